"""Runs of a sweep: their folders, how far they got, and running them to their end in processes of their own.

Nothing heavy is imported here: a node of a cluster reads this module before it starts the run.
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
RUN = Path(__file__).resolve().parents[2] / "run.py"
PATIENCE_S, POLL_S = 60.0, 0.5
"""How long a run that is asked to stop may take, before it is killed; between looks at runs that are at work."""


def search_of(run: Path) -> Path | None:
    """The folder of the search that a run is a trial of."""
    return sweep if ((sweep := run.parent.parent) / JOURNAL).is_file() else None


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
        name: of the folder of its versions: exp_name and seed.
        folder: of the sweep.
        options: of `run.py`; with `resume_from=auto` it finds out by itself how far it got, and that it is alone.
        tested: whether it ends with the test; of a run that does not, only its exit status says that it is complete.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    tested: bool

    @property
    def log(self) -> Path:
        """What the run said, in all its attempts."""
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def result(self) -> Path | None:
        """The test results, once the run is complete."""
        return self.newest("test_results.json") if self.tested else None

    def newest(self, file: str) -> Path | None:
        """The file of this name in the newest version of the run that has one."""
        paths = (self.folder / self.name).glob(f"version_*/{file}")
        found = [path for path in paths if path.parent.name.removeprefix("version_").isdecimal()]
        return max(found, key=natural_key, default=None)

    def command(self) -> list[str]:
        """Begins the run, or resumes it where it was interrupted."""
        return run_command("with", *self.options, "resume_from=auto")


class Outcome(NamedTuple):
    """How a run ended: what went wrong, or None, and how long it took."""

    error: str | None
    seconds: float


Outcomes = Generator[tuple[Job, Outcome]]


class Progress:
    """A line for each run that ends, with its time and an estimate of what is left; remembers those that failed.

    Args:
        total: runs of the sweep in all.
        complete: runs that were complete before this one started.
    """

    def __init__(self, total: int, complete: int) -> None:
        self.total = total
        self.done = complete
        self.ended = 0
        self.failed: list[tuple[Job, str]] = []
        self._began = time.monotonic()

    def report(self, job: Job, outcome: Outcome, words: str) -> None:
        """Says that `job` ended, and with what; `words` are its result."""
        self.ended += 1
        if outcome.error is None:
            self.done += 1
        else:
            self.failed.append((job, outcome.error))
            words = f"failed: {outcome.error}"
        place = self.done + len(self.failed)
        per_run = (time.monotonic() - self._began) / self.ended
        rest = f"; about {duration((self.total - place) * per_run)} left" if place < self.total else ""
        log.info("[%d/%d] %s: %s (%s%s)", place, self.total, job.name, words, duration(outcome.seconds), rest)

    def end(self, failed: str) -> None:
        """Prints the runs that failed, each with its last error and its log; raises SweepError if there are any."""
        if self.failed:
            listed = "\n".join(f"  {job.name}: {error}\n    {job.log}" for job, error in self.failed)
            print(f"failed:\n{listed}\n")
            raise SweepError(f"{len(self.failed)} {failed}")


def run_command(*arguments: str) -> list[str]:
    """A command line of run.py, for the interpreter that runs now."""
    return [sys.executable, str(RUN), *arguments]


class Running:
    """A run of a sweep that was started, its output going to its log.

    Args:
        variables: of the environment, beside those of this process.
    """

    def __init__(self, job: Job, variables: Mapping[str, str]) -> None:
        self.job, self._began = job, time.monotonic()
        # Lightning starts the processes of a run itself, and is not to take a job of SLURM for having done so.
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
                start_new_session=True,  # Ctrl-C comes from here alone, once
            )

    def outcome(self) -> Outcome | None:
        """How it ended; None while it is at work."""
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
    """Runs so many jobs at once, one in each place, on this machine, its GPUs shared out among them; `gpus` of each."""
    waiting, running = deque(jobs), dict[int, Running]()
    try:
        while waiting or running:
            for place in range(parallel):
                if waiting and place not in running:
                    job = waiting.popleft()
                    if job.result is not None:  # complete meanwhile
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
    """What shows so many GPUs to the run in this place of those at work, the next ones to the next place, and so on.

    Nothing where runs have no GPU, or all of them.
    """
    if not wanted:
        return {}
    import torch  # here, so that a node of a cluster need not

    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    visible = visible or [str(number) for number in range(torch.cuda.device_count())]
    if wanted >= len(visible):
        return {}
    own = [visible[(place * wanted + number) % len(visible)] for number in range(wanted)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def stop(runs: Sequence[Running]) -> None:
    """Interrupts runs and their processes, and kills what is left."""
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
            with suppress(ProcessLookupError):  # none is left
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def error_in(said: str) -> str:
    """The line of a run's output that says what went wrong: our own, an exception's, or else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern in (r"error: (.*)", r"((?:\w+\.)*\w+(?:Error|Exception|Interrupt)\b.*)"):
        found = [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return lines[-1] if lines else "it said nothing"
