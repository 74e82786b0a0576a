"""Converts a custom dataset: tables (CSV, TSV or JSONL) that list an image, texts and labels in each row."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.messages import quoted
from common.strict_json import kind_of
from vilt.datasets.custom import CustomData
from vilt.datasets.specs import SPLITS, Split, custom_spec
from vilt.utils import raw_data
from vilt.utils.custom_layout import COLUMNS, Layout, read_layout
from vilt.utils.names import label_name, look_alikes, normal, whole
from vilt.utils.raw_data import INCOMPLETE_ROW, UNKNOWN_CLASS, BadSampleError, RawDataset, RawSplit, Row
from vilt.utils.tables import table_rows

LAYOUT = """\
RAW/
  spec.yaml           names the table and sets options; may instead be given with --spec, or replaced by --table
  TABLE.csv           a row per sample: image, text, label, split; can also be .tsv, or .jsonl with these keys
  ANY/FILE            the image files; the table gives their paths relative to RAW
"""
SHARES: dict[Split, float] = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Shares of rows in each split, if the dataset defines no splits."""
ReadImage = Callable[["Listed"], tuple[bytes | None, str]]
"""Returns a row's image (None if there is none) and the image's name. Raises BadSampleError."""


class Listed(NamedTuple):
    """One row, as it is in the table."""

    table: Path
    row: int
    image: Any
    text: Any
    label: Any
    split: object
    """If this is None in all rows, the splits are drawn."""


def open_raw(
    raw: Path,
    spec: Path | None = None,
    table: Path | None = None,
    split_seed: int | None = None,
    follow_links: bool = False,
    allow_missing: bool = False,
) -> RawDataset:
    """Opens the dataset in `raw`: reads its tables and finds its classes.

    Args:
        spec: the spec.yaml; None means that in `raw`.
        table: instead of a spec, the only table, with the default columns.
        split_seed: seed of the splits if the table has none.
        follow_links: whether images may be links that lead out of `raw`.
        allow_missing: whether an absent image file makes the image naturally missing instead of the sample bad.

    Raises:
        DataError: the spec or a table is malformed; the message names the file, and the row if there is one.
    """
    raw_data.require_layout(raw, () if spec or table else ("spec.yaml",), LAYOUT)
    layout = read_layout(raw, spec, table)
    rows = []
    for path, of_table in layout.tables:
        for row, values in table_rows(path, [*layout.columns.values()], layout.needed, [layout.columns["image"]]):
            image, text, label, split = (values.get(layout.columns[column]) for column in COLUMNS)
            rows.append(Listed(path, row, image, text, label, of_table or split))

    def read_image(listed: Listed) -> tuple[bytes | None, str]:
        if not isinstance(listed.image, str):
            raise incomplete(listed, f"image: expected a path, found {found(listed.image)}")
        return raw_data.read_image(raw, listed.image, allow_missing, follow_links), listed.image

    return assemble(layout, rows, read_image, split_seed)


def assemble(layout: Layout, rows: Sequence[Listed], read_image: ReadImage, split_seed: int | None) -> RawDataset:
    """Builds the dataset from `rows`. Raises DataError if it has no classes, or a split has no rows."""
    note, table_of = "", {split: path for path, split in layout.tables}
    drawn = bool(rows) and all(listed.split is None for listed in rows)
    if drawn:
        of_splits, note = draw_splits(layout, rows, split_seed or 0)
    elif split_seed is not None:
        raise DataError(f"{layout.source}: split_seed is for data without splits; expected no column split")
    else:
        of_splits = {split: [] for split in SPLITS}
        for listed in rows:
            split = normal(listed.split).lower() if isinstance(listed.split, str) else listed.split
            if split not in tuple(SPLITS):
                place = f"{listed.table}, row {listed.row}: {layout.columns['split']}"
                raise DataError(f"{place}: expected {' or '.join(SPLITS)}, found {found(listed.split)}")
            of_splits[split].append(listed)
    for split, of_split in of_splits.items():
        if not of_split:
            table = table_of.get(split) or table_of.get(None, layout.source)
            if drawn:
                found_rows = f"of {len(rows)}, with those of an image kept together, none is left for {split}"
                raise DataError(f"{table}: expected enough rows to draw three splits from; {found_rows}")
            what = "" if split in table_of else f" with {layout.columns['split']} {split}"
            raise DataError(f"{table}: expected rows{what}, found none")
    custom = classes_of(layout, rows)
    doubts = [note]
    if layout.labels == "multi" and not any(
        len(listed.label) > 1 if isinstance(listed.label, list) else layout.separator in str(listed.label)
        for listed in rows
    ):
        doubts.append(f"warning: no row has several labels; within a cell, {quoted(layout.separator)} separates them")
    joined = [quoted(name) for name in custom.class_names if layout.separator in name]
    if layout.labels == "single" and joined:
        doubts.append(f"warning: {joined[0]} is one class; with `labels: multi` it would be several")
    read = partial(read_row, layout, {name: number for number, name in enumerate(custom.class_names)}, read_image)
    splits = [
        RawSplit(split, of_split[0].table.name, [(listed.row, partial(read, listed)) for listed in of_split])
        for split, of_split in of_splits.items()
    ]
    return RawDataset(custom_spec(custom), custom.class_names, tuple(splits), "\n".join(filter(None, doubts)))


