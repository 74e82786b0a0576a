"""Opens images, all of them untrusted, and resizes them as CLIP expects (docs/method.md section 1).

Images are seen as a viewer shows them: turned upright by their Exif orientation, transparent parts over white, 16-bit
grey over its whole range. The published code ignores the orientation, shows the colour that transparent pixels hide,
and clips grey at 255; images without any of these come out the same. Conversion, image cache, training, prediction and
report all use this module.

Memory is bounded by MAX_PIXELS and MAX_SIDE: 4 bytes a pixel, or three times that if the mode has to be converted;
1.1 GB at worst.
"""

import io
import warnings

import numpy as np
from PIL import Image, WebPImagePlugin  # noqa: F401 - registers itself
from PIL.ExifTags import Base

# Pillow warns about metadata and the like; only pixels matter. Set here once, since threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that occur in such datasets. Others are refused; for EPS, Pillow would run another program (Ghostscript)."""
MAX_PIXELS = 89_478_485
"""Most pixels in an image: the number above which Pillow warns. A poster of MM-IMDb has about 100,000."""
MAX_SIDE = 100_000
"""Longest side of an image, in pixels. Pillow keeps 8 bytes for every row."""
LONGEST = 50
"""Aspect ratio above which only the middle of an image is resized."""
PNG_HEAD, PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, keyed by Exif orientation."""
CHANGES = "changes"
"""Key in an image's `info` that lists how it differs from what the published code sees."""


def open_rgb(source: bytes | Image.Image) -> Image.Image:
    """Decodes an image completely, as RGB; only the first frame of an animation.

    Args:
        source: the bytes of an image file, or a Pillow image.

    Raises:
        ValueError: the image is empty, not in one of FORMATS, has more than MAX_PIXELS pixels or more than MAX_SIDE on
            a side, or has 32 bits per channel.
        Exception: Pillow's decoders raise all kinds of errors on damage: OSError, SyntaxError, struct.error, ...
    """
    if isinstance(source, Image.Image):
        return _as_seen(source)
    if not source:
        raise ValueError("empty file")
    try:
        opened = Image.open(io.BytesIO(_without_texts(source)), formats=FORMATS)
    except Image.UnidentifiedImageError:  # its message names a buffer in memory
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    with opened:
        return _as_seen(opened)


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, since Pillow refuses large ones; other data unchanged."""
    if not data.startswith(PNG_HEAD):
        return data
    kept, place = [PNG_HEAD], len(PNG_HEAD)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        if data[place + 4 : place + 8] not in PNG_TEXTS:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _as_seen(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} × {height} pixels; at most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} on a side")
    image.load()
    try:
        orientation = image.getexif().get(Base.Orientation)
    except Exception:  # damaged metadata can raise anything
        orientation = None
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, whose range is unknown; save it with 8 or 16 bits")
    changes = []
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
        changes.append("in 16-bit grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha, opaque = image.getchannel("A"), Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=alpha)
        image = opaque
        if alpha.getextrema() != (255, 255):
            changes.append("with transparency, shown over white")
    image = image.convert("RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        changes.append("turned upright by Exif")
    image.info = {CHANGES: changes}
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey (12-bit in some TIFFs) to 8 bits, with an alpha channel if one level is transparent."""
    tags = getattr(image, "tag_v2", {})
    most = 2 ** int(tags.get(Base.BitsPerSample, (16,))[0]) - 1
    stored = np.asarray(image)
    levels = np.rint(stored.astype(np.float32) * (255 / most)).clip(0, 255).astype(np.uint8)
    grey = Image.fromarray(255 - levels if tags.get(Base.PhotometricInterpretation) == 0 else levels)
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(stored == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def square_image(source: bytes | Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side of an image to `size` (bicubic) and crops the central (size, size) square.

    Raises:
        ValueError and others: as `open_rgb`.
    """
    image = open_rgb(source)
    short = min(image.size)
    width, height = (size if length == short else int(size * length / short) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if short < size and max(image.size) > LONGEST * short:
        # If it were resized before the crop, a line of 1 × 20,000 pixels would become an image of 3 GB. Ordinary
        # images do not go through this branch, where rounding may change a pixel by one level.
        across, down = image.width / width, image.height / height
        right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left * across, top * down, right, bottom))
    if short != size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
