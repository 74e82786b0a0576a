"""Reading the logits that `run.py robustness` stores of a test split, for each missing type.

Shapes: T missing types (of M modalities 2^M - 1; with two: complete, one or the other missing), N samples, C classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from common.arrow_file import open_table
from common.errors import DataError
from vilt.datasets.specs import DatasetSpec

FORMAT = 1
DESCRIPTION = b"rep"
"""Key of the schema's metadata under which a file says what it holds, as JSON."""


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
    natural: np.ndarray | int = 0
    """What every row misses by nature, a missing type, int8 (table_rows,)."""

    @property
    def units(self) -> int:
        """Rows that have samples."""
        return len(np.unique(self.row_of_sample_N))

    @property
    def unit_numbers(self) -> np.ndarray:
        """Which samples are of one row, such as the plots of one film: numbers from 0."""
        return np.unique(self.row_of_sample_N, return_inverse=True)[1]

    def at(self, table: np.ndarray) -> Tensor:
        """Logits (N, C) where the rows of the split lose what a missing table says."""
        type_N = torch.from_numpy(table[self.row_of_sample_N].astype(np.int64))
        return self.logits_TNC[type_N, torch.arange(len(type_N))]


def natural_text(natural: np.ndarray) -> str:
    """What every row misses by nature, as the description of stored logits has it: a digit for each."""
    return "".join(f"{code:x}" for code in natural.tolist())


def logit_columns_of(spec: DatasetSpec) -> list[str]:
    """Columns of the missing types of a dataset."""
    return [f"logits_{name.replace(', ', '_').replace(' ', '_')}" for name in spec.type_names]


def read_split(path: Path, spec: DatasetSpec) -> tuple[SplitLogits, tuple[str, ...], dict[str, Any]]:
    """The logits, what the samples are called, and what the file says of itself. See `read_logits`."""
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
    """The memory-mapped table of stored logits of a dataset, and what the file says of itself.

    Raises:
        DataError: it is damaged, or something else.
    """
    table = open_table(path, "stored logits")
    try:
        described = json.loads((table.schema.metadata or {})[DESCRIPTION])
        if described["format"] != FORMAT:
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected logits that `run.py robustness` stored, found another file") from error
    types = {name: pa.int64() for name in ("sample", "row", "text_number")} | {"id": pa.string()}
    number = pa.int64() if spec.label_range is None else pa.float32()
    types["label"] = pa.list_(pa.uint8()) if spec.multilabel else number
    types |= {name: pa.list_(pa.float32()) for name in logit_columns}
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    if found != types:
        expected, there = (", ".join(f"{name} ({kind})" for name, kind in of.items()) for of in (types, found))
        raise DataError(f"{path}: expected stored logits, with the columns {expected}; found {there}")
    for name in [*logit_columns, *(["label"] if spec.multilabel else [])]:
        lengths = pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy()
        _refuse_rows(path, name, lengths != spec.n_classes, f"expected {spec.n_classes} numbers")
        finite_NC = np.isfinite(matrix_of(table[name], spec.n_classes))
        _refuse_rows(path, name, ~finite_NC.all(axis=1), "expected finite numbers")
    return table, described


def matrix_of(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """The lists of a column, all of length `width`, as (N, width)."""
    return pc.list_flatten(column).to_numpy().reshape(-1, width).copy()


def labels_of(table: pa.Table, spec: DatasetSpec) -> np.ndarray:
    """(N, C) for multi-label data, else (N,)."""
    return matrix_of(table["label"], spec.n_classes) if spec.multilabel else table["label"].to_numpy().copy()


def _refuse_rows(path: Path, column: str, wrong_N: np.ndarray, expected: str) -> None:
    if wrong_N.any():
        raise DataError(f"{path}: row {np.flatnonzero(wrong_N)[0]}: column {column}: {expected}")
