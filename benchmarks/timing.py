"""Timing two sides beside each other, so that what else the machine does meets both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Seconds of each side, pair by pair."""

    baseline: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """Median of baseline time / our time."""
        return statistics.median(self._ratios())

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest ratio of a pair."""
        return min(self._ratios()), max(self._ratios())

    def _ratios(self) -> list[float]:
        return [theirs / mine for theirs, mine in zip(self.baseline, self.ours, strict=True)]


def compare(baseline: Work, ours: Work, device: torch.device, pairs: int = 5) -> Comparison:
    """Runs both once to warm up, then in turn."""
    seconds(baseline, device)
    seconds(ours, device)
    theirs, mine = [], []
    for _ in range(pairs):
        theirs.append(seconds(baseline, device))
        mine.append(seconds(ours, device))
    return Comparison(theirs, mine)


def seconds(work: Work, device: torch.device) -> float:
    """How long `work` takes, the device's part of it included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
