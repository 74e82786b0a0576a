"""Dropout on a CPU, with the exact rate over many calls."""

import pytest
import torch

from common.dropout import dropout


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_values_are_dropped_independently_at_the_rate(rate: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(400, 9_999)
    dropped = torch.stack([dropout(row, rate, training=True) for row in ones]) == 0
    # For four million values dropped at 0.1, the standard deviation is 0.00015 for the share and 0.00005 for pairs.
    assert float(dropped.float().mean()) == pytest.approx(rate, abs=6e-4)
    neighbours = dropped[:, 1:] & dropped[:, :-1]
    assert float(neighbours.float().mean()) == pytest.approx(rate**2, abs=3e-4)
    assert float((dropped[1:] & dropped[:-1]).float().mean()) == pytest.approx(rate**2, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_only_through_kept_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 11, 13, dtype=dtype, requires_grad=True)
    dropped = dropout(x, 0.1, training=True)
    dropped.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, dropped)
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) == {0, float(torch.tensor(1 / 0.9, dtype=dtype))}


def test_evaluation_drops_nothing() -> None:
    x = torch.ones(5)
    assert dropout(x, 0.1, training=False) is x
