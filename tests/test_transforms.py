"""CLIP's image transform equals explicit arithmetic: sizes, crop offsets, bicubic weights, colour modes."""

import io
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from clip.modules.vision_transformer_memory import normalise
from vilt.datasets.kinds import decode_image
from vilt.images import MAX_SIDE, open_rgb


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
    """Weights (n_out, n_in) of the bicubic kernel (a = -0.5), stretched by the scale if the image shrinks."""

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
    """Float image (size, size, 3): resized with explicit weights, width first, each time clipped to [0, 255]."""
    height, width = pixels.shape[:2]
    if width <= height:
        new_width, new_height = size, math.floor(size * height / width)
    else:
        new_width, new_height = math.floor(size * width / height), size
    image = pixels.astype(float)
    image = np.clip(np.einsum("ow,hwc->hoc", slow_weights(width, new_width), image), 0, 255)
    image = np.clip(np.einsum("oh,hwc->owc", slow_weights(height, new_height), image), 0, 255)
    # rint rounds halves to even.
    top, left = (int(np.rint((n - size) / 2)) for n in (new_height, new_width))
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        *((8, 3, 4), (3, 4, 224), (640, 427, 224)),  # a longer side of 10.67, 298.67, 335.73 is truncated, not rounded
        *((40, 30, 16), (30, 40, 16), (33, 33, 16)),  # landscape, portrait, square
        *((9, 7, 16), (7, 9, 16), (1, 1, 4), (1, 9, 4)),  # smaller than the target
        *((16, 16, 16), (16, 50, 16), (17, 16, 16)),  # the shorter side fits
        *((101, 37, 13), (200, 3, 8)),
    ],
)
def test_images_equal_the_slow_version(width, height, size):
    pixels = noise(width, height)
    image = decode_image(encode(pixels), size)
    assert image.dtype == torch.uint8 and image.shape == (3, size, size) and image.is_contiguous()
    # Pillow rounds to whole levels after each direction, the slow version does not.
    assert np.abs(to_hwc(image).astype(float) - slow_transform(pixels, size)).max() < 1.6


@pytest.mark.parametrize(
    ("over", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (9, 4), (11, 6)]
)
def test_the_crop_offset_rounds_halves_to_even(over, offset):
    pixels = noise(8 + over, 8)  # the shorter side fits: no resize, pixels stay exact
    image = decode_image(encode(pixels), 8)
    assert np.array_equal(to_hwc(image), pixels[:, offset : offset + 8])
    upright = pixels.transpose(1, 0, 2).copy()
    assert np.array_equal(to_hwc(decode_image(encode(upright), 8)), upright[offset : offset + 8])


def with_palette() -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 250, 0, 128, 1, 2, 3])
    image.putdata([0, 1, 2, 1])
    return image


def pixels_of(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (2, 2))
    image.putdata(values)
    return image


def levels(*values: int) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint16).reshape(2, 2))


GREYS = [(0,) * 3, (7,) * 3, (255,) * 3, (100,) * 3]
PALETTE = [(10, 20, 30), (250, 0, 128), (1, 2, 3), (250, 0, 128)]


