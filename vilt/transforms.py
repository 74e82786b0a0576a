"""CLIP's image transform (METHOD.md section 1), with Pillow."""

import functools
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


MAX_PIXELS = 89_478_485
"""Of an image, before it is decoded: where Pillow starts to warn of decompression bombs. 268 MB of RGB."""
THIN = 200
"""Times that one side is longer than the other, from which on only what the crop leaves is resized."""


def decode_image(data: bytes, size: int) -> Tensor:
    """RGB image of `data`, shorter side resized to `size` (bicubic), centre crop: uint8 (3, size, size).

    Raises:
        OSError, ValueError, SyntaxError: what Pillow raises on data that it cannot decode; ValueError also for an image
            of more than MAX_PIXELS pixels.
    """
    with Image.open(io.BytesIO(data)) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} × {opened.height} pixels, at most {MAX_PIXELS:,} are decoded")
        image = opened.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > THIN * short:
        return _middle_of_thin(image, size)
    if short != size:
        new_long = int(size * long / short)
        image = image.resize((size, new_long) if width <= height else (new_long, size), Image.Resampling.BICUBIC)
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _middle_of_thin(image: Image.Image, size: int) -> Tensor:
    """The same, to a few levels of 255, of an image that would be large once resized: 1 × 20,000 pixels take 3 GB."""
    width, height = image.size
    new_long = int(size * max(width, height) / min(width, height))
    scale, first = max(width, height) / new_long, round((new_long - size) / 2)
    start, end = scale * first, min(scale * (first + size), max(width, height))
    box = (start, 0, end, height) if width > height else (0, start, width, end)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def normalise(image_u8: Tensor) -> Tensor:
    """uint8 images (…, 3, R, R) as CLIP takes them: scaled to [0, 1], mean taken off, divided by the deviation."""
    mean, std = _mean_and_std(image_u8.device)
    return (image_u8.float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`, sent there once: sending makes the host wait for it."""
    return torch.tensor(IMAGE_MEAN, device=device).view(3, 1, 1), torch.tensor(IMAGE_STD, device=device).view(3, 1, 1)
