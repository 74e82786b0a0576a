"""The table of themes: which genres a synthetic film shows in its poster, which in its plot, and in what words."""

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Theme:
    """One genre and how it shows.

    In the task's films, a theme without `looks` never shows in the poster, and one without `tales` never in the plot.
    In the pretraining films, the poster shows every theme (posters.py has a motif for each) and the caption tells every
    theme, by a look, a tale or both.
    """

    genre: str
    weight: float
    """Relative frequency of the genre."""
    looks: tuple[str, ...] = ()
    """Phrases that describe the poster's motif, for the captions of the pretraining films."""
    tales: tuple[str, ...] = ()
    """Plot sentences. Slots: {name}, {friend}, {place}, {job}."""

    @property
    def in_poster(self) -> bool:
        return bool(self.looks)

    @property
    def in_plot(self) -> bool:
        return bool(self.tales)


_TEXTS = tomllib.loads(Path(__file__).with_name("themes.toml").read_text("utf-8"))
THEMES = tuple(
    Theme(theme["genre"], theme["weight"], tuple(theme.get("looks", ())), tuple(theme.get("tales", ())))
    for theme in _TEXTS["themes"]
)
FILLERS, DISTRACTORS = tuple(_TEXTS["fillers"]), tuple(_TEXTS["distractors"])
NAMES, PLACES, JOBS = (tuple(_TEXTS[name]) for name in ("names", "places", "jobs"))
TITLE_FIRST, TITLE_LAST = tuple(_TEXTS["title_first"]), tuple(_TEXTS["title_last"])
THEME_BY_GENRE = {theme.genre: theme for theme in THEMES}
