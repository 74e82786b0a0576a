"""Converts a custom sensor dataset: signals in one array, with tables of channels and recordings, and a spec."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import ConfigError, DataError
from common.messages import listed, quoted
from common.readers import Reader, flag, integer, literal, number, one_of, text
from vilt.datasets.custom import SENSORS, CustomData
from vilt.datasets.specs import EVERY_DATASET, SPLITS, custom_spec
from vilt.utils import raw_data
from vilt.utils.custom_layout import read_yaml
from vilt.utils.mapped_array import open_numbers
from vilt.utils.names import label_name, look_alikes
from vilt.utils.raw_data import RawDataset
from vilt.utils.recordings import (
    PUBLISHED,
    SPLIT_METHODS,
    SUBJECT,
    TIME,
    Cut,
    Recording,
    check_finite,
    check_split_method,
    note_on,
    split_samples,
)
from vilt.utils.tables import read_text, table_rows

LAYOUT = """\
RAW/
  signals.npy     (rows, columns): all recordings one after the other; a value is an entry × scale
  channels.csv    column, modality, axis, unit, rate_hz, scale
  labels.npy      (rows): class number of each row
  classes.txt     class names, one a line, from 0
  recordings.csv  recording, subject, split, start (row), length (rows); subject and split may be empty
  spec.yaml       name, sample and interval in seconds; or use --spec FILE
