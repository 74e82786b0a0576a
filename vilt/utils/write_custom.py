"""A custom dataset: tables (CSV, TSV or JSONL) that list an image, texts and labels in each row."""

from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.messages import quoted
from common.strict_json import kind_of
from vilt.datasets.specs import SPLITS, Split, custom_spec
from vilt.utils import raw_data
from vilt.utils.custom_layout import COLUMNS, Layout, read_layout
from vilt.utils.raw_data import INCOMPLETE_ROW, UNKNOWN_CLASS, BadSampleError, RawDataset, RawSplit, Row
from vilt.utils.tables import DELIMITERS, table_rows

LAYOUT = """\
RAW/
  spec.yaml           files: TABLE and what else is to be known; or say --spec FILE or --table TABLE
  TABLE.csv           columns image, text, label, split; or .tsv, or .jsonl with these keys on each line
  ANY/FILE            the images: in the table stands ANY/FILE
"""


class Listed(NamedTuple):
    """One row of a table, as it stands there."""

    table: Path
    row: int
    image: object
    text: object
    label: object


def read_row(raw: Path, layout: Layout, numbers: dict[str, int], listed: Listed) -> Row:
    """Columns image, text, label (class number, or 0/1 over the classes), image_id. Raises BadSampleError."""
    source, file = listed.table.name, listed.image
    if not isinstance(file, str) or not file:
        raise BadSampleError(INCOMPLETE_ROW, source, f"image: expected a path, found {_found(file)}")
    texts: list[Any] = listed.text if isinstance(listed.text, list) else [listed.text]
    for text in texts:
        if not isinstance(text, str):
            raise BadSampleError(INCOMPLETE_ROW, source, f"text: expected a string or a list, found {_found(text)}")
    if not any(text.strip() for text in texts):
        raise BadSampleError(INCOMPLETE_ROW, source, "text: empty")
    names = read_labels(layout, listed)
    for name in names:
        if name not in numbers:
            raise BadSampleError(UNKNOWN_CLASS, source, f"{quoted(name)} is not in classes")
    label = numbers[names[0]] if layout.labels == "single" else [int(name in names) for name in numbers]
    image = raw_data.read_image(raw, file)
    if not (raw / file).resolve().is_relative_to(raw.resolve()):
        raise BadSampleError(raw_data.PATH_LEAVES_RAW, file, "by a link")
    return {"image": image, "text": texts, "label": label, "image_id": file}


def read_labels(layout: Layout, listed: Listed) -> list[str]:
    """The names of the labels of a row. Raises BadSampleError."""
    source, labels = listed.table.name, [listed.label]
    if layout.labels == "multi":
        if listed.table.suffix.lower() in DELIMITERS:
            labels = [part for part in str(listed.label).split(layout.separator) if part.strip()]
        elif isinstance(listed.label, list):
            labels = listed.label
        else:
            raise BadSampleError(INCOMPLETE_ROW, source, f"label: expected a list, found {_found(listed.label)}")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
            raise BadSampleError(INCOMPLETE_ROW, source, f"label: expected a name, found {_found(label)}")
    return [str(label).strip() for label in labels]


def _found(value: object) -> str:
    return quoted(value) if isinstance(value, str) else kind_of(value) if value is not None else "none"


def open_raw(raw: Path, spec: Path | None = None, table: Path | None = None) -> RawDataset:
    """The dataset in `raw`, its tables read and its classes found.

    Args:
        spec: the spec.yaml; None: that of `raw`.
        table: instead of a spec: the only table, with the default columns.

    Raises:
        DataError: the spec or a table as such is wrong; names the file, and the row where there is one.
    """
    raw_data.require_layout(raw, () if spec or table else ("spec.yaml",), LAYOUT)
    layout = read_layout(raw, spec, table)
    rows: dict[Split, list[Listed]] = {split: [] for split in SPLITS}
    needed = [layout.columns[column] for column in COLUMNS if column != "split" or len(layout.tables) == 1]
    for path, of_table in layout.tables:
        for row, values in table_rows(path, needed):
            image, text, label, split = (values.get(layout.columns[column]) for column in COLUMNS)
            split = of_table or (split.strip() if isinstance(split, str) else split)
            if split not in tuple(SPLITS):
                place = f"{path}, row {row}: {layout.columns['split']}"
                raise DataError(f"{place}: expected {' or '.join(SPLITS)}, found {_found(split)}")
            rows[split].append(Listed(path, row, image, text, label))
        for one in SPLITS if of_table is None else (of_table,):
            if not rows[one]:
                what = "rows" if of_table else f"rows with {layout.columns['split']} {one}"
                raise DataError(f"{path}: expected {what}, found none")
    found: set[str] = set()
    for listed in chain(*rows.values()):
        with suppress(BadSampleError):  # read_row raises it again
            found.update(read_labels(layout, listed))
    custom = layout.dataset(found)
    read = partial(read_row, raw, layout, {name: number for number, name in enumerate(custom.class_names)})
    splits = []
    for split, of_split in rows.items():
        samples = [(listed.row, partial(read, listed)) for listed in of_split]
        splits.append(RawSplit(split, of_split[0].table.name, samples))
    return RawDataset(custom_spec(custom), custom.class_names, tuple(splits))
