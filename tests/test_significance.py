"""Paired tests against slow loops, the binomial distribution, and values computed by hand."""

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
    """Logits of Hateful Memes, all of class 1, that are right where there is a 1."""
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
        ("1111111101", "0000000011", 2 * (1 + 9) / 2**9),  # McNemar's exact test: 8 against 1, and one that is equal
        ("1110", "1011", 1.0),
        ("101", "101", 1.0),
    ],
)
def test_the_exact_test_of_tiny_samples(one: str, other: str, p: float) -> None:
    assert p_of_hits(one, other) == pytest.approx(p, abs=1e-12)
    assert p_of_hits(other, one) == pytest.approx(p, abs=1e-12)


def test_drawn_permutations_are_near_the_binomial_test_of_larger_samples() -> None:
    """40 against 20 samples that one alone has right."""
    one, other = "1" * 40 + "0" * 20 + "1" * 100, "0" * 40 + "1" * 20 + "1" * 100
    exact = 2 * sum(math.comb(60, k) for k in range(21)) / 2**60
    assert p_of_hits(one, other) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert p_of_hits("1" * 200, "0" * 200) == 1 / 10_001
    assert p_of_hits("10" * 50 + "1", "01" * 50 + "0") == pytest.approx(1, abs=0.01), "and stops early"


def ranks(scores: list[float]) -> list[float]:
    return [sum(other < score for other in scores) + sum(other == score for other in scores) / 2 for score in scores]


def slow_p(task: str, pairs: list[Pair], tables: list[np.ndarray], rows: np.ndarray) -> tuple[float, float]:
    """The difference and its exact p-value, each permutation with metrics of its own."""
    metric, differences = measure_of(task), []
    labels = pairs[0][0].labels
    once = torch.ones(1, len(labels), dtype=torch.float64)
    for swapped in itertools.product([False, True], repeat=int(rows.max()) + 1):
        mine = torch.tensor([swapped[row] for row in rows])[:, None]
        values = []
        for one, other in pairs:
            for table in tables:
                sides = one.at(table), other.at(table)
                if task == "hatememes":
                    scores = [torch.tensor(ranks((side[:, 1] - side[:, 0]).tolist())) for side in sides]
                    sides = tuple(torch.stack([-score, score], 1).double() / 100 for score in scores)  # type: ignore[assignment]
                first, second = torch.where(mine, sides[1], sides[0]), torch.where(mine, sides[0], sides[1])
                figures = [metric.resampled(side, labels, once).item() for side in (first, second)]
                values.append(figures[0] - figures[1])
        differences.append(statistics.fmean(values))
    value = differences[0]
    return value, statistics.fmean(abs(other) >= abs(value) - 1e-9 for other in differences)


@pytest.mark.parametrize("task", ["mmimdb", "food101", "hatememes", "mosi"])
def test_the_permutation_test_is_that_of_a_slow_loop(task: str) -> None:
    """Of two pairs of models at two tables; rows with several samples change sides together."""
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


@pytest.mark.parametrize("task", ["mmimdb", "food101", "mosi", "sims"])
def test_figures_after_a_swap_are_those_of_the_models_that_it_makes(task: str) -> None:
    (one, labels), (other, _) = made_up(TASKS[task], 30), made_up(TASKS[task], 30, seed=1)
    other = other + 0.25  # of numbers, so that sums of both start elsewhere
    swaps = torch.randint(0, 2, (5, 30), generator=torch.Generator().manual_seed(0))
    once = torch.ones(1, 30, dtype=torch.float64)
    for name, measure in TASKS[task].metrics.measures.items():
        found = measure.swapper(one, other, labels, torch.arange(30))(swaps.float())
        for figures, own, theirs in zip(found, (one, other), (other, one), strict=True):
            models = [torch.where(swap[:, None], theirs, own) for swap in swaps.bool()]
            expected = [measure.resampled(model, labels, once).item() for model in models]
            assert figures.tolist() == pytest.approx(expected, abs=1e-12), name


def test_the_interval_of_a_difference_is_paired_and_over_seeds_too() -> None:
    """Two models that fail on the same samples differ by less than each is uncertain; seeds that disagree count."""
    labels = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(0))
    right = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7
    measure, table = TASKS["hatememes"].metrics.measures["accuracy"], [np.zeros(400, int)]

    def values_of(better: int) -> Tensor:
        """Resampled accuracies of a model that has `better` more samples right."""
        more = right.clone()
        more[(~right).nonzero()[:better]] = True
        logits = torch.nn.functional.one_hot(torch.where(more, labels, 1 - labels), 2).float()
        return bootstrap(measure, split_of([logits], labels), table, 1000)

    one_R, same_R, better_R = values_of(0), values_of(0), values_of(12)
    low, high = difference_interval(better_R - one_R, 0.03, 400)
    spread = np.quantile(better_R.numpy(), [0.025, 0.975])
    assert 0 < low < 0.03 < high and high - low < 0.5 * (spread[1] - spread[0])
    assert difference_interval(same_R - one_R, 0.0, 400) == pytest.approx((-0.0095, 0.0095), abs=1e-4)  # not (0, 0)
    low, high = difference_interval(torch.cat([better_R - one_R, one_R - better_R, same_R - one_R]), 0.0, 400)
    assert low < -0.015 and high > 0.015


def test_undefined_differences() -> None:
    values = torch.tensor([[0.1, math.nan, 0.3]])
    assert difference_interval(values, 0.2, 3) == pytest.approx((0.105, 0.295))
    assert all(map(math.isnan, difference_interval(values * math.nan, 0.2, 3)))
    labels = torch.ones(4, dtype=torch.long)
    pair = split_of([hits("1010")], labels), split_of([hits("1111")], labels)
    assert math.isnan(permutation_p(measure_of("hatememes"), [pair], [np.zeros(4, int)], math.nan, 100))


def test_holm() -> None:
    """The example of Holm's paper's kind: each p times the number of hypotheses left, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([math.nan, 0.02, 0.03]) == pytest.approx([math.nan, 0.04, 0.04], nan_ok=True)
    assert holm([]) == []
