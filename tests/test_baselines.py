"""The scores of a constant answer and of chance on a test set."""

import math

import pytest
import torch

from engine.baselines import baselines
from engine.tasks import LOSSES, METRICS, TASKS, Task, task_of
from vilt.datasets.custom import CustomData


def test_the_multi_label_constant_is_the_best_of_all_constants() -> None:
    """Compared with every set of classes: all non-empty constants out of 2^4."""
    task = task_of("custom", CustomData("x", "multi", ("a", "b", "c", "d"), "f1_macro"))
    shares = torch.tensor([0.1, 0.7, 0.3, 0.0])
    labels = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < shares).long()
    found = baselines(task, labels, "abcd")["constant"]
    constants = [torch.tensor([1.0 if code >> place & 1 else -1 for place in range(4)]) for code in range(1, 16)]
    best = max(task.metrics(constant.expand(40, -1), labels)["f1_macro"] for constant in constants)
    assert found["metrics"]["f1_macro"] == pytest.approx(best)
    assert found["answer"] == "always a, b, c"


def test_the_single_label_constant_is_the_most_frequent_class() -> None:
    labels = torch.tensor([7] * 6 + [3] * 3 + [50])
    found = baselines(TASKS["food101"], labels, [f"dish {number}" for number in range(101)])
    assert found["constant"]["answer"] == "always dish 7"
    expected = {"accuracy": 0.6, "f1_macro": (2 * 6 / 16) / 3, "balanced_accuracy": 1 / 3}
    assert found["constant"]["metrics"] == pytest.approx(expected)
    assert found["chance"]["metrics"]["accuracy"] == pytest.approx(1 / 101)
    assert found["chance"]["metrics"]["balanced_accuracy"] == pytest.approx(1 / 101)


def test_two_classes() -> None:
    found = baselines(TASKS["hatememes"], torch.tensor([0, 0, 0, 1]), ("kind", "hateful"))
    assert found["constant"]["answer"] == "always kind"
    figures = {"auroc": 0.5, "accuracy": 0.75, "f1_macro": 3 / 7, "balanced_accuracy": 0.5}
    assert found["constant"]["metrics"] == pytest.approx(figures)
    chance = found["chance"]["metrics"]
    assert [chance[name] for name in ("auroc", "accuracy", "balanced_accuracy")] == pytest.approx([0.5] * 3)
    one_class = baselines(TASKS["hatememes"], torch.tensor([1, 1]), ("kind", "hateful"))
    assert all(math.isnan(each["metrics"]["auroc"]) for each in one_class.values())


def test_multi_label_chance_is_near_its_expectation() -> None:
    """A coin finds half of a class with share p, so that its F1 tends to p / (p + 1/2)."""
    shares = torch.linspace(0.05, 0.6, 23)
    labels = (torch.rand(4000, 23, generator=torch.Generator().manual_seed(0)) < shares).to(torch.uint8)
    found = baselines(TASKS["mmimdb"], labels, [str(number) for number in range(23)])["chance"]
    share = labels.double().mean(0)
    assert found["metrics"]["f1_macro"] == pytest.approx(float((share / (share + 0.5)).mean()), abs=1e-3)
    assert found["answer"] == "each class with probability 1/2"


def test_the_regression_constant_is_the_median() -> None:
    """The median minimises the mean absolute error; the correlation of a constant is undefined."""
    task = Task("mosi", 1, LOSSES["mean_absolute_error"], METRICS["sentiment"], "mae")
    labels = torch.tensor([-2.0, 0.2, 0.4, 1.0, 3.0])
    found = baselines(task, labels, [])
    assert found["constant"]["answer"] == "always the median, 0.4"
    assert found["constant"]["metrics"]["mae"] == pytest.approx((2.4 + 0.2 + 0 + 0.6 + 2.6) / 5)
    assert math.isnan(found["constant"]["metrics"]["corr"])
    pairs = [abs(a - b) for a in labels.tolist() for b in labels.tolist()]
    assert found["chance"]["metrics"]["mae"] == pytest.approx(sum(pairs) / 25, rel=0.1)
    assert baselines(task, labels[:0], []) == {}
