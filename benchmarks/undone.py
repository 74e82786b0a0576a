"""Work that is left out within the model, put back: what it would cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from clip.modules.vision_transformer_memory import ResidualAttentionBlock

_FORWARD = ResidualAttentionBlock.forward


def _whole_block(
    self: ResidualAttentionBlock,
    x_BLD: Tensor,
    prefix_BP2D: Tensor | None = None,
    mask: Tensor | None = None,
    read_B: Tensor | None = None,
) -> Tensor:
    y_BLD = _FORWARD(self, x_BLD, prefix_BP2D, mask)
    return y_BLD if read_B is None else y_BLD[torch.arange(len(read_B), device=read_B.device), read_B][:, None]


@contextmanager
def whole_last_block() -> Iterator[None]:
    """Computes all positions of the last block, of which one is read."""
    with patch.object(ResidualAttentionBlock, "forward", _whole_block):
        yield
