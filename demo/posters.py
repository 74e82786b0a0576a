"""Draws synthetic film posters: a sky, a ground, the title, and one motif for each theme that the poster shows."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

WIDTH, HEIGHT = 96, 128
"""Size of a poster in pixels. The loader's centre crop keeps the middle 96 rows: everything that shows a genre is drawn
there, and the title outside it."""
_CROP_TOP = (HEIGHT - WIDTH) // 2
Colour = tuple[int, int, int]
SKIES: dict[str, tuple[Colour, Colour]] = {
    "blue": ((40, 90, 170), (150, 195, 235)),
    "golden": ((214, 140, 40), (250, 215, 130)),
    "violet": ((66, 36, 110), (176, 130, 200)),
    "dark": ((12, 16, 40), (48, 58, 96)),
    "rosy": ((190, 90, 110), (250, 196, 180)),
    "green": ((24, 84, 80), (140, 200, 170)),
}
"""Each sky's colours at the top and at the horizon."""
_GROUNDS: tuple[Colour, ...] = ((60, 84, 50), (110, 88, 60), (52, 56, 70), (150, 120, 80), (36, 60, 84))
_INK: Colour = (20, 18, 24)


class Pen:
    """Draws around a point, in units of half the motif's size."""

    def __init__(self, poster: Image.Image, x: float, y: float, r: float, rng: random.Random) -> None:
        self.draw, self.x, self.y, self.r, self.rng = ImageDraw.Draw(poster), x, y, r, rng

    def __call__(self, shape: str, *points: tuple[float, float], **style: Any) -> None:
        """Draws a shape of ImageDraw, such as `polygon` or `ellipse`, given its corners."""
        corners = [(self.x + dx * self.r, self.y + dy * self.r) for dx, dy in points]
        getattr(self.draw, shape)(corners, **style)


