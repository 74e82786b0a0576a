"""Images as the loaders give them (METHOD.md section 1)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilt.images import square_image


def decode_image(source: bytes | Image.Image, size: int) -> Tensor:
    """`square_image` as a tensor: uint8 (3, size, size)."""
    return torch.from_numpy(np.array(square_image(source, size))).permute(2, 0, 1).contiguous()
