"""CLIP's image transform (METHOD.md section 1), with Pillow."""

import functools
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes, size: int) -> Tensor:
    """RGB image of `data`, shorter side resized to `size` (bicubic), centre crop: uint8 (3, size, size).

    Raises:
        OSError, ValueError, SyntaxError: what Pillow raises on data that it cannot decode.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != size:
        new_long = int(size * long / short)
        image = image.resize((size, new_long) if width <= height else (new_long, size), Image.Resampling.BICUBIC)
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(image_u8: Tensor) -> Tensor:
    """uint8 images (…, 3, R, R) as CLIP takes them: scaled to [0, 1], mean taken off, divided by the deviation."""
    mean, std = _mean_and_std(image_u8.device)
    return (image_u8.float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`, sent there once: sending makes the host wait for it."""
    return torch.tensor(IMAGE_MEAN, device=device).view(3, 1, 1), torch.tensor(IMAGE_STD, device=device).view(3, 1, 1)