WHITE = (255,) * 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(pixels_of("L", 0, 7, 255, 100)), GREYS),
        (saved(pixels_of("1", 0, 255, 255, 0)), [(0,) * 3, WHITE, WHITE, (0,) * 3]),
        # transparent pixels are blended onto white
        (saved(pixels_of("LA", (9, 0), (9, 255), (55, 51), (0, 0))), [WHITE, (9,) * 3, (215,) * 3, WHITE]),
        (
            saved(pixels_of("RGBA", (1, 2, 3, 0), (4, 5, 6, 255), (55, 155, 255, 51), (0,) * 4)),
            [WHITE, (4, 5, 6), (215, 235, 255), WHITE],
        ),
        (saved(with_palette()), PALETTE),
        (saved(with_palette(), "GIF"), PALETTE),
        (saved(with_palette(), transparency=1), [PALETTE[0], WHITE, PALETTE[2], WHITE]),
        (saved(with_palette(), "GIF", transparency=2), [*PALETTE[:2], WHITE, PALETTE[3]]),
        (saved(with_palette(), transparency=b"\0\xff\xff"), [WHITE, *PALETTE[1:]]),
        *((saved(levels(0, 7 * 257, 65535, 100 * 257), kind), GREYS) for kind in ("PNG", "TIFF")),
        (saved(levels(0, 7 * 257 + 128, 65535, 100 * 257 - 128)), GREYS),
        (saved(levels(0, 7 * 257, 9 * 257, 100 * 257), transparency=9 * 257), GREYS),
        (saved(levels(*(65535 - 257 * grey[0] for grey in GREYS)), "TIFF", tiffinfo={262: 0}), GREYS),
        (saved(pixels_of("L", 0, 7, 255, 100), "TIFF"), GREYS),
    ],
)
def test_every_mode_becomes_rgb(data, expected):
    for image in (decode_image(data, 2), decode_image(Image.open(io.BytesIO(data)), 2)):
        assert [tuple(pixel) for pixel in to_hwc(image).reshape(4, 3).tolist()] == expected


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_of_an_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match="32 bits per channel"):
        decode_image(saved(Image.new(mode, (2, 2)), "TIFF"), 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_mode_of_jpeg_becomes_rgb(mode):
    colours: dict[str, int | tuple[int, ...]] = {"RGB": (200, 100, 50), "L": 90, "CMYK": (0, 155, 205, 0)}
    image = decode_image(saved(Image.new(mode, (8, 16), colours[mode]), "JPEG", quality=95), 8)
    expected = {"RGB": (200, 100, 50), "L": (90, 90, 90), "CMYK": (255, 100, 50)}[mode]
    assert (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


def test_colours_are_resolved_before_the_resize():
    """Otherwise palette indices would be interpolated."""
    image = with_palette()
    plain = Image.fromarray(np.array(image.convert("RGB")))
    assert torch.equal(decode_image(saved(image), 7), decode_image(saved(plain), 7))
    assert len(torch.unique(decode_image(saved(image), 7).flatten(1), dim=1)[0]) > 3, "colours in between"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_by_their_exif_orientation(kind):
    pixels = noise(6, 6)
    turned = [
        pixels, pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2),
        np.rot90(pixels, -1), pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels), pixels,
    ]  # fmt: skip
    for orientation, expected in enumerate(turned):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(Image.fromarray(pixels), kind, exif=exif, **options)
        for source in (data, Image.open(io.BytesIO(data))):
            assert np.array_equal(to_hwc(decode_image(source, 6)), expected), orientation


@pytest.mark.filterwarnings("ignore")
def test_texts_and_profiles_of_a_png_are_ignored():
    """A damaged EXIF block is ignored too."""
    info = PngImagePlugin.PngInfo()
    for number in range(30):
        info.add_text(f"history {number}", "x" * 3_000_000, zip=True)
    pixels = noise(6, 6)
    damaged = {"exif": b"Exif\0\0MM\0*\0\0\xff\xff\0\1"}
    for given in (damaged, {"pnginfo": info, "icc_profile": b""}, {"pnginfo": info, "icc_profile": bytes(3_000_000)}):
        assert np.array_equal(to_hwc(decode_image(saved(Image.fromarray(pixels), **given), 6)), pixels)


def test_every_level_is_normalised_as_published():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    values = normalise(levels)
    assert values.dtype == torch.float32
    assert values.shape == (2, 3, 16, 16)
    for channel in range(3):
        expected = (np.arange(256) / 255 - mean[channel]) / std[channel]
        assert np.abs(values[1, channel].flatten().double().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(("long", "short"), [(2000, 3), (5000, 7), (20_000, 40), (900, 1)])
def test_very_thin_images_are_close_to_those_resized_whole(long, short):
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
        "from PIL import Image; from vilt.datasets.kinds import decode_image; import io; b = io.BytesIO(); "
        "Image.new('RGB', (60000, 1), (7, 8, 9)).save(b, 'PNG'); x = decode_image(b.getvalue(), 224); "
        "assert x.shape == (3, 224, 224) and x[:, 5, 5].tolist() == [7, 8, 9]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def photo(file_format: str, **options: object) -> bytes:
    return saved(Image.fromarray(noise(40, 30)), file_format, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def announced(width: int, height: int) -> bytes:
    """The header of a PNG of the given size."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in one of the formats BMP, GIF, JPEG, PNG"),
        (photo("EPS"), "not an image in one of the formats"),
        (announced(30_000, 4_000), "30000 × 4000 pixels; at most 89,478,485 are read, and 100,000 on a side"),
        (announced(MAX_SIDE + 1, 1), "100001 × 1 pixels"),
        (announced(1, MAX_SIDE + 1), "1 × 100001 pixels"),
        (announced(2**31 - 1, 2**31 - 1), "exceeds limit"),
    ],
    ids=["svg", "eps", "many pixels", "wide", "high", "any size"],
)
def test_unsupported_and_oversized_images_are_refused(data: bytes, found: str) -> None:
    with pytest.raises(Exception, match=found):
        open_rgb(data)


def test_animations_are_read_as_their_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for file_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert to_hwc(decode_image(data, 2)).tolist() == [[[255, 0, 0]] * 2] * 2, file_format
