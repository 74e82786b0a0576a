"""What SIGTERM and Ctrl-C do in a training: it stops after an optimiser step, with a checkpoint."""

import logging
import signal
from types import FrameType

import pytorch_lightning as pl

from common.signals import STOP_SIGNALS, stop_now

log = logging.getLogger("rep")


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
