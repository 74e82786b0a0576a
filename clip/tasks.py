"""The table of tasks: head, loss, metrics and the metric that chooses the best model (METHOD.md section 4)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from clip.metrics import Metric, auroc_and_accuracy, class_accuracy, macro_f1_and_accuracy, multilabel_f1
from vilt.datasets.custom import CUSTOM, CustomData


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def head_name(task: str) -> str:
    """Attribute name of the head of a task, as in published checkpoints."""
    return f"{task}_classifier"


@dataclass(frozen=True)
class Task:
    """One downstream task. Its name is also the name of its dataset."""

    name: str
    n_classes: int
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits (B, C), labels) to the mean loss."""
    metrics: Metric
    """(logits (N, C), labels) of a whole split to named values."""
    monitor: str
    """The metric that chooses the best model; higher is better."""

    @property
    def head_name(self) -> str:
        """Attribute name of the head."""
        return head_name(self.name)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mmimdb", 23, _binary_cross_entropy, multilabel_f1, "f1_macro"),
        Task("food101", 101, _cross_entropy, class_accuracy, "accuracy"),
        Task("hatememes", 2, _cross_entropy, auroc_and_accuracy, "auroc"),
    )
}
TASK_NAMES = (*TASKS, CUSTOM)
"""With that of one's own data."""
METRICS_OF_CUSTOM: dict[tuple[str, str], Metric] = {
    ("multi", "f1_macro"): multilabel_f1,
    ("single", "accuracy"): class_accuracy,
    ("single", "f1_macro"): macro_f1_and_accuracy,
    ("single", "auroc"): auroc_and_accuracy,
}
"""Of one's own data, by its labels and the metric that it names."""


def task_of(name: str, custom: CustomData | None) -> Task:
    """The row of a task; that of one's own data follows from what the data says."""
    if custom is None:
        return TASKS[name]
    loss = _binary_cross_entropy if custom.labels == "multi" else _cross_entropy
    return Task(name, custom.n_classes, loss, METRICS_OF_CUSTOM[custom.labels, custom.metric], custom.metric)
