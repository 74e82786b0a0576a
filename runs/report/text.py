"""How numbers, names and paths are written, in the page, the figures and Markdown alike."""

import math
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

from common.text import Estimate
from vilt.datasets.custom import CUSTOM
from vilt.datasets.specs import DATASETS

METRIC_TITLES = {
    **{name: name.replace("f1_", "F1-") for name in ("f1_macro", "f1_micro", "f1_samples", "f1_weighted")},
    "accuracy": "accuracy",
    "auroc": "AUROC",
}
CAPTIONS = tomllib.loads((Path(__file__).parent / "templates" / "captions.toml").read_text("utf-8"))
_NAME = r"[^/\\\\\s\"',;:]+"
_HOME = re.compile(rf"(?<![\w.~-])(?:/home/{_NAME}|/Users/{_NAME}|/root(?![\w.-])|[A-Za-z]:\\+Users\\+{_NAME})")


def dataset_title(task: str) -> str:
    """As texts and figures name the dataset; a custom one is called what its spec.yaml says."""
    return DATASETS[task].title if task in DATASETS else task.removeprefix(f"{CUSTOM}_")


def percent(share: float) -> str:
    """A fraction in per cent with two decimals, without the sign."""
    return f"{100 * share:.2f}" if math.isfinite(share) else "undefined"


def spread(value: Estimate) -> str:
    """Mean ± deviation in per cent; the deviation only where there is one."""
    return value.text(digits=2, factor=100)


def without_home(text: str) -> str:
    """`text` with home folders as `~`: a report is passed on."""
    return _HOME.sub("~", text)


def capital(text: str) -> str:
    """`text` as the start of a sentence."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def without(type_name: str) -> str:
    """A missing type as `complete`, `without text`."""
    return f"without {lacking}" if (lacking := type_name.removesuffix(" missing")) != type_name else type_name


def conditions(type_names: Sequence[str]) -> str:
    """`complete, without text, or without image`."""
    *first, last = map(without, type_names)
    return f"{', '.join(first)}, or {last}"


def excerpt(text: str, length: int) -> str:
    """The start of `text` in at most `length` characters, cut between words."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{textwrap.wrap(text, length - 1)[0]}…"


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
