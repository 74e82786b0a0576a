"""Runs on several processes: what ends one of them ends all, with one message and one exit status."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from clip.ending import OUR_FAULT, USER_ERROR
from clip.interruption import Stopped
from common.errors import NonFiniteLossError

SECONDS_TO_END = 5
"""For a process whose connections are gone."""
LOST = re.compile("connection (was )?(closed|reset|refused)|broken pipe|failed to recv", re.IGNORECASE)
"""What torch's errors say when the process at the other end is gone."""


class OtherProcessError(Exception):
    """Another process of the run is gone; it has said why itself.

    Args:
        status: its exit status, or the negative number of the signal that killed it.
    """

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """Within the block, an error in this process ends those that it has started, before they miss it and complain.

    Where processes are started by torchrun or SLURM, that is left to them.

    Raises:
        OtherProcessError: the error was that one of them is gone.
    """
    try:
        yield
    except Stopped:  # all stop together
        raise
    except BaseException as error:
        if trainer.global_rank and isinstance(error, NonFiniteLossError):  # all have it, and the first says so
            raise SystemExit(USER_ERROR) from error
        others: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        started = list(enumerate(others, trainer.global_rank + 1))
        others.clear()  # Lightning watches these, and would kill this process too
        ended = _first_failed(started) if isinstance(error, RuntimeError) else None  # which lost connections raise
        for _, process in started:
            process.kill()
        if ended is not None:
            rank, status = ended
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise OtherProcessError(f"process {rank} of the run {how}", status) from error
        if trainer.global_rank and isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise OtherProcessError(f"process {trainer.global_rank} lost the others of the run", OUR_FAULT) from error
        raise


def _first_failed(started: list[tuple[int, "subprocess.Popen[bytes]"]]) -> tuple[int, int] | None:
    """Rank and status of a process that failed, or does within SECONDS_TO_END."""
    until = time.monotonic() + SECONDS_TO_END * bool(started)
    while True:
        for rank, process in started:
            if status := process.poll():
                return rank, status
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)
