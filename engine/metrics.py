"""The published metrics (docs/method.md section 4) and others, computed on the logits of a whole split.

Shapes: N samples, C classes, R resamples. `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, otherwise
class indices (N,). All values are fractions in [0, 1], or NaN if the samples leave them undefined, such as the AUROC of
a single class. Undefined is not 0: an undefined value is left out of means and intervals, and never chooses a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.5


SwapFigures = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps swaps (R, U), 1 for each unit that changes sides, to the resulting figures (R,) of two models."""


class Measure(ABC):
    """A figure computed on a split."""

    @abstractmethod
    def resampled(self, logits: Tensor, labels: Tensor, counts_RN: Tensor) -> Tensor:
        """The figure (R,) of each resample; `counts_RN` is how often each sample occurs in it."""

    @abstractmethod
    def swapper(self, one: Tensor, other: Tensor, labels: Tensor, units_N: Tensor) -> SwapFigures:
        """For permutation tests: a function giving two models' figures after units of samples have changed sides.

        Args:
            units_N: unit of each sample, counted from 0; the samples of one unit change sides together.
        """


@dataclass(frozen=True)
class Sums(Measure):
    """A figure computed from sums over samples, so that all resamples take one matrix product."""

    terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (logits, labels) -> addends of each sample, (N, K) or (N,)
    value: Callable[..., Tensor]  # (number of samples (R,), sum of each term, (R, K) or (R,)) -> the figure (R,)

    def resampled(self, logits: Tensor, labels: Tensor, counts_RN: Tensor) -> Tensor:
        terms = (term if term.frac().any() else term.to(counts_RN.dtype) for term in self.terms(logits, labels))
        sums = (counts_RN.to(term.dtype) @ term for term in terms)  # float32 is exact for counts only
        return self.value(counts_RN.sum(1).double(), *(total.double() for total in sums))

    def swapper(self, one: Tensor, other: Tensor, labels: Tensor, units_N: Tensor) -> SwapFigures:
        # Both models together, since terms may be relative to the first sample.
        joint = self.terms(torch.cat([one, other]), torch.cat([labels, labels]))
        terms = [term.split(len(labels)) for term in joint]
        units = int(units_N.max()) + 1
        moves = [a.new_zeros(units, *a.shape[1:]).index_add_(0, units_N, b - a) for a, b in terms]
        moves = [move if move.frac().any() else move.float() for move in moves]  # exact for counts

        def swapped(swaps_RU: Tensor) -> tuple[Tensor, Tensor]:
            first, second = [], []
            for (a, b), move in zip(terms, moves, strict=True):
                moved = a.new_zeros(len(swaps_RU), *a.shape[1:])  # remains 0 for terms that depend on the labels only
                if move.any():
                    moved += swaps_RU.to(move.dtype) @ move
                first.append(a.sum(0) + moved)
                second.append(b.sum(0) - moved)
            n_R = torch.full((len(swaps_RU),), float(len(labels)), dtype=torch.float64)
            return self.value(n_R, *first), self.value(n_R, *second)

        return swapped


class Auroc(Measure):
    """Exact area under the ROC curve of class 1's probability (no binning); undefined if only one class occurs."""

    def resampled(self, logits: Tensor, labels: Tensor, counts_RN: Tensor) -> Tensor:
        fp_RK, tp_RK, _ = roc_counts(logits, labels, counts_RN)
        return _area(fp_RK, tp_RK)

    def swapper(self, one: Tensor, other: Tensor, labels: Tensor, units_N: Tensor) -> SwapFigures:
        """Swaps ranks instead of scores, whose spread may differ between models (Bandos et al. 2005)."""
        both, twice = torch.cat([_ranked(one), _ranked(other)]), torch.cat([labels, labels])
        fp_1K, tp_1K, _ = roc_counts(both, twice, torch.ones(1, len(both)))

        def swapped(swaps_RU: Tensor) -> tuple[Tensor, Tensor]:
            swaps_RN = swaps_RU[:, units_N]
            fp_RK, tp_RK, _ = roc_counts(both, twice, torch.cat([1 - swaps_RN, swaps_RN], 1))
            return _area(fp_RK, tp_RK), _area(fp_1K - fp_RK, tp_1K - tp_RK)

        return swapped


def _area(fp_RK: Tensor, tp_RK: Tensor) -> Tensor:
    return ratio(torch.trapezoid(tp_RK.double(), fp_RK.double()), fp_RK[:, -1].double() * tp_RK[:, -1])


@dataclass(frozen=True)
class Metric:
    """The measures of a task, by name."""

    measures: dict[str, Measure]

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Every measure over all samples; all are undefined if there are no samples or a logit is not finite."""
        if not len(labels) or not logits.isfinite().all():
            return dict.fromkeys(self.measures, torch.nan)
        once = torch.ones(1, len(labels), dtype=torch.float64)
        return {name: measure.resampled(logits, labels, once).item() for name, measure in self.measures.items()}


def decisions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted and the true classes, bool (N, C) each.

    Predicted are, for multi-label tasks, all classes with a probability above 0.5, otherwise the one with the highest
    logit.
    """
    if labels.ndim == 2:
        return are_predicted(logits), labels > 0.5
    class_C = torch.arange(logits.shape[1])
    return logits.argmax(-1, keepdim=True) == class_C, labels[:, None] == class_C


