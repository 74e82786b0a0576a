"""Writes a raw dataset as arrow files: in batches, with checks, and either all splits or none."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from common.errors import DataError, reason_of
from common.files import atomic_path, sync_folder
from common.messages import printable
from vilt.datasets.specs import CLIP, DatasetSpec, Modality
from vilt.datasets.subsequences import NUMBER, RECORDING
from vilt.utils.ordered_threads import in_order
from vilt.utils.raw_data import NOTHING_LEFT, REMARKS, BadSampleError, ImageFile, RawDataset, Row, Sample

Result = tuple[int, Row | BadSampleError]
"""A row's number, and its content or the error that makes it a bad sample."""

MAX_BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 4096
NO_TEXT = "left out, no text"
IN_TRAINING = "warning: image, or text of rows without one, that is also in training"
REPEATED = "warning: image, texts and label all repeat those of an earlier row"
BAD_SAMPLES = "_bad_samples.tsv"
"""Suffix of the file that lists bad samples."""
MAX_CELL = 1000
"""Most characters of a cell in the list of bad samples; a hostile name may have millions."""


class BadSample(NamedTuple):
    """A line in the list of bad samples."""

    split: str
    listed_in: str
    row: int
    file: str
    reason: str
    detail: str

    def cells(self) -> tuple[str, ...]:
        """The fields as printable text."""
        return tuple(printable(str(cell)[:MAX_CELL]) for cell in self)


class BadSamplesError(DataError):
    """Some samples cannot be used, and the user has not asked for them to be left out."""

    def __init__(self, bad: list[BadSample], n_samples: int) -> None:
        _, listed_in, row, *said = bad[0].cells()
        first = f"{listed_in}, row {row}: {': '.join(filter(None, said))}"
        super().__init__(f"{len(bad):,} of {n_samples:,} samples cannot be used ({first})")
        self.bad = bad


@dataclass
class SplitSummary:
    """What an arrow file contains, and what was left out of it."""

    name: str
    """The split as in the file name."""
    source: str
    """The file that lists the samples of the split."""
    path: Path
    replaced: bool
    """Whether a file of that name already existed."""
    n_samples: int = 0
    n_texts: int = 0
    n_bytes: int = 0
    label_counts: Counter[int] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    """Further remarks on samples, with the number of samples each applies to, which may be 0."""
    bad: list[BadSample] = field(default_factory=list)


def arrow_schema(spec: DatasetSpec, class_names: tuple[str, ...]) -> pa.Schema:
    """The arrow schema: columns and types of the published converters, with metadata in JSON.

    `class_names` holds the class names, `shapes` the shapes of arrays if there are any, and `custom` the rest of the
    description of a custom dataset.
    """
    texts = pa.list_(pa.string())
    types = {"image": pa.binary(), "text": texts}
    columns = [(each.column, types.get(each.kind) or array_type(each)) for each in spec.modalities.values()]
    number = pa.int64() if spec.label_range is None else pa.float32()
    columns += [("label", pa.list_(number) if spec.multilabel else number)]
    columns += [(name, texts) for name in spec.kept_columns]
    columns += [(name, pa.large_string()) for name in (spec.id_column, "split") if name is not None]
    columns += [(RECORDING, pa.string()), (NUMBER, pa.int64())] if spec.recordings else []
    metadata: dict[str, object] = {"class_names": class_names}
    if shapes := {name: each.shape for name, each in spec.modalities.items() if each.kind == "array"}:
        metadata["shapes"] = shapes
    if spec.custom is not None:
        metadata["custom"] = {"name": spec.custom.name, "labels": spec.custom.labels, "metric": spec.custom.metric}
        if spec.custom.signals:
            metadata["custom"] |= {"signals": spec.custom.signals}  # type: ignore[operator]
    return pa.schema(columns, metadata={key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})


def array_type(modality: Modality) -> pa.DataType:
    """The arrow type of an array: nested lists of float32."""
    kind = pa.float32()
    for size in reversed(modality.shape):
        kind = pa.list_(kind, -1 if size is None else size)
    return kind


