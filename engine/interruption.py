"""What SIGTERM and Ctrl-C do in a training: it stops after an optimiser step, with a checkpoint."""

import logging
import signal
from types import FrameType

from common.signals import STOP_SIGNALS, stop_now

log = logging.getLogger("rep")


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C, for a training to stop at a checkpoint; a second one stops at once."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def listen(self) -> None:
        """From now on notes signals, in place of Lightning's handlers, which stop in the middle of an accumulation."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """From now on signals end the run at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, stop_now)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            stop_now(number, frame)
        self.asked = number
        log.info("%s: stopping after the next optimiser step; a second one stops at once", signal.Signals(number).name)
