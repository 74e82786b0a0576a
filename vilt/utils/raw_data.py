"""Raw datasets as the converter sees them: samples that are read one at a time, and reasons to reject one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from common.errors import DataError
from common.messages import listed, quoted
from common.strict_json import kind_of, parse_json, read_json
from vilt.datasets.specs import DatasetSpec, Split
from vilt.images import CHANGES, open_rgb
from vilt.utils.names import find_file, normal

MISSING_FILE, UNREADABLE_FILE, UNDECODABLE_IMAGE = "missing file", "unreadable file", "undecodable image"
BROKEN_JSON, INCOMPLETE_JSON, INCOMPLETE_ROW = "broken JSON", "incomplete JSON", "incomplete row"
UNKNOWN_CLASS, PATH_LEAVES_RAW, NOTHING_LEFT = "unknown class", "path leaves RAW", "nothing left"

MAX_FILE_BYTES = 64 * 2**20
"""Largest file of one sample. It bounds memory, and no image of these datasets comes close."""
MAX_RECORD_BYTES = 16 * 2**20
"""Largest JSON file of one sample; parsed, it takes up to 30 times as much memory."""

Row = dict[str, Any]
"""One sample, keyed by column, without the `split` column, which the writer adds."""
REMARKS = "remarks"
"""Key in a row that is not a column, but counts what was changed in reading it, keyed by remark."""
Sample = tuple[int, Callable[[], Row]]
"""The sample's row, from 1, in the file that lists it, and a function that reads and checks it or raises
BadSampleError."""
Kind = TypeVar("Kind", str, list, dict)


class BadSampleError(Exception):
    """A sample cannot be used. `file` is relative to the raw folder, `detail` may be empty."""

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
    """A raw dataset whose top-level files have been read and checked, but whose samples have not."""

    spec: DatasetSpec
    class_names: tuple[str, ...]
    splits: tuple[RawSplit, ...]
    note: str = ""
    """Remarks for the user, one per line."""


# ---- top-level files: an error in one of them stops the conversion


def require_layout(root: Path, names: Iterable[str], layout: str) -> None:
    """Raises DataError, which shows `layout`, unless all `names` exist in `root`."""
    missing = [name for name in names if not (root / name).exists()]
    if not root.is_dir():
        raise not_as_in(layout, f"the raw folder {root} {'is a file' if root.exists() else 'does not exist'}")
    if missing:
        raise not_as_in(layout, f"{', '.join(missing)} not found in {root}")


def not_as_in(layout: str, problem: str) -> DataError:
    """An error that shows the expected layout."""
    return DataError(f"{problem}. Expected layout of RAW:\n\n{layout.rstrip()}")


def read_bytes(path: Path) -> bytes:
    """The content of a top-level file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_split_file(path: Path, spec: DatasetSpec) -> dict[Split, list[str]]:
    """The names that split.json lists for each split, in its order.

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
            if (other := seen.setdefault(normal(name), place)) != place:
                raise DataError(f"{path}: {quoted(name)} is listed twice, at {other} and at {place}")
    return {split: lists[key] for split, key in spec.file_splits.items()}


# ---- parts of a sample: an error in one of them makes it a bad sample


def check_inside(file: str) -> None:
    """Raises BadSampleError if `file`, which must be relative to the raw folder, is absolute or contains `..`."""
    # The path as written decides, not where links lead: large image folders are often links to another disk.
    path = PureWindowsPath(file)  # accepts both / and \\
    if path.root or ".." in path.parts:
        raise BadSampleError(PATH_LEAVES_RAW, file, "expected a relative path within RAW")


def read_file(
    raw: Path, file: str, most: int = MAX_FILE_BYTES, follow_links: bool = True, anywhere: bool = False
) -> bytes:
    """The bytes of `raw/file`.

    Args:
        follow_links: whether a link may lead out of `raw`.
        anywhere: whether `file` may be absolute or contain `..`.

    Raises:
        BadSampleError: the file is missing, unreadable, larger than `most` bytes, or outside `raw`.
    """
    if not anywhere:
        check_inside(file)
    try:
        path = find_file(raw, file)
        if path.is_dir() or "://" in file:
            found = "a folder" if path.is_dir() else "a URL"
            raise BadSampleError(UNREADABLE_FILE, file, f"expected a file, found {found}")
        if not path.is_file():
            raise BadSampleError(MISSING_FILE, file)
        if not follow_links and not path.resolve().is_relative_to(raw.resolve()):
            raise BadSampleError(PATH_LEAVES_RAW, file, "by a link; --follow-links allows that")
        with path.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise BadSampleError(UNREADABLE_FILE, file, error.strerror or str(error)) from None
    if len(data) > most:
        raise BadSampleError(UNREADABLE_FILE, file, f"larger than {most:,} bytes")
    return data


def read_image(
    raw: Path, file: str, allow_missing: bool = False, follow_links: bool = True, anywhere: bool = False
) -> bytes | None:
    """The unchanged bytes of an image file, checked by decoding it completely to RGB.

    Args:
        allow_missing: return None if the file is missing, instead of raising.
        follow_links, anywhere: as for `read_file`.

    Raises:
        BadSampleError: the file is missing, or cannot be read or decoded.
    """
    try:
        return checked_image(read_file(raw, file, MAX_FILE_BYTES, follow_links, anywhere), file)
    except BadSampleError as bad:
        if allow_missing and bad.reason == MISSING_FILE:
            return None
        raise


class ImageFile(bytes):
    """The bytes of an image file that can be decoded."""

    changes: Sequence[str] = ()
    """How the image is seen differently from the published code."""


def checked_image(data: bytes, file: str) -> ImageFile:
    """`data`, if it can be decoded. Raises BadSampleError."""
    image = ImageFile(data)
    try:
        image.changes = open_rgb(data).info[CHANGES]
    except Exception as error:  # see open_rgb
        macos = "; macOS keeps attributes of another file in it" if PureWindowsPath(file).name.startswith("._") else ""
        raise BadSampleError(UNDECODABLE_IMAGE, file, (str(error) or type(error).__name__) + macos) from None
    return image


def read_record(data: bytes, file: str) -> dict[str, Any]:
    """The JSON object of one sample. Raises BadSampleError."""
    try:
        return of_kind(dict, parse_json(data), file, "the sample")
    except ValueError as error:
        raise BadSampleError(BROKEN_JSON, file, str(error)) from None


def of_kind(kind: type[Kind], value: object, file: str, what: str) -> Kind:
    """`value`, if it is a `kind`. Otherwise raises BadSampleError, whose detail calls it `what`."""
    if not isinstance(value, kind):
        raise BadSampleError(INCOMPLETE_JSON, file, f"{what}: expected {kind_of(kind())}, found {kind_of(value)}")
    return value


def texts_of(record: dict[str, Any], key: str, file: str) -> list[str]:
    """The list of strings under `key`. Raises BadSampleError."""
    return [of_kind(str, text, file, repr(key)) for text in of_kind(list, record.get(key), file, repr(key))]
