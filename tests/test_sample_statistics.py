"""Figures by class, confusions, ROC and bootstrap against slow, obvious versions."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.metrics import auroc_and_accuracy
from engine.sample_statistics import BOOTSTRAP_SEED, CONFUSIONS, ROC_POINTS, class_figures, confidence, confusions, roc
from engine.tasks import TASKS, Task

DISHES = [f"dish {number}" for number in range(101)]


def made_up(task: Task, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels: better than chance, with ties, rare classes and classes that do not occur."""
    generator = torch.Generator().manual_seed(seed)
    if task.name == "mmimdb":
        labels = (torch.rand(samples, 23, generator=generator) < torch.linspace(0, 0.4, 23)).to(torch.uint8)
        target = labels.float()
        target[:, -3:] = 0  # are true and never predicted
    else:
        labels = torch.randint(0, max(2, task.n_classes - 5), (samples,), generator=generator)
        target = torch.nn.functional.one_hot(labels, task.n_classes).float()
    logits = 2 * target - 1.5 + torch.randn(samples, task.n_classes, generator=generator)
    return (logits * 4).round() / 4, labels


def predictions(logits: Tensor, labels: Tensor) -> tuple[list[set[int]], list[set[int]]]:
    """Predicted and true classes of each sample."""
    if labels.ndim == 2:
        predicted = [{c for c, x in enumerate(row) if 1 / (1 + math.exp(-x)) > 0.5} for row in logits.tolist()]
        return predicted, [{c for c, x in enumerate(row) if x == 1} for row in labels.tolist()]
    return [{max(range(len(row)), key=row.__getitem__)} for row in logits.tolist()], [{c} for c in labels.tolist()]


@pytest.mark.parametrize("name", TASKS)
def test_figures_by_class(name: str) -> None:
    logits, labels = made_up(TASKS[name], 60)
    predicted, true = predictions(logits, labels)
    found = class_figures(logits, labels)
    assert len(found) == TASKS[name].n_classes
    for number, figures in enumerate(found):
        hits = sum(number in p and number in t for p, t in zip(predicted, true, strict=True))
        n_predicted, support = sum(number in p for p in predicted), sum(number in t for t in true)
        precision = hits / n_predicted if n_predicted else 0.0
        recall = hits / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert figures == {"precision": precision, "recall": recall, "f1": pytest.approx(f1), "support": support}


def test_confusions_are_the_most_frequent_pairs() -> None:
    logits, labels = made_up(TASKS["food101"], 700)
    predicted, true = predictions(logits, labels)
    pairs = Counter((min(t), min(p)) for p, t in zip(predicted, true, strict=True) if p != t)
    expected = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    found = confusions(logits, labels, DISHES)
    assert len(pairs) > CONFUSIONS, "some should be left out"
    assert found == [
        {
            "true": DISHES[true],
            "predicted": DISHES[predicted],
            "count": count,
            "share": count / int((labels == true).sum()),
        }
        for (true, predicted), count in expected
    ]
    right = torch.tensor([3, 1, 4, 1])
    assert confusions(torch.nn.functional.one_hot(right, 101).float(), right, DISHES) == []


@pytest.mark.parametrize("samples", [6, 50, 3000])
def test_roc(samples: int) -> None:
    """Each point is what its threshold gives; the area under them is the AUROC, nearly so where points are left out."""
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(0, 2, (samples,), generator=generator)
    margin = labels + 1.5 * torch.randn(samples, generator=generator)
    margin = margin if samples > 1000 else (margin * 3).round() / 3  # ties
    logits = torch.stack([-margin, margin], 1)
    curve = roc(logits, labels)
    assert curve is not None
    fpr, tpr, thresholds = (curve[name] for name in ("fpr", "tpr", "threshold"))
    assert len(fpr) == ROC_POINTS if samples > 1000 else 3 <= len(fpr) <= ROC_POINTS
    assert (fpr[0], tpr[0], thresholds[0]) == (0.0, 0.0, math.inf)
    assert (fpr[-1], tpr[-1]) == (1.0, 1.0)
    scores = logits.double().softmax(-1)[:, 1]
    for point in zip(fpr, tpr, thresholds, strict=True):
        positive = scores >= point[2]
        assert point[:2] == tuple(float(positive[labels == label].double().mean()) for label in (0, 1))
    assert thresholds == sorted(thresholds, reverse=True)
    auroc = auroc_and_accuracy(logits, labels)["auroc"]
    assert float(np.trapezoid(tpr, fpr)) == pytest.approx(auroc, abs=1e-6 if samples < 1000 else 2e-3)


def test_roc_of_one_class_alone() -> None:
    assert roc(torch.randn(5, 2), torch.ones(5, dtype=torch.long)) is None


@pytest.mark.parametrize("name", TASKS)
def test_the_bootstrap_is_that_of_a_slow_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the resamples do not fit into memory at once."""
    task, samples, resamples = TASKS[name], 30, 25
    two_sets, labels = [made_up(task, samples, seed)[0] for seed in (0, 1)], made_up(task, samples)[1]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [rng.integers(samples, size=samples) for _ in range(resamples)]
    for counts_at_once in (1000 * samples, 7 * samples):
        monkeypatch.setattr("engine.sample_statistics.COUNTS_AT_ONCE", counts_at_once)
        for logits, found in zip(two_sets, confidence(task, two_sets, labels, resamples), strict=True):
            values = [task.metrics(logits[which], labels[which]) for which in drawn]
            for metric, interval in found.items():
                expected = np.percentile([value[metric] for value in values], [2.5, 97.5])
                assert interval == pytest.approx(expected.tolist(), abs=1e-12)


def test_the_interval_covers_where_theory_says_so() -> None:
    """Accuracy of a coin: the interval of 400 samples is 0.98 / sqrt(400) to each side, and covers in 95 % of cases."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        labels = torch.randint(0, 2, (400,), generator=generator)
        logits = torch.nn.functional.one_hot(torch.randint(0, 2, (400,), generator=generator), 3).float()
        (found,) = confidence(TASKS["food101"], [logits], labels, 200)
        low, high = found["accuracy"]
        assert high - low == pytest.approx(2 * 0.98 / math.sqrt(400), rel=0.25)
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100
