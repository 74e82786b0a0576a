"""Significance of differences between two methods: a paired bootstrap interval and a paired permutation test.

Shapes: S pairs of trained models (one of each method), K missing tables, N samples, R resamples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.metrics import Measure
from engine.sample_statistics import COUNTS_AT_ONCE, percentiles, wilson
from engine.stored_logits import SplitLogits

SEED = 0
TIE = 1e-7
"""Differences closer than this count as equal: summing in another order rounds differently."""
ENOUGH = 200
"""Number of permutations at least as far from 0 as the difference, after which p is known to about 7 %."""
Pair = tuple[SplitLogits, SplitLogits]


class Difference(NamedTuple):
    """One method's figure minus another's, averaged over pairs of models and missing tables."""

    value: float
    low: float  # ends of the bootstrap interval of level LEVEL
    high: float
    p: float  # two-sided p-value of the permutation test, not corrected; NaN if the difference is undefined


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for multiple testing (Holm 1979); NaN values stay NaN and are not counted."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def difference_interval(values_SR: Tensor, value: float, units: int) -> tuple[float, float]:
    """The percentile interval of the mean difference over S pairs of models.

    Test samples are resampled, and so are the pairs, if there are several: a difference that other training seeds do
    not show gets a wide interval.

    Args:
        values_SR: difference of each pair on the same R resamples of test samples.
        units: number of resampled units. If all resamples agree, they say nothing about unseen samples; the interval is
            then widened to what a difference seen in none of `units` allows.
    """
    pairs, resamples = values_SR.shape
    drawn_SR = np.random.default_rng(SEED).integers(pairs, size=(pairs, resamples))
    values_R = values_SR.gather(0, torch.from_numpy(drawn_SR)).nanmean(0)
    low, high = percentiles(value, values_R)
    margin = wilson(0, units)[1] if high - low < TIE else 0.0
    return low - margin, high + margin


def permutation_p(
    measure: Measure, pairs: Sequence[Pair], tables_K: Sequence[np.ndarray], value: float, permutations: int
) -> float:
    """The two-sided p-value of a mean difference `value` (Fisher's permutation test, paired).

    If the methods do not differ, a sample's outcomes might as well be the other method's: for each sample, with all its
    texts, in all pairs and tables, the two methods are swapped or not. All permutations are tried if there are at most
    `permutations`; otherwise that many are drawn at random, or fewer if ENOUGH of them are as far from 0 as `value`,
    since p is then known well enough (Besag and Clifford 1991).
    """
    if math.isnan(value):
        return math.nan
    units_N = torch.from_numpy(pairs[0][0].unit_of_sample)
    units, labels = int(units_N.max()) + 1, pairs[0][0].labels
    swappers = [
        measure.swapper(one.at(table), other.at(table), labels, units_N) for one, other in pairs for table in tables_K
    ]
    as_far, tried, exhaustive = 0, 0, 2**units <= permutations
    for swaps_RU in _swaps(units, permutations):
        sides = [swapped(swaps_RU) for swapped in swappers]
        mean_R = torch.stack([first - second for first, second in sides]).mean(0)
        as_far += int((~(mean_R.abs() < abs(value) - TIE)).sum())
        tried += len(mean_R)
        if as_far >= ENOUGH and not exhaustive:
            break
    return as_far / tried if exhaustive else (as_far + 1) / (tried + 1)


def _swaps(units: int, permutations: int) -> Iterator[Tensor]:
    """Swaps (R, U), float32, 1 where a unit changes sides, in parts that fit into memory: all swaps, or random ones."""
    rng, at_once = np.random.default_rng(SEED), max(1, COUNTS_AT_ONCE // units)
    for done in range(0, total := min(2**units, permutations), at_once):
        size = min(at_once, total - done)
        if total == 2**units:
            swaps_RU = (np.arange(done, done + size)[:, None] >> np.arange(units) & 1).astype(np.uint8)
        else:
            drawn = rng.integers(256, size=(size, -(-units // 8)), dtype=np.uint8)
            swaps_RU = np.unpackbits(drawn, axis=1, count=units)
        yield torch.from_numpy(swaps_RU).float()
