"""Draws made-up film posters: a sky, a ground, the title, and one motif for each theme that the poster shows."""

import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

WIDTH, HEIGHT = 96, 128
"""Size of a poster in pixels. The loader's centre crop keeps the middle 96 rows: everything that tells a genre is
drawn there, title and credits outside of it."""

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
"""Name of a sky and its colours at the top and at the horizon."""

_GROUNDS: tuple[Colour, ...] = ((60, 84, 50), (110, 88, 60), (52, 56, 70), (150, 120, 80), (36, 60, 84))
_INK: Colour = (20, 18, 24)

Motif = Callable[[ImageDraw.ImageDraw, float, float, float, random.Random], None]
"""Draws itself around the centre (x, y) with half its size in pixels."""


def _ship(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    hull = [(x - r, y + 0.35 * r), (x + r, y + 0.35 * r), (x + 0.65 * r, y + r), (x - 0.65 * r, y + r)]
    draw.polygon(hull, fill=(120, 66, 30), outline=_INK)
    draw.line([(x, y - r), (x, y + 0.35 * r)], fill=_INK, width=2)
    draw.polygon([(x, y - r), (x, y + 0.25 * r), (x + side * 0.9 * r, y + 0.25 * r)], fill=(250, 246, 230))
    draw.polygon([(x, y - 0.6 * r), (x, y + 0.25 * r), (x - side * 0.7 * r, y + 0.25 * r)], fill=(226, 216, 190))


def _castle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    wall = rng.choice(((196, 176, 214), (176, 170, 206)))
    draw.rectangle([x - 0.7 * r, y, x + 0.7 * r, y + r], fill=wall, outline=_INK)
    for dx, top in ((-0.7, -0.15), (0.0, -0.35), (0.7, -0.15)):
        draw.rectangle([x + (dx - 0.22) * r, y + top * r, x + (dx + 0.22) * r, y + r], fill=wall, outline=_INK)
        roof = [
            (x + (dx - 0.32) * r, y + top * r),
            (x + (dx + 0.32) * r, y + top * r),
            (x + dx * r, y + (top - 0.6) * r),
        ]
        draw.polygon(roof, fill=(226, 50, 140))
    draw.rectangle([x - 0.15 * r, y + 0.55 * r, x + 0.15 * r, y + r], fill=_INK)


def _cactus(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    green = rng.choice(((30, 130, 50), (50, 140, 40)))
    arm, side = max(3, round(0.34 * r)), rng.choice((-1, 1))
    draw.rounded_rectangle([x - 0.24 * r, y - r, x + 0.24 * r, y + r], radius=0.24 * r, fill=green)
    for s, low, high in ((side, 0.25, -0.5), (-side, 0.5, -0.15)):
        draw.line([(x, y + low * r), (x + s * 0.75 * r, y + low * r)], fill=green, width=arm)
        draw.line([(x + s * 0.75 * r, y + (low + 0.16) * r), (x + s * 0.75 * r, y + high * r)], fill=green, width=arm)
    draw.line([(x, y - 0.8 * r), (x, y + 0.9 * r)], fill=(150, 210, 110), width=1)


def _heart(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    red = rng.choice(((220, 20, 50), (235, 40, 80)))
    for s in (-1, 1):
        draw.ellipse([x + s * 0.45 * r - 0.53 * r, y - 0.85 * r, x + s * 0.45 * r + 0.53 * r, y + 0.2 * r], fill=red)
    draw.polygon([(x - 0.92 * r, y - 0.1 * r), (x + 0.92 * r, y - 0.1 * r), (x, y + r)], fill=red)
    draw.ellipse([x - 0.65 * r, y - 0.6 * r, x - 0.35 * r, y - 0.3 * r], fill=(255, 200, 210))


def _money_bag(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    sack = rng.choice(((140, 116, 60), (126, 108, 70)))
    draw.polygon([(x - 0.5 * r, y - r), (x + 0.5 * r, y - r), (x, y - 0.2 * r)], fill=sack)
    draw.ellipse([x - 0.85 * r, y - 0.5 * r, x + 0.85 * r, y + r], fill=sack, outline=_INK)
    draw.rectangle([x - 0.35 * r, y - 0.55 * r, x + 0.35 * r, y - 0.35 * r], fill=_INK)
    draw.line([(x, y - 0.2 * r), (x, y + 0.75 * r)], fill=(250, 230, 60), width=2)
    draw.ellipse([x - 0.35 * r, y - 0.05 * r, x + 0.35 * r, y + 0.6 * r], outline=(250, 230, 60), width=2)


def _magnifier(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    draw.line([(x + side * 0.2 * r, y + 0.2 * r), (x + side * r, y + r)], fill=(90, 46, 20), width=max(3, round(r / 3)))
    lens = [x - side * 0.3 * r - 0.68 * r, y - r, x - side * 0.3 * r + 0.68 * r, y + 0.36 * r]
    draw.ellipse(lens, fill=(200, 240, 250), outline=_INK, width=3)


def _portrait(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    draw.rectangle([x - 0.8 * r, y - r, x + 0.8 * r, y + r], fill=(214, 170, 50), outline=_INK)
    draw.rectangle([x - 0.6 * r, y - 0.8 * r, x + 0.6 * r, y + 0.8 * r], fill=(70, 40, 30))
    skin = rng.choice(((236, 200, 170), (196, 150, 110), (130, 90, 60)))
    draw.ellipse([x - 0.3 * r, y - 0.6 * r, x + 0.3 * r, y + 0.1 * r], fill=skin)
    draw.pieslice([x - 0.55 * r, y + 0.1 * r, x + 0.55 * r, y + 1.5 * r], 180, 360, fill=(150, 160, 190))


def _house(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    wall = rng.choice(((240, 226, 190), (236, 236, 236)))
    draw.rectangle([x - 0.75 * r, y - 0.1 * r, x + 0.75 * r, y + r], fill=wall, outline=_INK)
    draw.polygon([(x - r, y - 0.1 * r), (x + r, y - 0.1 * r), (x, y - r)], fill=(190, 60, 30))
    draw.rectangle([x - 0.2 * r, y + 0.35 * r, x + 0.2 * r, y + r], fill=(40, 110, 190))
    for s in (-1, 1):
        draw.rectangle([x + s * 0.5 * r - 0.14 * r, y + 0.15 * r, x + s * 0.5 * r + 0.14 * r, y + 0.45 * r], fill=_INK)


def _planet(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    body = rng.choice(((40, 200, 220), (60, 180, 240)))
    draw.ellipse([x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r], fill=body)
    draw.arc([x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r], 330, 120, fill=(10, 90, 130), width=3)
    ring = [x - 1.1 * r, y - 0.28 * r, x + 1.1 * r, y + 0.28 * r]
    draw.arc(ring, 330, 210, fill=(255, 236, 120), width=3)


def _ghost(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    sheet = rng.choice(((240, 246, 250), (226, 236, 232)))
    draw.pieslice([x - 0.7 * r, y - r, x + 0.7 * r, y + 0.4 * r], 180, 360, fill=sheet)
    hem = [(x + (-0.7 + 1.4 * i / 6) * r, y + (1.0 if i % 2 else 0.7) * r) for i in range(7)]
    draw.polygon([(x - 0.7 * r, y - 0.35 * r), *hem, (x + 0.7 * r, y - 0.35 * r)], fill=sheet)
    for dx in (-0.28, 0.28):
        draw.ellipse([x + (dx - 0.17) * r, y - 0.5 * r, x + (dx + 0.17) * r, y - 0.05 * r], fill=_INK)
    draw.ellipse([x - 0.15 * r, y + 0.1 * r, x + 0.15 * r, y + 0.5 * r], fill=_INK)


def _ball(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    r *= 0.85
    orange = rng.choice(((240, 120, 20), (226, 104, 30)))
    draw.ellipse([x - r, y - r, x + r, y + r], fill=orange, outline=_INK, width=2)
    for side in (-1, 1):
        seam = [x + side * 1.2 * r - r, y - r, x + side * 1.2 * r + r, y + r]
        draw.arc(seam, 35 + 90 * side, 145 + 90 * side, fill=_INK, width=2)
    draw.line([(x, y - r), (x, y + r)], fill=_INK, width=2)
    draw.line([(x - r, y), (x + r, y)], fill=_INK, width=2)


def _tree(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    draw.rectangle([x - 0.12 * r, y + 0.3 * r, x + 0.12 * r, y + r], fill=(80, 56, 36))
    crown = rng.choice(((60, 100, 60), (120, 110, 50), (80, 110, 90)))
    draw.ellipse([x - 0.6 * r, y - 0.8 * r, x + 0.6 * r, y + 0.5 * r], fill=crown)


def _birds(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    for _ in range(3):
        bx, by = x + rng.uniform(-0.7, 0.7) * r, y + rng.uniform(-0.7, 0.7) * r
        draw.arc([bx - 6, by - 3, bx, by + 3], 180, 360, fill=_INK)
        draw.arc([bx, by - 3, bx + 6, by + 3], 180, 360, fill=_INK)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    grey = rng.randrange(190, 230)
    for dx, size in ((-0.5, 0.3), (0.0, 0.42), (0.5, 0.3)):
        draw.ellipse([x + (dx - size) * r, y - size * r, x + (dx + size) * r, y + size * r], fill=(grey, grey, grey))


MOTIFS: dict[str, Motif] = {
    "Adventure": _ship,
    "Fantasy": _castle,
    "Western": _cactus,
    "Romance": _heart,
    "Crime": _money_bag,
    "Mystery": _magnifier,
    "Biography": _portrait,
    "Family": _house,
    "Sci-Fi": _planet,
    "Horror": _ghost,
    "Sport": _ball,
}
"""The motif of each genre, but for two that change the whole poster: Animation (dots) and Film-Noir (blinds)."""

_SCENERY: tuple[Motif, ...] = (_tree, _birds, _cloud)

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
    """A sky that fades to the horizon over a hilly ground, with grain."""
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
    # The bitmap font comes with Pillow; a system's fonts would make the bytes depend on the machine.
    font = ImageFont.load_default_imagefont()
    words = title.upper()
    draw.text(((WIDTH - font.getbbox(words)[2]) // 2, HEIGHT - _CROP_TOP + 2), words, font=font, fill=(240, 230, 200))


def draw_poster(
    title: str, sky: str, strength: dict[str, float], rng: random.Random, scenery: Sequence[int] = ()
) -> Image.Image:
    """One RGB poster of WIDTH x HEIGHT.

    `strength` maps each genre to show to 1 (plain) or less (faint); a genre that is not in it leaves no trace.
    `scenery` picks the genre-free things (tree, birds, cloud) by number. At most four motifs and scenery pieces have
    a place of their own; ValueError for more.
    """
    if len(strength) + len(scenery) > 4:
        raise ValueError(f"a poster has 4 places, {len(strength)} genres and {len(scenery)} pieces of scenery given")
    poster = _background(sky, rng)
    if "Animation" in strength:
        poster = Image.blend(poster, _dots(poster, rng), strength["Animation"])
    half = WIDTH / 4
    places = [(half + col * 2 * half, _CROP_TOP + half + row * 2 * half) for row in (0, 1) for col in (0, 1)]
    rng.shuffle(places)
    items = [(_SCENERY[number], 0.9) for number in scenery]
    items += [(MOTIFS[genre], value) for genre, value in strength.items() if genre in MOTIFS]
    for (motif, value), (x, y) in zip(items, places, strict=False):
        drawn = poster.copy()
        x, y, r = x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), rng.uniform(15, 20)
        motif(ImageDraw.Draw(drawn), x, y, r, rng)
        poster = Image.blend(poster, drawn, value)
    if "Film-Noir" in strength:
        poster = Image.blend(poster, _blinds(poster, rng), strength["Film-Noir"])
    _lettering(poster, title)
    return poster
