"""Paired tests equal slow loops, the binomial distribution, and values computed by hand."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.metrics import Measure
from engine.sample_statistics import bootstrap
from engine.significance import Pair, difference_interval, holm, permutation_p
from engine.tasks import TASKS
from tests.test_sample_statistics import made_up, split_of


def measure_of(task: str) -> Measure:
    return TASKS[task].metrics.measures[TASKS[task].monitor]


def hits(right: str) -> Tensor:
    """Hateful Memes logits for samples of class 1, right at each "1" in `right`."""
    return torch.tensor([[0.0, 1.0] if digit == "1" else [1.0, 0.0] for digit in right])


def p_of_hits(one: str, other: str, permutations: int = 10_000) -> float:
    labels = torch.ones(len(one), dtype=torch.long)
    pair = split_of([hits(one)], labels), split_of([hits(other)], labels)
    value = (one.count("1") - other.count("1")) / len(one)
    tables = [np.zeros(len(one), int)]
    return permutation_p(TASKS["hatememes"].metrics.measures["accuracy"], [pair], tables, value, permutations)


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        ("11111", "00000", 2 / 2**5),
        ("1111111101", "0000000011", 2 * (1 + 9) / 2**9),  # McNemar's exact test: 8 against 1, and one tie
        ("1110", "1011", 1.0),
        ("101", "101", 1.0),
    ],
)
def test_p_values_of_tiny_samples_are_exact(one: str, other: str, p: float) -> None:
    assert p_of_hits(one, other) == pytest.approx(p, abs=1e-12)
    assert p_of_hits(other, one) == pytest.approx(p, abs=1e-12)


def test_p_values_of_larger_samples_are_close_to_the_binomial_test() -> None:
    """One model alone is right on 40 samples, the other alone on 20."""
    one, other = "1" * 40 + "0" * 20 + "1" * 100, "0" * 40 + "1" * 20 + "1" * 100
    exact = 2 * sum(math.comb(60, k) for k in range(21)) / 2**60
    assert p_of_hits(one, other) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert p_of_hits("1" * 200, "0" * 200) == 1 / 10_001
    assert p_of_hits("10" * 50 + "1", "01" * 50 + "0") == pytest.approx(1, abs=0.01), "and stops early"


def ranks(scores: list[float]) -> list[float]:
    return [sum(other < score for other in scores) + sum(other == score for other in scores) / 2 for score in scores]


def slow_p(task: str, pairs: list[Pair], tables: list[np.ndarray], rows: np.ndarray) -> tuple[float, float]:
    """The difference and its exact p-value; the metrics of each permutation are computed separately."""
    metric, differences = measure_of(task), []
    labels = pairs[0][0].labels
    once = torch.ones(1, len(labels), dtype=torch.float64)
    for swapped in itertools.product([False, True], repeat=int(rows.max()) + 1):
        swaps = torch.tensor([swapped[row] for row in rows])[:, None]
        values = []
        for one, other in pairs:
            for table in tables:
                sides = one.at(table), other.at(table)
                if task == "hatememes":
                    scores = [torch.tensor(ranks((side[:, 1] - side[:, 0]).tolist())) for side in sides]
                    sides = tuple(torch.stack([-score, score], 1).double() / 100 for score in scores)  # type: ignore[assignment]
                first, second = torch.where(swaps, sides[1], sides[0]), torch.where(swaps, sides[0], sides[1])
                figures = [metric.resampled(side, labels, once).item() for side in (first, second)]
                values.append(figures[0] - figures[1])
        differences.append(statistics.fmean(values))
    value = differences[0]
    return value, statistics.fmean(abs(other) >= abs(value) - 1e-9 for other in differences)


@pytest.mark.parametrize("task", ["mmimdb", "food101", "hatememes", "mosi"])
def test_the_permutation_test_equals_a_slow_loop(task: str) -> None:
    """With two pairs of models and two tables; the samples of a row are swapped together."""
    rows = np.array([0, 1, 1, 2, 3, 4, 4, 5])
    labels = made_up(TASKS[task], 8)[1]
    made = [[made_up(TASKS[task], 8, seed + kind)[0] for kind in (0, 1, 2)] for seed in (0, 3, 6, 9)]
    models = [split_of(logits, labels, rows) for logits in made]
    pairs = [(models[0], models[1]), (models[2], models[3])]
    tables = [np.array([0, 1, 2, 0, 1, 2]), np.array([2, 2, 0, 1, 1, 0])]
    value, p = slow_p(task, pairs, tables, rows)
    assert permutation_p(measure_of(task), pairs, tables, value, 64) == pytest.approx(p, abs=1e-12)
    drawn = permutation_p(measure_of(task), pairs, tables, value, 63)
    assert drawn == pytest.approx(p, abs=4 * math.sqrt(p / 63) + 1 / 64)


@pytest.mark.parametrize("task", ["mmimdb", "food101", "hatememes", "mosi", "sims"])
def test_metrics_after_a_swap_equal_those_of_the_swapped_models(task: str) -> None:
    """For AUROC, models swap ranks, and equal scores have their mean rank."""
    (one, labels), (other, _) = made_up(TASKS[task], 30), made_up(TASKS[task], 30, seed=1)
    other = other + 0.25  # in regression, so that the two models' sums differ
    swaps = torch.randint(0, 2, (5, 30), generator=torch.Generator().manual_seed(0))
    once = torch.ones(1, 30, dtype=torch.float64)
    for name, measure in TASKS[task].metrics.measures.items():
        a, b = one, other
        if name == "auroc":
            one, other = one.round(), other.round()
            a, b = (torch.tensor([[0, rank] for rank in ranks((x[:, 1] - x[:, 0]).tolist())]) for x in (one, other))
        found = measure.swapper(one, other, labels, torch.arange(30))(swaps.float())
        for figures, kept, swapped_in in zip(found, (a, b), (b, a), strict=True):
            models = [torch.where(swap[:, None], swapped_in, kept) for swap in swaps.bool()]
            expected = [measure.resampled(model, labels, once).item() for model in models]
            assert figures.tolist() == pytest.approx(expected, abs=1e-12), name


def test_the_interval_of_a_difference_is_paired_and_includes_seeds() -> None:
    """For models that fail on the same samples it is narrower than each one's own; disagreeing seeds widen it."""
    labels = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(0))
    right = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7
    measure, table = TASKS["hatememes"].metrics.measures["accuracy"], [np.zeros(400, int)]

    def accuracies(better: int) -> Tensor:
        """Resampled accuracies of a model that is right on `better` more samples."""
        more = right.clone()
        more[(~right).nonzero()[:better]] = True
        logits = torch.nn.functional.one_hot(torch.where(more, labels, 1 - labels), 2).float()
        return bootstrap(measure, split_of([logits], labels), table, 1000)

    one_R, same_R, better_R = accuracies(0), accuracies(0), accuracies(12)
    low, high = difference_interval(better_R - one_R, 0.03, 400)
    spread = np.quantile(better_R.numpy(), [0.025, 0.975])
    assert 0 < low < 0.03 < high and high - low < 0.5 * (spread[1] - spread[0])
    assert difference_interval(same_R - one_R, 0.0, 400) == pytest.approx((-0.0095, 0.0095), abs=1e-4)  # not (0, 0)
    low, high = difference_interval(torch.cat([better_R - one_R, one_R - better_R, same_R - one_R]), 0.0, 400)
    assert low < -0.015 and high > 0.015


def test_undefined_differences_are_left_out() -> None:
    values = torch.tensor([[0.1, math.nan, 0.3]])
    assert difference_interval(values, 0.2, 3) == pytest.approx((0.105, 0.295))
    assert all(map(math.isnan, difference_interval(values * math.nan, 0.2, 3)))
    labels = torch.ones(4, dtype=torch.long)
    pair = split_of([hits("1010")], labels), split_of([hits("1111")], labels)
    assert math.isnan(permutation_p(measure_of("hatememes"), [pair], [np.zeros(4, int)], math.nan, 100))


def test_holm_equals_values_computed_by_hand() -> None:
    """Each p is multiplied by the number of hypotheses left, and the results never decrease."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([math.nan, 0.02, 0.03]) == pytest.approx([math.nan, 0.04, 0.04], nan_ok=True)
    assert holm([]) == []
