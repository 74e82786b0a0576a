"""CLIP's image transform against explicit arithmetic: sizes, crop offsets, bicubic weights, colour modes."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip.modules.vision_transformer_memory import normalise
from vilt.transforms import decode_image


def encode(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels))


def saved(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_hwc(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def slow_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): the bicubic kernel (a = -0.5), stretched by the scale where the image becomes smaller."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    scale = n_in / n_out
    stretch = max(scale, 1.0)
    weights = np.zeros((n_out, n_in))
    for out in range(n_out):
        centre = (out + 0.5) * scale
        for place in range(n_in):
            weights[out, place] = kernel((place + 0.5 - centre) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


def slow_transform(pixels: np.ndarray, size: int) -> np.ndarray:
    """float (size, size, 3): resized with explicit weights, width first, each time kept within 0 to 255; cropped."""
    height, width = pixels.shape[:2]
    if width <= height:
        new_width, new_height = size, math.floor(size * height / width)
    else:
        new_width, new_height = math.floor(size * width / height), size
    image = pixels.astype(float)
    image = np.clip(np.einsum("ow,hwc->hoc", slow_weights(width, new_width), image), 0, 255)
    image = np.clip(np.einsum("oh,hwc->owc", slow_weights(height, new_height), image), 0, 255)
    # Halves go to the even number.
    top, left = (int(np.rint((n - size) / 2)) for n in (new_height, new_width))
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (40, 30, 16),  # landscape, smaller
        (30, 40, 16),  # portrait
        (33, 33, 16),  # square
        (9, 7, 16),  # smaller than what is wanted
        (7, 9, 16),
        (5, 5, 16),
        (16, 16, 16),
        (16, 50, 16),  # the shorter side fits
        (50, 16, 16),
        (17, 16, 16),
        (101, 37, 13),  # an odd size
        (37, 101, 13),
        (200, 3, 8),
        (1, 1, 4),
        (1, 9, 4),
    ],
)
def test_equals_the_slow_version(width, height, size):
    pixels = noise(width, height)
    image = decode_image(encode(pixels), size)
    assert image.dtype == torch.uint8
    assert image.shape == (3, size, size)
    assert image.is_contiguous()
    # Pillow rounds to whole levels after each direction, the slow version does not.
    assert np.abs(to_hwc(image).astype(float) - slow_transform(pixels, size)).max() < 1.6


@pytest.mark.parametrize(
    ("width", "height", "size", "resized"),
    [
        (8, 3, 4, (10, 4)),  # 10.67: cut, not rounded
        (3, 8, 4, (4, 10)),
        (10, 7, 5, (7, 5)),  # 7.14
        (3, 5, 2, (2, 3)),  # 3.33
        (3, 4, 224, (224, 298)),  # 298.67
        (640, 427, 224, (335, 224)),  # 335.73
        (427, 640, 224, (224, 335)),
        (300, 300, 224, (224, 224)),
    ],
)
def test_the_longer_side_is_cut_to_whole_pixels(width, height, size, resized):
    pixels = noise(width, height)
    whole = np.array(Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC))
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    expected = whole[top : top + size, left : left + size]
    assert np.array_equal(to_hwc(decode_image(encode(pixels), size)), expected)


@pytest.mark.parametrize(
    ("over", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (9, 4), (11, 6)]
)
def test_the_crop_offset_rounds_halves_to_even(over, offset):
    pixels = noise(8 + over, 8)  # the shorter side fits: no resize, pixels stay exact
    image = decode_image(encode(pixels), 8)
    assert np.array_equal(to_hwc(image), pixels[:, offset : offset + 8])
    upright = pixels.transpose(1, 0, 2).copy()
    assert np.array_equal(to_hwc(decode_image(encode(upright), 8)), upright[offset : offset + 8])


def test_enlarged_pixels_are_those_that_were_written_down():
    pixels = np.array([[0, 255], [100, 200]], dtype=np.uint8)
    image = decode_image(encode(pixels), 4)
    expected = [[0, 47, 204, 255], [19, 67, 197, 245], [72, 107, 184, 219], [99, 127, 177, 205]]
    for channel in image:
        assert channel.tolist() == expected


def test_reduced_pixels_are_smoothed_over_the_whole_area():
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: all of it becomes grey
    image = decode_image(encode(stripes), 8).int()
    assert (image[:, :, 2:-2] - 128).abs().max() <= 1


# ---- colour modes


def with_palette() -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 250, 0, 128, 1, 2, 3])
    image.putdata([0, 1, 2, 1])
    return image


def pixels_of(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (2, 2))
    image.putdata(values)
    return image


PALETTE = [(10, 20, 30), (250, 0, 128), (1, 2, 3), (250, 0, 128)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(pixels_of("L", 0, 7, 255, 100)), [(0,) * 3, (7,) * 3, (255,) * 3, (100,) * 3]),
        (saved(pixels_of("1", 0, 255, 255, 0)), [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3]),
        (saved(pixels_of("LA", (9, 0), (9, 255), (80, 3), (0, 0))), [(9,) * 3, (9,) * 3, (80,) * 3, (0,) * 3]),
        # transparency is dropped, not laid over a background
        (
            saved(pixels_of("RGBA", (1, 2, 3, 0), (4, 5, 6, 255), (7, 8, 9, 1), (0,) * 4)),
            [(1, 2, 3), (4, 5, 6), (7, 8, 9), (0,) * 3],
        ),
        (saved(with_palette()), PALETTE),
        (saved(with_palette(), "GIF"), PALETTE),
        (saved(with_palette(), transparency=1), PALETTE),
    ],
    ids=["grey", "black and white", "grey with alpha", "RGBA", "palette", "GIF", "transparent colour"],
)
def test_every_mode_becomes_rgb(data, expected):
    image = decode_image(data, 2)
    assert [tuple(pixel) for pixel in to_hwc(image).reshape(4, 3).tolist()] == expected


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_in_each_of_its_modes(mode):
    colours: dict[str, int | tuple[int, ...]] = {"RGB": (200, 100, 50), "L": 90, "CMYK": (0, 155, 205, 0)}
    image = decode_image(saved(Image.new(mode, (8, 16), colours[mode]), "JPEG", quality=95), 8)
    expected = {"RGB": (200, 100, 50), "L": (90, 90, 90), "CMYK": (255, 100, 50)}[mode]
    assert (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


def test_colours_are_resolved_before_the_resize():
    """Else a palette would be resized by its numbers, which cannot be blended."""
    image = with_palette()
    plain = Image.fromarray(np.array(image.convert("RGB")))
    assert torch.equal(decode_image(saved(image), 7), decode_image(saved(plain), 7))
    assert len(torch.unique(decode_image(saved(image), 7).flatten(1), dim=1)[0]) > 3, "colours in between"


def test_the_orientation_tag_is_not_applied_as_in_clip():
    pixels = noise(6, 6)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(to_hwc(decode_image(saved(Image.fromarray(pixels), exif=exif), 6)), pixels)


@pytest.mark.parametrize("data", [b"", b"not an image", encode(noise(30, 30))[:-200]])
def test_what_is_not_an_image_raises(data):
    with pytest.raises((OSError, ValueError), match=r"empty file|not an image|truncated|unexpected end"):
        decode_image(data, 8)


# ---- normalisation


def test_normalised_values_of_every_level():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    values = normalise(levels)
    assert values.dtype == torch.float32
    assert values.shape == (2, 3, 16, 16)
    for channel in range(3):
        expected = (np.arange(256) / 255 - mean[channel]) / std[channel]
        assert np.abs(values[1, channel].flatten().double().numpy() - expected).max() < 1e-6


def test_normalised_black_and_white_and_nothing():
    assert normalise(torch.empty(0, 3, 0, 0, dtype=torch.uint8)).shape == (0, 3, 0, 0)
    values = normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 2).expand(3, 1, 2))
    assert values[:, 0, 0].tolist() == pytest.approx([-1.7922626, -1.7520971, -1.4802198], abs=1e-6)
    assert values[:, 0, 1].tolist() == pytest.approx([1.9303361, 2.0748837, 2.1458969], abs=1e-6)


@pytest.mark.parametrize(("long", "short"), [(2000, 3), (5000, 7), (20_000, 40), (900, 1)])
def test_very_thin_images_are_close_to_those_that_are_resized_whole(long, short):
    size = 56
    ramp = np.linspace(0, 40 * np.pi, long)
    pixels = np.repeat((127 + 120 * np.sin(ramp))[None, :, None], short, axis=0).repeat(3, axis=2).astype(np.uint8)
    for array in (pixels, pixels.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(array))
        width, height = image.size
        new_long = int(size * long / short)
        whole = image.resize((new_long, size) if width > height else (size, new_long), Image.Resampling.BICUBIC)
        left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)
        expected = np.array(whole.crop((left, top, left + size, top + size))).transpose(2, 0, 1).astype(int)
        assert np.abs(decode_image(saved(image), size).numpy().astype(int) - expected).max() <= 1


def test_a_very_thin_image_takes_little_memory():
    """Resized whole, 1 × 60,000 pixels would be 9 GB."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2); "
        "from PIL import Image; from vilt.transforms import decode_image; import io; b = io.BytesIO(); "
        "Image.new('RGB', (60000, 1), (7, 8, 9)).save(b, 'PNG'); x = decode_image(b.getvalue(), 224); "
        "assert x.shape == (3, 224, 224) and x[:, 5, 5].tolist() == [7, 8, 9]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_of_too_many_pixels_is_not_decoded():
    image = Image.new("1", (10_000, 9_000))
    with pytest.raises(ValueError, match="10000 × 9000 pixels; at most 89,478,485 are read, and 100,000 to a side"):
        decode_image(saved(image), 224)
