"""Launchers for the runs of a sweep: on this machine, or through submitit on SLURM (or here, all at once)."""

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
"""Runs jobs and yields each with its outcome as it ends. If closed early, it stops the running ones."""

CLUSTERS = {"slurm": "slurm", "submitit_local": "local"}
"""submitit's names of our launchers."""
TIMEOUT_MIN = 24 * 60
"""Time limit of a cluster job in minutes, if `sweep_slurm` has no timeout_min; submitit's defaults are 2 and 5."""


def make_launcher(name: str, options: Options, folder: Path) -> Launcher:
    """Creates the launcher of this name; submitit keeps its files in `folder`.

    Raises:
        ConfigError: SLURM is not available here, or submitit does not know a parameter.
    """
    if name == "local":
        return partial(run_here, parallel=options.sweep_parallel, gpus=options.num_gpus)
    executor = _executor(name, options.sweep_slurm, folder)
    # Lets nodes find this package, wherever the sweep was started from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RUN.parent), os.environ.get("PYTHONPATH")]))
    return lambda jobs: _run_submitted(executor, jobs)


@dataclass(frozen=True)
class Submission:
    """The task of a cluster job. At its time limit, submitit requeues it, and it resumes the run."""

    job: Job

    def __call__(self) -> Outcome:
        [(_, outcome)] = run_here([self.job])
        return outcome

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit shortly before the time limit."""
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
    except Exception as error:  # its text contains whatever the job raised
        return Outcome(error_in(str(error)), 0.0)
