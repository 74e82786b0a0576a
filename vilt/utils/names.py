"""Compares names as people, spreadsheets and file systems write them: those that look the same count as the same."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
"""Zero-width characters that never distinguish words, unlike the joiners U+200C and U+200D."""
ALIKE = str.maketrans(
    "аеорсухіјѕԁһАВЕКМНОРСТХУІЈЅΑΒΕΖΗΙΚΜΝΟΡΤΥΧο‐‑‒–−", "aeopcyxijsdhABEKMHOPCTXYIJSABEZHIKMNOPTYXo-----"
)
"""Maps Cyrillic and Greek letters, and dashes, to the Latin letter or the hyphen that they look like."""
MADE_OF = ("<compat>", "<wide>", "<narrow>")
"""Tags of Unicode decompositions of characters that look like those they are composed of."""
WHOLE = re.compile(r"(-?\d+)\.0+")


def normal(name: str) -> str:
    """`name` in Unicode form NFC, without invisible characters, and with single blanks between words."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", name)).split())


def whole(value: object) -> object:
    """A whole float as an integer, else `value`: programs turn 1 into 1.0 in a column with gaps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def label_name(label: str | float) -> str:
    """The name of a label, which may be text or a number; 1.0 becomes 1."""
    name = normal(str(label))
    return found[1] if (found := WHOLE.fullmatch(name)) else name


def look(name: str) -> str:
    """The appearance of `name`: the same for names that cannot be told apart by eye."""
    shown = (c for c in normal(name) if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    # Ligatures and full-width or half-width letters are replaced by the letters they are composed of.
    plain = (unicodedata.normalize("NFKC", c) if unicodedata.decomposition(c).startswith(MADE_OF) else c for c in shown)
    return "".join(plain).translate(ALIKE)


def look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Two different names that look the same, in ASCII with escapes; None if there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(look(name), name)) != name:
            return ascii(other), ascii(name)
    return None


def spelled_as(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """`names` in normal form; those that look like a `known` name but for capitals become that name."""
    by_look = {look(name).casefold(): name for name in known}
    given = [normal(name) for name in names]
    spelled = [by_look.get(look(name).casefold(), name) for name in given]
    return [name if spelled.count(like) > 1 else like for name, like in zip(given, spelled, strict=True)]


def find_file(folder: Path, file: str) -> Path:
    """FOLDER/FILE, or, if there is no such file, the only one that `file` can mean.

    It may be spelled with backslashes, other capitalisation, another Unicode form, or blanks around it.

    Raises:
        OSError: a name is too long, or there is no permission for a folder.
    """
    as_written = folder / file
    if as_written.exists():
        return as_written
    place = folder
    for part in PurePosixPath(file.replace("\\", "/")).parts:
        if not (place / part).exists():
            alike = _listing(place, place.stat().st_mtime_ns).get(_key(part), []) if place.is_dir() else []
            if len(alike) != 1:
                return as_written
            part = alike[0]
        place /= part
    return place


def _key(name: str) -> str:
    return normal(name).casefold()


@lru_cache(maxsize=64)
def _listing(folder: Path, _: int) -> dict[str, list[str]]:
    """Names in a folder, keyed by `_key`. The second argument, its modification time, invalidates the cache."""
    found: dict[str, list[str]] = {}
    for path in folder.iterdir():
        found.setdefault(_key(path.name), []).append(path.name)
    return found
