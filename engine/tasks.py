"""Each dataset's task: head, loss, metrics, and the metric that chooses the best model (docs/method.md section 4)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from common.text import LOWER_IS_BETTER
from engine.metrics import Metric, auroc_and_accuracy, class_accuracy, macro_f1_and_accuracy, multilabel_f1
from engine.regression import PUBLISHED_F1, sentiment, sentiment_of_sims
from vilt.datasets.custom import CustomData
from vilt.datasets.specs import CLIP, DATASETS, DatasetSpec, spec_of


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _mean_absolute_error(logits: Tensor, labels: Tensor) -> Tensor:
    assert logits.shape == (len(labels), 1) and labels.ndim == 1, "shapes that broadcast would compare all pairs"
    return F.l1_loss(logits[:, 0], labels)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary_cross_entropy": _binary_cross_entropy,
    "cross_entropy": F.cross_entropy,
    "mean_absolute_error": _mean_absolute_error,
}
METRICS: dict[str, Metric] = {
    "multilabel_f1": multilabel_f1,
    "class_accuracy": class_accuracy,
    "macro_f1_and_accuracy": macro_f1_and_accuracy,
    "auroc_and_accuracy": auroc_and_accuracy,
    "sentiment": sentiment,
    "sentiment_of_sims": sentiment_of_sims,
}
NO_SHARES = (*LOWER_IS_BETTER, "corr")
"""Metrics that are not fractions of 1, and so not shown in per cent."""


def head_name(task: str) -> str:
    """Attribute name of a task's head, as in published checkpoints."""
    return f"{task}_classifier"


@dataclass(frozen=True)
class Task:
    """One downstream task. Its name is also the name of its dataset."""

    name: str
    n_classes: int
    loss: Callable[[Tensor, Tensor], Tensor]  # (logits (B, C), labels) -> mean loss
    metrics: Metric  # (logits (N, C), labels) of a whole split -> values by name
    monitor: str  # the metric that chooses the best model; see `order_of` (common/text.py)

    @property
    def head_name(self) -> str:
        """Attribute name of the head."""
        return head_name(self.name)


def task_with(spec: DatasetSpec) -> Task:
    """The task of a dataset."""
    return Task(spec.name, spec.n_classes, LOSSES[spec.loss], METRICS[spec.metrics], spec.monitor)


TASKS: dict[str, Task] = {name: task_with(spec) for name, spec in DATASETS.items()}


def task_of(name: str, custom: CustomData | None) -> Task:
    """The task of a dataset, by the dataset's name; for a custom dataset, it follows from what the data declare."""
    return task_with(spec_of(name, custom))


def with_published_f1(task: Task) -> Task:
    """A sentiment task with F1 as in MPLMM's code added to its metrics, under its own name."""
    more = PUBLISHED_F1[next(name for name, metrics in METRICS.items() if metrics is task.metrics)]
    return replace(task, metrics=Metric({**task.metrics.measures, **more}))


def counts_as_published(dataset: DatasetSpec) -> bool:
    """Whether the last, smaller optimiser step of an epoch counts as in the published code.

    It does for tasks with published results to compare with; see `schedule_steps` and `weight_in_step`
    (engine/optimization.py).
    """
    return dataset.family == CLIP and bool(dataset.published_rows)
