"""What blocks do between their matrix products; compiled for a GPU, where otherwise each operation reads and writes all
activations."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), of which autograd keeps one tensor instead of two."""
    return F.silu(1.702 * x) / 1.702


def quick_gelu_in_one(x: Tensor) -> Tensor:
    """The same with one division instead of two, which is faster where all is one pass over memory."""
    return x * torch.sigmoid(1.702 * x)


def normed(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """The norm of x, in the type of the matrix products that follow."""
    return norm(x).to(dtype)


def added_and_normed(x: Tensor, y: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    x = x + y
    return x, norm(x).to(dtype)


class Passes(NamedTuple):
    """Ways of computing the three."""

    quick_gelu: Callable[[Tensor], Tensor]
    normed: Callable[[Tensor, nn.LayerNorm, torch.dtype], Tensor]
    added_and_normed: Callable[[Tensor, Tensor, nn.LayerNorm, torch.dtype], tuple[Tensor, Tensor]]


PLAIN = Passes(quick_gelu, normed, added_and_normed)


@cache
def compiled() -> Passes:
    """The three, compiled for a GPU: each is one pass over memory.

    Raises:
        Exception: of many types, where they cannot be: there is no C compiler, or no Triton.
    """
    torch._dynamo.config.recompile_limit = 32  # by width, for one position and for more, with gradients and without
    in_one = PLAIN._replace(quick_gelu=quick_gelu_in_one)
    passes = Passes._make(torch.compile(each, dynamic=True) for each in in_one)
    passes.normed(torch.zeros(2, 2, 64, device="cuda"), nn.LayerNorm(64, device="cuda"), torch.bfloat16)
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled later, for another width, runs as it is
    return passes
