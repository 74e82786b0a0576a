"""Writes a raw dataset as arrow files: in batches, checked, all of its splits or none."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
from tqdm import tqdm

from common.errors import DataError, reason_of
from common.files import atomic_path, sync_folder
from common.messages import printable
from vilt.datasets.specs import DatasetSpec
from vilt.utils.ordered_pool import Result, read_in_order
from vilt.utils.raw_data import BadSampleError, RawDataset, Row

Results = Iterator[tuple[int, Result]]
"""Row numbers, and the rows or what is wrong with them."""

MAX_BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 4096
MAX_CELL = 1000
"""Characters of a name in the list of bad samples; a hostile one may have millions."""


@dataclass(frozen=True)
class BadSample:
    """One line of the list of bad samples."""

    split: str
    source: str
    row: int
    file: str
    reason: str
    detail: str

    def fields(self) -> tuple[str, ...]:
        """The columns of the list and of the report, printable."""
        return tuple(printable(str(cell)[:MAX_CELL]) for cell in astuple(self))


REPORT_COLUMNS = ("split", "listed_in", "row", "file", "reason", "detail")


class BadSamplesError(DataError):
    """Some samples cannot be used, and leaving them out was not asked for."""

    def __init__(self, bad: list[BadSample], n_samples: int) -> None:
        super().__init__(f"{len(bad):,} of {n_samples:,} samples cannot be used")
        self.bad = bad


@dataclass
class SplitSummary:
    """What one arrow file holds, and what it does not."""

    name: str
    """The split as the file name has it."""
    path: Path
    replaced: bool
    """Whether a file of that name was there before."""
    n_without_text: int
    n_samples: int = 0
    n_texts: int = 0
    n_bytes: int = 0
    n_without_label: int = 0
    """Samples of a multi-label dataset with no label set."""
    label_counts: Counter[int] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)


@dataclass
class Summary:
    """The outcome of a conversion."""

    target: Path
    splits: list[SplitSummary]
    report: Path | None
    """Where the bad samples are listed, if there are any."""

    @property
    def bad(self) -> list[BadSample]:
        """Those of all splits."""
        return [sample for split in self.splits for sample in split.bad]


def arrow_schema(spec: DatasetSpec, class_names: tuple[str, ...]) -> pa.Schema:
    """Columns and types of the published converters, and the class names as JSON in the metadata `class_names`.

    For a custom dataset also what else is known of it, as JSON in the metadata `custom`.
    """
    texts = pa.list_(pa.string())
    columns = [(spec.modalities["image"].column, pa.binary()), (spec.text_column, texts)]
    columns += [("label", pa.list_(pa.int64()) if spec.multilabel else pa.int64())]
    columns += [(name, texts) for name in spec.kept_columns]
    columns += [(name, pa.large_string()) for name in (spec.id_column, "split") if name is not None]
    metadata: dict[str, object] = {"class_names": class_names}
    if spec.custom is not None:
        metadata["custom"] = {"name": spec.custom.name, "labels": spec.custom.labels, "metric": spec.custom.metric}
    return pa.schema(columns, metadata={key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})


def _kept_rows(
    results: Results, bar: "tqdm[NoReturn]", spec: DatasetSpec, source: str, summary: SplitSummary, skip_bad: bool
) -> Iterator[Row]:
    """The rows to write, with the `split` column; fills in `summary`, also from the others."""
    for row_number, row in results:
        bar.update()
        if isinstance(row, BadSampleError):
            summary.bad.append(BadSample(summary.name, source, row_number, row.file, row.reason, row.detail))
            continue
        label = row["label"]
        labels = [number for number, is_set in enumerate(label) if is_set] if spec.multilabel else [label]
        summary.n_samples += 1
        summary.n_texts += len(row[spec.text_column])
        summary.n_without_label += not labels
        summary.label_counts.update(labels)
        if skip_bad or not summary.bad:  # otherwise the file will not be kept: the rest completes the list only
            yield {**row, "split": summary.name}


def _write_rows(rows: Iterator[Row], part: Path, schema: pa.Schema, spec: DatasetSpec) -> None:
    """Writes record batches that are bounded in bytes and rows."""
    batch: list[Row] = []
    n_bytes = 0
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            size = len(row[spec.modalities["image"].column]) + sum(map(len, row[spec.text_column]))
            if batch and (n_bytes + size > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_ROWS):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, n_bytes = [], 0
            batch.append(row)
            n_bytes += size
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _empty(split: SplitSummary) -> DataError:
    first = f" The first bad one: {' '.join(split.bad[0].fields())}" if split.bad else ""
    return DataError(
        f"no sample is left for {split.path.name}: "
        f"{len(split.bad):,} are bad, {split.n_without_text:,} have no text.{first}"
    )


def convert(dataset: RawDataset, target: Path, n_workers: int = 0, skip_bad: bool = False) -> Summary:
    """Writes `NAME_SPLIT.arrow` for each split into the folder `target`, and shows a progress bar on stderr.

    The files appear under their names together, after the last sample has been read; until then older files of those
    names stay as they are. Where this ends among the renames, a mark stays that keeps the files from being read.
    Memory is bounded by batch size and number of workers, not by the dataset.

    Args:
        dataset: from one of the `open_raw` functions; its samples have not been read yet.
        target: the folder to write to; made if absent.
        n_workers: number of processes that read and decode; 0 reads in this process.
        skip_bad: leave bad samples out and list them in `NAME_bad_samples.tsv`, instead of raising.

    Raises:
        BadSamplesError: there are bad samples and `skip_bad` is false. It holds all of them; nothing was written.
        DataError: a split has no usable sample, a worker died, or the disk cannot be written. Nothing was written.
    """
    spec = dataset.spec
    summary = Summary(target, [], None)
    for raw_split in dataset.splits:
        path = target / spec.file_name(raw_split.split)
        if path.is_dir():
            raise DataError(f"{path} is a folder; the arrow file needs that name.")
        name = spec.file_splits[raw_split.split]
        summary.splits.append(SplitSummary(name, path, path.exists(), raw_split.n_without_text))
    schema, report = arrow_schema(spec, dataset.class_names), target / f"{spec.name}_bad_samples.tsv"
    samples = [sample for raw_split in dataset.splits for sample in raw_split.samples]
    # A log file gets a line now and then; a terminal is kept up to date.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(unit=" samples", total=len(samples), dynamic_ncols=True, mininterval=interval)
    try:
        with ExitStack() as files:
            with bar, closing(read_in_order(samples, n_workers)) as results:
                for raw_split, split in zip(dataset.splits, summary.splits, strict=True):
                    bar.set_description(split.path.name, refresh=False)
                    part = files.enter_context(atomic_path(split.path))
                    of_split = islice(results, len(raw_split.samples))
                    _write_rows(_kept_rows(of_split, bar, spec, raw_split.source, split, skip_bad), part, schema, spec)
                    split.n_bytes = part.stat().st_size
            if summary.bad and not skip_bad:
                raise BadSamplesError(summary.bad, len(samples))
            for split in summary.splits:
                if not split.n_samples:
                    raise _empty(split)
            if summary.bad:
                summary.report = report
                lines = [REPORT_COLUMNS, *(sample.fields() for sample in summary.bad)]
                part = files.enter_context(atomic_path(report))
                part.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
            mark = spec.replacing_mark(target)
            mark.touch()
            sync_folder(target)
        if not summary.bad:
            report.unlink(missing_ok=True)  # of an earlier run: it would speak of files that are replaced now
        mark.unlink()  # not after an error or a kill before this: the files are of two conversions then
    except OSError as error:
        raise DataError(
            f"cannot write to {error.filename or target}: {reason_of(error)}. No file was left half-written."
        ) from None
    return summary
