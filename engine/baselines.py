"""What answers that look at no sample get on a test set: the best constant one, and a coin."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from common.text import estimate, order_of
from engine.tasks import Task

DRAWS, SEED = 100, 0
"""Coins are thrown so often; from this seed, so that a test set always has the same figures."""


def baselines(task: Task, labels: Tensor, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`constant` and `chance`: each a text that says what is answered, and the metrics of it.

    The constant is the best one for the metric that chooses the model, on these very labels: the class, or with several
    labels a sample the k classes, that occur most often; of numbers the median. Chance draws a class, with several
    labels every class with probability 1/2, of numbers the label of another sample; its metrics are means over draws,
    of the defined ones.
    """
    if not len(labels):
        return {}
    constants, coins = (_numbers if labels.is_floating_point() else _classes)(task, labels, class_names)
    answer, best = max(constants, key=lambda each: order_of(each[1][task.monitor], task.monitor))
    drawn = [task.metrics(logits, labels) for logits in coins[1]]
    chance = {name: found.mean for name in drawn[0] if (found := estimate([each[name] for each in drawn]))}
    return {
        "constant": {"answer": f"always {answer}", "metrics": best},
        "chance": {"answer": coins[0], "metrics": chance},
    }


Answers = tuple[list[tuple[str, dict[str, float]]], tuple[str, Iterator[Tensor]]]
"""Constants that may be best, with their metrics; what is drawn by chance, and the logits (N, C) of draws."""


def _classes(task: Task, labels: Tensor, class_names: Sequence[str]) -> Answers:
    constants = []
    for logits_C in _constants(labels, task.n_classes):
        names = [class_names[number] for number in (logits_C > 0).nonzero().flatten().tolist()]
        most = f"the {len(names)} most frequent classes" if len(names) > 3 else ", ".join(names)
        constants.append((most, task.metrics(logits_C.expand(len(labels), -1), labels)))
    coin = "each class with probability 1/2" if labels.ndim == 2 else f"one of {task.n_classes} classes at random"
    return constants, (coin, _coins(labels, task.n_classes))


def _numbers(task: Task, labels: Tensor, class_names: Sequence[str]) -> Answers:
    generator, middle = torch.Generator().manual_seed(SEED), labels.median()
    draws = (labels[torch.randperm(len(labels), generator=generator)][:, None] for _ in range(DRAWS))
    of_middle = task.metrics(middle.expand(len(labels), 1), labels)
    return [(f"the median, {middle:.4g}", of_middle)], ("the label of another sample, at random", draws)


def _constants(labels: Tensor, n_classes: int) -> list[Tensor]:
    """Logits (C,) of the constants that may be best."""
    counts_C = labels.long().sum(0) if labels.ndim == 2 else labels.bincount(minlength=n_classes)
    order_C = counts_C.argsort(descending=True, stable=True)
    if labels.ndim == 1:
        return [one_hot(order_C[0], n_classes).float()]
    rank_C = order_C.argsort()
    return [(rank_C < k).float() * 2 - 1 for k in range(1, n_classes + 1)]


def _coins(labels: Tensor, n_classes: int) -> Iterator[Tensor]:
    """Logits (N, C) of draws, in groups that together answer each class equally often, so that means are exact."""
    generator = torch.Generator().manual_seed(SEED)
    if labels.ndim == 2:
        for _ in range(DRAWS // 2):
            heads = torch.rand(labels.shape, generator=generator) < 0.5
            yield from (side.float() * 2 - 1 for side in (heads, ~heads))
        return
    for _ in range(math.ceil(DRAWS / n_classes)):
        drawn = torch.randint(n_classes, labels.shape, generator=generator)
        yield from (one_hot((drawn + shift) % n_classes, n_classes).float() for shift in range(n_classes))
