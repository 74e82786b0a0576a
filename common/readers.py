"""Readers of option values: each takes (option, value) and returns the value to use.

All raise ConfigError with one line that names the option, what was expected and what was found.
"""

import ast
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.messages import quoted, suggestion

Reader = Callable[[str, Any], Any]


def wrong(option: str, expected: str, value: Any) -> ConfigError:
    """The error for an unexpected value."""
    return ConfigError(f"{option}: expected {expected}, found {quoted(value)}")


def is_number(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer with hundreds of digits
        return False


def integer(low: int, high: int = 2**63 - 1) -> Reader:
    """Reads an integer from `low` to `high`."""

    def read(option: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            at_most = f" and at most {high}" if isinstance(value, int) and value > high else ""
            raise wrong(option, f"an integer of at least {low}{at_most}", value)
        return value

    return read


def number(low: float, high: float = float("inf"), *, above: bool = False) -> Reader:
    """Reads a number from `low` (exclusive if `above`) to `high`."""

    def read(option: str, value: Any) -> float:
        if not is_number(value) or not low <= value <= high or (above and value == low):
            top = "" if high == float("inf") else f" and at most {high:g}"
            span = f"above {low:g}{top}" if above else f"of at least {low:g}" if high == float("inf") else ""
            raise wrong(option, f"a number {span or f'from {low:g} to {high:g}'}", value)
        return float(value)

    return read


def flag(option: str, value: Any) -> bool:
    """Reads True or False."""
    if not isinstance(value, bool):
        raise wrong(option, "True or False", value)
    return value


def one_of(*choices: str) -> Reader:
    """Reads one of `choices`."""

    def read(option: str, value: Any) -> str:
        if value not in choices:
            raise ConfigError(f"{wrong(option, ' or '.join(choices), value)}{suggestion(value, choices)}")
        return str(value)

    return read


def text(option: str, value: Any) -> str:
    """Reads a text. A number is refused: its spelling, such as 1.10 or 1_000, is already lost."""
    if not isinstance(value, str):
        raise wrong(option, "a text (numbers in quotes)", value)
    return value


def folder_name(option: str, value: Any) -> str:
    """Reads the name of a folder without a path."""
    name = text(option, value)
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable() or not may_be_path(name):
        raise wrong(option, "the name of a folder, without slashes", value)
    return name


def path_or_name(option: str, value: Any) -> str:
    """Reads a text that may be a path."""
    name = text(option, value)
    if not may_be_path(name):
        raise wrong(option, "a path", value)
    return name


def path(option: str, value: Any) -> Path:
    """Reads a path; `~` is the home folder."""
    try:
        return Path(path_or_name(option, value)).expanduser()
    except RuntimeError:  # no such user
        raise wrong(option, "a path", value) from None


def may_be_path(name: str) -> bool:
    """Whether a file can have this name: not if it is too long, or has a NUL or a lone surrogate."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in name and len(name) < 4096 and max(map(len, parts)) < 256


def optional(reader: Reader) -> Reader:
    """Reads what `reader` reads, or None; an empty text is None too."""
    return lambda option, value: None if value is None or value == "" else reader(option, value)


def word_or(word: str, reader: Reader) -> Reader:
    """Reads `word`, or what `reader` reads."""
    return lambda option, value: word if value == word else reader(option, value)


def by_key(keys: Sequence[str], reader: Reader) -> Reader:
    """Reads one value for all keys, or a dictionary with a value for each."""

    def read(option: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {key: reader(option, value) for key in keys}
        if set(value) != set(keys):
            raise wrong(option, f"a value, or a dictionary of {', '.join(keys)}", dict(value))
        return {key: reader(f"{option}.{key}", value[key]) for key in keys}

    return read


def of_each(count: int, reader: Reader) -> Reader:
    """Reads a list of `count` values, or one value for all of them, into a tuple."""

    def read(option: str, value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise wrong(option, f"one value, or a list of {count}", value)
        return tuple(reader(option, one) for one in values)

    return read


def several(reader: Reader, *, texts: bool = False) -> Reader:
    """Reads a non-empty list of distinct values into a tuple; a single value counts as a list of one.

    A shell turns `["text","image"]` into `[text,image]`, which is not a Python list, but is read as one too.

    Args:
        texts: the values are texts and are taken literally: 1.10 is not a number.
    """

    def read(option: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = words_of(option, value, texts)
        values = [reader(option, one) for one in value] if isinstance(value, (list, tuple)) else [reader(option, value)]
        if not values:
            raise wrong(option, "at least one value", list(value))
        repeated = [one for place, one in enumerate(values) if one in values[:place]]
        if repeated:
            raise ConfigError(f"{option}: expected each value once, found {repeated[0]} twice")
        return tuple(values)

    return read


def one_or_several(reader: Reader) -> Reader:
    """Reads a single text, or a list of several into a tuple."""

    def read(option: str, value: Any) -> Any:
        found = several(reader, texts=True)(option, value)
        return found[0] if len(found) == 1 else found

    return read


def words_of(option: str, value: str, texts: bool) -> Any:
    """The values in `[a,b]`; anything but a list is returned unchanged."""
    found = literal(value)
    if isinstance(found, (list, tuple)) and (not texts or all(one is None or isinstance(one, str) for one in found)):
        return found
    if value.startswith("[") and value.endswith("]"):
        words = [word.strip() for word in value[1:-1].split(",") if word.strip()]
        return [(unquoted(word) if word != "None" else None) if texts else literal(word) for word in words]
    if value.startswith("[") or (value.startswith("(") and not texts):
        raise wrong(option, """a Python list, such as "['a','b']" or [1,2]""", value)
    return value


def literal(word: str) -> Any:
    """The Python literal that `word` spells, or `word` itself if it is not one."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def unquoted(word: str) -> str:
    """`word` without its quotes; unchanged if it has none, even if it looks like a number."""
    found = literal(word)
    return found if isinstance(found, str) else word


def dictionary(option: str, value: Any) -> dict[str, Any]:
    """Reads a dictionary and sorts it, since folders of a sweep's runs are named in its order; None is an empty one."""
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise wrong(option, f"a dictionary, or one entry as in {option}.NAME=VALUE", value)
    return {str(key): plain(value[key]) for key in sorted(value, key=str)}


def warmup(option: str, value: Any) -> float:
    """Reads a share below 1 or a whole number of steps."""
    if not is_number(value) or value < 0 or (value >= 1 and value != int(value)):
        raise wrong(option, "a share below 1 or a number of steps", value)
    return float(value)


def interval(option: str, value: Any) -> int | float:
    """Reads a share of an epoch (up to 1) or a number of batches."""
    if is_number(value) and (0 < value <= 1 or (isinstance(value, int) and value > 1)):
        return value if isinstance(value, int) and value > 1 else float(value)
    raise wrong(option, "a share of an epoch above 0 and up to 1, or an integer number of batches", value)


def gpus(option: str, value: Any) -> int:
    """Reads a number of GPUs, or the list of the first ones: [0], [0, 1], …"""
    if isinstance(value, (list, tuple)) and value:
        if list(value) != list(range(len(value))):
            raise ConfigError(
                f"{option}: expected a number, or the first GPUs as in [0] or [0,1], found {list(value)}; "
                f"CUDA_VISIBLE_DEVICES chooses others"
            )
        return len(value)
    return integer(0)(option, value)


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: with lists in place of tuples."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
