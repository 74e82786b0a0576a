"""Dropout whose random numbers cost little on any CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**8


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """`F.dropout`, of a rate below 0.99.

    On CPUs that are not Intel's that one draws a double for each value, one by one: a third of a training step.
    """
    if not training:
        return x
    return x * kept(x, rate) if x.device.type == "cpu" else F.dropout(x, rate)


def kept(x: Tensor, rate: float) -> Tensor:
    """What dropout multiplies with, on a CPU: of the type and shape of x.

    Eight random bits decide on each value. They lose one level more than `LEVELS * rate` as often as makes the rate of
    each value exact over all calls.
    """
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.uint8)[: x.numel()].view(x.shape)
    lost = (LEVELS * rate + torch.rand(())).to(torch.uint8)
    return torch.ge(bits, lost, out=torch.empty(x.shape, dtype=x.dtype)).div_(1 - rate)
