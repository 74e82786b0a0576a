"""Per-class metrics, confusions, ROC and bootstrap equal slow, obvious versions."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.metrics import auroc_and_accuracy
from engine.sample_statistics import (
    BOOTSTRAP_SEED,
    CONFUSIONS,
    ROC_POINTS,
    bootstrap,
    class_figures,
    confusions,
    interval,
    roc,
)
from engine.stored_logits import SplitLogits
from engine.tasks import TASKS, Task
from tests.conftest import Patch

DISHES = [f"dish {number}" for number in range(101)]


def made_up(task: Task, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels, better than chance, with ties, rare classes and absent ones."""
    generator = torch.Generator().manual_seed(seed)
    if task.n_classes == 1:
        numbers = (torch.randn(samples, generator=generator) * 7).round() / 5
        return numbers[:, None] + torch.randn(samples, 1, generator=generator), numbers
    if task.name == "mmimdb":
        labels = (torch.rand(samples, 23, generator=generator) < torch.linspace(0, 0.4, 23)).to(torch.uint8)
        target = labels.float()
        target[:, -3:] = 0  # true but never predicted
    else:
        labels = torch.randint(0, max(2, task.n_classes - 5), (samples,), generator=generator)
        target = torch.nn.functional.one_hot(labels, task.n_classes).float()
    logits = 2 * target - 1.5 + torch.randn(samples, task.n_classes, generator=generator)
    return (logits * 4).round() / 4, labels


def predictions(logits: Tensor, labels: Tensor) -> tuple[list[set[int]], list[set[int]]]:
    """The predicted and the true classes of each sample."""
    if labels.ndim == 2:
        predicted = [{c for c, x in enumerate(row) if 1 / (1 + math.exp(-x)) > 0.5} for row in logits.tolist()]
        return predicted, [{c for c, x in enumerate(row) if x == 1} for row in labels.tolist()]
    return [{max(range(len(row)), key=row.__getitem__)} for row in logits.tolist()], [{c} for c in labels.tolist()]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.n_classes > 1])
def test_class_metrics_equal_counts_by_hand(name: str) -> None:
    logits, labels = made_up(TASKS[name], 60)
    predicted, true = predictions(logits, labels)
    found = class_figures(logits, labels)
    assert len(found) == TASKS[name].n_classes
    for number, figures in enumerate(found):
        hits = sum(number in p and number in t for p, t in zip(predicted, true, strict=True))
        n_predicted, support = sum(number in p for p in predicted), sum(number in t for t in true)
        expected = {
            "precision": hits / n_predicted if n_predicted else math.nan,
            "recall": hits / support if support else math.nan,
            "f1": 2 * hits / (n_predicted + support) if n_predicted + support else math.nan,
            "support": support,
        }
        assert figures == pytest.approx(expected, nan_ok=True)


def test_confusions_are_the_most_frequent_pairs() -> None:
    logits, labels = made_up(TASKS["food101"], 700)
    predicted, true = predictions(logits, labels)
    pairs = Counter((min(t), min(p)) for p, t in zip(predicted, true, strict=True) if p != t)
    expected = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    found = confusions(logits, labels, DISHES)
    assert len(pairs) > CONFUSIONS, "some should be left out"
    cells = [(one["true"], one["predicted"], one["count"], one["share"]) for one in found]
    assert cells == [(DISHES[t], DISHES[p], n, n / int((labels == t).sum())) for (t, p), n in expected]
    right = torch.tensor([3, 1, 4, 1])
    assert confusions(torch.nn.functional.one_hot(right, 101).float(), right, DISHES) == []


