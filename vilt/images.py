"""Images: every one that others made is opened here, and resized as CLIP expects it (docs/method.md section 1).

Memory is bounded by MAX_PIXELS and MAX_SIDE: 4 bytes a pixel, twice where a mode has to be changed; 700 MB at worst.
"""

import io
import warnings

from PIL import Image, WebPImagePlugin  # noqa: F401 - registers itself

# About metadata and the like: the pixels are what counts. Here and not where images are opened: threads share filters.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What images of these datasets are. Of the others that Pillow reads, it runs another program for EPS (Ghostscript),
and for TIFF allocates as much memory as the file claims."""
MAX_PIXELS = 89_478_485
"""Of an image: the number above which Pillow warns. A poster of MM-IMDb has some 100,000."""
MAX_SIDE = 100_000
"""Of an image, in pixels. Pillow keeps 8 bytes for every line."""
LONGEST = 50
"""Times its shorter side: of an image that is longer still, only the middle is resized."""


def open_rgb(data: bytes) -> Image.Image:
    """The RGB image in the bytes of an image file, fully decoded; of an animation the first frame.

    Raises:
        ValueError: it is empty, of another format, or has more than MAX_PIXELS pixels or MAX_SIDE to a side.
        Exception: Pillow's decoders raise whatever the damage leads to: OSError, SyntaxError, struct.error, ...
    """
    if not data:
        raise ValueError("empty file")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:  # its message names a buffer in memory
        raise ValueError(f"not an image of the kinds {', '.join(FORMATS)}") from None
    with opened:
        width, height = opened.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(f"{width} × {height} pixels; at most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} to a side")
        return opened.convert("RGB")


def square_image(data: bytes, size: int) -> Image.Image:
    """RGB image of `data`, shorter side resized to `size` (bicubic), and of that the (size, size) in the middle.

    Raises:
        ValueError and others: as `open_rgb`.
    """
    image = open_rgb(data)
    short = min(image.size)
    width, height = (size if length == short else int(size * length / short) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if short < size and max(image.size) > LONGEST * short:
        # Resized before the crop, a line of 1 × 20,000 pixels would become an image of 3 GB. Others do not take this
        # way, in which rounding may change a pixel by a level.
        across, down = image.width / width, image.height / height
        right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left * across, top * down, right, bottom))
    if short != size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
