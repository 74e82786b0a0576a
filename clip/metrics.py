"""The published metrics (docs/method.md section 4), computed on the logits of a whole split.

Shapes: `logits` (N, C); `labels` (N, C) of 0/1 for multi-label tasks, (N,) class numbers otherwise.
All values are fractions in [0, 1].
"""

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

THRESHOLD = 0.5


def multilabel_f1(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """F1 at threshold 0.5, averaged over classes, decisions, samples and classes by support.

    `f1_macro` leaves out classes that are in neither predictions nor targets; `f1_samples` counts a sample with no
    predicted and no true class as 0; `f1_weighted` weighs classes by their number of true samples.
    """
    predicted, true = decisions(logits, labels)
    tp, fp, fn = outcomes(predicted, true)
    per_class = f1(tp.sum(0), fp.sum(0), fn.sum(0))
    occurs = (predicted | true).any(0)
    support = true.double().sum(0)
    return {
        "f1_macro": _mean(per_class[occurs]),
        "f1_micro": float(f1(tp.sum(), fp.sum(), fn.sum())),
        "f1_samples": _mean(f1(tp.sum(1), fp.sum(1), fn.sum(1))),
        "f1_weighted": float((per_class * support).sum() / support.sum().clamp(min=1)),
    }


def class_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of samples whose highest logit is the true class."""
    return {"accuracy": _mean((logits.argmax(-1) == labels).double())}


def macro_f1_and_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """F1 of the class of the highest logit, averaged over the classes, and the accuracy.

    `f1_macro` leaves out classes that are in neither predictions nor targets.
    """
    tp, fp, fn = (outcome.sum(0) for outcome in outcomes(*decisions(logits, labels)))
    return {"f1_macro": _mean(f1(tp, fp, fn)[tp + fp + fn > 0]), **class_accuracy(logits, labels)}


def auroc_and_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Area under the ROC curve of class 1's probability, exact (no binning), and the accuracy.

    The AUROC is 0 where only one class occurs.
    """
    scores = logits.double().softmax(-1)[:, 1]
    both = 0 < int(labels.sum()) < len(labels)
    return {"auroc": float(binary_auroc(scores, labels)) if both else 0.0, **class_accuracy(logits, labels)}


def decisions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which classes are predicted and which are true, bool (N, C) each.

    Multi-label: every class of a probability above 0.5. Otherwise: the class of the highest logit.
    """
    if labels.ndim == 2:
        return logits.double().sigmoid() > THRESHOLD, labels > 0.5
    class_C = torch.arange(logits.shape[1])
    return logits.argmax(-1, keepdim=True) == class_C, labels[:, None] == class_C


def outcomes(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 for each true positive, false positive and false negative, else 0: float64 (N, C) each."""
    return (predicted & true).double(), (predicted & ~true).double(), (~predicted & true).double()


def f1(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """2TP/(2TP+FP+FN), 0 where the denominator is 0."""
    denominator = 2 * tp + fp + fn
    return torch.where(denominator > 0, 2 * tp / denominator.clamp(min=1), torch.zeros_like(denominator))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