"""
RECORDINGS = ["recording", "subject", "split", "start", "length"]
CHANNELS = ["column", "modality", "rate_hz", "scale"]
KEYS = {
    "name": (SENSORS, text),
    "sample": (None, number(0, above=True)),
    "sample_overlap": (0.0, number(0, 0.99)),
    "interval": (None, number(0, above=True)),
    "interval_overlap": (0.0, number(0, 0.99)),
    "mixed_labels": (True, flag),
    "metric": ("accuracy", one_of("accuracy", "f1_macro")),
}
"""Keys of spec.yaml, each with default and reader. `mixed_labels`: samples with several labels get the most frequent
one if true, and are left out if false."""


class _Channels(NamedTuple):
    columns: dict[str, list[int]]
    """Columns of signals.npy that belong to each modality."""
    scales: dict[str, np.ndarray]
    """Factor of each of these columns."""
    rate: float


def read_spec(path: Path) -> dict[str, Any]:
    """The values of a spec.yaml, keyed as in KEYS. Raises DataError."""
    given = read_yaml(path)
    if not isinstance(given, dict) or (unknown := [key for key in given if key not in KEYS]):
        found = unknown[0] if isinstance(given, dict) else given
        raise DataError(f"{path}: expected the keys {', '.join(KEYS)}, found {quoted(found)}")
    try:
        values = {key: read(key, _typed(given.get(key, default), read)) for key, (default, read) in KEYS.items()}
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    return values


def _typed(value: Any, read: Reader) -> Any:
    """Turns the text of a YAML scalar into the number or truth value that it spells, unless `read` reads texts."""
    if not isinstance(value, str) or read is text:
        return value
    return literal(value.capitalize() if read is flag else value)


def open_raw(raw: Path, spec: Path | None = None, split: str | None = None) -> RawDataset:
    """Opens the dataset in `raw`.

    Args:
        spec: the spec.yaml; None means that in `raw`.
        split: way to split; None means as in recordings.csv, else by subject, else by time.

    Raises:
        DataError: a file is missing or does not fit the others; the message names it, and the row if there is one.
    """
    files = ("signals.npy", "channels.csv", "labels.npy", "classes.txt", "recordings.csv")
    raw_data.require_layout(raw, (*files, *(() if spec else ("spec.yaml",))), LAYOUT)
    source = spec or raw / "spec.yaml"
    settings = read_spec(source)
    signals = open_numbers(raw / "signals.npy", ("rows", "columns"))
    labels = open_numbers(raw / "labels.npy", ("rows",))
    if len(labels) != len(signals):
        raise DataError(f"{raw / 'labels.npy'}: expected {len(signals)} rows, as in signals.npy, found {len(labels)}")
    channels = _read_channels(raw / "channels.csv", signals.shape[1])
    steps = {name: settings[name] * (1 - settings[f"{name}_overlap"]) for name in ("sample", "interval")}
    classes = tuple(map(label_name, read_text(raw / "classes.txt").rstrip().splitlines()))
    if pair := look_alikes(classes):
        raise DataError(f"{raw / 'classes.txt'}: the classes {' and '.join(pair)} look the same")
    try:
        cut = Cut.from_seconds(
            channels.rate, settings["sample"], steps["sample"], settings["interval"], steps["interval"]
        )
        sizes = *cut.shape, cut.interval_step, channels.rate
        of_signals = tuple((name, len(of), *sizes) for name, of in channels.columns.items())
        custom = CustomData(settings["name"], "single", classes, settings["metric"], of_signals)
    except ValueError as error:
        file_of = {"classes": raw / "classes.txt", "modalities": raw / "channels.csv"}
        raise DataError(f"{file_of.get(str(error).partition(':')[0], source)}: {error}") from None
    for name, of in channels.columns.items():
        for column, scale in zip(of, channels.scales[name], strict=True):
            check_finite(signals[:, column] * scale, raw / "signals.npy", 0, f"column {column} × scale {scale:g}")
    _check_labels(raw / "labels.npy", labels, classes)

    def read(start: int, length: int, number: int) -> dict[str, np.ndarray]:
        values_Nc, scales = signals[start : start + length][cut.rows(number)], channels.scales
        return {name: cut.intervals(values_Nc[:, of] * scales[name]) for name, of in channels.columns.items()}

    recordings: list[Recording] = []
    recording_of_row = np.full(len(signals), -1)
    for row, values in table_rows(raw / "recordings.csv", RECORDINGS):
        place = f"{raw / 'recordings.csv'}, row {row}"
        start, length = (_number(f"{place}: {name}", values[name], integer(0)) for name in ("start", "length"))
        if start + length > len(signals):
            raise DataError(f"{place}: expected rows below {len(signals)}, as in signals.npy, found {start + length}")
        if values["split"] not in (*SPLITS, ""):
            found = quoted(values["split"])
            raise DataError(f"{place}: split: expected {' or '.join(SPLITS)}, or nothing, found {found}")
        if (taken := recording_of_row[start : start + length].max(initial=-1)) >= 0:
            found = quoted(recordings[taken].name)
            raise DataError(f"{place}: expected rows of its own, found some that also belong to {found}")
        recording_of_row[start : start + length] = len(recordings)
        of_samples = cut.labels(labels[start : start + length], mixed=settings["mixed_labels"])
        if values["recording"] in {one.name for one in recordings} or not values["recording"]:
            raise DataError(f"{place}: recording: expected a unique name, found {quoted(values['recording'])}")
        reader, subject = partial(read, start, length), label_name(values["subject"])
        recordings.append(Recording(values["recording"], of_samples, reader, subject, values["split"] or None, row))
    row_of_set = custom_spec(custom)
    default = SUBJECT if any(one.subject for one in recordings) else TIME
    default = PUBLISHED if any(one.split for one in recordings) else default
    how = check_split_method(split, default, SPLIT_METHODS, EVERY_DATASET[SENSORS])
    splits = tuple(split_samples(recordings, how, str(raw / "recordings.csv"), cut.dropped))
    note = note_on(recordings, splits)
    if how == PUBLISHED:
        pairs = {(one.subject, one.split) for one in recordings if one.subject}
        counts = Counter(subject for subject, _ in pairs)
        if several := sorted(subject for subject, count in counts.items() if count > 1):
            note += f"{note and chr(10)}warning: subjects in several splits: {listed(several)}"
    if in_none := np.count_nonzero(recording_of_row < 0):
        note += f"{note and chr(10)}warning: in no recording, and left out: {in_none:,} of {len(signals):,} rows"
    return RawDataset(row_of_set, classes, splits, note)


def _check_labels(path: Path, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    if labels.dtype.kind == "f":
        raise DataError(f"{path}: expected class numbers, found {labels.dtype}")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(f"{path}, row {wrong[0]}: expected 0 to {len(classes) - 1}, found {labels[wrong[0]]}")


def _read_channels(path: Path, n_columns: int) -> _Channels:
    columns: dict[str, list[int]] = {}
    scales: dict[str, list[float]] = {}
    rates: dict[float, int] = {}
    seen: dict[int, int] = {}
    for row, values in table_rows(path, CHANNELS):
        place = f"{path}, row {row}"
        column = _number(f"{place}: column", values["column"], integer(0))
        if column >= n_columns or seen.setdefault(column, row) != row:
            raise DataError(f"{place}: column: expected one of 0 to {n_columns - 1}, each once, found {column}")
        rate, scale = (
            _number(f"{place}: {name}", values[name], number(0, above=True)) for name in ("rate_hz", "scale")
        )
        if rates and rate not in rates:
            raise DataError(f"{place}: rate_hz: expected {next(iter(rates)):g}, as in earlier rows, found {rate:g}")
        rates.setdefault(rate, row)
        columns.setdefault(values["modality"], []).append(column)
        scales.setdefault(values["modality"], []).append(scale)
    if len(seen) != n_columns:
        absent = next(column for column in range(n_columns) if column not in seen)
        expected = f"expected a row for each of the {n_columns} columns of signals.npy"
        raise DataError(f"{path}: {expected}, found none for column {absent}")
    return _Channels(columns, {name: np.array(of) for name, of in scales.items()}, next(iter(rates)))


def _number(place: str, value: str, read: Reader) -> Any:
    """Reads a number in a table. Raises DataError, which names its place."""
    try:
        return read(place, int(value) if value.isdecimal() else float(value))
    except ConfigError as error:
        raise DataError(str(error)) from None
    except ValueError:
        raise DataError(f"{place}: expected a number, found {quoted(value)}") from None
