"""Metrics of sentiment regression (docs/vla.md section 5).

Shapes: N samples, R resamples. `logits` (N, 1) are the predicted values, `labels` (N,) the true ones, both float32.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.metrics import Metric, Sums, f1_weighted, mean_of, ratio

Decide = Callable[[Tensor], Tensor]
"""Maps values (N,) to classes: class indices, or whether a value is positive."""


def _pair(logits: Tensor, labels: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Predictions and labels (N,), clipped to ±`limit`."""
    predicted_N = logits[:, 0]
    return (predicted_N, labels) if limit is None else (predicted_N.clamp(-limit, limit), labels.clamp(-limit, limit))


def _error(limit: float | None) -> Sums:
    def terms(logits: Tensor, labels: Tensor) -> tuple[Tensor]:
        predicted_N, true_N = _pair(logits, labels, limit)
        return ((predicted_N - true_N).abs().double(),)

    return Sums(terms, mean_of)


def _correlation(limit: float | None) -> Sums:
    """Pearson's correlation; undefined if predictions or labels are constant."""

    def terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        # Shifted by the first value, which does not change the result, so that constants give sums of exactly 0.
        p, t = (x.double() - x[0].double() for x in _pair(logits, labels, limit))
        return p, t, p * p, t * t, p * t

    def value(n: Tensor, p: Tensor, t: Tensor, pp: Tensor, tt: Tensor, pt: Tensor) -> Tensor:
        spread = (pp - p * p / n) * (tt - t * t / n)
        return ratio(pt - p * t / n, spread.clamp(min=0).sqrt())

    return Sums(terms, value)


def _share(decide: Decide, limit: float | None = None, counted: Decide | None = None) -> Sums:
    """Accuracy: share of the samples with a `counted` label whose prediction and label are in the same class."""

    def terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        predicted_N, true_N = _pair(logits, labels, limit)
        counts_N = torch.ones_like(labels).bool() if counted is None else counted(labels)
        return ((decide(predicted_N) == decide(true_N)) & counts_N).double(), counts_N.double()

    return Sums(terms, lambda n, right, all_: ratio(right, all_))


def _f1(decide: Decide, limit: float | None = None, counted: Decide | None = None, by_prediction: bool = False) -> Sums:
    """Mean F1 of positive and not positive, weighted by true counts, or, with `by_prediction`, by predicted counts."""

    def terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predicted_N, true_N = (decide(x) for x in _pair(logits, labels, limit))
        if by_prediction:
            predicted_N, true_N = true_N, predicted_N
        counts_N2 = torch.ones_like(labels).bool()[:, None] if counted is None else counted(labels)[:, None]
        predicted_N2, true_N2 = (torch.stack([~each, each], 1) & counts_N2 for each in (predicted_N, true_N))
        return (predicted_N2 & true_N2).double(), predicted_N2.double(), true_N2.double()

    return Sums(terms, f1_weighted)


def _bins(edges: Sequence[float], numbers: Tensor) -> Tensor:
    """Index of the bin (-∞, e0], (e0, e1], … that each value is in."""
    return torch.bucketize(numbers, torch.tensor(edges, dtype=numbers.dtype))


def _positive(numbers: Tensor) -> Tensor:
    return numbers > 0


def _not_negative(numbers: Tensor) -> Tensor:
    return numbers >= 0


def _not_zero(numbers: Tensor) -> Tensor:
    return numbers != 0


sentiment = Metric(
    {
        "mae": _error(None),
        "corr": _correlation(None),
        "acc7": _share(torch.round, 3),
        "acc5": _share(torch.round, 2),
        "acc2_non0": _share(_positive, counted=_not_zero),
        "f1_non0": _f1(_positive, counted=_not_zero),
        "acc2_has0": _share(_not_negative),
        "f1_has0": _f1(_not_negative),
    }
)
"""Metrics for MOSI and MOSEI. `non0` leaves out labels of 0, and positive means above 0; `has0` keeps all samples, and
0 counts as positive."""

sentiment_of_sims = Metric(
    {
        "mae": _error(1),
        "corr": _correlation(1),
        "acc5": _share(partial(_bins, (-0.7, -0.1, 0.1, 0.7)), 1),
        "acc3": _share(partial(_bins, (-0.1, 0.1)), 1),
        "acc2": _share(_positive, 1),
        "f1": _f1(_positive, 1),
    }
)
"""Metrics for CH-SIMS as MMSA defines them: all values clipped to [-1, 1]; positive means above 0."""

PUBLISHED_F1 = {
    "sentiment": {"f1_non0_published": _f1(_positive, counted=_not_zero, by_prediction=True)},
    "sentiment_of_sims": {"f1_published": _f1(_positive, 1, by_prediction=True)},
}
"""F1 as in MPLMM's code, keyed by the name of the metrics: weighted by how often a class is predicted, which raises it
if one class is predicted too often."""
