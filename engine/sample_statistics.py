"""What the logits of a split say beside its metrics: figures by class, confusions, ROC curves, confidence intervals.

Shapes: N samples, C classes, R resamples. `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, (N,) class
numbers otherwise. All values but counts are fractions in [0, 1], NaN where they are undefined.
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
"""Of the confidence intervals, with the quantile of the normal distribution that belongs to it."""
BOOTSTRAP_SEED = 0
COUNTS_AT_ONCE = 4_000_000
"""How many counts of samples in resamples are held in memory, 8 bytes each."""
CONFUSIONS = 50
ROC_POINTS = 200


def class_figures(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Precision, recall, F1 (each undefined where its denominator is 0) and support of each of the C classes."""
    counts = [outcome.sum(0) for outcome in outcomes(logits, labels)]
    columns = {"precision": precision(*counts), "recall": recall(*counts), "f1": f1(*counts)}
    columns["support"] = counts[2].long()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def confusions(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent pairs of a true and a wrongly predicted class, at most CONFUSIONS; single-label only.

    `share` is of the samples of the true class.
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
    """The ROC of class 1's probability (`fpr`, `tpr`, `threshold`), at most ROC_POINTS points from the highest
    threshold to the lowest; None where only one class occurs.

    A threshold is the least probability that counts as positive; the first is infinite. Points on a straight line
    between others are left out first; if there are still too many, evenly spaced ones stay.
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
    undefined: int = 0  # resamples that leave the figure undefined, and are left out


def draw_counts(units_N: np.ndarray, resamples: int) -> Iterator[Tensor]:
    """How often each sample is in each resample, (R, N) float32, in parts that fit into memory.

    Args:
        units_N: numbers from 0; samples of one number, such as the plots of one film, are drawn together.
    """
    rng, units = np.random.default_rng(BOOTSTRAP_SEED), int(units_N.max()) + 1
    at_once = max(1, COUNTS_AT_ONCE // len(units_N))
    for done in range(0, resamples, at_once):
        drawn_RU = rng.integers(units, size=(min(at_once, resamples - done), units))
        counts_RU = np.stack([np.bincount(which, minlength=units) for which in drawn_RU])
        yield torch.from_numpy(counts_RU[:, units_N].astype(np.float32))


def bootstrap(measure: Measure, split: SplitLogits, tables_K: Sequence[np.ndarray], resamples: int) -> Tensor:
    """The figures (K, R) of resamples over test samples at missing tables; the same samples for all, in every call."""
    parts = [
        torch.stack([measure.resampled(split.at(table), split.labels, counts_RN) for table in tables_K])
        for counts_RN in draw_counts(split.unit_numbers, resamples)
    ]
    return torch.cat(parts, 1)


def percentiles(value: float, values_R: Tensor) -> tuple[float, float]:
    """The ends of a figure's percentile interval; NaN where it, or each of its values in resamples, is undefined."""
    if math.isnan(value) or values_R.isnan().all():
        return math.nan, math.nan
    low, high = np.nanquantile(values_R.numpy(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def interval(value: float, values_R: Tensor, units: int) -> Interval:
    """The percentile interval of a figure, from its values in resamples.

    Where all resamples agree, as they do where no sample or every sample is right, they say nothing about samples not
    seen: there it is Wilson's interval of a share of `units`.
    """
    low, high = percentiles(value, values_R)
    if high - low < 1e-9 and 0 <= value <= 1:
        low, high = wilson(value, units)
    return Interval(low, high, int(values_R.isnan().sum()))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of `n` samples (Wilson 1927)."""
    z2 = NORMAL**2
    centre, half = share + z2 / (2 * n), NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))
