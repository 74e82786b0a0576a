"""The dataset class that reads all arrow files."""

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.arrow_file import open_table
from common.errors import DataError
from common.messages import quoted
from common.shares import part_of
from vilt.datasets.kinds import ImageKind, Kind, TextKind, Tokenize, kinds_of, real_windows
from vilt.datasets.specs import DatasetSpec, Split
from vilt.missing_tables import MissingPattern, draw_missing_type, drop_modalities
from vilt.missing_types import COMPLETE, code_of, is_missing, with_natural


class Sample(NamedTuple):
    """A sample. A row with several texts holds several."""

    inputs: dict[str, Tensor]
    """Inputs of the modalities that are present, keyed by modality."""
    label: Tensor
    """0/1 vector (C,) uint8 for multi-label data, else a class number, int64, or a numeric label, float32."""
    number: int
    """Index of the sample in the dataset."""


def _cached_feature(cached: Tensor, kind: Kind, index: int) -> Tensor:
    """The cached feature of a sample's input: (D,), or (w, D) for a text in windows."""
    found = cached[kind.position_of_sample[index]]
    return found if found.ndim == 1 else real_windows(found)


class ArrowDataset(Dataset[Sample]):
    """The samples of one split, read from a memory-mapped arrow file.

    In datasets with texts, each text is a sample: a film with three plots is three samples with the same image and
    missing type. Opening the dataset reads labels and texts; images are read and decoded one at a time, unless
    `cache_images` has decoded them all beforehand.

    Args:
        spec: row of the dataset table.
        root: folder of the arrow files.
        image_size: side of the images returned, if any.
        pretraining: for the training split, read the dataset's pretraining file, if it has one, which also holds
            unlabelled samples (label -1).
        group_texts: all texts of a row form one sample.

    Raises:
        DataError: the file is missing, damaged, from another conversion than the others or of another split, or its
            columns or labels are not those of the dataset.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        root: Path,
        split: Split,
        image_size: int = 224,
        *,
        pretraining: bool = False,
        group_texts: bool = False,
    ) -> None:
        self.spec = spec
        self.split: Split = split
        pretraining_file = spec.pretraining_file if pretraining and split == "train" else None
        self.path = root / (pretraining_file or spec.file_name(split))
        self._for_pretraining = pretraining_file is not None  # rows may be unlabelled, and of any split
        self.image_size, self.group_texts = image_size, group_texts
        self._table: pa.Table | None = None
        self.kinds = {name: kind(spec.modalities[name], self) for name, kind in kinds_of(spec).items()}
        """The reader of each modality's inputs."""
        if spec.replacing_mark(root).exists():
            raise DataError(
                f"{root}: its {spec.name} files are being replaced, or make_arrow.py was killed while replacing them, "
                f"and belong to two conversions; {spec.how_to_make(root)}"
            )
        self._check_columns()
        lists = [kind.lengths_of_rows() for kind in self.kinds.values() if isinstance(kind, TextKind)]
        samples = np.maximum(lists[0], 1) if lists and not group_texts else 1
        self.row_of_sample = np.repeat(np.arange(self.n_rows), samples)
        """Row of every sample, int64 (N,), ascending."""
        self.chosen = np.arange(len(self.row_of_sample))
        """Indices of the samples that training uses, ascending; all unless `choose` leaves some out."""
        self.labels = self._read_labels()
        """Labels of every row, see `_read_labels`."""
        self.natural = self._natural_types()
        """Missing type of every row due to naturally missing modalities, int8 (n_rows,)."""
        self.missing_table = np.zeros(self.n_rows, dtype=np.int8)
        self.simulate_seed: int | None = None
        """Training only: seed with which complete samples lose a modality in each epoch (option simulate_missing)."""
        self.redrawn: tuple[MissingPattern, int] | None = None
        """Training only: pattern and seed from which each sample's missing type is redrawn every epoch, in place of a
        missing table."""
        self.modality_dropout = (0.0, 0)
        """Training only: the probability that a sample loses further modalities, and a seed."""
        self.cached: dict[str, Tensor] | None = None
        """Cached features (n, D) of each modality, at `Kind.position_of_sample`, to return in place of inputs."""
        self.reading: Tensor | None = None
        """Shared int64 (workers, 2): each worker's process id and the index of the sample that it is reading."""

    def without_draws(self) -> Self:
        """A copy whose samples lose only what the missing table says, the same in every epoch."""
        dataset = copy.copy(self)
        dataset.simulate_seed, dataset.redrawn, dataset.modality_dropout = None, None, (0.0, 0)
        return dataset

    def choose(self, ratio: float, seed: int) -> None:
        """Restricts training to a share of the rows, drawn from the seed; a smaller share is part of a larger one.

        Indices of samples and everything kept for each row, such as the missing table, stay those of the whole split.
        """
        named = self.table[self.spec.id_column].to_pylist() if self.spec.id_column in self.table.column_names else []
        by_name = sorted(range(self.n_rows), key=lambda row: str(named[row]) if named else "")  # else as in the file
        key = hashlib.sha256(f"{self.spec.table_name}/label_ratio/{seed}".encode()).digest()
        drawn = np.argsort(np.random.PCG64(int.from_bytes(key, "big")).random_raw(self.n_rows), kind="stable")
        rows = np.array(by_name)[drawn[: part_of(self.n_rows, ratio)]]
        self.chosen = np.flatnonzero(np.isin(self.row_of_sample, rows))

    @property
    def table(self) -> pa.Table:
        """The memory-mapped table; each process opens its own."""
        if self._table is None:
            self._table = open_table(self.path, how_to_make=self.spec.how_to_make(self.path.parent))
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # each worker maps this file, and those of the caches, itself

    @property
    def missing_table(self) -> np.ndarray:
        """Missing type of every row, int8 (n_rows,): the table that was set, on top of naturally missing modalities."""
        return self._missing_table

    @missing_table.setter
    def missing_table(self, table: np.ndarray) -> None:
        self._missing_table = with_natural(self.kinds, self.natural, table)

    @property
    def n_rows(self) -> int:
        """Number of rows in the file. Missing tables have one entry per row."""
        return self.table.num_rows

    @property
    def label_of_sample(self) -> np.ndarray:
        """Label of every sample, see `_read_labels`."""
        return self.labels[self.row_of_sample]

    @property
    def missing_type_of_sample(self) -> np.ndarray:
        """Missing type of every sample, int8 (N,)."""
        return self.missing_table[self.row_of_sample]

    def __len__(self) -> int:
        return len(self.row_of_sample)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample for the key (epoch, index). Raises DataError if an image cannot be decoded or a cache is gone."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        """The samples of a batch, in the form that loaders call; samples of one row share its image."""
        of_rows: dict[tuple[str, int], Tensor | None] = {}
        return [self._sample(epoch, index, of_rows) for epoch, index in keys]

    def evaluation_order(self) -> np.ndarray:
        """Indices (N,) of all samples by decreasing length of their inputs, so that batches need little padding.

        Texts and arrays of variable length count; missing inputs have length 0. Samples of one row stay together, at
        the position of the longest.
        """
        lengths = np.zeros(len(self), dtype=np.int64)
        for name, kind in self.kinds.items():
            missing = is_missing(self.spec.modalities, name, self.missing_type_of_sample)
            lengths += np.where(missing, 0, kind.lengths())
        longest_of_row = np.zeros(self.n_rows, dtype=np.int64)
        np.maximum.at(longest_of_row, self.row_of_sample, lengths)
        return np.argsort(-longest_of_row[self.row_of_sample], kind="stable")

    def _sample(self, epoch: int, index: int, of_rows: dict[tuple[str, int], Tensor | None]) -> Sample:
        if self.reading is not None and (worker := get_worker_info()) is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        row = int(self.row_of_sample[index])
        missing_type = int(self.missing_table[row])
        if self.simulate_seed is not None and missing_type == COMPLETE:
            generator = np.random.default_rng([self.simulate_seed, epoch, index])
            missing_type = int(generator.integers(len(self.spec.type_names)))
        if self.redrawn is not None:
            pattern, seed = self.redrawn
            drawn = draw_missing_type(pattern, self.kinds, np.random.default_rng([seed, epoch, index, 1]))
            missing_type = int(with_natural(self.kinds, self.natural[row : row + 1], np.array([drawn]))[0])
        if self.modality_dropout[0]:
            chance, seed = self.modality_dropout
            generator = np.random.default_rng([seed, epoch, index, 2])
            missing_type = drop_modalities(missing_type, chance, self.kinds, generator)
        label = torch.from_numpy(self.labels[row]) if self.spec.multilabel else torch.tensor(self.labels[row])
        inputs: dict[str, Tensor] = {}
        for name, kind in self.kinds.items():
            if is_missing(self.spec.modalities, name, missing_type):
                continue
            place = name, index if kind.of_sample else row
            if place not in of_rows:
                cached = self.cached
                of_rows[place] = kind.read(row, index) if cached is None else _cached_feature(cached[name], kind, index)
            if (read := of_rows[place]) is not None:
                inputs[name] = read
        return Sample(inputs, label, index)

    def given(self, modality: str, index: int) -> Any:
        """A sample's raw value of a modality in the file (bytes, text or nested lists), or None if it is missing."""
        return self.kinds[modality].given(int(self.row_of_sample[index]), index)

    def sample_name(self, index: int) -> str:
        """The sample's id if the file has one, else its row; for messages and results."""
        row, column = int(self.row_of_sample[index]), self.spec.id_column
        return str(self.table[column][row].as_py()) if column in self.table.column_names else f"row {row}"

    def class_names(self) -> tuple[str, ...]:
        """Class names in label order, from the dataset table or the file's metadata; unnamed classes get their number.

        Raises:
            DataError: the metadata is damaged.
        """
        if self.spec.class_names is not None:
            return self.spec.class_names
        most = self.spec.n_classes
        expected = f"{self.path}: metadata class_names: expected a list of at most {most} names"
        try:
            names = json.loads((self.table.schema.metadata or {}).get(b"class_names", b"[]"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{expected}: {error}") from error
        if not isinstance(names, list) or len(names) > most or not all(type(name) is str for name in names):
            raise DataError(f"{expected}, found something else")
        named = (*names, *map(str, range(len(names), most)))
        if twice := [name for name, count in Counter(named).items() if count > 1]:
            raise DataError(f"{expected}, each once, found {quoted(twice[0])} twice")
        return named

    def absent_classes(self) -> list[str]:
        """Names of the classes that no sample in `chosen` has; empty if labels are numeric."""
        if self.spec.label_range is not None:
            return []
        classes, labels = np.arange(self.spec.n_classes), self.label_of_sample[self.chosen]
        occurs: Any = labels.any(axis=0) if labels.ndim == 2 else np.isin(classes, labels)
        return [name for name, found in zip(self.class_names(), occurs, strict=True) if not found]

    def only_class(self) -> str | None:
        """Name of the class of all rows, if only one occurs."""
        absent = self.absent_classes()
        occurring = [name for name in self.class_names() if name not in absent]
        return occurring[0] if absent and len(occurring) == 1 else None

    def tokenize(self, tokenize: Tokenize, fingerprint: str, windows: int = 1) -> None:
        """Computes the token ids of all texts and caches them next to the arrow file, keyed by texts and fingerprint.

        Args:
            windows: most windows that a text is read in.
        """
        for kind in self.kinds.values():
            if isinstance(kind, TextKind):
                kind.tokenize(tokenize, fingerprint, windows)

    def cache_images(self, workers: int) -> None:
        """Decodes the images of all rows in `workers` threads and caches them next to the arrow file.

        They take 3·R² bytes per row: 3.9 GB for MM-IMDb's 25,959 films at R = 224. Raises DataError if an image cannot
        be decoded, even one that the missing table leaves out, or if the cache cannot be written.
        """
        for kind in self.kinds.values():
            if isinstance(kind, ImageKind):
                kind.cache(workers)

    def _check_columns(self) -> None:
        found = self.table.column_names
        expected = {*(modality.column for modality in self.spec.modalities.values()), "label"}
        if not expected <= set(found):
            raise DataError(
                f"{self.path}: expected the columns {', '.join(sorted(expected))}; found {', '.join(found) or 'none'}"
            )
        if not self.n_rows:
            raise DataError(f"{self.path}: expected samples, found no rows")
        if "split" in found and not pa.types.is_nested(self.table["split"].type) and not self._for_pretraining:
            names, own = pc.unique(self.table["split"]).to_pylist(), [self.spec.file_splits[self.split]]
            if names != own:
                raise DataError(f"{self.path}: column split: expected {quoted(own)}, found {quoted(names)}")
        if nulls := self.table["label"].null_count:
            row = pc.index(pc.is_null(self.table["label"]), True).as_py()
            raise DataError(f"{self.path}: row {row}: column label is empty (null) ({nulls} such rows)")
        for kind in self.kinds.values():
            kind.check()

    def _natural_types(self) -> np.ndarray:
        natural = np.zeros(self.n_rows, dtype=np.int8)
        for name, kind in self.kinds.items():
            natural += np.where(kind.absent(), code_of(self.kinds, name), 0).astype(np.int8)
        if len(nothing := np.flatnonzero(natural == 2 ** len(self.kinds) - 1)):
            found = f"found all columns empty ({len(nothing)} such rows)"
            raise DataError(f"{self.path}: row {nothing[0]}: expected {' or '.join(self.kinds)}, {found}")
        return natural

    def _read_labels(self) -> np.ndarray:
        """(N, C) uint8 for multi-label data, (N,) float32 for numeric labels, else class numbers (N,) int64."""
        column, n_classes, limit = self.table["label"], self.spec.n_classes, self.spec.label_range
        if not self.spec.multilabel:
            fits = column.type == pa.float32() if limit is not None else pa.types.is_integer(column.type)
            if not fits:
                expected = "float32" if limit is not None else "class numbers"
                raise DataError(f"{self.path}: column label: expected {expected}, found {column.type}")
            numbers = column.to_numpy() if limit is not None else column.to_numpy().astype(np.int64)
            low, high = (-limit, limit) if limit is not None else (-1 if self._for_pretraining else 0, n_classes - 1)
            wrong = np.flatnonzero(~((numbers >= low) & (numbers <= high)))
            if len(wrong):
                found = f"label {numbers[wrong[0]]} is outside {low:g} to {high:g} ({len(wrong)} such rows)"
                raise DataError(f"{self.path}: row {wrong[0]}: {found}")
            return numbers
        expected = f"column label: expected lists of {n_classes} zeros and ones"
        if not pa.types.is_list(column.type):
            raise DataError(f"{self.path}: {expected}, found {column.type}")
        lengths = pc.list_value_length(column).to_numpy()
        wrong = np.flatnonzero(lengths != n_classes)
        if len(wrong):
            raise DataError(f"{self.path}: row {wrong[0]}: {expected}, found {lengths[wrong[0]]} values")
        values = pc.list_flatten(column)
        labels = values.to_numpy()
        wrong = np.flatnonzero(~np.isin(labels, (0, 1)))
        if len(wrong):
            row, found = wrong[0] // n_classes, values[wrong[0]].as_py()
            raise DataError(f"{self.path}: row {row}: {expected}, found {quoted(found)}")
        return labels.reshape(-1, n_classes).astype(np.uint8)
