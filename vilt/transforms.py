"""CLIP's image transform (METHOD.md section 1), with Pillow."""

import functools
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilt.utils.images import open_rgb

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 50
"""Times its shorter side: only the middle of an image that is longer still, and has to be enlarged, is resized."""


def decode_image(data: bytes, size: int) -> Tensor:
    """RGB image of `data`, shorter side resized to `size` (bicubic), centre crop: uint8 (3, size, size).

    Raises:
        ValueError and others: the data cannot be decoded, or is an image of too many pixels (see `open_rgb`).
    """
    image = open_rgb(data)
    short, long = min(image.size), max(image.size)
    if short < size and long > LONGEST * short:
        image = _cut_and_resized(image, size)
    elif short != size:
        image = image.resize(_resized(image, size), Image.Resampling.BICUBIC)
    left, top = (round((length - size) / 2) for length in image.size)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _resized(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height once the shorter side is `size`."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    return (size, new_long) if width <= height else (new_long, size)


def _cut_and_resized(image: Image.Image, size: int) -> Image.Image:
    """The (size, size) in the middle of the resized image, of which no more than that is ever made.

    As a whole a line of 1 × 20,000 pixels would become an image of 3 GB. Ordinary images do not take this way: the
    places below are rounded, which might change one of their pixels by a level.
    """
    cuts, boxes = [], []
    for length, new_length in zip(image.size, _resized(image, size), strict=True):
        scale, offset = length / new_length, round((new_length - size) / 2)
        start, end = offset * scale, (offset + size) * scale
        kernel = math.ceil(2 * max(scale, 1)) + 1  # how far a bicubic kernel reaches
        cut = max(0, math.floor(start) - kernel), min(length, math.ceil(end) + kernel)
        cuts.append(cut)
        boxes.append((start - cut[0], end - cut[0]))
    part = image.crop((cuts[0][0], cuts[1][0], cuts[0][1], cuts[1][1]))
    part = part.resize((size, part.height), Image.Resampling.BICUBIC, box=(boxes[0][0], 0, boxes[0][1], part.height))
    return part.resize((size, size), Image.Resampling.BICUBIC, box=(0, boxes[1][0], size, boxes[1][1]))


def normalise(image_u8: Tensor) -> Tensor:
    """uint8 images (…, 3, R, R) as CLIP takes them: scaled to [0, 1], mean taken off, divided by the deviation."""
    mean, std = _mean_and_std(image_u8.device)
    return (image_u8.float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`, sent there once: sending makes the host wait for it."""
    return torch.tensor(IMAGE_MEAN, device=device).view(3, 1, 1), torch.tensor(IMAGE_STD, device=device).view(3, 1, 1)
