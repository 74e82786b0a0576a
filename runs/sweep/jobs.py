"""The runs of a sweep: their folders, their progress, and running them in processes of their own.

Nothing heavy is imported here, since a cluster node imports this module before it starts the run.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import SweepError
from common.text import duration, natural_key

log = logging.getLogger("rep")

JOURNAL = "optuna.journal"
"""Optuna's record of a search, in the folder of its sweep."""
BUSY = "resume_from=auto: another process runs this training"
"""Start of a run's error if its training is in progress elsewhere, for instance since a killed sweep started it."""
RUN = Path(__file__).resolve().parents[2] / "run.py"
PATIENCE_S, POLL_S = 60.0, 0.5
"""Seconds that a run gets to stop before it is killed; seconds between checks on running jobs."""


def search_of(run: Path) -> Path | None:
    """The folder of the search that a run is a trial of; None if it is not a trial."""
    return sweep if ((sweep := run.parent.parent) / JOURNAL).is_file() else None


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
        name: name of the folder with its versions: exp_name and seed.
        folder: the sweep's folder.
        options: options of `run.py`; `resume_from=auto` is added, so the run resumes itself and locks its training.
        tested: whether the run ends with the test; otherwise, only its exit status shows that it is complete.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    tested: bool

    @property
    def log(self) -> Path:
        """The run's output, from all attempts."""
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def result(self) -> Path | None:
        """The file of test results; None until the run is complete, and for runs without a test."""
        return self.newest("test_results.json") if self.tested else None

    def newest(self, file: str) -> Path | None:
        """The file of this name in the newest version of the run that has it."""
        paths = (self.folder / self.name).glob(f"version_*/{file}")
        found = [path for path in paths if path.parent.name.removeprefix("version_").isdecimal()]
        return max(found, key=natural_key, default=None)

    def command(self) -> list[str]:
        """The command that starts the run, or resumes it after an interruption."""
        return command_line_of("with", *self.options, "resume_from=auto")


class Outcome(NamedTuple):
    """How a run ended: the error, if any, and the time it took."""

    error: str | None
    seconds: float


Outcomes = Generator[tuple[Job, Outcome]]


class Progress:
    """Logs a line for each run that ends, with its time and an estimate of the time left.

    Collects failed runs, and those that another process is running.

    Args:
        total: total number of runs in the sweep.
        complete: number of runs that were complete at the start.
    """

    def __init__(self, total: int, complete: int) -> None:
        self.total = total
        self.done = complete
        self.ended = 0
        self.failed: list[tuple[Job, str]] = []
        self.elsewhere: list[tuple[Job, str]] = []
        self._began = time.monotonic()

    def report(self, job: Job, outcome: Outcome, words: str) -> None:
        """Logs that `job` has ended, with its error or else its result, `words`."""
        self.ended += 1
        if outcome.error is None:
            self.done += 1
        elif outcome.error.startswith(BUSY):
            holder = re.search(r"process \d+ on .*(?=\)$)", outcome.error)
            self.elsewhere.append((job, holder[0] if holder else "another process"))
            words = f"running elsewhere: {self.elsewhere[-1][1]}"
        else:
            self.failed.append((job, outcome.error))
            words = f"failed: {outcome.error}"
        place = self.done + len(self.failed) + len(self.elsewhere)
        per_run = (time.monotonic() - self._began) / self.ended
        rest = f"; about {duration((self.total - place) * per_run)} left" if place < self.total else ""
        log.info("[%d/%d] %s: %s (%s%s)", place, self.total, job.name, words, duration(outcome.seconds), rest)

    def end(self, asked: str, again: str) -> None:
        """Prints the runs still running elsewhere, and the failed ones with their last error and log.

        Args:
            asked: the runs in words.
            again: what the same command will do about failed ones.

        Raises:
            SweepError: runs failed, or other processes are still running some.
        """
        elsewhere = [f"  {job.name}: {holder}\n" for job, holder in self.elsewhere if job.result is None]
        if elsewhere:
            print(f"running elsewhere:\n{''.join(elsewhere)}")
        if self.failed:
            listed = "\n".join(f"  {job.name}: {error}\n    {job.log}" for job, error in self.failed)
            print(f"failed:\n{listed}\n")
            raise SweepError(f"{len(self.failed)} of {asked} failed; the same command {again}")
        if elsewhere:
            raise SweepError(f"{len(elsewhere)} of {asked} running elsewhere; the same command reads their results")