@pytest.mark.parametrize("samples", [6, 50, 3000])
def test_each_point_of_the_roc_curve_is_that_of_its_threshold(samples: int) -> None:
    """The area under the points is the AUROC, or close to it if points are left out."""
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
    scores = (logits[:, 1].double() - logits[:, 0].double()).sigmoid()
    for point in zip(fpr, tpr, thresholds, strict=True):
        positive = scores >= point[2]
        assert point[:2] == tuple(float(positive[labels == label].double().mean()) for label in (0, 1))
    assert thresholds == sorted(thresholds, reverse=True)
    auroc = auroc_and_accuracy(logits, labels)["auroc"]
    assert float(np.trapezoid(tpr, fpr)) == pytest.approx(auroc, abs=1e-6 if samples < 1000 else 2e-3)
    assert roc(torch.randn(5, 2), torch.ones(5, dtype=torch.long)) is None, "undefined for one class"


def split_of(logits: Sequence[Tensor], labels: Tensor, rows: np.ndarray | None = None) -> SplitLogits:
    rows = np.arange(len(labels)) if rows is None else rows
    return SplitLogits(rows, int(rows.max()) + 1, labels, torch.stack(list(logits)))


@pytest.mark.parametrize("name", ["mmimdb", "food101", "hatememes", "mosi"])
def test_the_bootstrap_equals_a_slow_loop(name: str, monkeypatch: Patch) -> None:
    """Also if the resamples are computed in parts, and if rows have several samples."""
    task, samples, resamples = TASKS[name], 30, 25
    two_sets, labels = [made_up(task, samples, seed)[0] for seed in (0, 1)], made_up(task, samples)[1]
    for logits in two_sets:
        logits[1:] *= 0.01  # predictions that hardly differ, except the first, which correlations start from
    rows = np.sort(np.arange(samples) * 2 // 3)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [rng.integers(20, size=20) for _ in range(resamples)]
    samples_of = [[sample for unit in which for sample in np.flatnonzero(rows == unit).tolist()] for which in drawn]
    split, tables = split_of(two_sets, labels, rows), [np.full(20, kind) for kind in (0, 1)]
    for counts_at_once in (1000 * samples, 7 * samples):
        monkeypatch.setattr("engine.sample_statistics.COUNTS_AT_ONCE", counts_at_once)
        for metric, measure in task.metrics.measures.items():
            found = bootstrap(measure, split, tables, resamples)
            for logits, values in zip(two_sets, found.tolist(), strict=True):
                expected = [task.metrics(logits[which], labels[which])[metric] for which in samples_of]
                assert values == pytest.approx(expected, abs=1e-7)


def test_the_interval_has_its_theoretical_width_and_coverage() -> None:
    """For a fair coin and 400 samples, it reaches 0.98 / sqrt(400) to each side and covers 0.5 in 95 % of cases."""
    generator, measure = torch.Generator().manual_seed(0), TASKS["food101"].metrics.measures["accuracy"]
    covered = 0
    for _ in range(100):
        labels = torch.randint(0, 2, (400,), generator=generator)
        logits = torch.nn.functional.one_hot(torch.randint(0, 2, (400,), generator=generator), 101).float()
        values = bootstrap(measure, split_of([logits], labels), [np.zeros(400, int)], 200)[0]
        low, high, undefined = interval(0.5, values, 400)
        assert high - low == pytest.approx(2 * 0.98 / math.sqrt(400), rel=0.25) and undefined == 0
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0, 0.0713), (1.0, 0.9287, 1), (0.5, 0.3664, 0.6336)])
def test_an_interval_never_shrinks_to_a_point(value: float, low: float, high: float) -> None:
    """If all resamples agree, it is Wilson's interval; values from tables for 50 samples."""
    assert interval(value, torch.full((20,), value), 50) == pytest.approx((low, high, 0), abs=1e-4)


@pytest.mark.parametrize("value", [-0.25, 1.25])
def test_figures_that_are_no_share_keep_their_point(value: float) -> None:
    """A correlation may be negative, and a mean error above 1."""
    assert interval(value, torch.full((20,), value), 50) == (value, value, 0)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    values = torch.tensor([0.2, math.nan, 0.4, math.nan, 0.4])
    assert interval(0.3, values, 5) == pytest.approx((*np.quantile([0.2, 0.4, 0.4], [0.025, 0.975]), 2))
    assert interval(math.nan, values, 5)[:2] == pytest.approx((math.nan, math.nan), nan_ok=True)
