"""Opening images that others made: every image of the project that is not our own passes here.

Memory is bounded by MAX_PIXELS and MAX_SIDE: 4 bytes a pixel, twice where a mode has to be changed; 700 MB at worst.
"""

import io
import warnings

from PIL import Image, WebPImagePlugin  # noqa: F401 - registers itself

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What images of these datasets are. Of the others that Pillow reads, it runs another program for EPS (Ghostscript),
and for TIFF asks for as much memory as the file says."""
MAX_PIXELS = 89_478_485
"""Of an image: the number above which Pillow warns. A poster of MM-IMDb has some 100,000."""
MAX_SIDE = 100_000
"""Of an image, in pixels. Pillow keeps 8 bytes for every line."""


def open_rgb(data: bytes) -> Image.Image:
    """The RGB image in the bytes of an image file, wholly decoded; of an animation the first frame.

    Raises:
        ValueError: it is empty, of another format, or has more than MAX_PIXELS pixels or MAX_SIDE to a side.
        Exception: Pillow's decoders raise whatever the damage leads to: OSError, SyntaxError, struct.error, ...
    """
    if not data:
        raise ValueError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata and the like: the pixels are what counts
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:  # its message names a buffer in memory
            raise ValueError(f"not an image of the kinds {', '.join(FORMATS)}") from None
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise ValueError(
                    f"{width} × {height} pixels; at most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} to a side"
                )
            return opened.convert("RGB")
