"""The table of tasks: head, loss, metrics and the metric that chooses the best model (METHOD.md section 4)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from clip.metrics import auroc_and_accuracy, class_accuracy, multilabel_f1


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Task:
    """One downstream task. Its name is also the name of its dataset."""

    name: str
    n_classes: int
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits (B, C), labels) to the mean loss."""
    metrics: Callable[[Tensor, Tensor], dict[str, float]]
    """(logits (N, C), labels) of a whole split to named values."""
    monitor: str
    """The metric that chooses the best model; higher is better."""

    @property
    def head_name(self) -> str:
        """Attribute name of the head, as in published checkpoints."""
        return f"{self.name}_classifier"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mmimdb", 23, _binary_cross_entropy, multilabel_f1, "f1_macro"),
        Task("food101", 101, _cross_entropy, class_accuracy, "accuracy"),
        Task("hatememes", 2, _cross_entropy, auroc_and_accuracy, "auroc"),
    )
}
