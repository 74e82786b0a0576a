"""How numbers, names and paths are written, in the page, the figures and Markdown alike."""

import math
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilt.datasets.specs import DATASETS

CAPTIONS = tomllib.loads((Path(__file__).parent / "templates" / "captions.toml").read_text("utf-8"))
_NAME = r"[^/\\\\\s\"',;:]+"
_HOME = re.compile(rf"(?<![\w.~-])(?:/home/{_NAME}|/Users/{_NAME}|/root(?![\w.-])|[A-Za-z]:\\+Users\\+{_NAME})")


def metric_title(name: str) -> str:
    """As texts and figures name a metric."""
    return {"auroc": "AUROC"}.get(name, name.replace("f1_", "F1-").replace("_", " "))


def dataset_title(key: str) -> str:
    """As texts and figures name the dataset; a custom one is called what its spec.yaml says."""
    return DATASETS[key].title if key in DATASETS else key.partition("_")[2]


def digits_for(samples: int) -> int:
    """Decimals of per cent that a result on so many test samples has: its standard error is about 50 % / √samples."""
    return 2 if samples >= 1000 else 1 if samples >= 100 else 0


def percent(share: float, digits: int) -> str:
    """A fraction in per cent, without the sign."""
    return f"{100 * share:.{digits}f}" if math.isfinite(share) else "undefined"


def without_home(text: str) -> str:
    """`text` with home folders as `~`: a report is passed on."""
    return _HOME.sub("~", text)


def capital(text: str) -> str:
    """`text` as the start of a sentence."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def listed_runs(tags: Sequence[str]) -> str:
    """`R1, R3 to R5`: tags of runs, those that follow each other as a range."""
    ranges: list[list[int]] = []
    for number in sorted(int(tag[1:]) for tag in tags):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"R{first}" if not more else f"R{first} to R{more[-1]}" for first, *more in ranges)


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


def option_text(name: str, value: Any) -> str:
    """An option that sets a method apart, in few words: `memory_length 12`; of a path its end."""
    return f"{name} {excerpt(str(value).rstrip('/').rsplit('/')[-1], 24)}"


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
