"""The logits of a test split at each missing type, which `run.py robustness` stores in `robustness/logits.arrow`.

A sample's logits depend only on the sample and its missing type, so the logits at each type give the result for any
missing table.

Shapes: T missing types (2^M - 1 for M modalities; with two: complete, one or the other missing), N samples, C classes.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from common.arrow_file import open_table
from common.errors import CheckpointError, DataError, UserError
from common.files import atomic_path, writing
from common.messages import first_line, quoted
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DatasetSpec

log = logging.getLogger("rep")

FORMAT = 1
DESCRIPTION = b"rep"
"""Key in the schema's metadata of the file's own description, as JSON."""


@dataclass(frozen=True, eq=False)
class SplitLogits:
    """A test split with its logits."""

    row_of_sample_N: np.ndarray
    table_rows: int  # rows of the arrow file; missing tables have one entry for each
    labels: Tensor  # (N, C) uint8 for multi-label tasks, else (N,): int64, or float32 for regression
    logits_TNC: Tensor  # float32
    natural: np.ndarray | int = 0  # missing type of each row's naturally missing modalities, int8 (table_rows,)

    @property
    def units(self) -> int:
        """Number of rows that have samples."""
        return len(np.unique(self.row_of_sample_N))

    @property
    def unit_of_sample(self) -> np.ndarray:
        """Unit of each sample, counted from 0: the samples of one row, such as the plots of a film, form a unit."""
        return np.unique(self.row_of_sample_N, return_inverse=True)[1]

    def at(self, table: np.ndarray) -> Tensor:
        """Logits (N, C) with the modalities missing that a missing table says."""
        type_N = torch.from_numpy(table[self.row_of_sample_N].astype(np.int64))
        return self.logits_TNC[type_N, torch.arange(len(type_N))]


def logit_columns_of(spec: DatasetSpec) -> list[str]:
    """Names of the logit columns, one for each missing type of a dataset."""
    return [f"logits_{name.replace(', ', '_').replace(' ', '_')}" for name in spec.type_names]


def read_split(path: Path, spec: DatasetSpec) -> tuple[SplitLogits, tuple[str, ...], dict[str, Any]]:
    """The logits, the names of the samples, and the file's description. Raises the same as `read_logits`."""
    columns = logit_columns_of(spec)
    table, described = read_logits(path, spec, columns)
    rows = table["row"].to_numpy().copy()
    split = SplitLogits(
        row_of_sample_N=rows,
        table_rows=described.get("rows", int(rows.max(initial=-1)) + 1),
        labels=torch.from_numpy(labels_of(table, spec)),
        logits_TNC=torch.from_numpy(np.stack([matrix_of(table[name], spec.n_classes) for name in columns])),
        natural=np.array([int(digit, 16) for digit in described.get("natural", "")] or 0, np.int8),
    )
    return split, tuple(table["id"].to_pylist()), described


