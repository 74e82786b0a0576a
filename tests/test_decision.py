"""The logit offset chosen on validation data: compared with a slow search, and cases without a choice."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from common.text import AT_OFFSET
from engine.decision import best_offset, with_offset
from engine.metrics import multilabel_f1
from engine.tasks import TASKS


def macro_f1(logits: Tensor, labels: Tensor, offset: float) -> float:
    return multilabel_f1(logits.double() + offset, labels)["f1_macro"]


def slow_best(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Best macro F1 over offsets in every gap between logits, and the least magnitude of an offset that attains it."""
    ends = sorted({-value for value in logits.double().flatten().tolist()})
    tried = [0.0, ends[0] - 1, ends[-1] + 1, *((a + b) / 2 for a, b in itertools.pairwise(ends))]
    found = [(value, abs(offset)) for offset in tried if not math.isnan(value := macro_f1(logits, labels, offset))]
    best = max(value for value, _ in found)
    return best, min(distance for value, distance in found if value > best - 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_no_offset_is_better(seed: int) -> None:
    """Also with classes that never occur, few distinct logits, and logits all on one side of 0."""
    generator = torch.Generator().manual_seed(seed)
    n, c = int(torch.randint(1, 40, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator))
    labels = (torch.rand(n, c, generator=generator) < 0.15).to(torch.uint8)
    labels[0, 0] = 1
    logits = torch.randn(n, c, generator=generator) + labels - (0, 1.5, 8, -8)[seed % 4]
    if seed % 3 == 0:
        logits = logits.round()
    offset = best_offset(logits, labels)
    assert offset is not None
    best, distance = slow_best(logits, labels)
    assert macro_f1(logits, labels, offset) == pytest.approx(best, abs=1e-9)
    assert abs(offset) == pytest.approx(distance, abs=1e-9)


def test_offsets_computed_by_hand() -> None:
    """In the first case, class 1 needs an offset above 1.5, and up to 3 nothing else changes; the second needs none."""
    labels = torch.tensor([[1, 0], [0, 1]])
    assert best_offset(torch.tensor([[1.0, -3], [-4, -1.5]]), labels) == pytest.approx((1.5 + 3) / 2)
    assert best_offset(torch.tensor([[1.0, -3], [-4, 0.5]]), labels) == 0


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.randn(3, 2), torch.zeros(3, 2)),
        (torch.tensor([[1.0, math.nan]]), torch.ones(1, 2)),
        (torch.zeros(0, 2), torch.zeros(0, 2)),
    ],
)
def test_without_a_defined_score_no_offset_is_chosen(logits: Tensor, labels: Tensor) -> None:
    assert best_offset(logits, labels) is None


def test_the_offset_metric_is_the_macro_f1_of_shifted_logits_and_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(30, 23, generator=generator) < 0.3).to(torch.uint8)
    logits = torch.randn(30, 23, generator=generator)
    found = with_offset(TASKS["mmimdb"], 0.7).metrics(logits, labels)
    assert found.pop(AT_OFFSET) == pytest.approx(macro_f1(logits, labels, 0.7), abs=1e-12)
    assert found == TASKS["mmimdb"].metrics(logits, labels)
    assert with_offset(TASKS["mmimdb"], None) is TASKS["mmimdb"], "a checkpoint from before offsets were chosen"
    assert with_offset(TASKS["food101"], 0.7) is TASKS["food101"], "one class per sample: an offset changes nothing"
