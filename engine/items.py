"""Reading the samples that a user gives for prediction: lists, a table, a folder, or a file of arrays."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from common.errors import DataError, reason_of
from common.messages import cut, listed
from common.text import natural_key
from engine.recordings import split_recordings
from vilt.datasets.kinds import kinds_of
from vilt.datasets.specs import DatasetSpec
from vilt.utils.array_files import SUFFIXES, samples_of_arrays, say_unread
from vilt.utils.names import find_file, normal
from vilt.utils.tables import FORMATS, table_rows
from vilt.utils.write_custom import missing as is_missing

log = logging.getLogger("rep")

ImageInput = str | Path | Image.Image | None


class Item(NamedTuple):
    """One sample."""

    id: str
    inputs: dict[str, Any]  # keyed by modality, without missing ones; values as `Kind.read_given` takes them
    place: str  # how messages refer to it
    times: tuple[float, float] | None = None  # start and end in seconds, if it is part of a recording


def items_of_lists(images: Sequence[ImageInput] | None, texts: Sequence[str | None] | None) -> list[Item]:
    """Samples of images and texts; see `Predictor.predict`."""
    for name, values in {"images": images, "texts": texts}.items():
        if isinstance(values, str | Path | Image.Image):
            raise DataError(f"{name}: expected a list, found {type(values).__name__}; put a single sample into a list")
    count = len(images if images is not None else texts if texts is not None else [])
    images = [None] * count if images is None else images
    texts = [None] * count if texts is None else texts
    if len(images) != len(texts):
        raise DataError(f"expected as many images as texts, found {len(images)} and {len(texts)}")
    pairs = zip(images, texts, strict=True)
    return [
        Item(str(n), {name: value for name, value in given.items() if not is_missing(value)}, f"sample {n}")
        for n, given in enumerate({"image": image, "text": text} for image, text in pairs)
    ]


def read_items(source: Path, dataset: DatasetSpec) -> list[Item]:
    """Reads the samples in a table, a folder, or a file of arrays.

    A table (CSV, TSV or JSONL) has a column for each modality and optionally `id`; texts are in the table itself, other
    inputs are paths of files, relative to the table. In a folder and its subfolders, files that share a name are one
    sample: the text for `NAME.jpg` is in `NAME.txt` next to it; samples are sorted by name. A `.npz` or a pickle holds
    an array (N, …) for each modality and optionally `id`; a modality without an array is missing. A sensor recording is
    cut into as many samples as it holds.

    Raises:
        DataError: the source is missing or empty, or a row is invalid; names file and row.
    """
    if source.suffix.lower() in (".npz", *SUFFIXES):
        items = [Item(*sample) for sample in samples_of_arrays(source, list(dataset.modalities))]
    else:
        items = _items_of_folder(source, dataset) if source.is_dir() else _items_of_table(source, dataset)
    if not items:
        raise DataError(f"input={source}: expected at least one sample, found none")
    return split_recordings(items, dataset)


def _items_of_table(source: Path, dataset: DatasetSpec) -> list[Item]:
    if source.suffix.lower() not in FORMATS:
        found = "another kind of file" if source.exists() else "nothing there"
        raise DataError(f"input={source}: expected a folder of images, or a .csv, .tsv or .jsonl file, found {found}")
    items, kinds, columns = [], kinds_of(dataset), dict[str, None]()
    for row, values in table_rows(source, [*kinds, "id"], [], [name for name, kind in kinds.items() if kind.in_file]):
        place = f"{source}, row {row}"
        if not kinds.keys() & values.keys():
            names = f"{', '.join(map(repr, kinds))} or {'both' if len(kinds) == 2 else 'some of them'}"
            raise DataError(f"{place}: expected the columns {names}, found {listed(list(values))}")
        columns |= dict.fromkeys(values)
        cells = {name: _cell(values.get(name), name, place) for name in kinds}
        inputs: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
        for name in inputs.keys() & {name for name, kind in kinds.items() if kind.in_file}:
            inputs[name] = _file(source.parent, inputs[name], place)
        items.append(Item(str(row if values.get("id") is None else values["id"]), inputs, place))
    say_unread(source, list(kinds), columns)
    return items


def _cell(value: object, name: str, place: str) -> str | None:
    """The text in a cell; None if it is absent or blank."""
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: {name}: expected a text, found {json.dumps(value)[:80]}")
    return value


def _file(folder: Path, name: str, place: str) -> Path:
    try:
        return find_file(folder, name)
    except OSError as error:
        raise DataError(f"{place}: {cut(name)}: cannot be read: {reason_of(error)}") from error


def _items_of_folder(source: Path, dataset: DatasetSpec) -> list[Item]:
    kinds = kinds_of(dataset)
    name_of = {suffix: name for name, kind in kinds.items() for suffix in kind.suffixes}
    if len(set(kinds.values())) < len(kinds):
        raise DataError(f"input={source}: expected a table, as several of {', '.join(kinds)} are files of one kind")
    inputs_of: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    for path in sorted((path for path in source.rglob("*") if path.is_file()), key=natural_key):
        # Hidden files are not samples: macOS stores attributes of NAME.jpg in ._NAME.jpg.
        if any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        if (name := name_of.get(path.suffix.lower())) is None:
            others.append(path.relative_to(source).as_posix())
            continue
        stem = normal(str(path.relative_to(source).with_suffix("")))
        if (other := inputs_of.setdefault(stem, {}).setdefault(name, path)) is not path:
            raise DataError(f"{path}: expected one file of this name, found {other.name} too")
    if others:
        log.warning("input=%s: left out, as their suffix is none of %s: %s", source, " ".join(name_of), listed(others))
    items = []
    for stem, inputs in sorted(inputs_of.items(), key=lambda item: natural_key(item[0])):
        for name, path in list(inputs.items()):
            if not kinds[name].in_file:
                try:
                    inputs[name] = path.read_text("utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error
        given = {name: value for name, value in inputs.items() if str(value).strip()}
        items.append(Item(stem, given, str(source / stem)))
    return items