def command_line_of(*arguments: str) -> list[str]:
    """A command line of run.py, with the current Python interpreter."""
    return [sys.executable, str(RUN), *arguments]


class Running:
    """A started run of a sweep, which writes its output to its log.

    Args:
        variables: environment variables to set in addition to those of this process.
    """

    def __init__(self, job: Job, variables: Mapping[str, str]) -> None:
        self.job, self._began = job, time.monotonic()
        # Lightning starts a run's processes itself; with this variable it would expect SLURM to have started them.
        own = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS"}
        command = job.command()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**own, "PYTHONUNBUFFERED": "1", **variables},
                start_new_session=True,  # Ctrl-C reaches the run only once, through `stop`
            )

    def outcome(self) -> Outcome | None:
        """How the run ended; None while it is running."""
        status = self.process.poll()
        if status is None:
            return None
        job, error = self.job, None
        if status < 0:
            error = f"killed by {signal.Signals(-status).name}"
        elif status:
            error = error_in(job.log.read_bytes()[self._start :].decode("utf-8", "replace"))
        elif job.tested and job.result is None:
            error = "it ended without test_results.json"
        return Outcome(error, time.monotonic() - self._began)


def run_here(jobs: Sequence[Job], parallel: int = 1, gpus: int = 0) -> Outcomes:
    """Runs jobs on this machine, `parallel` at a time, each with `gpus` of its GPUs."""
    waiting, running = deque(jobs), dict[int, Running]()
    try:
        while waiting or running:
            for place in range(parallel):
                if waiting and place not in running:
                    job = waiting.popleft()
                    if job.result is not None:  # completed in the meantime
                        yield job, Outcome(None, 0.0)
                        continue
                    log.info("%s: %s", job.name, job.log)
                    running[place] = Running(job, gpus_of(place, gpus))
            ended = [(place, found) for place, run in running.items() if (found := run.outcome()) is not None]
            for place, outcome in ended:
                yield running.pop(place).job, outcome
            if running and not ended:
                with suppress(subprocess.TimeoutExpired):
                    next(iter(running.values())).process.wait(POLL_S)
    finally:
        stop([*running.values()])


def gpus_of(place: int, wanted: int) -> dict[str, str]:
    """Environment variables that give the run at index `place` its `wanted` GPUs; the next place gets the next ones.

    Empty if runs use no GPU, or all of them.
    """
    if not wanted:
        return {}
    import torch  # a cluster node does not need it

    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    visible = visible or [str(index) for index in range(torch.cuda.device_count())]
    if wanted >= len(visible):
        return {}
    own = [visible[(place * wanted + index) % len(visible)] for index in range(wanted)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def stop(runs: Sequence[Running]) -> None:
    """Interrupts runs and their processes, and kills those that do not stop in time."""
    until = time.monotonic() + PATIENCE_S
    try:
        for run in runs:
            with suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGINT)
        for run in runs:
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0.0, until - time.monotonic()))
    finally:
        for run in runs:
            with suppress(ProcessLookupError):  # no process is left
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def error_in(said: str) -> str:
    """The line of a run's output that names the error: our own message, an exception, or else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern in (r"error: (.*)", r"((?:\w+\.)*\w+(?:Error|Exception|Interrupt)\b.*)"):
        found = [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return lines[-1] if lines else "it ended without output"
