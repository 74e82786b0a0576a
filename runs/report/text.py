"""How numbers, names and paths are written in the page, the figures and Markdown."""

import math
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.text import Estimate
from engine.tasks import NO_SHARES
from vilt.datasets.specs import DATASETS

CAPTIONS = tomllib.loads((Path(__file__).parent / "templates" / "captions.toml").read_text("utf-8"))
_NAME = r"[^/\\\\\s\"',;:]+"
_HOME = re.compile(rf"(?<![\w.~-])(?:/home/{_NAME}|/Users/{_NAME}|/root(?![\w.-])|[A-Za-z]:\\+Users\\+{_NAME})")


class Unit(NamedTuple):
    """How values of a metric are written: in per cent, or unscaled."""

    factor: float
    digits: int
    sign: str

    @classmethod
    def of(cls, metric: str, samples: int) -> "Unit":
        """The unit of a metric, with as many decimals as the number of test samples justifies.

        The standard error of a share is about 50 % / √samples.
        """
        digits = 2 if samples >= 1000 else 1 if samples >= 100 else 0
        return cls(1, digits + 2, "") if metric in NO_SHARES else cls(100, digits, " %")

    def text(self, value: float) -> str:
        """The value without a per cent sign."""
        return f"{self.factor * value:.{self.digits}f}" if math.isfinite(value) else "undefined"

    def full(self, value: float | Estimate) -> str:
        """The value with a per cent sign, if it has one."""
        text = value.text(self.digits, self.factor) if isinstance(value, Estimate) else self.text(value)
        return f"{text}{self.sign}"


def metric_title(name: str) -> str:
    """Name of a metric for text and figures."""
    return name.upper() if name in ("auroc", "mae") else name.replace("f1_", "F1-").replace("_", " ")


def dataset_title(key: str) -> str:
    """Name of a dataset for text and figures; for a custom dataset, the name in its spec.yaml."""
    return DATASETS[key].title if key in DATASETS else key.partition("_")[2]


def without_home(text: str) -> str:
    """`text` with home folders replaced by `~`, since reports are shared."""
    return _HOME.sub("~", text)


def capital(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def in_words(words: Sequence[str]) -> str:
    """Joins words as in `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def without(type_name: str) -> str:
    """Rephrases a missing type: `text, audio missing` becomes `without text + audio`; `complete` stays."""
    lacking = type_name.removesuffix(" missing")
    return f"without {lacking.replace(', ', ' + ')}" if lacking != type_name else type_name


def excerpt(text: str, length: int) -> str:
    """The start of `text` in at most `length` characters, cut between words."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{textwrap.wrap(text, length - 1)[0]}…"
