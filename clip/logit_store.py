"""The logits of a test split for each missing type, kept beside their checkpoint in `robustness/logits.arrow`.

A sample's logits depend on nothing but the sample and its missing type, so that these three sets of logits give the
result of any missing table. Until all three are there, each is kept in a part file of its own; then the next results
bring logits.arrow with them, and take the place of the folder as a whole.

Shapes: T missing types (complete, text missing, image missing), N samples, C classes.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytorch_lightning as pl
import torch
from torch import Tensor

from clip.training import FinetuneModule
from common.arrow_file import open_table
from common.errors import CheckpointError, DataError, UserError, reason_of
from common.files import atomic_path, new_folder, restore_folder
from common.messages import quoted
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.missing_tables import TYPE_NAMES

log = logging.getLogger("rep")

FORMAT = 1
DESCRIPTION = b"rep"
"""Key of the schema's metadata under which a file says what it holds, as JSON."""
LOGIT_COLUMNS = tuple(f"logits_{name.replace(' ', '_')}" for name in TYPE_NAMES)
"""Of the missing types."""


@dataclass(frozen=True)
class Origin:
    """What logits follow from. Those of one origin are never taken for those of another."""

    task: str
    checkpoint_sha256: str
    arrow_file: str
    """Name of the file with the test split."""
    arrow_sha256: str
    precision: str
    tokenizer: str | None
    """The option; None for the tokenizer that comes with the weights."""
    published_seed: int | None = None
    """The option, for a published checkpoint, whose dynamic queries follow from it."""


SAID = {
    "task": "task",
    "checkpoint_sha256": "checkpoint (sha256)",
    "arrow_file": "test set",
    "arrow_sha256": "test set (sha256 of the arrow file)",
    "precision": "precision",
    "tokenizer": "tokenizer",
    "published_seed": "published_seed",
}
"""What messages call each part of an origin."""


@dataclass(frozen=True, eq=False)
class SplitLogits:
    """A test split with its logits."""

    row_of_sample_N: np.ndarray
    table_rows: int
    """Rows of the arrow file, which is what missing tables count."""
    labels: Tensor
    """(N, C) uint8 for multi-label tasks, else (N,) int64."""
    logits_TNC: Tensor
    """float32."""

    def at(self, table: np.ndarray) -> Tensor:
        """Logits (N, C) where the rows of the split lose what a missing table says."""
        type_N = torch.from_numpy(table[self.row_of_sample_N].astype(np.int64))
        return self.logits_TNC[type_N, torch.arange(len(type_N))]


