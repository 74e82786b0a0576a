"""What the logits of a split tell beside its metrics: figures by class, confusions, ROC curves, confidence intervals.

Shapes: N samples, C classes, R resamples, G groups of equal scores. `logits` (N, C); `labels` (N, C) of 0/1 for
multi-label tasks, (N,) class numbers otherwise. All values but counts are fractions in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip.metrics import (
    auroc_and_accuracy,
    class_accuracy,
    decisions,
    f1,
    macro_f1_and_accuracy,
    multilabel_f1,
    outcomes,
)
from clip.tasks import Task

LEVEL = 0.95
BOOTSTRAP_SEED = 0
WEIGHTS_AT_ONCE = 4_000_000
"""How many weights of resamples are held in memory, 8 bytes each."""
CONFUSIONS = 50
ROC_POINTS = 200


@dataclass(frozen=True)
class ClassFigures:
    """Of one class; 0 where a denominator is 0."""

    precision: float
    recall: float
    f1: float
    support: int
    """Samples of the class."""


@dataclass(frozen=True)
class Confusion:
    """Samples of class `true` that were taken for class `predicted`."""

    true: int
    predicted: int
    count: int
    share: float
    """Of the samples of class `true`."""


@dataclass(frozen=True)
class Roc:
    """Points of a receiver operating characteristic, from the highest threshold to the lowest."""

    fpr: list[float]
    tpr: list[float]
    threshold: list[float]
    """Least probability that counts as positive; the first is infinite."""


def class_figures(logits: Tensor, labels: Tensor) -> list[ClassFigures]:
    """Precision, recall, F1 and support of each of the C classes."""
    tp, fp, fn = (outcome.sum(0) for outcome in outcomes(*decisions(logits, labels)))
    precision, recall = tp / (tp + fp).clamp(min=1), tp / (tp + fn).clamp(min=1)
    columns = (precision.tolist(), recall.tolist(), f1(tp, fp, fn).tolist(), (tp + fn).long().tolist())
    return [ClassFigures(*figures) for figures in zip(*columns, strict=True)]


def confusions(logits: Tensor, labels: Tensor) -> list[Confusion]:
    """The most frequent pairs of a true and a wrongly predicted class, at most CONFUSIONS; single-label only."""
    n_classes = logits.shape[1]
    pair_N = labels * n_classes + logits.argmax(-1)
    counts_CC = torch.bincount(pair_N, minlength=n_classes**2).reshape(n_classes, n_classes)
    support_C = counts_CC.sum(1)
    wrong = counts_CC.clone().fill_diagonal_(0).flatten()
    most = torch.argsort(wrong, descending=True, stable=True)[:CONFUSIONS]
    return [
        Confusion(
            pair // n_classes, pair % n_classes, int(wrong[pair]), float(wrong[pair] / support_C[pair // n_classes])
        )
        for pair in most.tolist()
        if wrong[pair]
    ]


def roc(logits: Tensor, labels: Tensor) -> Roc | None:
    """The ROC of class 1's probability, at most ROC_POINTS points; None where only one class occurs.

    Points on a straight line between others are left out first; if there are still too many, evenly spaced ones stay.
    """
    scores, positive_N = logits.double().softmax(-1)[:, 1], labels.double()
    positives, negatives = float(positive_N.sum()), float((1 - positive_N).sum())
    if not positives or not negatives:
        return None
    threshold_G, group_N = torch.unique(-scores, return_inverse=True)  # ascending, so highest scores first
    start = torch.zeros(1, dtype=torch.double)
    tp = torch.cat([start, _by_group(positive_N[None], group_N, len(threshold_G))[0].cumsum(0)])
    fp = torch.cat([start, _by_group(1 - positive_N[None], group_N, len(threshold_G))[0].cumsum(0)])
    turn = tp.diff()[:-1] * fp.diff()[1:] != tp.diff()[1:] * fp.diff()[:-1]
    kept = torch.nonzero(torch.cat([torch.tensor([True]), turn, torch.tensor([True])])).flatten()
    if len(kept) > ROC_POINTS:
        kept = kept[torch.linspace(0, len(kept) - 1, ROC_POINTS).round().long()]
    thresholds = torch.cat([start + torch.inf, -threshold_G])
    return Roc((fp[kept] / negatives).tolist(), (tp[kept] / positives).tolist(), thresholds[kept].tolist())


def confidence(
    task: Task, logits_KNC: Sequence[Tensor], labels: Tensor, resamples: int
) -> list[dict[str, list[float]]]:
    """Percentile bootstrap over samples: [low, high] of each metric of `task`, for each of K sets of logits.

    The samples drawn are the same for all sets, and in every call with as many samples and resamples.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    metrics_of = [RESAMPLED[task.metrics](logits, labels) for logits in logits_KNC]
    found: list[list[dict[str, Tensor]]] = [[] for _ in metrics_of]
    at_once = max(1, WEIGHTS_AT_ONCE // len(labels))
    for done in range(0, resamples, at_once):
        weights_RN = _draw_weights(rng, min(at_once, resamples - done), len(labels))
        for of_set, metrics in zip(found, metrics_of, strict=True):
            of_set.append(metrics(weights_RN))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    return [
        {metric: torch.cat([part[metric] for part in of_set]).quantile(tails).tolist() for metric in of_set[0]}
        for of_set in found
    ]


def _draw_weights(rng: np.random.Generator, resamples: int, samples: int) -> Tensor:
    """How often each sample is in each resample, float64 (R, N)."""
    drawn = rng.integers(samples, size=(resamples, samples))
    drawn += np.arange(resamples)[:, None] * samples
    counts = np.bincount(drawn.ravel(), minlength=resamples * samples)
    return torch.from_numpy(counts.reshape(resamples, samples)).double()


Resampled = Callable[[Tensor], dict[str, Tensor]]
"""Weights (R, N) of the samples to metrics (R,). With weights of 1 they are those of clip.metrics."""


def resampled_multilabel_f1(logits: Tensor, labels: Tensor) -> Resampled:
    """`multilabel_f1` of weighted samples."""
    tp_NC, fp_NC, fn_NC = outcomes(*decisions(logits, labels))
    f1_N = f1(tp_NC.sum(1), fp_NC.sum(1), fn_NC.sum(1))

    def metrics(weights_RN: Tensor) -> dict[str, Tensor]:
        tp_RC, fp_RC, fn_RC = weights_RN @ tp_NC, weights_RN @ fp_NC, weights_RN @ fn_NC
        f1_RC, support_RC = f1(tp_RC, fp_RC, fn_RC), tp_RC + fn_RC
        occurs_RC = tp_RC + fp_RC + fn_RC > 0
        return {
            "f1_macro": f1_RC.sum(1) / occurs_RC.sum(1).clamp(min=1),
            "f1_micro": f1(tp_RC.sum(1), fp_RC.sum(1), fn_RC.sum(1)),
            "f1_samples": weights_RN @ f1_N / weights_RN.sum(1),
            "f1_weighted": (f1_RC * support_RC).sum(1) / support_RC.sum(1).clamp(min=1),
        }

    return metrics


def resampled_accuracy(logits: Tensor, labels: Tensor) -> Resampled:
    """`class_accuracy` of weighted samples."""
    correct_N = (logits.argmax(-1) == labels).double()
    return lambda weights_RN: {"accuracy": weights_RN @ correct_N / weights_RN.sum(1)}


def resampled_macro_f1_and_accuracy(logits: Tensor, labels: Tensor) -> Resampled:
    """`macro_f1_and_accuracy` of weighted samples."""
    all_f1, accuracy = resampled_multilabel_f1(logits, labels), resampled_accuracy(logits, labels)
    return lambda weights_RN: {"f1_macro": all_f1(weights_RN)["f1_macro"], **accuracy(weights_RN)}


def resampled_auroc_and_accuracy(logits: Tensor, labels: Tensor) -> Resampled:
    """`auroc_and_accuracy` of weighted samples."""
    accuracy = resampled_accuracy(logits, labels)
    positive_N = labels.double()
    score_G, group_N = torch.unique(logits.double().softmax(-1)[:, 1], return_inverse=True)

    def metrics(weights_RN: Tensor) -> dict[str, Tensor]:
        positive_RG = _by_group(weights_RN * positive_N, group_N, len(score_G))
        negative_RG = _by_group(weights_RN * (1 - positive_N), group_N, len(score_G))
        below_RG = negative_RG.cumsum(1) - negative_RG
        pairs_R = positive_RG.sum(1) * negative_RG.sum(1)
        won_R = (positive_RG * (below_RG + negative_RG / 2)).sum(1)  # a tie is half won
        return {"auroc": won_R / pairs_R.clamp(min=1), **accuracy(weights_RN)}

    return metrics


RESAMPLED: dict[Callable[[Tensor, Tensor], dict[str, float]], Callable[[Tensor, Tensor], Resampled]] = {
    multilabel_f1: resampled_multilabel_f1,
    class_accuracy: resampled_accuracy,
    macro_f1_and_accuracy: resampled_macro_f1_and_accuracy,
    auroc_and_accuracy: resampled_auroc_and_accuracy,
}
"""The weighted form of the metrics of each task."""


def _by_group(values_RN: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """Sums (R, G) of the values of each group."""
    return values_RN.new_zeros(len(values_RN), groups).index_add_(1, group_N, values_RN)
