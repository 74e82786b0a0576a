"""Where the runs of a sweep are run: here, or through submitit on SLURM (or all at once here)."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from common.errors import ConfigError
from common.messages import first_line
from common.text import counted
from config import Options
from runs.sweep.jobs import POLL_S, RUN, Job, Outcome, Outcomes, error_in, run_here

log = logging.getLogger("rep")

Launcher = Callable[[Sequence[Job]], Outcomes]
"""Runs jobs and yields each with its outcome as it ends. Left early, it stops what it runs."""

CLUSTERS = {"slurm": "slurm", "submitit_local": "local"}
"""submitit's word for a launcher."""
TIMEOUT_MIN = 24 * 60
"""Of a cluster job where `sweep_slurm` has no timeout_min; submitit's own are 2 and 5 minutes."""


def make_launcher(name: str, options: Options, folder: Path) -> Launcher:
    """The launcher of this name; submitit's keep their files in `folder`.

    Raises:
        ConfigError: there is no SLURM here, or submitit does not know a parameter.
    """
    if name == "local":
        return partial(run_here, parallel=options.sweep_parallel, gpus=options.num_gpus)
    executor = _executor(name, options.sweep_slurm, folder)
    # A node finds this package wherever the sweep was started from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RUN.parent), os.environ.get("PYTHONPATH")]))
    return lambda jobs: _run_submitted(executor, jobs)


@dataclass(frozen=True)
class Submission:
    """What a cluster job does. Cut off by the end of its time, it is queued again and resumes the run."""

    job: Job

    def __call__(self) -> Outcome:
        [(_, outcome)] = run_here([self.job])
        return outcome

    def checkpoint(self) -> DelayedSubmission:
        """Asked for by submitit shortly before the time ends."""
        return DelayedSubmission(self)


def _executor(name: str, parameters: dict[str, Any], folder: Path) -> submitit.AutoExecutor:
    for own in ("nodes", "tasks_per_node"):
        if parameters.get(own, 1) != 1:
            raise ConfigError(f"sweep_slurm.{own}: expected 1, since a run starts its processes itself (num_gpus)")
    general = submitit.AutoExecutor._typed_parameters()
    named = {
        key if key in general or key.startswith("slurm_") else f"slurm_{key}": parameters[key] for key in parameters
    }
    try:
        executor = submitit.AutoExecutor(folder, cluster=CLUSTERS[name])
    except RuntimeError as error:
        raise ConfigError(f"sweep_launcher={name}: {first_line(error)}") from error
    try:
        executor.update_parameters(**{"timeout_min": TIMEOUT_MIN, "name": folder.parent.name, **named})
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"sweep_slurm: {first_line(error)}") from error
    return executor


def _run_submitted(executor: submitit.AutoExecutor, jobs: Sequence[Job]) -> Outcomes:
    with executor.batch():
        handles = [executor.submit(Submission(job)) for job in jobs]
    pending = dict(zip(handles, jobs, strict=True))
    try:
        for handle, job in pending.items():
            log.info("%s is job %s: %s", job.name, handle.job_id, job.log)
        while pending:
            for handle in [handle for handle in pending if handle.done()]:
                yield pending.pop(handle), _outcome(handle)
            time.sleep(POLL_S)
    finally:
        if pending:
            log.info("cancelled: %s", counted(len(pending), "job"))
        for handle in pending:
            handle.cancel(check=False)


def _outcome(handle: submitit.Job[Outcome]) -> Outcome:
    try:
        return handle.result()
    except UncompletedJobError as error:
        return Outcome(first_line(error), 0.0)
    except Exception as error:  # submitit puts whatever the job raised into its text
        return Outcome(error_in(str(error)), 0.0)
