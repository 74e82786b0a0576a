"""Converts PAMAP2 and RealWorld-HAR, in the layouts of their public files."""

import io
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DataError
from common.messages import first_line, listed
from vilt.datasets.specs import DATASETS
from vilt.utils import raw_data
from vilt.utils.names import spelled_as
from vilt.utils.raw_data import RawDataset
from vilt.utils.recordings import (
    NO_LABEL,
    SUBJECT,
    TIME,
    Cut,
    Recording,
    check_finite,
    check_split_method,
    note_on,
    read_numbers,
    split_samples,
)

PAMAP2_LAYOUT = """\
RAW/
  Protocol/subject101.dat …   54 columns: time, activity, heart rate, then the sensors of hand, chest and ankle
  Optional/subject101.dat …   the same, optional
"""
PAMAP2_WIDTH, PAMAP2_RATE = 54, 100
PAMAP2_COLUMNS = {"Acc": (4, 5, 6), "Gyro": (10, 11, 12), "Mag": (13, 14, 15)}
"""Columns of the hand's sensors: accelerometer (±16 g), gyroscope, magnetometer."""
PAMAP2_ACTIVITIES = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20, 24)
PAMAP2_CUT = Cut.from_seconds(PAMAP2_RATE, 2, 2, 0.4, 0.2)
RWHAR_LAYOUT = """\
RAW/
  proband1/data/acc_walking_csv.zip …   each with acc_walking_waist.csv: id, attr_time in ms, values; or unpacked
"""
RWHAR_FILES = {"acc": "acc", "gyr": "Gyroscope", "mag": "MagneticField", "lig": "Light"}
AXES = ["attr_x", "attr_y", "attr_z"]
RWHAR_RATE, LONGEST_GAP = 50, 1000
"""Rate in Hz, and longest gap between two values in ms. The gap does not apply to light, recorded only on changes."""
RWHAR_CUT = Cut.from_seconds(RWHAR_RATE, 5, 5, 1, 0.5)


def open_raw(raw: Path, dataset: str, split: str | None = None) -> RawDataset:
    """Opens PAMAP2 or RealWorld-HAR in `raw`, split by subject (default) or time. Raises DataError."""
    spec = DATASETS[dataset]
    how = check_split_method(split, SUBJECT, (SUBJECT, TIME), spec)
    recordings = list(_pamap2(raw) if dataset == "pamap2" else _rwhar(raw))
    cut = PAMAP2_CUT if dataset == "pamap2" else RWHAR_CUT
    assert spec.class_names is not None
    splits = split_samples(recordings, how, str(raw), cut.dropped)
    note = note_on(recordings, splits, ", without an activity, or with missing rows")
    return RawDataset(spec, spec.class_names, tuple(splits), note)


def _sample(signals: dict[str, np.ndarray], cut: Cut, number: int) -> dict[str, np.ndarray]:
    return {name: cut.intervals(signal[cut.rows(number)]) for name, signal in signals.items()}


def _pamap2(raw: Path) -> Iterator[Recording]:
    raw_data.require_layout(raw, ("Protocol",), PAMAP2_LAYOUT)
    paths = sorted(path for path in [*raw.glob("Protocol/*"), *raw.glob("Optional/*")] if path.name[0] != ".")
    if wrong := [path for path in paths if path.suffix != ".dat"]:
        raise DataError(f"{wrong[0].parent}: expected files subject101.dat …, found {wrong[0].name}")
    if not paths:
        raise DataError(f"{raw / 'Protocol'}: expected files subject101.dat …, found none")
    columns = [0, 1, *(column for of in PAMAP2_COLUMNS.values() for column in of)]
    for row, path in enumerate(paths, 1):
        _check_width(path, PAMAP2_WIDTH)
        values = read_numbers(path, columns, r"\s+")
        for column, of_column in zip(columns[2:], values[:, 2:].T, strict=True):
            check_finite(np.where(np.isnan(of_column), 0, of_column), path, 1, f"column {column + 1}")
        activities, signals = values[:, 1], values[:, 2:].astype(np.float32)
        for place in np.flatnonzero(~np.isin(activities, (0, *PAMAP2_ACTIVITIES))):
            raise DataError(f"{path}, row {place + 1}: expected a PAMAP2 activity, found {activities[place]:g}")
        parts = activities.astype(np.int64) + 100 * _parts(path, values[:, 0])
        of_samples = [part % 100 if part > 0 else 0 for part in PAMAP2_CUT.labels(parts, mixed=False).tolist()]
        labels = [PAMAP2_ACTIVITIES.index(activity) if activity else NO_LABEL for activity in of_samples]
        by_sensor = {name: signals[:, 3 * m : 3 * m + 3] for m, name in enumerate(PAMAP2_COLUMNS)}
        name, read = f"{path.parent.name}_{path.stem}", partial(_sample, by_sensor, PAMAP2_CUT)
        yield Recording(name, np.array(labels, dtype=np.int64), read, path.stem, row=row)


