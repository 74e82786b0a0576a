"""Further statistics of a split's logits: per-class figures, confusions, ROC curves, confidence intervals.

Shapes: N samples, C classes, R resamples. `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, otherwise
class indices (N,). All values except counts are fractions in [0, 1], NaN where undefined.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from engine.metrics import Measure, f1, outcomes, precision, recall, roc_counts
from engine.stored_logits import SplitLogits

LEVEL, NORMAL = 0.95, 1.959964
"""Level of the confidence intervals, with its two-sided quantile of the normal distribution."""
BOOTSTRAP_SEED = 0
COUNTS_AT_ONCE = 4_000_000
"""Most counts of samples in resamples held in memory at once, 8 bytes each."""
CONFUSIONS = 50
ROC_POINTS = 200


def class_figures(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Precision, recall, F1 (each undefined if its denominator is 0) and support of each of the C classes."""
    counts = [outcome.sum(0) for outcome in outcomes(logits, labels)]
    columns = {"precision": precision(*counts), "recall": recall(*counts), "f1": f1(*counts)}
    columns["support"] = counts[2].long()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def confusions(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The at most CONFUSIONS most frequent pairs of a true and a wrongly predicted class; single-label only.

    `share` is relative to the samples of the true class.
    """
    n_classes = logits.shape[1]
    counts_CC = multiclass_confusion_matrix(logits.argmax(-1), labels, n_classes)
    support_C = counts_CC.sum(1).tolist()
    wrong = counts_CC.fill_diagonal_(0).flatten()
    most = torch.argsort(wrong, descending=True, stable=True)[:CONFUSIONS]
    found = []
    for pair, count in zip(most.tolist(), wrong[most].tolist(), strict=True):
        true, predicted = divmod(pair, n_classes)
        if count:
            names = {"true": class_names[true], "predicted": class_names[predicted]}
            found.append({**names, "count": count, "share": count / support_C[true]})
    return found


def roc(logits: Tensor, labels: Tensor) -> dict[str, list[float]] | None:
    """The ROC curve of class 1's probability as `fpr`, `tpr` and `threshold`; None if only one class occurs.

    There are at most ROC_POINTS points, from the highest threshold to the lowest. A threshold is the lowest probability
    that counts as positive; the first is infinite. Points on a straight line between others are dropped first; if there
    are still too many, evenly spaced ones are kept.
    """
    (fp,), (tp,), thresholds = roc_counts(logits, labels, torch.ones(1, len(labels), dtype=torch.float64))
    if not fp[-1] or not tp[-1]:
        return None
    turn = tp.diff()[:-1] * fp.diff()[1:] != tp.diff()[1:] * fp.diff()[:-1]
    kept = torch.nonzero(torch.cat([torch.tensor([True]), turn, torch.tensor([True])])).flatten()
    if len(kept) > ROC_POINTS:
        kept = kept[torch.linspace(0, len(kept) - 1, ROC_POINTS).round().long()]
    curve = {"fpr": fp / fp[-1], "tpr": tp / tp[-1], "threshold": thresholds}
    return {name: values[kept].tolist() for name, values in curve.items()}


class Interval(NamedTuple):
    """A confidence interval of level LEVEL over test samples."""

    low: float
    high: float
    undefined: int = 0  # resamples in which the figure is undefined; they are left out


def draw_counts(units_N: np.ndarray, resamples: int) -> Iterator[Tensor]:
    """How often each sample occurs in each resample, (R, N) float32, in parts that fit into memory.

    Args:
        units_N: unit of each sample, counted from 0; the samples of one unit, such as the plots of a film, are drawn
            together.
    """
    rng, units = np.random.default_rng(BOOTSTRAP_SEED), int(units_N.max()) + 1
    at_once = max(1, COUNTS_AT_ONCE // len(units_N))
    for done in range(0, resamples, at_once):
        drawn_RU = rng.integers(units, size=(min(at_once, resamples - done), units))
        counts_RU = np.stack([np.bincount(drawn_U, minlength=units) for drawn_U in drawn_RU])
        yield torch.from_numpy(counts_RU[:, units_N].astype(np.float32))


def bootstrap(measure: Measure, split: SplitLogits, tables_K: Sequence[np.ndarray], resamples: int) -> Tensor:
    """The figure (K, R) at each missing table in each resample of test samples; every call draws the same resamples."""
    parts = [
        torch.stack([measure.resampled(split.at(table), split.labels, counts_RN) for table in tables_K])
        for counts_RN in draw_counts(split.unit_of_sample, resamples)
    ]
    return torch.cat(parts, 1)


def percentiles(value: float, values_R: Tensor) -> tuple[float, float]:
    """The ends of a figure's percentile interval; NaN if the figure, or its value in every resample, is undefined."""
    if math.isnan(value) or values_R.isnan().all():
        return math.nan, math.nan
    low, high = np.nanquantile(values_R.numpy(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def interval(value: float, values_R: Tensor, units: int) -> Interval:
    """The percentile interval of a figure, from its values in resamples.

    If all resamples agree, as they do when no sample or every sample is right, they say nothing about unseen samples;
    the result is then Wilson's interval of a share of `units`.
    """
    low, high = percentiles(value, values_R)
    if high - low < 1e-9 and 0 <= value <= 1:
        low, high = wilson(value, units)
    return Interval(low, high, int(values_R.isnan().sum()))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `n` samples (Wilson 1927)."""
    z2 = NORMAL**2
    centre, half = share + z2 / (2 * n), NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))