def draw_splits(layout: Layout, rows: Sequence[Listed], seed: int) -> tuple[dict[Split, list[Listed]], str]:
    """Draws splits stratified by label, with all rows of an image in one split. Also returns a note on them."""
    groups: dict[str, list[int]] = {}
    for number, listed in enumerate(rows):
        file = normal(str(listed.image)) if isinstance(listed.image, str | Path) else ""
        groups.setdefault(file or f"row {number}", []).append(number)

    def place(group: str) -> tuple[str, bytes]:
        label = normal(str(rows[groups[group][0]].label))
        return label, hashlib.sha256(f"{seed} {group}".encode(errors="replace")).digest()

    of_splits: dict[Split, list[int]] = {split: [] for split in SPLITS}
    done = 0
    for group in sorted(groups, key=place):
        done += len(groups[group])
        behind = {split: share * done - len(of_splits[split]) for split, share in SHARES.items()}
        of_splits[max(SPLITS, key=behind.__getitem__)].extend(groups[group])
    counts = ", ".join(f"{split} {len(numbers):,}" for split, numbers in of_splits.items())
    note = f"no column {layout.columns['split']}: splits drawn by label with seed {seed}: {counts}"
    return {split: [rows[number] for number in sorted(numbers)] for split, numbers in of_splits.items()}, note


def classes_of(layout: Layout, rows: Sequence[Listed]) -> CustomData:
    """The description of the dataset. Raises DataError; if rows lack labels, the message names the first of them."""
    names: set[str] = set()
    faults: list[tuple[Listed, BadSampleError]] = []
    for listed in rows:
        try:
            names.update(read_labels(layout, listed))
        except BadSampleError as bad:  # read_row raises it again
            faults.append((listed, bad))
    try:
        return layout.dataset(names)
    except DataError:
        if layout.classes is not None or not faults:
            raise
        first, fault = faults[0]
        raise DataError(f"{first.table}, row {first.row}: {fault.detail} ({len(faults):,} such rows)") from None


def read_row(layout: Layout, numbers: dict[str, int], read_image: ReadImage, listed: Listed) -> Row:
    """Columns image, text, label (class number, or 0/1 over the classes), image_id. Raises BadSampleError.

    A blank cell means that the image or text is naturally missing.
    """
    texts = None
    if not missing(listed.text):
        texts = listed.text if isinstance(listed.text, list) else [listed.text]
        for text in texts:
            if not isinstance(text, str):
                raise incomplete(listed, f"text: expected a string or a list, found {found(text)}")
    names = read_labels(layout, listed)
    for name in names:
        if name not in numbers:
            spelling = "" if look_alikes((name, *numbers)) is None else f" ({name!a}, which looks like one of them)"
            raise BadSampleError(UNKNOWN_CLASS, listed.table.name, f"{quoted(name)} is not in classes{spelling}")
    label = numbers[names[0]] if layout.labels == "single" else [int(name in names) for name in numbers]
    image, name = (None, f"row {listed.row}") if missing(listed.image) else read_image(listed)
    return {"image": image, "text": texts, "label": label, "image_id": name}


def read_labels(layout: Layout, listed: Listed) -> list[str]:
    """The label names of a row. Raises BadSampleError."""
    labels = [listed.label]
    if layout.labels == "multi":
        if isinstance(listed.label, str) and listed.table.suffix.lower() != ".jsonl":
            labels = [part for part in listed.label.split(layout.separator) if normal(part)]
        elif isinstance(listed.label, list):
            labels = listed.label
        else:
            raise incomplete(listed, f"label: expected a list, found {found(listed.label)}")
    for label in map(whole, labels):
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not normal(str(label)):
            raise incomplete(listed, f"label: expected a name, found {found(label)}")
    return [label_name(label) for label in labels]


def missing(cell: Any) -> bool:
    """Whether a cell for an image or text is empty: None, NaN, blank, or a list of such values."""
    if isinstance(cell, list):
        return all(map(missing, cell))
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def incomplete(listed: Listed, detail: str) -> BadSampleError:
    return BadSampleError(INCOMPLETE_ROW, listed.table.name, detail)


def found(value: object) -> str:
    return quoted(value) if isinstance(value, str) else kind_of(value) if value is not None else "none"