class LogitStore:
    """The files with the logits of one checkpoint.

    Args:
        folder: where they are; made when something is written.
        dataset: the test split.
        configuration: of the run, for the record.
        anew: whether a logits.arrow that does not fit or cannot be read is replaced, not an error.
    """

    def __init__(
        self, folder: Path, origin: Origin, dataset: ArrowDataset, configuration: dict[str, Any], anew: bool = False
    ) -> None:
        self.folder = folder
        self.path = folder / "logits.arrow"
        self.origin = origin
        self.dataset = dataset
        self.configuration = configuration
        self.anew = anew

    def lacking(self) -> list[int]:
        """The missing types that have to be encoded; what a killed run left of the folder is put in order first.

        Raises:
            CheckpointError: logits.arrow has another origin.
            DataError: it is damaged, or something else.
        """
        restore_folder(self.folder)
        if self._is_whole:
            return []
        return [kind for kind in range(len(TYPE_NAMES)) if not self._has_part(kind)]

    def load(self) -> SplitLogits:
        """All logits, when none are lacking."""
        table = self._read(self.path, LOGIT_COLUMNS) if self._is_whole else self._join_parts()
        logits_TNC = np.stack([_matrix(table[name], self.dataset.spec.n_classes) for name in LOGIT_COLUMNS])
        return SplitLogits(
            row_of_sample_N=self.dataset.row_of_sample,
            table_rows=self.dataset.n_rows,
            labels=torch.from_numpy(self._labels(table)),
            logits_TNC=torch.from_numpy(logits_TNC),
        )

    def keep(self, missing_type: int, logits_NC: Tensor, labels: Tensor) -> None:
        """Writes the part of one missing type: float32 logits and labels of all samples, in their order.

        Raises:
            DataError: the folder cannot be written.
        """
        self.check_writable()
        path = self._part(missing_type)
        columns = self._columns(labels) | {LOGIT_COLUMNS[missing_type]: _lists(logits_NC)}
        try:
            self._write(path, self._described(columns))
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {reason_of(error)}") from error

    @contextmanager
    def renewed(self, results: Sequence[str]) -> Iterator[Path]:
        """Yields a folder that takes the place of the old one when the block ends: a kill leaves the one or the other.

        It holds all logits, when none are lacking, and what else the old one holds, but for files called as `results`.

        Raises:
            DataError: it cannot be written.
        """
        parts = (self._part(kind).name for kind in range(len(TYPE_NAMES)))
        left_behind = shutil.ignore_patterns(*results, *parts, ".*.part")
        try:
            with new_folder(self.folder) as fresh:
                shutil.copytree(
                    self.folder, fresh, symlinks=True, ignore=left_behind, copy_function=_link, dirs_exist_ok=True
                )
                if not self._is_whole:
                    self._write(fresh / self.path.name, self._join_parts())
                yield fresh
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: cannot be written: {reason_of(error)}") from error

    def check_writable(self) -> None:
        """Makes the folder; DataError where that or writing there is impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not all(os.access(folder, os.W_OK) for folder in (self.folder, self.folder.resolve().parent)):
                raise PermissionError(None, "not writable")
        except OSError as error:
            raise DataError(f"{self.folder}: cannot keep results there: {error.strerror or error}") from error

    def _part(self, missing_type: int) -> Path:
        return self.folder / f"{LOGIT_COLUMNS[missing_type]}.part.arrow"

    @cached_property
    def _is_whole(self) -> bool:
        if not self.path.is_file():
            return False
        try:
            self._read(self.path, LOGIT_COLUMNS)
        except UserError as error:
            if not self.anew:
                raise type(error)(f"{error}; robustness_anew=True makes them anew") from error
            log.info("%s; they are made anew", error)
            return False
        return True

    def _has_part(self, missing_type: int) -> bool:
        path = self._part(missing_type)
        if not path.is_file():
            return False
        try:
            self._read(path, [LOGIT_COLUMNS[missing_type]])
        except UserError as error:
            log.info("%s; not used", error)
            return False
        return True

    def _join_parts(self) -> pa.Table:
        parts = [self._read(self._part(kind), [name]) for kind, name in enumerate(LOGIT_COLUMNS)]
        columns = self._columns(torch.from_numpy(self._labels(parts[0])))
        return self._described(columns | {name: part[name] for name, part in zip(LOGIT_COLUMNS, parts, strict=True)})

    def _columns(self, labels: Tensor) -> dict[str, pa.Array]:
        """What says which sample a row is."""
        rows = self.dataset.row_of_sample
        first_of_row = np.searchsorted(rows, rows)  # rows ascend
        return {
            "sample": pa.array(np.arange(len(rows)), pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "id": pa.array([self.dataset.sample_name(number) for number in range(len(rows))], pa.string()),
            "text_number": pa.array(np.arange(len(rows)) - first_of_row, pa.int64()),
            "label": _lists(labels) if self.dataset.spec.multilabel else pa.array(labels.numpy(), pa.int64()),
        }

    def _labels(self, table: pa.Table) -> np.ndarray:
        if self.dataset.spec.multilabel:
            return _matrix(table["label"], self.dataset.spec.n_classes)
        return table["label"].to_numpy().copy()

    def _described(self, columns: dict[str, Any]) -> pa.Table:
        description = {"format": FORMAT, **asdict(self.origin), "configuration": self.configuration}
        return pa.table(columns).replace_schema_metadata({DESCRIPTION: json.dumps(description, default=str).encode()})

    def _write(self, path: Path, table: pa.Table) -> None:
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    def _read(self, path: Path, logit_columns: Sequence[str]) -> pa.Table:
        """The table in `path`; CheckpointError where its origin is another one, DataError where it is damaged."""
        table = open_table(path, "stored logits")
        self._check_origin(path, table)
        spec = self.dataset.spec
        types = {name: pa.int64() for name in ("sample", "row", "text_number")} | {"id": pa.string()}
        types["label"] = pa.list_(pa.uint8()) if spec.multilabel else pa.int64()
        types |= {name: pa.list_(pa.float32()) for name in logit_columns}
        found = dict(zip(table.schema.names, table.schema.types, strict=True))
        if found != types:
            raise DataError(f"{path}: expected stored logits, with the columns {_some(types)}; found {_some(found)}")
        if not np.array_equal(table["row"].to_numpy(), self.dataset.row_of_sample):
            raise DataError(f"{path}: expected the {len(self.dataset):,} samples of {self.dataset.path}, found others")
        for name in [*logit_columns, *(["label"] if spec.multilabel else [])]:
            lengths = pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy()
            wrong = np.flatnonzero(lengths != spec.n_classes)
            if len(wrong):
                raise DataError(f"{path}: row {wrong[0]}: column {name}: expected {spec.n_classes} numbers")
        if not np.array_equal(self._labels(table), self.dataset.label_of_sample):
            raise DataError(f"{path}: expected the labels of {self.dataset.path}, found others")
        for name in logit_columns:
            wrong = np.flatnonzero(~np.isfinite(_matrix(table[name], spec.n_classes)).all(axis=1))
            if len(wrong):
                raise DataError(f"{path}: row {wrong[0]}: column {name}: expected finite numbers")
        return table

    def _check_origin(self, path: Path, table: pa.Table) -> None:
        try:
            described = json.loads((table.schema.metadata or {})[DESCRIPTION])
            if described["format"] != FORMAT:
                raise ValueError
            names = Origin.__dataclass_fields__.keys() - {"published_seed"}  # younger than the others
            origin = Origin(**{name: described[name] for name in names}, published_seed=described.get("published_seed"))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: expected logits that `run.py robustness` stored, found another file") from error
        for name, what in SAID.items():
            expected, found = getattr(self.origin, name), getattr(origin, name)
            if found != expected:
                raise CheckpointError(
                    f"{path}: stored logits of another {what}: expected {_short(expected)}, found {_short(found)}"
                )


class LogitModule(FinetuneModule):
    """Collects the logits of a test run, in the order of the samples, instead of measuring them."""

    collected: tuple[Tensor, Tensor] | None = None
    """Logits (N, C) and labels of all processes' samples, after a test run."""

    def on_test_epoch_end(self) -> None:
        self.collected = self._collect("test")


