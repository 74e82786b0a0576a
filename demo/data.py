"""A small synthetic dataset in the MM-IMDb layout, and separate films with captions to pretrain a CLIP on.

In the task, some genres show only in the poster, some only in the plot and some in both (see themes.py), so a missing
modality loses information that the other cannot supply. No cue is certain: some are left out, some posters are faint,
and some plots use a genre's word without belonging to it.
"""

import io
import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common import files
from demo import themes
from demo.posters import SKIES, draw_poster
from demo.themes import FILLERS, THEME_BY_GENRE, THEMES, Theme

MARKER = "made_up.json"
"""File that marks a folder as written by the demo, so a rerun may replace it."""

_GENRES_PER_FILM = {1: 0.35, 2: 0.45, 3: 0.20}
_CUE_ABSENT = 0.05
_POSTER_FAINT = 0.08
_SECOND_PLOT = 0.15
_DISTRACTOR = 0.30
_DEV_SHARE, _TEST_SHARE = 1 / 6, 1 / 3
_FIRST_TASK_ID, _FIRST_PRETRAIN_ID = 1_000_000, 9_000_000


@dataclass(frozen=True)
class Film:
    """One synthetic film. `genres` is None for a pretraining film, which has no label."""

    title: str
    plots: list[str]
    genres: list[str] | None
    year: int
    poster: Image.Image


def whole_folder(target: Path) -> AbstractContextManager[Path]:
    """A folder that becomes `target` when complete. DataError if `target` exists and was not written by the demo."""
    return files.whole_folder(target, MARKER, "the demo")


def _fill(sentence: str, rng: random.Random, cast: Sequence[str], place: str) -> str:
    name, friend = rng.sample(cast, 2)
    return sentence.format(name=name, friend=friend, place=place, job=rng.choice(themes.JOBS))


def _tell(sentences: list[str], rng: random.Random) -> str:
    """Joins the sentences in random order, with one cast and one place."""
    cast, place = rng.sample(themes.NAMES, 3), rng.choice(themes.PLACES)
    rng.shuffle(sentences)
    return " ".join(_fill(sentence, rng, cast, place) for sentence in sentences)


def _draw_genres(rng: random.Random, by_weight: bool) -> list[str]:
    count = rng.choices(list(_GENRES_PER_FILM), weights=list(_GENRES_PER_FILM.values()))[0]
    chosen: list[str] = []
    while len(chosen) < count:
        theme = rng.choices(THEMES, weights=[theme.weight if by_weight else 1.0 for theme in THEMES])[0]
        if theme.genre not in chosen:
            chosen.append(theme.genre)
    return chosen


def _title(rng: random.Random) -> str:
    return f"{rng.choice(themes.TITLE_FIRST)} {rng.choice(themes.TITLE_LAST)}"


def _task_plot(shown: Sequence[Theme], rng: random.Random) -> str:
    """A plot that tells the themes that have tales, among sentences without any theme."""
    told = [rng.choice(theme.tales) for theme in shown if theme.in_plot and rng.random() >= _CUE_ABSENT]
    padding = rng.sample(FILLERS, 1 if len(told) == 3 else 2)
    if rng.random() < _DISTRACTOR:
        padding[0] = rng.choice(themes.DISTRACTORS)
    return _tell(told + padding, rng)


def make_task_film(seed: int, number: int) -> Film:
    """Film `number` of the task: 1 to 3 genres, each shown only in the modalities of its theme."""
    rng = random.Random(f"task-{seed}-{number}")
    genres = _draw_genres(rng, by_weight=True)
    shown = [THEME_BY_GENRE[genre] for genre in genres]
    strength = {
        theme.genre: 0.5 if rng.random() < _POSTER_FAINT else 1.0
        for theme in shown
        if theme.in_poster and rng.random() >= _CUE_ABSENT
    }
    plots = [_task_plot(shown, rng) for _ in range(2 if rng.random() < _SECOND_PLOT else 1)]
    title = _title(rng)
    scenery = rng.sample(range(3), rng.randrange(2))
    poster = draw_poster(title, rng.choice(list(SKIES)), strength, rng, scenery)
    return Film(title, plots, genres, rng.randrange(1930, 2016), poster)


def _caption(shown: Sequence[Theme], sky: str, rng: random.Random) -> str:
    """A caption that tells every theme of a pretraining poster, by a look or by a tale."""
    looks: list[str] = []
    tales: list[str] = []
    for theme in shown:
        if theme.in_poster and (not theme.in_plot or rng.random() < 0.3):
            looks.append(rng.choice(theme.looks))
        else:
            tales.append(rng.choice(theme.tales))
    if rng.random() < 0.6:
        tales.append(rng.choice(FILLERS))
    story = _tell(tales, rng)
    rng.shuffle(looks)
    scene = " and ".join(looks) or "a landscape"
    look = rng.choice(("A poster of {} under a {} sky.", "{} below a {} sky.", "The poster shows {}, the sky is {}."))
    if not looks and rng.random() < 0.5:
        return story
    described = look.format(scene, sky)
    parts = [described[0].upper() + described[1:], story]
    rng.shuffle(parts)
    return " ".join(part for part in parts if part)


def make_pretrain_film(seed: int, number: int) -> Film:
    """Film `number` for pretraining: the poster shows every theme, and two captions each tell every theme."""
    rng = random.Random(f"pretrain-{seed}-{number}")
    genres = _draw_genres(rng, by_weight=False)
    shown = [THEME_BY_GENRE[genre] for genre in genres]
    sky, title = rng.choice(list(SKIES)), _title(rng)
    scenery = rng.sample(range(3), rng.randrange(2))
    poster = draw_poster(title, sky, dict.fromkeys(genres, 1.0), rng, scenery)
    return Film(title, [_caption(shown, sky, rng) for _ in range(2)], None, rng.randrange(1930, 2016), poster)


def _write_film(folder: Path, film_id: str, film: Film) -> None:
    poster = io.BytesIO()  # Pillow does not notice if a full disk takes only part of a file
    film.poster.save(poster, "JPEG", quality=88)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "images" / f"{film_id}.jpeg").write_bytes(poster.getvalue())
    label: dict[str, object] = {"title": film.title, "plot": film.plots, "year": film.year}
    if film.genres is not None:
        label["genres"] = film.genres
    (folder / "labels" / f"{film_id}.json").write_text(json.dumps(label), encoding="utf-8")


def write_task(target: Path, films: int, seed: int) -> dict[str, list[str]]:
    """Writes the task in the MM-IMDb layout: `films` training films, plus a sixth of that for dev and a third for test.

    Returns the split as written: ids keyed by "train", "dev", "test". Errors are those of `whole_folder`.
    """
    sizes = {"train": films, "dev": max(1, round(films * _DEV_SHARE)), "test": max(1, round(films * _TEST_SHARE))}
    numbers = list(range(sum(sizes.values())))
    random.Random(f"split-{seed}").shuffle(numbers)
    split: dict[str, list[str]] = {}
    with whole_folder(target) as folder:
        for name, size in sizes.items():
            chosen, numbers = numbers[:size], numbers[size:]
            split[name] = [str(_FIRST_TASK_ID + number) for number in chosen]
            for film_id, number in zip(split[name], chosen, strict=True):
                _write_film(folder, film_id, make_task_film(seed, number))
        (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return split


def write_pretrain(target: Path, films: int, seed: int) -> None:
    """Writes `films` captioned posters, without genres or split. Errors are those of `whole_folder`."""
    with whole_folder(target) as folder:
        for number in range(films):
            _write_film(folder, str(_FIRST_PRETRAIN_ID + number), make_pretrain_film(seed, number))