def _record_batch(rows: list[Row], schema: pa.Schema, spec: DatasetSpec) -> pa.RecordBatch:
    """Turns rows into columns, without making a Python number of each array element."""
    arrays = {each.column for each in spec.modalities.values() if each.kind == "array"}
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        values = [row[name] for row in rows]
        columns.append(_arrays_of(values, kind) if name in arrays else pa.array(values, kind))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _arrays_of(values: Sequence[np.ndarray] | np.ndarray, kind: pa.DataType) -> pa.Array:
    """Arrays of the same shape, except perhaps for the first size, as a column of nested lists."""
    if not isinstance(kind, (pa.FixedSizeListType, pa.ListType)):
        return pa.array(values, kind)
    rows = values.reshape(-1, *values.shape[2:]) if isinstance(values, np.ndarray) else np.concatenate(values)
    inner = _arrays_of(rows, kind.value_type)
    if isinstance(kind, pa.FixedSizeListType):
        return pa.FixedSizeListArray.from_arrays(inner, kind.list_size)
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, values)], dtype=np.int32), inner, type=kind)


def _size_of(row: Row, spec: DatasetSpec) -> int:
    """Size of a row's modalities, in bytes, or characters for texts."""
    total = 0
    for modality in spec.modalities.values():
        value = row[modality.column]
        if isinstance(value, np.ndarray):
            total += value.nbytes
        else:
            total += sum(map(len, value)) if isinstance(value, list) else len(value or b"")
    return total


def _read(sample: Sample) -> Result:
    row, read = sample
    try:
        return row, read()
    except BadSampleError as bad:
        return row, bad


def _kept_rows(
    results: Iterator[Result],
    bar: "tqdm[NoReturn]",
    spec: DatasetSpec,
    summary: SplitSummary,
    skip_bad: bool,
    seen: set[int],
) -> Iterator[Row]:
    """Yields the rows to write, with a `split` column added; also records all rows in `summary`.

    `seen` collects hashes of all rows, and of the images and texts of training, to find repeated ones. With 64 bits,
    the probability that any two of a million different rows share a hash is 3e-8.
    """
    for row_number, row in results:
        bar.update()
        if not isinstance(row, BadSampleError) and all(row[m.column] is None for m in spec.modalities.values()):
            row = BadSampleError(NOTHING_LEFT, str(row.get("image_id", "")), f"no {' and no '.join(spec.modalities)}")
        if isinstance(row, BadSampleError):
            summary.bad.append(BadSample(summary.name, summary.source, row_number, row.file, row.reason, row.detail))
            summary.remarks["left out, bad"] += 1
            continue
        label = row["label"]
        labels = [number for number, is_set in enumerate(label) if is_set] if spec.multilabel else [label]
        if spec.label_range is not None:
            labels = [int(np.sign(label)) + 1]
        summary.remarks.update(row.pop(REMARKS, {}))
        for image in (value for value in row.values() if isinstance(value, ImageFile)):
            summary.remarks.update(f"images {change} (the published code differs)" for change in image.changes)
        summary.n_samples += 1
        texts = spec.column_of("text") or next(iter(spec.kept_columns), None)
        summary.n_texts += len(row[texts] or []) if texts else 0
        summary.remarks.update(f"kept, {name} missing" for name, m in spec.modalities.items() if row[m.column] is None)
        summary.remarks["kept, but with none of the labels"] += not labels
        summary.label_counts.update(labels)
        if spec.family == CLIP:
            image, said = row["image"], tuple(row[spec.modalities["text"].column] or ())
            content, whole = hash(said if image is None else image), hash((summary.name, image, said, str(label)))
            summary.remarks[IN_TRAINING] += summary.name != "train" and content in seen
            summary.remarks[REPEATED] += whole in seen
            seen.update([whole, content] if summary.name == "train" else [whole])
        if skip_bad or not summary.bad:  # otherwise no file will be kept, and the rest only completes the list
            yield {**row, "split": summary.name}


