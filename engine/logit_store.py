"""The logits of a test split for each missing type, kept beside their checkpoint in `robustness/logits.arrow`.

A sample's logits depend on nothing but the sample and its missing type, so that the logits of each type give the result
of any missing table. Until all are there, each set is kept in a part file of its own.

Shapes: T missing types (of M modalities 2^M - 1; with two: complete, one or the other missing), N samples, C classes.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
from torch import Tensor

from common.errors import CheckpointError, DataError, UserError, reason_of
from common.files import atomic_path
from common.messages import quoted
from common.text import counted
from engine.stored_logits import (
    DESCRIPTION,
    FORMAT,
    SplitLogits,
    labels_of,
    logit_columns_of,
    natural_text,
    read_logits,
    read_split,
)
from engine.training import FinetuneModule
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset

log = logging.getLogger("rep")


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
    """The option; None for the one that comes with the weights. Of a published checkpoint, which says none, what
    identifies it."""
    published_seed: int | None = None
    """The option, for a published checkpoint, whose dynamic queries follow from it."""


TITLES = {
    "checkpoint_sha256": "checkpoint (sha256)",
    "arrow_file": "test set",
    "arrow_sha256": "test set (sha256 of the arrow file)",
}
"""What messages call a part of an origin where that is not its name."""


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
        self.type_names, self.logit_columns = dataset.spec.type_names, logit_columns_of(dataset.spec)
        self.configuration = configuration
        self.anew = anew

    def lacking(self) -> list[int]:
        """The missing types that have to be encoded.

        Raises:
            CheckpointError: logits.arrow has another origin.
            DataError: it is damaged, or something else.
        """
        if self._is_complete:
            return []
        columns = enumerate(self.logit_columns)
        return [kind for kind, column in columns if not self._fits(self._part(kind), [column], "not used")]

    def load(self) -> SplitLogits:
        """All logits, when none are lacking; parts are joined to logits.arrow.

        Raises:
            DataError: the folder cannot be written.
        """
        parts = [self._part(kind) for kind in range(len(self.type_names))]
        if not self._is_complete:
            tables = [self._read(part, [name]) for part, name in zip(parts, self.logit_columns, strict=True)]
            logits = {name: table[name] for name, table in zip(self.logit_columns, tables, strict=True)}
            self._write(self.path, self._columns() | logits)
        for part in parts:
            part.unlink(missing_ok=True)
        self._read(self.path, self.logit_columns)
        split = read_split(self.path, self.dataset.spec)[0]
        return replace(split, table_rows=self.dataset.n_rows, natural=self.dataset.natural)

    def keep(self, missing_type: int, logits_NC: Tensor) -> None:
        """Writes the part of one missing type: float32 logits of all samples, in their order.

        Raises:
            DataError: the folder cannot be written.
        """
        column = self.logit_columns[missing_type]
        self._write(self._part(missing_type), self._columns() | {column: _lists(logits_NC.numpy())})

    def check_writable(self) -> None:
        """Makes the folder; DataError where that or writing there is impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(None, "not writable")
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot keep results there: {error.strerror or error}; copy the checkpoint, with its "
                f"config.json, to a folder that can be written"
            ) from error

    def _part(self, missing_type: int) -> Path:
        return self.folder / f"{self.logit_columns[missing_type]}.part.arrow"

    @cached_property
    def _is_complete(self) -> bool:
        """Whether logits.arrow is there and fits, when the store was opened."""
        try:
            return self._fits(self.path, self.logit_columns, "they are replaced" if self.anew else None)
        except UserError as error:
            raise type(error)(f"{error}; robustness_anew=True replaces them") from error

    def _fits(self, path: Path, logit_columns: Sequence[str], otherwise: str | None) -> bool:
        """Whether a file is there and can be used; logs what is wrong and `otherwise`, or raises it if that is None."""
        try:
            return path.is_file() and self._read(path, logit_columns) is not None
        except UserError as error:
            if otherwise is None:
                raise
            log.info("%s; %s", error, otherwise)
            return False

    def _columns(self) -> dict[str, Any]:
        """What says which sample a row is, and its labels."""
        rows, labels = self.dataset.row_of_sample, self.dataset.label_of_sample
        return {
            "sample": pa.array(np.arange(len(rows)), pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "id": pa.array([self.dataset.sample_name(number) for number in range(len(rows))], pa.string()),
            "text_number": pa.array(np.arange(len(rows)) - np.searchsorted(rows, rows), pa.int64()),  # rows ascend
            "label": _lists(labels.astype(np.uint8)) if labels.ndim == 2 else pa.array(labels),
        }

    def _write(self, path: Path, columns: dict[str, Any]) -> None:
        description = {"format": FORMAT, "rows": self.dataset.n_rows, **asdict(self.origin)}
        description["configuration"] = self.configuration
        if np.any(self.dataset.natural):
            description["natural"] = natural_text(self.dataset.natural)
        table = pa.table(columns).replace_schema_metadata({DESCRIPTION: json.dumps(description, default=str).encode()})
        try:
            with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
                writer.write_table(table)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {reason_of(error)}") from error

    def _read(self, path: Path, logit_columns: Sequence[str]) -> pa.Table:
        """The table in `path`; CheckpointError where its origin is another one, DataError where it is damaged."""
        table, described = read_logits(path, self.dataset.spec, logit_columns)
        for name, expected in asdict(self.origin).items():
            if (found := described.get(name)) != expected:
                raise CheckpointError(
                    f"{path}: stored logits of another {TITLES.get(name, name)}: expected {_short(expected)}, "
                    f"found {_short(found)}"
                )
        if not np.array_equal(table["row"].to_numpy(), self.dataset.row_of_sample):
            raise DataError(f"{path}: expected the {len(self.dataset):,} samples of {self.dataset.path}, found others")
        if not np.array_equal(labels_of(table, self.dataset.spec), self.dataset.label_of_sample):
            raise DataError(f"{path}: expected the labels of {self.dataset.path}, found others")
        return table


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
        name = store.type_names[missing_type]
        log.info("encoding %d of %d: %s, %s", number, len(lacking), name, counted(len(dataset), "sample"))
        dataset.missing_table = np.full(dataset.n_rows, missing_type, dtype=np.int8)
        trainer.test(module, datamodule=data, verbose=False)
        assert module.collected is not None and len(module.collected[0]) == len(dataset)
        if trainer.is_global_zero:
            store.keep(missing_type, module.collected[0])


def _lists(values_NC: np.ndarray) -> pa.Array:
    """A column with a list per row."""
    offsets = np.arange(len(values_NC) + 1, dtype=np.int32) * values_NC.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values_NC.reshape(-1)))


def _short(value: object) -> str:
    if not isinstance(value, str):
        return quoted(value)
    return f"{value[:12]}…" if len(value) == 64 else value[:100]