def encode(
    store: LogitStore, lacking: Sequence[int], module: LogitModule, trainer: pl.Trainer, data: MissingModalityData
) -> None:
    """Computes the logits that `store` lacks, in one pass over the test split for each missing type.

    With several processes all take part, and the first one writes.
    """
    dataset = data.datasets["test"]
    for number, missing_type in enumerate(lacking, start=1):
        log.info("encoding %d of %d: %s, %d samples", number, len(lacking), TYPE_NAMES[missing_type], len(dataset))
        dataset.missing_table = np.full(dataset.n_rows, missing_type, dtype=np.int8)
        trainer.test(module, datamodule=data, verbose=False)
        assert module.collected is not None and len(module.collected[0]) == len(dataset)
        if trainer.is_global_zero:
            store.keep(missing_type, *module.collected)


def _link(source: str, target: str) -> None:
    """Gives a file a second name, so that it is not written again; copies it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _lists(values_NC: Tensor) -> pa.Array:
    """A column with a list per row."""
    array = values_NC.contiguous().numpy()
    offsets = np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)))


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """The lists of a column, all of length `width`, as (N, width)."""
    return pc.list_flatten(column).to_numpy().reshape(-1, width).copy()


def _short(value: object) -> str:
    if not isinstance(value, str):
        return quoted(value)
    return f"{value[:12]}…" if len(value) == 64 else value[:100]


def _some(names: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in names.items())
