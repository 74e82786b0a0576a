"""The decision threshold of a multi-label model: the offset of its logits that gives the best macro F1 on validation.

Macro F1 peaks well below a probability of 1/2 (for one class, at half of its best F1), and training may shift the
threshold: DPL's margins move it to about 1/3, as an offset of log 2 does. Methods are therefore compared at their own
offsets, as well as at the published 1/2. Shapes: N samples, C classes, K = N * C logits in descending order.
"""

from dataclasses import replace

import torch
from torch import Tensor

from common.text import AT_OFFSET
from engine.metrics import Metric, Sums, f1_macro, multilabel_f1, outcomes
from engine.tasks import Task

TIE = 1e-9
"""Values of macro F1 closer than this count as equal: summing in another order rounds differently."""


def best_offset(logits: Tensor, labels: Tensor) -> float | None:
    """The value to add to all logits for the highest macro F1 when deciding at a probability of 1/2.

    The search is exact: as the offset rises, one logit after another passes 0 and changes the F1 of its class. Of
    equally good offsets, the one nearest to 0 is taken: 0 itself if nothing is better, else midway between the two
    logits that it separates.

    Args:
        logits: (N, C).
        labels: (N, C) of 0 and 1.

    Returns:
        None if no offset can be chosen: no class is ever true, or a logit is not finite.
    """
    if not labels.any() or not logits.isfinite().all():
        return None
    logits_NC, true_NC = logits.double(), labels.double()
    order_NC = logits_NC.argsort(0, descending=True)
    hits_NC, true_C = true_NC.gather(0, order_NC).cumsum(0), true_NC.sum(0)
    predicted_N1 = torch.arange(1, len(logits) + 1, dtype=torch.float64)[:, None]
    f1_NC = 2 * hits_NC / (predicted_N1 + true_C)
    gain_NC = f1_NC.diff(dim=0, prepend=torch.zeros(1, len(true_C)))
    counted_NC = (predicted_N1 == 1) & (true_C == 0)  # a class that is never true only counts once predicted
    falling_K, place_K = logits_NC.gather(0, order_NC).flatten().sort(descending=True)
    counted_K = (true_C > 0).sum() + counted_NC.flatten()[place_K].cumsum(0)
    macro_K = gain_NC.flatten()[place_K].cumsum(0) / counted_K
    # For k = 0, 1, … : the k highest logits are predicted at offsets above -above, up to and including -below.
    macro = torch.cat([torch.zeros(1), macro_K])
    above, below = (torch.cat(ends) for ends in ((falling_K[:1] + 2, falling_K), (falling_K, falling_K[-1:] - 2)))
    offsets = -(above + below) / 2
    above[0], below[-1] = torch.inf, -torch.inf
    offsets[(above > 0) & (below <= 0)] = 0
    best = (above > below) & (macro >= macro[above > below].max() - TIE)
    return float(offsets[best][offsets[best].abs().argmin()])


def with_offset(task: Task, offset: float | None) -> Task:
    """The task with macro F1 at `offset` as a further metric; unchanged without an offset or F1 metrics."""
    if offset is None or task.metrics is not multilabel_f1:
        return task
    at_offset = Sums(lambda logits, labels: outcomes(logits.double() + offset, labels), f1_macro)
    return replace(task, metrics=Metric({**task.metrics.measures, AT_OFFSET: at_offset}))
