"""What SIGTERM and Ctrl-C do: a training run writes a checkpoint and then ends, everything else ends at once.

The exit status is 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C.
"""

import logging
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytorch_lightning as pl

from vilt.datamodules import STOP_SIGNALS

log = logging.getLogger("rep")


class Stopped(SystemExit):
    """A signal ended the run. `code` is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def stop_now(number: int, _: FrameType | None) -> None:
    """A signal handler: ends what runs. Unfinished files are removed on the way."""
    raise Stopped(number)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C raise Stopped; to be used in the main thread."""
    before = {number: signal.signal(number, stop_now) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Stopped):
            cause = cause.__context__
        if cause is not None:  # the error is from cleaning up what the signal stopped halfway
            raise cause from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_loaders() -> None:
    """Kills the loader processes, which hold no state; at exit torch would report their end as an error."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C, for a training to stop at a checkpoint; a second one stops at once."""

    def __init__(self) -> None:
        self._asked: int | None = None

    def listen(self) -> None:
        """From now on notes signals, in place of Lightning's handlers, which stop in the middle of an accumulation."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """From now on signals end the run at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, stop_now)

    def made(self, trainer: pl.Trainer) -> int | None:
        """The signal, if a process of the run got one; all processes have to ask at the same place."""
        asked = self._asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return (self._asked or signal.SIGTERM) if asked else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            stop_now(number, frame)
        self._asked = number
        log.info("%s: stopping after the next optimiser step; a second one stops at once", signal.Signals(number).name)
