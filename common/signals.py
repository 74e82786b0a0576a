"""SIGTERM and Ctrl-C end a command at once; a training run writes a checkpoint first (engine/callbacks.py).

The exit status is 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a run to stop."""


class Stopped(SystemExit):
    """A signal ended the run. `code` is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def stop_now(number: int, _: FrameType | None) -> None:
    """Signal handler that ends the command. Unfinished files are removed on the way out."""
    raise Stopped(number)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C raise Stopped within the block; for use in the main thread."""
    before = {number: signal.signal(number, stop_now) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Stopped):
            cause = cause.__context__
        if cause is not None:  # the error comes from cleaning up after the signal
            raise cause from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_loaders() -> None:
    """Kills the loader workers, which hold no state; at exit torch would report their end as an error."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)