def _write_rows(rows: Iterator[Row], part: Path, schema: pa.Schema, spec: DatasetSpec) -> None:
    """Writes record batches of bounded size in bytes and rows."""
    batch: list[Row] = []
    n_bytes = 0
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            size = _size_of(row, spec)
            if batch and (n_bytes + size > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_ROWS):
                writer.write_batch(_record_batch(batch, schema, spec))
                batch, n_bytes = [], 0
            batch.append(row)
            n_bytes += size
        if batch:
            writer.write_batch(_record_batch(batch, schema, spec))


def convert(dataset: RawDataset, target: Path, n_workers: int = 0, skip_bad: bool = False) -> list[SplitSummary]:
    """Writes `NAME_SPLIT.arrow` for each split into the folder `target`, with a progress bar on stderr.

    All files appear under their names together, after the last sample has been read; older files of those names stay
    in place until then. If the process is killed between the renames, a marker file remains that keeps the files from
    being read. Memory is bounded by the batch size and the number of workers, not by the dataset.

    Args:
        dataset: from one of the `open_raw` functions; its samples have not been read yet.
        target: the folder to write to; created if absent.
        n_workers: number of threads that read and decode.
        skip_bad: leave bad samples out and list them in `NAME_bad_samples.tsv`, instead of raising.

    Raises:
        BadSamplesError: there are bad samples and `skip_bad` is false. The error lists them all; nothing was written.
        DataError: a split has no usable sample, or the disk cannot be written. Nothing was written.
    """
    spec = dataset.spec
    splits: list[SplitSummary] = []
    for raw_split in dataset.splits:
        path = target / spec.file_name(raw_split.split)
        if path.is_dir():
            raise DataError(f"{path} is a folder; the arrow file needs that name")
        name = spec.file_splits[raw_split.split]
        remarks = Counter({NO_TEXT: raw_split.n_without_text})
        splits.append(SplitSummary(name, raw_split.source, path, path.exists(), remarks=remarks))
    schema, report = arrow_schema(spec, dataset.class_names), target / f"{spec.name}{BAD_SAMPLES}"
    seen: set[int] = set()
    samples = [sample for raw_split in dataset.splits for sample in raw_split.samples]
    # A terminal is updated continuously, a log file only now and then.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(unit=" samples", total=len(samples), dynamic_ncols=True, mininterval=interval)
    try:
        with ExitStack() as files:
            with bar, closing(in_order(_read, samples, n_workers)) as results:
                for raw_split, split in zip(dataset.splits, splits, strict=True):
                    bar.set_description(split.path.name, refresh=False)
                    part = files.enter_context(atomic_path(split.path))
                    of_split = islice(results, len(raw_split.samples))
                    _write_rows(_kept_rows(of_split, bar, spec, split, skip_bad, seen), part, schema, spec)
                    split.n_bytes = part.stat().st_size
            bad = [sample for split in splits for sample in split.bad]
            if bad and not skip_bad:
                raise BadSamplesError(bad, len(samples))
            for split in splits:
                if not split.n_samples:
                    counts = f"{len(split.bad):,} are bad, {split.remarks[NO_TEXT]:,} have no text"
                    first = f"; the first bad one: {' '.join(split.bad[0].cells())}" if split.bad else ""
                    if not split.bad and not split.remarks[NO_TEXT]:
                        counts = "none is listed for it, or recordings are too short to be split"
                    note = "".join(f"; {line}" for line in dataset.note.splitlines())
                    raise DataError(f"no sample is left for {split.path.name}: {counts}{first}{note}")
            if bad:
                lines = [BadSample._fields, *(sample.cells() for sample in bad)]
                part = files.enter_context(atomic_path(report))
                part.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
            mark = spec.replacing_mark(target)
            mark.touch()
            sync_folder(target)
        if not bad:
            report.unlink(missing_ok=True)  # from an earlier run, about files that are now replaced
        mark.unlink()  # stays after an earlier error or kill: the files are then of two conversions
    except OSError as error:
        at = error.filename or target
        raise DataError(f"cannot write to {at}: {reason_of(error)}. No file was left half-written.") from None
    return splits
