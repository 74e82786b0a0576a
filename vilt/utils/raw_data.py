"""Raw datasets as the converter sees them: samples that are read one by one, and what makes one unusable.

Neither this module nor write_*.py imports pyarrow: the converter's worker processes import them, and so stay small.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from common.errors import DataError
from common.messages import quoted
from common.strict_json import kind_of, parse_json
from vilt.datasets.specs import DatasetSpec, Split
from vilt.images import open_rgb

MISSING_FILE = "missing file"
UNREADABLE_FILE = "unreadable file"
UNDECODABLE_IMAGE = "undecodable image"
BROKEN_JSON = "broken JSON"
INCOMPLETE_JSON = "incomplete JSON"
INCOMPLETE_ROW = "incomplete row"
UNKNOWN_CLASS = "unknown class"
PATH_LEAVES_RAW = "path leaves RAW"

MAX_FILE_BYTES = 64 * 2**20
"""Of one sample's file. No image of these datasets comes near, and memory stays bounded."""
MAX_RECORD_BYTES = 16 * 2**20
"""Likewise of one sample's JSON file, of which Python makes up to 30 times as much in memory."""

Row = dict[str, Any]
"""One sample, column name -> value, without the `split` column, which the writer adds."""


class BadSampleError(Exception):
    """A sample that cannot be used. `file` is relative to the raw folder, `detail` may be empty."""

    def __init__(self, reason: str, file: str, detail: str = "") -> None:
        super().__init__(reason, file, detail)  # all of them, or the exception would not survive pickling
        self.reason = reason
        self.file = file
        self.detail = detail


@dataclass(frozen=True)
class Sample:
    """What a worker process gets: small, and able to read itself."""

    row: int
    """In the file that lists it, from 1."""
    name: str
    """For messages."""
    read: Callable[[], Row]
    """Reads and checks everything of the sample; can be pickled. Raises BadSampleError if it cannot be used."""


@dataclass(frozen=True)
class RawSplit:
    """The samples of one split, in the order of the file that lists them."""

    split: Split
    source: str
    """The file that lists the samples, relative to the raw folder."""
    samples: Sequence[Sample]
    n_without_text: int = 0
    """Listed samples that are left out because the dataset has no text for them."""


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset whose top-level files have been read and checked; its samples have not been yet."""

    spec: DatasetSpec
    class_names: tuple[str, ...]
    splits: tuple[RawSplit, ...]


# ---- top-level files: one of them wrong means that nothing can be converted


def require_layout(root: Path, names: Iterable[str], layout: str) -> None:
    """Raises DataError, which shows `layout`, unless all `names` exist in `root`; those ending in `/` are folders."""
    missing = [n for n in names if not ((root / n).is_dir() if n.endswith("/") else (root / n).is_file())]
    if not root.is_dir():
        problem = f"the raw folder {root} does not exist"
    elif missing:
        problem = f"{', '.join(missing)} not found in {root}"
    else:
        return
    raise DataError(f"{problem}. Expected layout of RAW:\n\n{layout.rstrip()}")


def read_bytes(path: Path) -> bytes:
    """The content of a top-level file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a top-level file; `expected` says in the message what it should hold. Raises DataError."""
    try:
        value = parse_json(read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON in UTF-8: {error}. Expected {expected}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected {expected}, found {kind_of(value)}.")
    return value


def read_split_file(path: Path, spec: DatasetSpec) -> dict[Split, list[str]]:
    """The names in split.json by split, in its order.

    Raises DataError if a split is absent, unknown or empty, or if a name is not a string or is listed twice.
    """
    keys = list(spec.file_splits.values())
    expected = f"an object with the lists {', '.join(map(repr, keys))}"
    value = read_object(path, expected)
    if set(value) != set(keys):
        found = ", ".join(map(quoted, list(value)[:8])) or "(none)"
        raise DataError(f"{path}: expected {expected}, found the keys {found}.")
    seen: dict[str, str] = {}
    for key, names in value.items():
        if not isinstance(names, list) or not names:
            found = "an empty list" if names == [] else kind_of(names)
            raise DataError(f"{path}: expected a list of strings under {quoted(key)}, found {found}.")
        for row, name in enumerate(names, 1):
            where = f"{quoted(key)}, row {row}"
            if not isinstance(name, str):
                raise DataError(f"{path}: expected a string at {where}, found {kind_of(name)} ({quoted(name)}).")
            if name in seen:
                raise DataError(f"{path}: {quoted(name)} is listed twice, at {seen[name]} and at {where}.")
            seen[name] = where
    return {split: value[key] for split, key in spec.file_splits.items()}


# ---- parts of a sample: one of them wrong makes a bad sample


def check_inside(file: str) -> None:
    """Raises BadSampleError if `file`, relative to the raw folder, is absolute or climbs with `..`."""
    # The path as written decides, not where links lead: big image folders often are links to another disk.
    path = PurePath(file)
    if path.anchor or ".." in path.parts:
        raise BadSampleError(PATH_LEAVES_RAW, file)


def read_file(raw: Path, file: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of `raw/file`, `most` of them. Raises BadSampleError, also if there are more or `file` leaves `raw`."""
    check_inside(file)
    path = raw / file
    try:
        if not path.is_file():
            raise BadSampleError(MISSING_FILE, file)
        with path.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise BadSampleError(UNREADABLE_FILE, file, error.strerror or str(error)) from None
    if len(data) > most:
        raise BadSampleError(UNREADABLE_FILE, file, f"larger than {most:,} bytes")
    return data


def read_image(raw: Path, file: str) -> bytes:
    """The bytes of an image file, unchanged, after a full decode to RGB has succeeded. Raises BadSampleError."""
    data = read_file(raw, file)
    try:
        open_rgb(data)
    except Exception as error:  # see there
        raise BadSampleError(UNDECODABLE_IMAGE, file, str(error) or type(error).__name__) from None
    return data


def read_record(data: bytes, file: str) -> dict[str, Any]:
    """The JSON object of one sample. Raises BadSampleError."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise BadSampleError(BROKEN_JSON, file, str(error)) from None
    if not isinstance(value, dict):
        raise BadSampleError(INCOMPLETE_JSON, file, f"expected an object, found {kind_of(value)}")
    return value


def check_text(text: object, file: str, what: str) -> str:
    """`text` if it is a string. Raises BadSampleError; `what` names the text in its detail."""
    if not isinstance(text, str):
        raise BadSampleError(INCOMPLETE_JSON, file, f"{what}: expected a string, found {kind_of(text)}")
    return text


def check_texts(record: dict[str, Any], key: str, file: str) -> list[str]:
    """The list of strings under `key`. Raises BadSampleError."""
    if key not in record:
        raise BadSampleError(INCOMPLETE_JSON, file, f"no {quoted(key)}")
    if not isinstance(record[key], list):
        raise BadSampleError(INCOMPLETE_JSON, file, f"{quoted(key)}: expected a list, found {kind_of(record[key])}")
    return [check_text(text, file, repr(key)) for text in record[key]]
