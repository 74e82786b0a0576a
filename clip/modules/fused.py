"""The operations between a block's matrix products, compiled for a GPU, where each would otherwise read and write all
activations."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), in a form for which autograd saves one tensor instead of two."""
    return F.silu(1.702 * x) / 1.702


def quick_gelu_in_one(x: Tensor) -> Tensor:
    """The same function with one division instead of two, which is faster if it compiles to one pass over memory."""
    return x * torch.sigmoid(1.702 * x)


def normed(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """The normalised x, in the dtype of the matrix products that follow."""
    return norm(x).to(dtype)


def added_and_normed(x: Tensor, y: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + y, and the normalised sum in `dtype`."""
    x = x + y
    return x, norm(x).to(dtype)


class BlockOps(NamedTuple):
    """Implementations of the three operations."""

    quick_gelu: Callable[[Tensor], Tensor]
    normed: Callable[[Tensor, nn.LayerNorm, torch.dtype], Tensor]
    added_and_normed: Callable[[Tensor, Tensor, nn.LayerNorm, torch.dtype], tuple[Tensor, Tensor]]


PLAIN = BlockOps(quick_gelu, normed, added_and_normed)


@cache
def compiled() -> BlockOps:
    """The three operations compiled for a GPU, each to one pass over memory.

    Raises:
        Exception: they cannot be compiled, for example without a C compiler or Triton; the types vary.
    """
    torch._dynamo.config.recompile_limit = 32  # by width, for one position and for more, with gradients and without
    in_one = PLAIN._replace(quick_gelu=quick_gelu_in_one)
    ops = BlockOps._make(torch.compile(each, dynamic=True) for each in in_one)
    ops.normed(torch.zeros(2, 2, 64, device="cuda"), nn.LayerNorm(64, device="cuda"), torch.bfloat16)
    torch._dynamo.config.suppress_errors = True  # if a later width fails to compile, run it uncompiled
    return ops