def _check_width(path: Path, width: int) -> None:
    """Raises DataError if a row has another number of values; pandas would fill a short row with missing values."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for row, line in enumerate(lines, 1):
                if (found := len(line.split())) != width:
                    raise DataError(f"{path}, row {row}: expected {width} values, found {found}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _parts(path: Path, times_N: np.ndarray) -> np.ndarray:
    """The number of the gapless part that each row belongs to, int64 (N,).

    A part ends if the next row is not 0.01 s later.

    Raises:
        DataError: most rows do not follow at that distance.
    """
    steps = np.diff(times_N)
    ends = ~(np.abs(steps * PAMAP2_RATE - 1) < 0.5)
    if len(ends) and ends.mean() > 0.5:
        row = int(np.argmax(ends))
        expected = f"expected a time (column 1) {1 / PAMAP2_RATE:g} s after that of the row before"
        raise DataError(f"{path}, row {row + 2}: {expected}, found {steps[row]:g} s")
    return np.concatenate([[0], np.cumsum(ends)])


def _rwhar(raw: Path) -> Iterator[Recording]:
    raw_data.require_layout(raw, (), RWHAR_LAYOUT)
    classes = DATASETS["rwhar"].class_names or ()
    files = _waist_files(raw)
    if not files:
        raise DataError(f"{raw}: expected waist files below proband1/data …, found none")
    for row, (subject, part) in enumerate(sorted({key[:2] for key in files}), 1):
        activity = re.sub(r"_\d+$", "", part)
        if activity not in classes:
            raise DataError(f"{raw / subject}: expected one of the activities {', '.join(classes)}, found {activity}")
        series, in_order = {}, True
        for name in RWHAR_FILES:
            if (subject, part, name) not in files:
                raise DataError(f"{raw / subject / 'data'}: expected a file of {name} for {part}, found none")
            times, values = _timed(*files[subject, part, name], name)
            order = np.argsort(times, kind="stable")
            in_order &= bool((np.diff(times) > 0).all())
            series[name] = times[order], values[order]
        begin, end = max(times[0] for times, _ in series.values()), min(times[-1] for times, _ in series.values())
        clock = np.arange(begin, end, 1000 / RWHAR_RATE)  # for all sensors, over the time that all recorded
        signals = {
            name: np.stack([np.interp(clock, times, column) for column in values.T], axis=1).astype(np.float32)
            for name, (times, values) in series.items()
        }
        labels_N = np.full(len(clock), classes.index(activity))
        for times, values in series.values():
            if values.shape[1] == len(AXES):
                after = np.searchsorted(times, clock, side="right")
                labels_N[np.diff(times, append=np.inf)[after - 1] > LONGEST_GAP] = NO_LABEL
        labels, read = RWHAR_CUT.labels(labels_N, mixed=False), partial(_sample, signals, RWHAR_CUT)
        remark = "" if in_order else "times go back or repeat; sorted"
        yield Recording(f"{subject}_{part}", labels, read, subject, row=row, remark=remark)


def _waist_files(raw: Path) -> dict[tuple[str, str, str], tuple[Path, tuple[str, ...]]]:
    """Path of each file of the waist, and of its place within archives; keyed by subject, activity and sensor.

    The activity includes the number of its part, if there is one.
    """
    name_of = {prefix.lower(): name for name, prefix in RWHAR_FILES.items()}
    found: dict[tuple[str, str, str], tuple[Path, tuple[str, ...]]] = {}
    for folder in sorted(raw.glob("[pP]roband*")):
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder, found a file; unpack it, if it is an archive")
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".csv", ".zip")):
            for inside in _files_in(path):
                match = re.fullmatch(r"(\w+?)_(\w+)_waist\.csv", (path.name, *inside)[-1].rsplit("/", 1)[-1])
                if match and (sensor := name_of.get(match[1].lower())):
                    archive = (path.parent.name, path.name, *inside)[-2].rsplit("/", 1)[-1]
                    number = re.search(r"_(\d+)$", re.sub(r"(_csv)?(\.zip)?$", "", archive, flags=re.IGNORECASE))
                    part = match[2] + (number[0] if number and number[0] not in match[2] else "")
                    other = found.setdefault((folder.name, part, sensor), (path, inside))
                    if other != (path, inside) and _content(*other) != _content(path, inside):
                        place = f"{path}{_in(inside)}"
                        raise DataError(f"{place}: expected one file of {sensor} for {part}, also found {other[0]}")
        if folder.name not in {subject for subject, _, _ in found}:
            raise DataError(f"{folder}: expected waist files, such as data/acc_walking_csv.zip, found none")
    return found


def _in(inside: tuple[str, ...]) -> str:
    return f" ({', '.join(inside)})" if inside else ""


def _files_in(path: Path, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the place of each file within `path`: () if that is not an archive, else names in nested archives."""
    if not (path.name, *inside)[-1].lower().endswith(".zip"):
        yield inside
        return
    try:
        with zipfile.ZipFile(io.BytesIO(_content(path, inside))) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}{_in(inside)}: not readable as an archive: {error}") from None
    for name in names:
        yield from _files_in(path, (*inside, name))


