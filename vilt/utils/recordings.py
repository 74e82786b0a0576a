"""Cuts sensor recordings into samples, and divides these so that neighbouring samples are never in different splits.

Shape suffixes: N values, c channels, I intervals of a sample, S values of an interval.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd

from common.errors import DataError
from common.messages import listed, quoted
from common.shares import part_of
from vilt.datasets.specs import SPLITS, DatasetSpec, Split
from vilt.datasets.subsequences import NUMBER, RECORDING
from vilt.utils.raw_data import REMARKS, RawSplit, Row

TIME, SUBJECT, RUN, PUBLISHED = SPLIT_METHODS = ("time", "subject", "run", "published")
"""Ways to split: by time within each recording, by subject, by complete recordings of each class, or as published."""
TRAIN_SHARE, TRAIN_AND_VAL_SHARE, VAL_SHARE = 0.7, 0.8, 0.1
NO_LABEL = -1
MISSING_VALUES = "samples with missing values, now 0"
SHORT = "shorter than a sample, and left out"
LARGEST = np.finfo(np.float32).max


class Cut(NamedTuple):
    """How a recording becomes samples, in values."""

    sample: int
    step: int
    """Distance from the start of one sample to the start of the next."""
    interval: int
    interval_step: int

    @classmethod
    def from_seconds(cls, rate: float, *seconds: float) -> Self:
        """A Cut from durations in seconds.

        Raises ValueError unless each is a whole number of values, and the intervals fill a sample.
        """
        found = []
        names = ("sample", "sample less sample_overlap", "interval", "interval less interval_overlap")
        for name, of_name in zip(names, seconds, strict=True):
            values = of_name * rate
            if round(values) < 1 or abs(round(values) - values) > 1e-6:
                at = f"found {of_name:g} s, {values:g} values at {rate:g} Hz"
                raise ValueError(f"{name}: expected a whole number of values, {at}")
            found.append(round(values))
        sample, _, interval, step = found
        if sample < interval or (sample - interval) % step:
            raise ValueError(f"intervals of {interval} values, {step} apart, do not fill {sample} values")
        return cls(*found)

    @property
    def shape(self) -> tuple[int, int]:
        """(I, S)."""
        return (self.sample - self.interval) // self.interval_step + 1, self.interval

    def rows(self, number: int) -> slice:
        """The slice of the recording that is sample `number`."""
        return slice(number * self.step, number * self.step + self.sample)

    def count(self, values: int) -> int:
        """Number of samples in a recording of `values` values."""
        return max(0, (values - self.sample) // self.step + 1)

    def labels(self, labels_N: np.ndarray, *, mixed: bool) -> np.ndarray:
        """Label of each sample of a recording, int64; see `label_of`."""
        found = [label_of(labels_N[self.rows(number)], mixed=mixed) for number in range(self.count(len(labels_N)))]
        return np.array(found, dtype=np.int64)

    def intervals(self, sample_Nc: np.ndarray) -> np.ndarray:
        """The values of a sample, cut into intervals: float32 (c, I, S)."""
        values_Nc = np.asarray(sample_Nc, dtype=np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(values_Nc, self.interval, axis=0)  # (N, c, S)
        return np.ascontiguousarray(windows[:: self.interval_step].transpose(1, 0, 2))

    @property
    def dropped(self) -> int:
        """Number of samples to leave out at a border between splits: one, or more if samples overlap by over half."""
        return max(1, -(-self.sample // self.step) - 1)


@dataclass(frozen=True)
class Recording:
    """A recording and its samples."""

    name: str
    labels: np.ndarray
    """Label of each sample; NO_LABEL if it is left out."""
    read: Callable[[int], dict[str, np.ndarray]]
    """Reads a sample by its number: (c, I, S) for each modality. Raises DataError."""
    subject: str = ""
    split: Split | None = None
    """The split that the data assign it, if any."""
    row: int = 1
    """Its row in the file that lists it."""
    remark: str = ""
    """Remark for the user."""


def label_of(labels_N: np.ndarray, *, mixed: bool) -> int:
    """The label of a sample: the most frequent one, or NO_LABEL if there are several and `mixed` is false."""
    values, counts = np.unique(labels_N, return_counts=True)
    return int(values[np.argmax(counts)]) if mixed or len(values) == 1 else NO_LABEL


def split_samples(recordings: Sequence[Recording], how: str, source: str, dropped: int) -> list[RawSplit]:
    """Divides the samples of `recordings` into splits.

    Args:
        how: one of SPLIT_METHODS.
        dropped: number of samples to leave out at a border between splits.

    Raises:
        DataError: the recordings lack what `how` requires.
    """
    split_of = _ways(recordings, how, source) if how != TIME else {}
    found: dict[Split, list[tuple[int, Callable[[], Row]]]] = {split: [] for split in SPLITS}
    for recording in recordings:
        for number, label in enumerate(recording.labels.tolist()):
            split = time_split(number, len(recording.labels), dropped) if how == TIME else split_of[recording.name]
            if split is not None and label != NO_LABEL:
                found[split].append((recording.row, partial(read_row, recording, number)))
    return [RawSplit(split, source, samples) for split, samples in found.items()]


def note_on(recordings: Sequence[Recording], splits: Sequence[RawSplit] | None = None, others: str = "") -> str:
    """Notes for the user: remarks on recordings, and how many samples are in none of `splits`.

    Args:
        others: further reasons for samples to have no label, besides having several.
    """
    remarks: dict[str, list[str]] = {}
    for recording in recordings:
        for remark in (SHORT if not len(recording.labels) else "", recording.remark):
            remarks.setdefault(remark, []).append(recording.name)
    lines = [f"warning: {remark}: {listed(names)}" for remark, names in remarks.items() if remark]
    if splits is not None:
        n_samples = sum(len(recording.labels) for recording in recordings)
        unlabelled = sum(np.count_nonzero(recording.labels == NO_LABEL) for recording in recordings)
        between = n_samples - unlabelled - sum(len(split.samples) for split in splits)
        left_out = {f"with several labels{others}": unlabelled, "next to another split": between}
        lines += [f"left out, {why}: {count:,} of {n_samples:,} samples" for why, count in left_out.items() if count]
    return "\n".join(lines)


def time_split(number: int, count: int, dropped: int) -> Split | None:
    """The split of a sample by time: 70 % of a recording for training, then 10 % and 20 %; None next to a border."""
    first, second = part_of(count, TRAIN_SHARE), part_of(count, TRAIN_AND_VAL_SHARE)
    if number < first:
        return "train"
    if number < second:
        return "val" if number >= first + dropped else None
    return "test" if number >= second + dropped else None


def _ways(recordings: Sequence[Recording], how: str, source: str) -> dict[str, Split]:
    """The split of each recording, keyed by name."""
    if how == PUBLISHED:
        for recording in recordings:
            if recording.split is None:
                raise DataError(f"{source}, row {recording.row}: --split published: expected a split, found none")
        return {recording.name: recording.split for recording in recordings if recording.split is not None}
    found: dict[str, Split] = {}
    groups: dict[int, list[Recording]] = {0: list(recordings)}
    if how == RUN:
        groups = {}
        for recording in recordings:
            kept = recording.labels[recording.labels != NO_LABEL]
            if len(kept):
                groups.setdefault(label_of(kept, mixed=True), []).append(recording)
            else:
                found[recording.name] = "train"  # has no effect, as none of its samples is used
    for label, group in groups.items():
        key_of = {one.name: one.subject if how == SUBJECT else one.name for one in group}
        if how == SUBJECT and (without := [one for one in group if not one.subject]):
            raise DataError(f"{source}, row {without[0].row}: --split subject: expected a subject, found none")
        keys = sorted(set(key_of.values()), key=lambda key: hashlib.sha256(key.encode()).digest())
        if len(keys) < len(SPLITS):
            of = f" of class {label}" if how == RUN else ""
            raise DataError(f"{source}: --split {how}: expected at least 3 {how}s{of}, found {listed(keys)}")
        n_test = max(1, round((1 - TRAIN_AND_VAL_SHARE) * len(keys)))
        n_val = max(1, round(VAL_SHARE * len(keys)))
        of_key: dict[str, Split] = {
            key: "test" if place < n_test else "val" if place < n_test + n_val else "train"
            for place, key in enumerate(keys)
        }
        found |= {name: of_key[key] for name, key in key_of.items()}
    return found


def read_row(recording: Recording, number: int) -> Row:
    """The row of one sample. Missing values become 0, with a remark."""
    read = recording.read(number)
    remarks = {MISSING_VALUES: 1} if any(np.isnan(array).any() for array in read.values()) else {}
    signals = {f"signal_{name}": np.nan_to_num(array) for name, array in read.items()}
    of_sample = {"sample": f"{recording.name}_{number}", RECORDING: recording.name, NUMBER: number, REMARKS: remarks}
    return {**signals, "label": int(recording.labels[number]), **of_sample}


def check_finite(
    signal_N: np.ndarray, place: Path | str, first_row: int, column: str, given_N: Sequence[object] = ()
) -> None:
    """Raises DataError, which names the first row whose value is not finite in float32; rows count from `first_row`.

    Args:
        given_N: the cells as read, to quote them if they may not be numbers.
    """
    finite = np.abs(signal_N) <= LARGEST
    if not finite.all():
        row = int(np.argmin(finite))
        found = f"found {quoted(given_N[row]) if len(given_N) else f'{signal_N[row]:g}'}"
        raise DataError(f"{place}, row {row + first_row}: {column}: expected a finite float32 number, {found}")


def read_numbers(path: Path, columns: Sequence[int], separator: str) -> np.ndarray:
    """Reads columns, in ascending order, of a text file of numbers: (N, columns) float64.

    Empty cells, blank lines and `NaN` become NaN.

    Raises:
        DataError: the file cannot be read, or a cell is not a number; the message names file and row.
    """
    try:
        options = {"header": None, "usecols": list(columns), "skip_blank_lines": False}
        return np.asarray(pd.read_csv(path, sep=separator, dtype=np.float64, engine="c", **options))
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}, row 1: expected numbers, found none") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise DataError(_first_wrong(path, columns, separator) or f"{path}: {str(error).strip()}") from None


def _first_wrong(path: Path, columns: Sequence[int], separator: str) -> str | None:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for row, line in enumerate(lines, 1):
            cells = line.split() if separator == r"\s+" else line.rstrip("\r\n").split(separator)
            for column in columns:
                cell = cells[column] if column < len(cells) else "no such column"
                try:
                    float(cell or "nan")
                except ValueError:
                    return f"{path}, row {row}: expected a number in column {column + 1}, found {quoted(cell)}"
    return None


def check_split_method(how: str | None, default: str, known: Sequence[str], spec: DatasetSpec) -> str:
    """The way to split, `default` if `how` is None. Raises DataError if the dataset does not offer it."""
    if how is not None and how not in known:
        raise DataError(f"--split {how}: expected {' or '.join(known)} for {spec.make_arrow_name}")
    return how or default
