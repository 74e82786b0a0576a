"""Dropout whose random numbers are cheap on any CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**8


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """`F.dropout` for rates below 0.99.

    On non-Intel CPUs, PyTorch's own draws a double for each value, one at a time, which takes a third of a training
    step.
    """
    if not training:
        return x
    return x * kept(x, rate) if x.device.type == "cpu" else F.dropout(x, rate)


def kept(x: Tensor, rate: float) -> Tensor:
    """The mask that dropout multiplies `x` by, scaled by 1 / (1 - rate); on a CPU, with the dtype and shape of `x`.

    Eight random bits decide each value, so one call drops a whole number of the LEVELS levels. `LEVELS * rate` is
    rounded up or down at random, which makes the rate exact on average over calls.
    """
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.uint8)[: x.numel()].view(x.shape)
    lost = (LEVELS * rate + torch.rand(())).to(torch.uint8)
    return torch.ge(bits, lost, out=torch.empty(x.shape, dtype=x.dtype)).div_(1 - rate)
