"""What the logits of a split say beside its metrics: figures by class, confusions, ROC curves, confidence intervals.

Shapes: N samples, C classes, R resamples. `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, (N,) class
numbers otherwise. All values but counts are fractions in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from engine.metrics import f1, outcomes, roc_counts
from engine.tasks import Task

LEVEL = 0.95
BOOTSTRAP_SEED = 0
COUNTS_AT_ONCE = 4_000_000
"""How many counts of samples in resamples are held in memory, 8 bytes each."""
CONFUSIONS = 50
ROC_POINTS = 200


def class_figures(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Precision, recall, F1 (0 where a denominator is 0) and support of each of the C classes."""
    tp, fp, fn = (outcome.sum(0) for outcome in outcomes(logits, labels))
    columns = {
        "precision": tp / (tp + fp).clamp(min=1),
        "recall": tp / (tp + fn).clamp(min=1),
        "f1": f1(tp, fp, fn),
        "support": (tp + fn).long(),
    }
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


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


def confidence(
    task: Task, logits_KNC: Sequence[Tensor], labels: Tensor, resamples: int
) -> list[dict[str, list[float]]]:
    """Percentile bootstrap over samples: [low, high] of each metric of `task`, for each of K sets of logits.

    The samples drawn are the same for all sets, and in every call with as many samples and resamples.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    found: list[list[dict[str, float]]] = [[] for _ in logits_KNC]
    at_once = max(1, COUNTS_AT_ONCE // len(labels))
    for done in range(0, resamples, at_once):
        counts_RN = _draw_counts(rng, min(at_once, resamples - done), len(labels))
        for of_set, logits in zip(found, logits_KNC, strict=True):
            of_set.extend(task.metrics.resampled(logits, labels, counts_RN))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return [
        {metric: np.quantile([figures[metric] for figures in of_set], tails).tolist() for metric in of_set[0]}
        for of_set in found
    ]


def _draw_counts(rng: np.random.Generator, resamples: int, samples: int) -> Tensor:
    """How often each sample is in each resample, float64 (R, N)."""
    drawn = rng.integers(samples, size=(resamples, samples))
    return torch.from_numpy(np.stack([np.bincount(which, minlength=samples) for which in drawn])).double()
