"""Dropout on a CPU, whose rate is exact over many calls."""

import pytest
import torch

from common.dropout import dropout


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_values_are_lost_at_the_rate_and_by_themselves(rate: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(400, 9_999)
    lost = torch.stack([dropout(row, rate, training=True) for row in ones]) == 0
    # Of four million values that are lost at 0.1 the deviation of the share is 0.00015, of the pairs 0.00005.
    assert float(lost.float().mean()) == pytest.approx(rate, abs=6e-4)
    neighbours = lost[:, 1:] & lost[:, :-1]
    assert float(neighbours.float().mean()) == pytest.approx(rate**2, abs=3e-4)
    assert float((lost[1:] & lost[:-1]).float().mean()) == pytest.approx(rate**2, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_values_are_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 11, 13, dtype=dtype, requires_grad=True)
    dropped = dropout(x, 0.1, training=True)
    dropped.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, dropped)
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) == {0, float(torch.tensor(1 / 0.9, dtype=dtype))}


def test_in_evaluation_nothing_is_lost() -> None:
    x = torch.ones(5)
    assert dropout(x, 0.1, training=False) is x
