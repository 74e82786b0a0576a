"""Baselines that ignore the input: the test metrics of the best constant answer and of random guessing."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from common.text import estimate, order_of
from engine.tasks import Task

DRAWS, SEED = 100, 0
"""Number of random guesses, and their seed, which is fixed so that a test set always has the same figures."""


def baselines(task: Task, labels: Tensor, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The baselines `constant` and `chance`: for each, the answer in words and its metrics.

    The constant is the one that scores best on these very labels, by the metric that chooses the model: the most
    frequent class (multi-label: the k most frequent classes; regression: the median). Chance draws one class
    (multi-label: each class with probability 1/2; regression: the label of another sample); its metrics are means over
    the draws in which they are defined.
    """
    if not len(labels):
        return {}
    answers = _regression if labels.is_floating_point() else _classification
    constants, (guess, draws) = answers(task, labels, class_names)
    answer, best = max(constants, key=lambda each: order_of(each[1][task.monitor], task.monitor))
    drawn = [task.metrics(logits, labels) for logits in draws]
    chance = {name: found.mean for name in drawn[0] if (found := estimate([each[name] for each in drawn]))}
    return {
        "constant": {"answer": f"always {answer}", "metrics": best},
        "chance": {"answer": guess, "metrics": chance},
    }


Answers = tuple[list[tuple[str, dict[str, float]]], tuple[str, Iterator[Tensor]]]
"""Candidate constants with their metrics; the random guess in words, with the logits (N, C) of each draw."""


def _classification(task: Task, labels: Tensor, class_names: Sequence[str]) -> Answers:
    constants = []
    for logits_C in _constants(labels, task.n_classes):
        names = [class_names[index] for index in (logits_C > 0).nonzero().flatten().tolist()]
        answer = f"the {len(names)} most frequent classes" if len(names) > 3 else ", ".join(names)
        constants.append((answer, task.metrics(logits_C.expand(len(labels), -1), labels)))
    guess = "each class with probability 1/2" if labels.ndim == 2 else f"one of {task.n_classes} classes at random"
    return constants, (guess, _guesses(labels, task.n_classes))


def _regression(task: Task, labels: Tensor, class_names: Sequence[str]) -> Answers:
    generator, median = torch.Generator().manual_seed(SEED), labels.median()
    draws = (labels[torch.randperm(len(labels), generator=generator)][:, None] for _ in range(DRAWS))
    metrics = task.metrics(median.expand(len(labels), 1), labels)
    return [(f"the median, {median:.4g}", metrics)], ("the label of another sample, at random", draws)


def _constants(labels: Tensor, n_classes: int) -> list[Tensor]:
    """Logits (C,) of the constants that may score best."""
    counts_C = labels.long().sum(0) if labels.ndim == 2 else labels.bincount(minlength=n_classes)
    order_C = counts_C.argsort(descending=True, stable=True)
    if labels.ndim == 1:
        return [one_hot(order_C[0], n_classes).float()]
    rank_C = order_C.argsort()
    return [(rank_C < k).float() * 2 - 1 for k in range(1, n_classes + 1)]


def _guesses(labels: Tensor, n_classes: int) -> Iterator[Tensor]:
    """Logits (N, C) of random guesses, in groups that predict each class equally often, so that means are exact."""
    generator = torch.Generator().manual_seed(SEED)
    if labels.ndim == 2:
        for _ in range(DRAWS // 2):
            heads = torch.rand(labels.shape, generator=generator) < 0.5
            yield from (side.float() * 2 - 1 for side in (heads, ~heads))
        return
    for _ in range(math.ceil(DRAWS / n_classes)):
        drawn = torch.randint(n_classes, labels.shape, generator=generator)
        yield from (one_hot((drawn + shift) % n_classes, n_classes).float() for shift in range(n_classes))