def draw_motif(motif: str, pen: Pen) -> None:
    """Draws one of MOTIFS or SCENERY."""
    pick = pen.rng.choice
    match motif:
        case "Adventure":
            side = pick((-1, 1))
            pen("polygon", (-1, 0.35), (1, 0.35), (0.65, 1), (-0.65, 1), fill=(120, 66, 30), outline=_INK)
            pen("line", (0, -1), (0, 0.35), fill=_INK, width=2)
            pen("polygon", (0, -1), (0, 0.25), (side * 0.9, 0.25), fill=(250, 246, 230))
            pen("polygon", (0, -0.6), (0, 0.25), (-side * 0.7, 0.25), fill=(226, 216, 190))
        case "Fantasy":
            wall = pick(((196, 176, 214), (176, 170, 206)))
            pen("rectangle", (-0.7, 0), (0.7, 1), fill=wall, outline=_INK)
            for dx, top in ((-0.7, -0.15), (0.0, -0.35), (0.7, -0.15)):
                pen("rectangle", (dx - 0.22, top), (dx + 0.22, 1), fill=wall, outline=_INK)
                pen("polygon", (dx - 0.32, top), (dx + 0.32, top), (dx, top - 0.6), fill=(226, 50, 140))
            pen("rectangle", (-0.15, 0.55), (0.15, 1), fill=_INK)
        case "Western":
            green = pick(((30, 130, 50), (50, 140, 40)))
            arm, side = max(3, round(0.34 * pen.r)), pick((-1, 1))
            pen("rounded_rectangle", (-0.24, -1), (0.24, 1), radius=0.24 * pen.r, fill=green)
            for s, low, high in ((side, 0.25, -0.5), (-side, 0.5, -0.15)):
                pen("line", (0, low), (s * 0.75, low), fill=green, width=arm)
                pen("line", (s * 0.75, low + 0.16), (s * 0.75, high), fill=green, width=arm)
            pen("line", (0, -0.8), (0, 0.9), fill=(150, 210, 110), width=1)
        case "Romance":
            red = pick(((220, 20, 50), (235, 40, 80)))
            for s in (-1, 1):
                pen("ellipse", (s * 0.45 - 0.53, -0.85), (s * 0.45 + 0.53, 0.2), fill=red)
            pen("polygon", (-0.92, -0.1), (0.92, -0.1), (0, 1), fill=red)
            pen("ellipse", (-0.65, -0.6), (-0.35, -0.3), fill=(255, 200, 210))
        case "Crime":
            sack, gold = pick(((140, 116, 60), (126, 108, 70))), (250, 230, 60)
            pen("polygon", (-0.5, -1), (0.5, -1), (0, -0.2), fill=sack)
            pen("ellipse", (-0.85, -0.5), (0.85, 1), fill=sack, outline=_INK)
            pen("rectangle", (-0.35, -0.55), (0.35, -0.35), fill=_INK)
            pen("line", (0, -0.2), (0, 0.75), fill=gold, width=2)
            pen("ellipse", (-0.35, -0.05), (0.35, 0.6), outline=gold, width=2)
        case "Mystery":
            side = pick((-1, 1))
            pen("line", (side * 0.2, 0.2), (side, 1), fill=(90, 46, 20), width=max(3, round(pen.r / 3)))
            lens = ((-side * 0.3 - 0.68, -1), (-side * 0.3 + 0.68, 0.36))
            pen("ellipse", *lens, fill=(200, 240, 250), outline=_INK, width=3)
        case "Biography":
            pen("rectangle", (-0.8, -1), (0.8, 1), fill=(214, 170, 50), outline=_INK)
            pen("rectangle", (-0.6, -0.8), (0.6, 0.8), fill=(70, 40, 30))
            skin = pick(((236, 200, 170), (196, 150, 110), (130, 90, 60)))
            pen("ellipse", (-0.3, -0.6), (0.3, 0.1), fill=skin)
            pen("pieslice", (-0.55, 0.1), (0.55, 1.5), start=180, end=360, fill=(150, 160, 190))
        case "Family":
            wall = pick(((240, 226, 190), (236, 236, 236)))
            pen("rectangle", (-0.75, -0.1), (0.75, 1), fill=wall, outline=_INK)
            pen("polygon", (-1, -0.1), (1, -0.1), (0, -1), fill=(190, 60, 30))
            pen("rectangle", (-0.2, 0.35), (0.2, 1), fill=(40, 110, 190))
            for dx in (-0.5, 0.5):
                pen("rectangle", (dx - 0.14, 0.15), (dx + 0.14, 0.45), fill=_INK)
        case "Sci-Fi":
            pen("ellipse", (-0.6, -0.6), (0.6, 0.6), fill=pick(((40, 200, 220), (60, 180, 240))))
            pen("arc", (-0.6, -0.6), (0.6, 0.6), start=330, end=120, fill=(10, 90, 130), width=3)
            pen("arc", (-1.1, -0.28), (1.1, 0.28), start=330, end=210, fill=(255, 236, 120), width=3)
        case "Horror":
            sheet = pick(((240, 246, 250), (226, 236, 232)))
            pen("pieslice", (-0.7, -1), (0.7, 0.4), start=180, end=360, fill=sheet)
            hem = [(-0.7 + 1.4 * i / 6, 1.0 if i % 2 else 0.7) for i in range(7)]
            pen("polygon", (-0.7, -0.35), *hem, (0.7, -0.35), fill=sheet)
            for dx in (-0.28, 0.28):
                pen("ellipse", (dx - 0.17, -0.5), (dx + 0.17, -0.05), fill=_INK)
            pen("ellipse", (-0.15, 0.1), (0.15, 0.5), fill=_INK)
        case "Sport":
            pen.r *= 0.85
            pen("ellipse", (-1, -1), (1, 1), fill=pick(((240, 120, 20), (226, 104, 30))), outline=_INK, width=2)
            for side in (-1, 1):
                seam = ((side * 1.2 - 1, -1), (side * 1.2 + 1, 1))
                pen("arc", *seam, start=35 + 90 * side, end=145 + 90 * side, fill=_INK, width=2)
            pen("line", (0, -1), (0, 1), fill=_INK, width=2)
            pen("line", (-1, 0), (1, 0), fill=_INK, width=2)
        case "tree":
            pen("rectangle", (-0.12, 0.3), (0.12, 1), fill=(80, 56, 36))
            pen("ellipse", (-0.6, -0.8), (0.6, 0.5), fill=pick(((60, 100, 60), (120, 110, 50), (80, 110, 90))))
        case "birds":
            for _ in range(3):
                x, y = pen.x + pen.rng.uniform(-0.7, 0.7) * pen.r, pen.y + pen.rng.uniform(-0.7, 0.7) * pen.r
                for left in (x - 6, x):
                    pen.draw.arc([left, y - 3, left + 6, y + 3], 180, 360, fill=_INK)
        case "cloud":
            grey = pen.rng.randrange(190, 230)
            for dx, size in ((-0.5, 0.3), (0.0, 0.42), (0.5, 0.3)):
                pen("ellipse", (dx - size, -size), (dx + size, size), fill=(grey, grey, grey))


