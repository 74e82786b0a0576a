"""What can be found out about a dataset before a long run, a line each: for `run.py doctor`."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from common.errors import DataError, UserError
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.missing_tables import MissingPattern, draw_missing_table, read_kept_table, type_counts
from vilt.utils.arrow_writer import arrow_schema

Level = Literal["ok", "warn", "FAIL"]
IMAGES_LOOKED_AT = 64
"""Of each split, evenly spread."""
SHOWN = 3
"""How many names of a kind a line holds."""


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    level: Level
    """`FAIL`: a run would end, or not be what it is taken for. `warn`: worth a look."""
    subject: str
    text: str

    def line(self) -> str:
        """For the terminal; on one line, whatever the text was made from."""
        return " ".join(f"{self.level:<5}{self.subject}: {self.text}".splitlines())


def guarded(subject: str, findings: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds; an error that ends the check is a finding too, so that the other checks go on."""
    try:
        yield from findings()
    except UserError as error:
        yield Finding("FAIL", subject, str(error))
    except Exception as error:  # of a check that met what nobody thought of: it failed, and that is what counts
        yield Finding("FAIL", subject, f"{type(error).__name__}: {error}")


def check_file(dataset: ArrowDataset) -> Iterator[Finding]:
    """What a file that could be opened says of itself, beside what make_arrow.py writes.

    Raises:
        DataError: its classes are not the dataset's, or it is another split.
    """
    subject, spec, schema = f"{dataset.split} file", dataset.spec, dataset.table.schema
    names = _class_names_of(dataset)
    if names is not None and (len(names) != spec.n_classes or names != (spec.class_names or names)):
        expected = ", ".join(spec.class_names[:SHOWN]) + ", …" if spec.class_names else "any"
        raise DataError(
            f"{dataset.path}: metadata class_names: expected {spec.n_classes} names ({expected}), found {len(names)} "
            f"({', '.join(names[:SHOWN])}, …)"
        )
    expected_split = spec.file_splits[dataset.split]
    splits = pc.unique(dataset.table["split"]).to_pylist() if "split" in schema.names else [expected_split]
    if splits != [expected_split]:
        found = ", ".join(map(repr, splits[:SHOWN]))
        raise DataError(f"{dataset.path}: column split: expected {expected_split!r} in every row, found {found}")
    lacking = [name for name in arrow_schema(spec, ()).names if name not in schema.names]
    remarks = [f"without the column {name}" for name in lacking]
    if names is None:
        remarks.append("no class_names in its metadata" + ("" if spec.class_names else ": classes go by number"))
    said = "; ".join([f"{dataset.path.name}: columns, types and texts are whole", *remarks])
    yield Finding("warn" if names is None and spec.class_names is None else "ok", subject, said)


def _class_names_of(dataset: ArrowDataset) -> tuple[str, ...] | None:
    """As the file's metadata has them. Raises DataError where they are not a list of texts."""
    raw = (dataset.table.schema.metadata or {}).get(b"class_names")
    if raw is None:
        return None
    names = None
    with suppress(ValueError, RecursionError):
        names = json.loads(raw)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{dataset.path}: metadata class_names: expected a JSON list of texts, found {raw[:60]!r}")
    return tuple(names)


def check_rows(dataset: ArrowDataset) -> Iterator[Finding]:
    """How many rows, beside the published split where there is one."""
    subject, rows = f"{dataset.split} rows", dataset.n_rows
    said = f"{rows:,} rows, {len(dataset):,} samples (one per text)"
    if dataset.spec.custom is not None:
        yield Finding("ok", subject, said)
        return
    published = dataset.spec.published_rows[dataset.split]
    if rows in published:
        yield Finding("ok", subject, f"{said}, as published")
    else:
        listed = " or ".join(f"{number:,}" for number in published)
        yield Finding("warn", subject, f"{said}; the published split lists {listed}")


