"""Images as the loaders give them (METHOD.md section 1)."""

import numpy as np
import torch
from torch import Tensor

from vilt.images import square_image


def decode_image(data: bytes, size: int) -> Tensor:
    """`square_image` as a tensor: uint8 (3, size, size)."""
    return torch.from_numpy(np.array(square_image(data, size))).permute(2, 0, 1).contiguous()