# fmt: off
MOTIFS = (
    "Adventure", "Fantasy", "Western", "Romance", "Crime", "Mystery",
    "Biography", "Family", "Sci-Fi", "Horror", "Sport",
)
# fmt: on
"""Genres with a motif. Two more change the whole poster: Animation (dots) and Film-Noir (blinds)."""
SCENERY = ("tree", "birds", "cloud")
_DOT_COLOURS: tuple[Colour, ...] = ((250, 80, 160), (80, 220, 90), (255, 230, 50), (60, 150, 250))


def _dots(poster: Image.Image, rng: random.Random) -> Image.Image:
    dotted = poster.copy()
    draw = ImageDraw.Draw(dotted)
    step, radius = rng.randrange(15, 19), rng.uniform(3.2, 4.6)
    shift = rng.randrange(step)
    for row, y in enumerate(range(-step + shift, HEIGHT + step, step)):
        for x in range(-step + (step // 2) * (row % 2), WIDTH + step, step):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=rng.choice(_DOT_COLOURS))
    return dotted


def _blinds(poster: Image.Image, rng: random.Random) -> Image.Image:
    grey = ImageEnhance.Color(poster).enhance(0.45)
    shadow = grey.copy()
    draw = ImageDraw.Draw(shadow)
    step, slope = rng.randrange(11, 15), rng.uniform(-0.25, 0.25)
    for y in range(-2 * step, HEIGHT + 2 * step, step):
        draw.line([(-2, y), (WIDTH + 2, y + slope * WIDTH)], fill=(8, 8, 10), width=step // 2)
    return Image.blend(grey, shadow, 0.55)


def _background(sky: str, rng: random.Random) -> Image.Image:
    """A sky that fades towards the horizon over a hilly ground, with grain."""
    noise = np.random.default_rng(rng.getrandbits(64))
    top, bottom = (np.array(colour, dtype=np.float32) for colour in SKIES[sky])
    fade = np.linspace(0, 1, HEIGHT, dtype=np.float32)[:, None, None]
    pixels = np.broadcast_to(top + (bottom - top) * fade, (HEIGHT, WIDTH, 3)).copy()
    columns = np.arange(WIDTH)
    hills = rng.randrange(82, 98) + rng.uniform(1, 6) * np.sin(columns / rng.uniform(9, 22) + rng.uniform(0, 6))
    ground = np.arange(HEIGHT)[:, None] > hills[None, :]
    pixels[ground] = rng.choice(_GROUNDS)
    pixels += noise.normal(0, 7, (HEIGHT, WIDTH, 1)) + noise.normal(0, 4, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _lettering(poster: Image.Image, title: str) -> None:
    draw = ImageDraw.Draw(poster)
    draw.rectangle([0, HEIGHT - _CROP_TOP, WIDTH, HEIGHT], fill=_INK)
    # The bitmap font comes with Pillow; with system fonts, the bytes would depend on the machine.
    font = ImageFont.load_default_imagefont()
    words = title.upper()
    draw.text(((WIDTH - font.getbbox(words)[2]) // 2, HEIGHT - _CROP_TOP + 2), words, font=font, fill=(240, 230, 200))


def draw_poster(
    title: str, sky: str, strength: dict[str, float], rng: random.Random, scenery: Sequence[int] = ()
) -> Image.Image:
    """Draws an RGB poster of WIDTH x HEIGHT.

    `strength` maps each genre to show to 1 (plain) or less (faint); a genre not in it leaves no trace. `scenery` are
    indices into SCENERY. Motifs and scenery share four places.
    """
    poster = _background(sky, rng)
    if "Animation" in strength:
        poster = Image.blend(poster, _dots(poster, rng), strength["Animation"])
    half = WIDTH / 4
    places = [(half + col * 2 * half, _CROP_TOP + half + row * 2 * half) for row in (0, 1) for col in (0, 1)]
    rng.shuffle(places)
    items = [(SCENERY[number], 0.9) for number in scenery]
    items += [(genre, value) for genre, value in strength.items() if genre in MOTIFS]
    for (motif, value), (x, y) in zip(items, places, strict=False):
        drawn = poster.copy()
        x, y, r = x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), rng.uniform(15, 20)
        draw_motif(motif, Pen(drawn, x, y, r, rng))
        poster = Image.blend(poster, drawn, value)
    if "Film-Noir" in strength:
        poster = Image.blend(poster, _blinds(poster, rng), strength["Film-Noir"])
    _lettering(poster, title)
    return poster
