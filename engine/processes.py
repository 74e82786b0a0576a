"""Runs on several processes: if one of them ends, all end, with one message and one exit status."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from common.errors import MachineError, NonFiniteLossError, OtherProcessError
from common.messages import first_line
from common.signals import Stopped
from engine.ending import OUR_FAULT, USER_ERROR

NOT_CONNECTED = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
SECONDS_TO_END, SECONDS_IF_LOST = 5, 60
"""How long to wait for another process to end after an error here, and after one that says its connection is lost: on a
busy machine, seconds pass between the two."""
LOST = re.compile("connection (was )?(closed|reset|refused)|broken pipe|failed to recv", re.IGNORECASE)
"""Matches torch's errors when the process at the other end is gone."""


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """Within the block, an error in this process ends the processes that it started, before they report it missing.

    Lightning kills the others as well, but prints the traceback of a lost connection for each. Processes started by
    torchrun or SLURM are left to these.

    Raises:
        OtherProcessError: another process of the run is gone.
        MachineError: the processes cannot connect, for example because the port is in use.
    """
    try:
        yield
    except Stopped:  # all stop together
        raise
    except BaseException as error:
        if trainer.global_rank and isinstance(error, NonFiniteLossError):  # all have it, and the first one reports it
            raise SystemExit(USER_ERROR) from error
        others: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        started = list(others)
        others.clear()  # Lightning watches this list, and would kill this process too
        may_be_lost = isinstance(error, RuntimeError) and not isinstance(error, NOT_CONNECTED)
        lost = may_be_lost and LOST.search(str(error)) is not None
        failed = _first_failed(started, SECONDS_IF_LOST if lost else SECONDS_TO_END) if may_be_lost else None
        for process in started:
            process.kill()
        if failed is not None:
            who, status = f"process {trainer.global_rank + 1 + started.index(failed)} of the run", failed.returncode
            if status > 0:
                raise OtherProcessError(f"{who} ended with status {status}: its message is above", status) from error
            killed = f"{who} was killed by {signal.Signals(-status).name}: perhaps out of memory"
            raise OtherProcessError(killed, USER_ERROR) from error
        if isinstance(error, NOT_CONNECTED):
            at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise MachineError(
                f"the processes of the run cannot connect at {at}: {first_line(error)}; set MASTER_PORT to a free "
                f"port, or leave it out on a single machine"
            ) from error
        if trainer.global_rank and lost:
            message = f"process {trainer.global_rank} lost the others of the run: their message is above"
            raise OtherProcessError(message, OUR_FAULT) from error
        raise


def _first_failed(processes: list["subprocess.Popen[bytes]"], seconds: int) -> "subprocess.Popen[bytes] | None":
    """The first of `processes` to have failed, or to fail within `seconds`; None if there is none."""
    until = time.monotonic() + seconds
    while processes and time.monotonic() < until:
        for process in processes:
            if process.poll():
                return process
        time.sleep(0.1)
    return None