def _content(path: Path, inside: tuple[str, ...]) -> bytes:
    """The bytes of the file at `inside`, a place as `_files_in` yields it. Raises DataError."""
    data = raw_data.read_bytes(path)
    try:
        for name in inside:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(name)
    except Exception as error:  # zipfile raises all kinds of errors on damage, and RuntimeError if a password is needed
        raise DataError(f"{path}{_in(inside)}: cannot be read: {first_line(error)}") from None
    return data


def _timed(path: Path, inside: tuple[str, ...], sensor: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a sensor's times in ms and values (N, channels), in the order of the file. Raises DataError."""
    place = f"{path}{_in(inside)}"
    file = io.BytesIO(_content(path, inside))
    header, first = file.readline(), file.readline()
    try:
        if first.count(b",") > header.count(b","):  # pandas would turn the excess into an index
            raise ValueError("row 2: more values than in the header")
        frame = pd.read_csv(io.BytesIO(file.getvalue()), skip_blank_lines=False)
    except ValueError as error:
        raise DataError(f"{place}: not readable as a table: {first_line(error)}") from None
    frame.columns = pd.Index(spelled_as(frame.columns, ["id", "attr_time", *AXES]))
    channels = sorted(set(frame.columns) - {"id", "attr_time"})
    fits = len(channels) == 1 if sensor == "lig" else channels == AXES
    if not fits or "attr_time" not in frame or not len(frame):
        expected = f"attr_time and {'the light' if sensor == 'lig' else ', '.join(AXES)}"
        found = listed(list(frame.columns)) if len(frame) else "none"
        raise DataError(f"{place}: expected rows of {expected}, found {found}")
    numbers = frame[["attr_time", *channels]].apply(pd.to_numeric, errors="coerce")
    for name, column in numbers.items():
        check_finite(column.to_numpy(np.float64), place, 2, str(name), frame[name].tolist())
    times, values = numbers["attr_time"].to_numpy(np.float64), numbers[channels].to_numpy(np.float64)
    step = float(np.median(np.diff(np.sort(times)))) if len(times) > 1 else 1000 / RWHAR_RATE
    if sensor != "lig" and not 1 <= step <= 200:
        expected = f"expected milliseconds, in rows about {1000 // RWHAR_RATE} apart"
        raise DataError(f"{place}: attr_time: {expected}, found {step:g}")
    return times, values