def are_predicted(logits: Tensor, offset: float = 0.0) -> Tensor:
    """The classes predicted in a multi-label task: probability above 0.5, with `offset` added to the logits."""
    return (logits.double() + offset).sigmoid() > THRESHOLD


def outcomes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indicators (1 or 0) of classes correctly predicted, predicted, and true: float64 (N, C) each."""
    predicted, true = decisions(logits, labels)
    return (predicted & true).double(), predicted.double(), true.double()


def ratio(part: Tensor, of: Tensor) -> Tensor:
    """`part / of`; NaN where the denominator is 0."""
    return torch.where(of > 0, part / of, torch.nan)


def f1(hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """2TP/(2TP+FP+FN); undefined where the denominator is 0."""
    return ratio(2 * hits, predicted + true)


def precision(hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """TP/(TP+FP); undefined for a class that is never predicted."""
    return ratio(hits, predicted)


def recall(hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """TP/(TP+FN); undefined for a class that is never true."""
    return ratio(hits, true)


def _f1_of_samples(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    f1_N = f1(*(outcome.sum(1) for outcome in outcomes(logits, labels)))
    return (f1_N.nan_to_num(0),)  # as published


def f1_weighted(n: Tensor, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    return ratio((f1(hits, predicted, true).nan_to_num(0) * true).sum(-1), true.sum(-1))


def mean_of(n: Tensor, total: Tensor) -> Tensor:
    return ratio(total, n)


def f1_macro(n: Tensor, *counts: Tensor) -> Tensor:
    """Macro F1 from hits, predicted and true (R, C), without the classes whose F1 is undefined."""
    return f1(*counts).nanmean(-1)


_f1_macro = Sums(outcomes, f1_macro)
_balanced_accuracy = Sums(outcomes, lambda n, *counts: recall(*counts).nanmean(-1))
_accuracy = Sums(lambda logits, labels: ((logits.argmax(-1) == labels).double(),), mean_of)

multilabel_f1 = Metric(
    {
        "f1_macro": _f1_macro,
        "f1_micro": Sums(
            lambda logits, labels: tuple(outcome.sum(1) for outcome in outcomes(logits, labels)),
            lambda n, *counts: f1(*counts),
        ),
        "f1_samples": Sums(_f1_of_samples, mean_of),
        "f1_weighted": Sums(outcomes, f1_weighted),
    }
)
"""F1 at threshold 0.5: macro, micro, sample and support-weighted averages.

`f1_macro` leaves out classes that are in neither predictions nor targets; `f1_samples` counts a sample with no
predicted and no true class as 0; `f1_weighted` weights classes by their number of true samples.
"""

class_accuracy = Metric({"accuracy": _accuracy, "f1_macro": _f1_macro, "balanced_accuracy": _balanced_accuracy})
"""Accuracy, macro F1 and mean recall of the class with the highest logit.

`f1_macro` leaves out classes that are in neither predictions nor targets, unlike torchmetrics, which counts them as 0;
`balanced_accuracy` leaves out classes that are not in the targets.
"""

macro_f1_and_accuracy = Metric({"f1_macro": _f1_macro} | class_accuracy.measures)
"""The measures of `class_accuracy`, macro F1 first."""

auroc_and_accuracy = Metric({"auroc": Auroc()} | class_accuracy.measures)
"""See `Auroc` and `class_accuracy`."""


def roc_counts(logits: Tensor, labels: Tensor, counts_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positives (R, K) of each resample at K thresholds, and the thresholds (K,).

    A threshold is the lowest probability of class 1 that counts as positive: first infinity, then each one that occurs.
    Thresholds are distinguished by log-odds, since probabilities near 1 round to 1.
    """
    score_N, order_N = _log_odds(logits).sort(descending=True)
    last_K = torch.nonzero(score_N.diff(append=torch.tensor([-torch.inf]))).flatten()  # end of each run of equal scores
    counts_RN, positive_N = counts_RN[:, order_N], labels[order_N].to(counts_RN.dtype)
    tp_RK, fp_RK = ((counts_RN * is_N).cumsum(1)[:, last_K] for is_N in (positive_N, 1 - positive_N))
    nothing_R1 = counts_RN.new_zeros(len(counts_RN), 1)
    thresholds_K = torch.cat([torch.tensor([torch.inf]), score_N[last_K].sigmoid()])
    return torch.cat([nothing_R1, fp_RK], 1), torch.cat([nothing_R1, tp_RK], 1), thresholds_K


def _log_odds(logits: Tensor) -> Tensor:
    """Log-odds of class 1, (N,)."""
    return logits[:, 1].double() - logits[:, 0].double()


def _ranked(logits: Tensor) -> Tensor:
    """Logits (N, 2) whose difference is the mean rank of class 1's probability."""
    _, place_N, count_K = _log_odds(logits).unique(return_inverse=True, return_counts=True)
    rank_N = (count_K.cumsum(0) - (count_K.double() - 1) / 2)[place_N]
    return torch.stack([torch.zeros_like(rank_N), rank_N], 1)
