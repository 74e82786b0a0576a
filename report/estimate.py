"""A mean with its spread."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and the sample standard deviation; None where there is one value only."""

    mean: float
    std: float | None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and sample standard deviation (divisor N-1); None where there are no values."""
    if not values:
        return None
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