def read_logits(path: Path, spec: DatasetSpec, logit_columns: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
    """The memory-mapped table of stored logits of a dataset, and the file's description.

    Raises:
        DataError: it is damaged, or not a file of logits.
    """
    table = open_table(path, "stored logits")
    try:
        described = json.loads((table.schema.metadata or {})[DESCRIPTION])
        if described["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {quoted(described['format'])}")
        for name, type_ in {"row": pa.int64(), "id": pa.string()}.items():
            if (found := table.schema.field(name).type) != type_:
                raise ValueError(f"{name}: expected {type_}, found {found}")
        for name in [*logit_columns, *(["label"] if spec.multilabel else [])]:
            lengths = pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy()
            if wrong := np.flatnonzero(lengths != spec.n_classes).tolist():
                raise ValueError(f"{name}: expected {spec.n_classes} numbers, found others in row {wrong[0]}")
            if not np.isfinite(matrix_of(table[name], spec.n_classes)).all():
                raise ValueError(f"{name}: expected finite numbers")
        labels_of(table, spec).astype(np.float32)
    except (KeyError, TypeError, ValueError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{path}: expected logits stored by `run.py robustness`: {first_line(error)}") from error
    return table, described


def matrix_of(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """The lists of a column, all of length `width`, as (N, width)."""
    return pc.list_flatten(column).to_numpy().reshape(-1, width).copy()


def labels_of(table: pa.Table, spec: DatasetSpec) -> np.ndarray:
    """Labels: (N, C) for multi-label data, else (N,)."""
    return matrix_of(table["label"], spec.n_classes) if spec.multilabel else table["label"].to_numpy().copy()


TITLES = {
    "checkpoint_sha256": "checkpoint (sha256)",
    "arrow_file": "test set",
    "arrow_sha256": "test set (sha256 of the arrow file)",
}
"""Names that messages use for parts of an origin, if not the key itself."""


@dataclass(frozen=True, eq=False)
class LogitStore:
    """The file with the logits of one checkpoint."""

    folder: Path  # folder of the file, created when it is written
    origin: dict[str, Any]
    """Everything the logits depend on, by name: stored logits are only used if their origin is the same."""
    dataset: ArrowDataset  # the test split
    configuration: dict[str, Any]  # the run's, for the record

    @property
    def path(self) -> Path:
        return self.folder / "logits.arrow"

    def exists(self) -> bool:
        """Whether the logits are stored.

        Raises:
            CheckpointError: the stored logits have another origin.
            DataError: the file is damaged, or not a file of logits.
        """
        if not self.path.is_file():
            return False
        try:
            self.load()
        except UserError as error:
            raise type(error)(f"{error}; delete the file to compute them again") from error
        return True

    def load(self) -> SplitLogits:
        """The logits. Raises the same as `exists`."""
        split, _, described = read_split(self.path, self.dataset.spec)
        self._check_origin(self.path, described)
        return replace(split, table_rows=self.dataset.n_rows, natural=self.dataset.natural)

    def load_part(self) -> dict[str, Tensor]:
        """Logits (N, C) saved by an interrupted run, keyed by column; empty if they do not fit or are damaged."""
        spec, part = self.dataset.spec, self._part
        if not part.is_file():
            return {}
        try:
            stored = open_table(part, "stored logits").column_names
            columns = [name for name in logit_columns_of(spec) if name in stored]
            table, described = read_logits(part, spec, columns)
            self._check_origin(part, described)
            if len(table) != len(self.dataset):
                raise DataError(f"{part}: expected {len(self.dataset):,} samples, found {len(table):,}")
        except UserError as error:
            log.info("%s; not used", error)
            return {}
        return {name: torch.from_numpy(matrix_of(table[name], spec.n_classes)) for name in columns}

    @property
    def _part(self) -> Path:
        return self.folder / "logits_part.arrow"

    def _check_origin(self, path: Path, described: Mapping[str, Any]) -> None:
        for name, expected in self.origin.items():
            if (found := described.get(name)) != expected:
                raise CheckpointError(
                    f"{path}: stored logits of another {TITLES.get(name, name)}: expected {_short(expected)}, "
                    f"found {_short(found)}"
                )

    def check_writable(self) -> None:
        """Creates the folder; raises DataError if that, or writing there, is impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(None, "not writable")
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot store results there: {error.strerror or error}; copy the checkpoint, with its "
                f"config.json, to a writable folder"
            ) from error

    def write(self, logits: Mapping[str, Tensor]) -> None:
        """Writes float32 logits (N, C) of all samples in order, keyed by column; a part until the columns are complete.

        Raises:
            DataError: the folder cannot be written.
        """
        rows, labels, spec = self.dataset.row_of_sample, self.dataset.label_of_sample, self.dataset.spec
        columns = {
            "sample": pa.array(np.arange(len(rows)), pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "id": pa.array([self.dataset.sample_name(index) for index in range(len(rows))], pa.string()),
            "text_number": pa.array(np.arange(len(rows)) - np.searchsorted(rows, rows), pa.int64()),  # rows ascend
            "label": _lists(labels.astype(np.uint8)) if labels.ndim == 2 else pa.array(labels),
        }
        columns |= {name: _lists(logits_NC.numpy()) for name, logits_NC in logits.items()}
        path = self.path if len(logits) == len(spec.type_names) else self._part
        description = {"format": FORMAT, "rows": self.dataset.n_rows, **self.origin}
        description["configuration"] = self.configuration
        if np.any(self.dataset.natural):
            description["natural"] = "".join(f"{code:x}" for code in self.dataset.natural.tolist())
        table = pa.table(columns).replace_schema_metadata({DESCRIPTION: json.dumps(description, default=str).encode()})
        with writing(path):
            with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
                writer.write_table(table)
            if path == self.path:
                self._part.unlink(missing_ok=True)


def _lists(values_NC: np.ndarray) -> pa.Array:
    """A column with one list per row."""
    offsets = np.arange(len(values_NC) + 1, dtype=np.int32) * values_NC.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values_NC.reshape(-1)))


def _short(value: object) -> str:
    if not isinstance(value, str):
        return quoted(value)
    return f"{value[:12]}…" if len(value) == 64 else value[:100]
