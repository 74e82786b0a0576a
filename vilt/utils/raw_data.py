"""Raw datasets as the converter sees them: samples that are read one by one, and what makes one unusable."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from common.errors import DataError
from common.messages import listed, quoted
from common.strict_json import kind_of, parse_json, read_json
from vilt.datasets.specs import DatasetSpec, Split
from vilt.images import open_rgb

MISSING_FILE, UNREADABLE_FILE, UNDECODABLE_IMAGE = "missing file", "unreadable file", "undecodable image"
BROKEN_JSON, INCOMPLETE_JSON, INCOMPLETE_ROW = "broken JSON", "incomplete JSON", "incomplete row"
UNKNOWN_CLASS, PATH_LEAVES_RAW = "unknown class", "path leaves RAW"

MAX_FILE_BYTES = 64 * 2**20
"""Of one sample's file. No image of these datasets comes near, and memory stays bounded."""
MAX_RECORD_BYTES = 16 * 2**20
"""Likewise of one sample's JSON file, of which Python makes up to 30 times as much in memory."""

Row = dict[str, Any]
"""One sample, column name -> value, without the `split` column, which the writer adds."""
Sample = tuple[int, Callable[[], Row]]
"""Row in the file that lists it, from 1, and what reads and checks all of it, or raises BadSampleError."""
Kind = TypeVar("Kind", str, list, dict)


class BadSampleError(Exception):
    """A sample that cannot be used. `file` is relative to the raw folder, `detail` may be empty."""

    def __init__(self, reason: str, file: str, detail: str = "") -> None:
        super().__init__(reason, file, detail)
        self.reason, self.file, self.detail = reason, file, detail


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
    """Raises DataError, which shows `layout`, unless all `names` exist in `root`."""
    missing = [name for name in names if not (root / name).exists()]
    if missing or not root.is_dir():
        there = root.is_dir()
        problem = f"{', '.join(missing)} not found in {root}" if there else f"the raw folder {root} does not exist"
        raise DataError(f"{problem}. Expected layout of RAW:\n\n{layout.rstrip()}")


def read_bytes(path: Path) -> bytes:
    """The content of a top-level file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_split_file(path: Path, spec: DatasetSpec) -> dict[Split, list[str]]:
    """The names in split.json by split, in its order.

    Raises DataError if a split is absent, unknown or empty, or if a name is not a string or is listed twice.
    """
    keys, lists = list(spec.file_splits.values()), read_json(path)
    if lists.keys() != set(keys):
        raise DataError(f"{path}: expected lists under {listed(keys)}, found the keys {listed(list(lists))}")
    seen: dict[str, str] = {}
    for key, names in lists.items():
        if not isinstance(names, list) or not names:
            found = "an empty list" if names == [] else kind_of(names)
            raise DataError(f"{path}: expected a list of strings under {quoted(key)}, found {found}")
        for row, name in enumerate(names, 1):
            place = f"{quoted(key)}, row {row}"
            if not isinstance(name, str):
                raise DataError(f"{path}: expected a string at {place}, found {kind_of(name)} ({quoted(name)})")
            if seen.setdefault(name, place) != place:
                raise DataError(f"{path}: {quoted(name)} is listed twice, at {seen[name]} and at {place}")
    return {split: lists[key] for split, key in spec.file_splits.items()}


# ---- parts of a sample: one of them wrong makes a bad sample


def check_inside(file: str) -> None:
    """Raises BadSampleError if `file`, relative to the raw folder, is absolute or climbs with `..`."""
    # The path as written decides, not where links lead: big image folders often are links to another disk.
    path = PurePath(file)
    if path.anchor or ".." in path.parts:
        raise BadSampleError(PATH_LEAVES_RAW, file)


def read_file(raw: Path, file: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of `raw/file`. Raises BadSampleError, also if there are more than `most` or `file` leaves `raw`."""
    check_inside(file)
    try:
        if not (raw / file).is_file():
            raise BadSampleError(MISSING_FILE, file)
        with (raw / file).open("rb") as opened:
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
        return of_kind(dict, parse_json(data), file, "the sample")
    except ValueError as error:
        raise BadSampleError(BROKEN_JSON, file, str(error)) from None


def of_kind(kind: type[Kind], value: object, file: str, what: str) -> Kind:
    """`value`, if it is a `kind`. Raises BadSampleError, whose detail calls it `what`."""
    if not isinstance(value, kind):
        raise BadSampleError(INCOMPLETE_JSON, file, f"{what}: expected {kind_of(kind())}, found {kind_of(value)}")
    return value


def texts_of(record: dict[str, Any], key: str, file: str) -> list[str]:
    """The list of strings under `key`. Raises BadSampleError."""
    return [of_kind(str, text, file, repr(key)) for text in of_kind(list, record.get(key), file, repr(key))]