def check_labels(dataset: ArrowDataset) -> Iterator[Finding]:
    """How the classes are spread; that all labels are in range was checked when the file was opened."""
    labels, names = dataset.labels, _known_class_names(dataset)
    counts = labels.sum(axis=0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    most, least = int(counts.argmax()), int(counts.argmin())
    said = f"in range; most often {names[most]} ({counts[most]:,}), least often {names[least]} ({counts[least]:,})"
    if labels.ndim == 2 and (without := int((labels.sum(axis=1) == 0).sum())):
        said += f"; {without:,} rows with none of the labels"
    absent = [names[number] for number in np.flatnonzero(counts == 0)]
    if absent:
        said += f"; {len(absent)} of {len(names)} classes never: {_some(absent)}"
    yield Finding("warn" if absent else "ok", f"{dataset.split} labels", said)


def _known_class_names(dataset: ArrowDataset) -> tuple[str, ...]:
    """The class numbers where the file's own names are no use, which `check_file` has told."""
    names = None
    with suppress(DataError):
        names = dataset.spec.class_names or _class_names_of(dataset)
    numbers = tuple(map(str, range(dataset.spec.n_classes)))
    return names if names is not None and len(names) == len(numbers) else numbers


def check_images(dataset: ArrowDataset) -> Iterator[Finding]:
    """Decodes a sample of the images."""
    spread = np.linspace(0, len(dataset) - 1, IMAGES_LOOKED_AT).astype(np.int64)
    chosen = np.unique(dataset.row_of_sample[spread])
    faults = []
    started = time.perf_counter()
    for index in np.searchsorted(dataset.row_of_sample, chosen).tolist():
        try:
            _ = dataset[0, index]
        except DataError as error:
            faults.append(str(error))
    milliseconds = 1000 * (time.perf_counter() - started) / len(chosen)
    subject = f"{dataset.split} images"
    if faults:
        first = f"{len(faults)} of {len(chosen)} looked at cannot be decoded; the first: {faults[0]}"
        yield Finding("FAIL", subject, f"{first}; make the file anew (make_arrow.py checks every image)")
    else:
        yield Finding("ok", subject, f"{len(chosen)} of {dataset.n_rows:,} looked at; {milliseconds:.1f} ms each")


def check_texts(dataset: ArrowDataset) -> Iterator[Finding]:
    """Lengths of the texts in tokens, once `tokenize` has made them."""
    tokens = dataset.tokens
    assert tokens is not None
    lengths, room = tokens.argmax(axis=1) - 1, tokens.shape[1] - 2  # without <start> and <end>
    full, empty = int((lengths == room).sum()), int((lengths == 0).sum())
    said = (
        f"{np.median(lengths):.0f} tokens (median); {full / len(lengths):.0%} fill or pass the {room} there is room for"
    )
    if empty:
        said += f"; {empty:,} are empty"
    yield Finding("warn" if empty else "ok", f"{dataset.split} texts", said)


def check_missing_table(dataset: ArrowDataset, root: Path, pattern: MissingPattern) -> Iterator[Finding]:
    """Whether the table is kept and fits, or can be made. Gives it to the dataset, and writes nothing."""
    subject, name, rows = f"{dataset.split} missing table", dataset.spec.name, dataset.n_rows
    kept = read_kept_table(root, name, dataset.split, pattern, rows)
    dataset.missing_table = draw_missing_table(name, dataset.split, pattern, rows) if kept is None else kept
    if kept is None and pattern.ratio > 0 and not is_writable(root):
        yield Finding("FAIL", subject, f"missing_table_root={root}: expected a folder that can be written")
        return
    counts = ", ".join(f"{count:,} {kind}" for kind, count in type_counts(dataset.missing_table).items())
    state = "kept and fitting" if kept is not None else "not needed" if pattern.ratio == 0 else "will be made"
    yield Finding("ok", subject, f"{state} in {root}: {counts}")


def is_writable(folder: Path) -> bool:
    """Whether `folder` is one that can be written, or can be made."""
    place = nearest_folder(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def nearest_folder(path: Path) -> Path:
    """`path`, or what there is of the folders above it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
