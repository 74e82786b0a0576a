"""The published metrics (docs/method.md section 4), computed on the logits of a whole split.

Shapes: N samples, C classes, R resamples. `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, (N,) class
numbers otherwise. All values are fractions in [0, 1].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.5


@dataclass(frozen=True)
class Metric:
    """Metrics that follow from sums over samples, so that resamples cost one matrix product."""

    terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    """(logits, labels) to what each sample adds: (N, C) or (N,), float64."""
    figures: Callable[..., dict[str, float]]
    """Number of samples and the sum of each term, (C,) or (), to named values."""

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics of all samples."""
        return self.figures(len(labels), *(term.sum(0) for term in self.terms(logits, labels)))

    def resampled(self, logits: Tensor, labels: Tensor, counts_RN: Tensor) -> Iterator[dict[str, float]]:
        """The metrics of each resample; `counts_RN`, float64, says how often each sample is in it."""
        sums = [counts_RN @ term for term in self.terms(logits, labels)]
        yield from (self.figures(len(labels), *of_resample) for of_resample in zip(*sums, strict=True))


def decisions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which classes are predicted and which are true, bool (N, C) each.

    Multi-label: every class of a probability above 0.5. Otherwise: the class of the highest logit.
    """
    if labels.ndim == 2:
        return logits.double().sigmoid() > THRESHOLD, labels > 0.5
    class_C = torch.arange(logits.shape[1])
    return logits.argmax(-1, keepdim=True) == class_C, labels[:, None] == class_C


def outcomes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 for each true positive, false positive and false negative, else 0: float64 (N, C) each."""
    predicted, true = decisions(logits, labels)
    return (predicted & true).double(), (predicted & ~true).double(), (~predicted & true).double()


def f1(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """2TP/(2TP+FP+FN), 0 where the denominator is 0."""
    denominator = 2 * tp + fp + fn
    return torch.where(denominator > 0, 2 * tp / denominator.clamp(min=1), torch.zeros_like(denominator))


def _f1_terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    tp, fp, fn = outcomes(logits, labels)
    return tp, fp, fn, f1(tp.sum(1), fp.sum(1), fn.sum(1))


def _f1_figures(n: int, tp: Tensor, fp: Tensor, fn: Tensor, of_samples: Tensor) -> dict[str, float]:
    support, per_class = tp + fn, f1(tp, fp, fn)
    return {
        **_f1_macro(tp, fp, fn),
        "f1_micro": float(f1(tp.sum(), fp.sum(), fn.sum())),
        "f1_samples": float(of_samples / n) if n else 0.0,
        "f1_weighted": float((per_class * support).sum() / support.sum().clamp(min=1)),
    }


def _f1_macro(tp: Tensor, fp: Tensor, fn: Tensor) -> dict[str, float]:
    occurs = tp + fp + fn > 0
    return {"f1_macro": float(f1(tp, fp, fn)[occurs].mean()) if occurs.any() else 0.0}


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).double()


def _accuracy(n: int, correct: Tensor) -> dict[str, float]:
    return {"accuracy": float(correct / n) if n else 0.0}


multilabel_f1 = Metric(_f1_terms, _f1_figures)
"""F1 at threshold 0.5, averaged over classes, decisions, samples and classes by support.

`f1_macro` leaves out classes that are in neither predictions nor targets; `f1_samples` counts a sample with no
predicted and no true class as 0; `f1_weighted` weighs classes by their number of true samples.
"""

class_accuracy = Metric(lambda logits, labels: (_correct(logits, labels),), _accuracy)
"""Share of samples whose highest logit is the true class."""

macro_f1_and_accuracy = Metric(
    lambda logits, labels: (*outcomes(logits, labels), _correct(logits, labels)),
    lambda n, tp, fp, fn, correct: {**_f1_macro(tp, fp, fn), **_accuracy(n, correct)},
)
"""F1 of the class of the highest logit, averaged over the classes, and the accuracy.

`f1_macro` leaves out classes that are in neither predictions nor targets, unlike torchmetrics', which counts them as 0.
"""


class _AurocAndAccuracy(Metric):
    """The area does not follow from sums over samples, but from those up to each score."""

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        return next(self.resampled(logits, labels, torch.ones(1, len(labels), dtype=torch.float64)))

    def resampled(self, logits: Tensor, labels: Tensor, counts_RN: Tensor) -> Iterator[dict[str, float]]:
        fp_RK, tp_RK, _ = roc_counts(logits, labels, counts_RN)
        pairs_R = fp_RK[:, -1] * tp_RK[:, -1]
        area_R = torch.trapezoid(tp_RK, fp_RK) / pairs_R.clamp(min=1)
        for area, others in zip(area_R.tolist(), super().resampled(logits, labels, counts_RN), strict=True):
            yield {"auroc": area, **others}


auroc_and_accuracy = _AurocAndAccuracy(class_accuracy.terms, class_accuracy.figures)
"""Area under the ROC curve of class 1's probability, exact (no binning), and the accuracy.

The AUROC is 0 where only one class occurs.
"""


def roc_counts(logits: Tensor, labels: Tensor, counts_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positives (R, K) of each resample at K thresholds, float64, and the thresholds (K,).

    A threshold is the least probability of class 1 that counts as positive: first infinity, then each that occurs, in
    float64, since float32 does not tell confident ones apart.
    """
    score_N, order_N = logits.double().softmax(-1)[:, 1].sort(descending=True)
    last_K = torch.nonzero(score_N.diff(append=torch.tensor([-1.0]))).flatten()  # of each run of equal scores
    counts_RN, positive_N = counts_RN[:, order_N], labels[order_N].double()
    tp_RK, fp_RK = ((counts_RN * is_N).cumsum(1)[:, last_K] for is_N in (positive_N, 1 - positive_N))
    nothing_R1 = counts_RN.new_zeros(len(counts_RN), 1)
    thresholds_K = torch.cat([torch.tensor([torch.inf]), score_N[last_K]])
    return torch.cat([nothing_R1, fp_RK], 1), torch.cat([nothing_R1, tp_RK], 1), thresholds_K
