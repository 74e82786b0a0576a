"""Images as the model takes them (docs/method.md section 1)."""

import functools

import numpy as np
import torch
from torch import Tensor

from vilt.images import square_image

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes, size: int) -> Tensor:
    """`square_image` as a tensor: uint8 (3, size, size)."""
    return torch.from_numpy(np.array(square_image(data, size))).permute(2, 0, 1).contiguous()


def normalise(image_u8: Tensor) -> Tensor:
    """uint8 images (…, 3, R, R) as CLIP takes them: scaled to [0, 1], mean subtracted, divided by the deviation."""
    mean, std = _mean_and_std(image_u8.device)
    return (image_u8.float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`, sent there once: sending makes the host wait for it."""
    return torch.tensor(IMAGE_MEAN, device=device).view(3, 1, 1), torch.tensor(IMAGE_STD, device=device).view(3, 1, 1)
