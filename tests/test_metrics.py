"""The metrics equal slow, obvious loops and values computed by hand (docs/method.md section 4)."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from engine.metrics import auroc_and_accuracy, class_accuracy, macro_f1_and_accuracy, multilabel_f1
from engine.tasks import NO_SHARES, TASKS

YES, NO = 2.0, -2.0


def slow_f1(true: list[bool], predicted: list[bool]) -> float:
    tp = sum(t and p for t, p in zip(true, predicted, strict=True))
    wrong = sum(t != p for t, p in zip(true, predicted, strict=True))
    return 2 * tp / (2 * tp + wrong) if tp + wrong else math.nan


def slow_multilabel(logits: Tensor, labels: Tensor) -> dict[str, float]:
    predicted = [[1 / (1 + math.exp(-x)) > 0.5 for x in row] for row in logits.tolist()]
    true = [[x == 1 for x in row] for row in labels.tolist()]
    n, c = len(true), len(true[0])
    per_class = [slow_f1([row[k] for row in true], [row[k] for row in predicted]) for k in range(c)]
    support = [sum(row[k] for row in true) for k in range(c)]
    occurring = [k for k in range(c) if any(true[i][k] or predicted[i][k] for i in range(n))]
    return {
        "f1_macro": sum(per_class[k] for k in occurring) / len(occurring) if occurring else math.nan,
        "f1_micro": slow_f1(list(itertools.chain(*true)), list(itertools.chain(*predicted))),
        "f1_samples": sum(slow_f1(t, p) if any(t + p) else 0 for t, p in zip(true, predicted, strict=True)) / n,
        "f1_weighted": sum(per_class[k] * support[k] for k in range(c) if support[k]) / sum(support)
        if sum(support)
        else math.nan,
    }


def slow_auroc(scores: list[float], labels: list[int]) -> float:
    """Share of (positive, negative) pairs in the right order; ties count half."""
    positives = [s for s, label in zip(scores, labels, strict=True) if label == 1]
    negatives = [s for s, label in zip(scores, labels, strict=True) if label == 0]
    if not positives or not negatives:
        return math.nan
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return won / (len(positives) * len(negatives))


@pytest.mark.parametrize("seed", range(12))
def test_multilabel_f1_equals_the_slow_version(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, c = int(torch.randint(1, 40, (), generator=generator)), int(torch.randint(1, 24, (), generator=generator))
    rarity = 0.02 + 0.3 * (seed % 3)  # if low, some classes and samples have no positives at all
    labels = (torch.rand(n, c, generator=generator) < rarity).float()
    logits = torch.randn(n, c, generator=generator) - (2 if rarity < 0.1 else 0)
    assert multilabel_f1(logits, labels) == pytest.approx(slow_multilabel(logits, labels), abs=1e-12, nan_ok=True)


def test_multilabel_f1_equals_values_computed_by_hand() -> None:
    logits = torch.tensor([[YES, YES, NO, NO], [YES, NO, NO, NO], [NO, NO, NO, NO]])
    labels = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    # class 0: 2 of 2, F1 1; class 1: one false alarm, one miss, F1 0; classes 2 and 3 do not occur.
    expected = {
        "f1_macro": 1 / 2,  # of the two classes that occur, not of four
        "f1_micro": 4 / 6,
        "f1_samples": (2 / 3 + 2 / 3 + 0) / 3,  # nothing predicted, nothing true: 0
        "f1_weighted": 2 / 3,  # supports 2 and 1
    }
    assert multilabel_f1(logits, labels) == pytest.approx(expected)
    predicted_alone = torch.tensor([[YES, YES, NO]])
    assert multilabel_f1(predicted_alone, torch.tensor([[1.0, 0, 0]]))["f1_macro"] == pytest.approx(1 / 2)
    assert multilabel_f1(predicted_alone, torch.tensor([[1.0, 0, 1]]))["f1_macro"] == pytest.approx(1 / 3)
    for logit, f1 in ((0.0, 0.0), (1e-6, 1.0)):  # a probability of exactly 0.5 is a no
        assert multilabel_f1(torch.tensor([[logit]]), torch.tensor([[1.0]]))["f1_micro"] == f1


def test_f1_is_undefined_if_nothing_is_predicted_or_true() -> None:
    """Except the F1 over samples, each of which counts as 0, as published."""
    values = multilabel_f1(torch.full((3, 5), NO), torch.zeros(3, 5))
    undefined = dict.fromkeys(("f1_macro", "f1_micro", "f1_weighted"), math.nan)
    assert values == pytest.approx({**undefined, "f1_samples": 0.0}, nan_ok=True)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("samples", [0, 4])
def test_all_metrics_are_undefined_without_samples_or_finite_logits(name: str, samples: int) -> None:
    logits = torch.full((samples, TASKS[name].n_classes), math.nan)
    labels = torch.zeros_like(logits) if name == "mmimdb" else torch.zeros(samples, dtype=torch.long)
    assert all(math.isnan(value) for value in TASKS[name].metrics(logits, labels).values())


def test_balanced_accuracy_leaves_out_absent_classes() -> None:
    """By hand: class 0 is right in 2 of 3, class 1 in 1 of 1, class 2 is predicted once and never true."""
    logits = torch.eye(3)[[0, 0, 2, 1]]
    found = class_accuracy(logits, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx({"accuracy": 3 / 4, "f1_macro": (4 / 5 + 1 + 0) / 3, "balanced_accuracy": 5 / 6})


@pytest.mark.parametrize("seed", range(10))
def test_auroc_is_the_share_of_ordered_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 60, (), generator=generator))
    margin = torch.randint(-3, 4, (n,), generator=generator).float()  # few values, so many ties
    logits = torch.stack([-margin / 2, margin / 2], dim=1)
    labels = torch.randint(0, 2, (n,), generator=generator)
    expected = slow_auroc(margin.tolist(), labels.tolist())
    assert auroc_and_accuracy(logits, labels)["auroc"] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_auroc_equals_values_computed_by_hand() -> None:
    def auroc(logits: list[list[float]], labels: list[int]) -> float:
        return auroc_and_accuracy(torch.tensor(logits), torch.tensor(labels))["auroc"]

    for margins, labels, expected in (
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0),
        ([5, 5, 5], [0, 1, 0], 1 / 2),
        ([1, 2, 2, 3], [0, 1, 0, 1], 3.5 / 4),
        ([40, 50], [0, 1], 1),  # both probabilities are rounded to 1, which would be a tie
    ):
        assert auroc([[0.0, margin] for margin in margins], labels) == pytest.approx(expected)
    assert auroc([[9.0, 5.0], [0.0, 1.0]], [0, 1]) == pytest.approx(1), "the probability counts, not the logit"


def test_macro_f1_equals_torchmetrics_except_for_absent_classes() -> None:
    """torchmetrics counts a class that does not occur as 0; the published numbers leave it out."""
    generator = torch.Generator().manual_seed(0)
    labels, logits = torch.randint(0, 5, (200,), generator=generator), torch.randn(200, 5, generator=generator)
    found = macro_f1_and_accuracy(logits, labels)["f1_macro"]
    assert found == pytest.approx(float(multiclass_f1_score(logits, labels, 5, average="macro")), abs=1e-6)
    with_absent = torch.cat([logits, torch.full((200, 1), -99.0)], 1)
    assert macro_f1_and_accuracy(with_absent, labels)["f1_macro"] == found


@pytest.mark.parametrize("label", [0, 1])
def test_auroc_of_one_class_is_undefined(label: int) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    values = auroc_and_accuracy(logits, torch.full((3,), label))
    assert math.isnan(values["auroc"]) and values["accuracy"] == (2 if label else 1) / 3


def test_each_task_reports_the_metric_that_selects_checkpoints() -> None:
    cases = {"mmimdb": "f1_macro", "food101": "accuracy", "hatememes": "auroc"}
    cases |= dict.fromkeys(("mosi", "mosei", "sims", "vla"), "mae")
    assert {name: TASKS[name].monitor for name in cases} == cases
    for task in TASKS.values():
        labels = torch.ones(4, task.n_classes) if task.name == "mmimdb" else torch.tensor([0, 1, 1, 0])
        labels = labels.float() if task.monitor == "mae" else labels
        values = task.metrics(torch.randn(4, task.n_classes), labels)
        assert task.monitor in values
        assert all(0 <= value <= 1 for name, value in values.items() if name not in NO_SHARES)


def test_task_losses_are_cross_entropies() -> None:
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0)), math.log(2)]
    assert TASKS["mmimdb"].loss(logits, labels).item() == pytest.approx(sum(terms) / 4)
    by_class = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(2.0))]
    for name in ("food101", "hatememes"):
        assert TASKS[name].loss(logits, torch.tensor([0, 1])).item() == pytest.approx(sum(by_class) / 2)
