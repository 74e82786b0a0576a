"""PAMAP2 and RealWorld-HAR, from the layouts of their public files."""

import io
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DataError
from vilt.datasets.specs import DATASETS
from vilt.utils import raw_data
from vilt.utils.raw_data import RawDataset
from vilt.utils.recordings import NO_LABEL, SUBJECT, TIME, Cut, Recording, check_way, divide, read_numbers

PAMAP2_LAYOUT = """\
RAW/
  Protocol/subject101.dat …   54 columns: time, activity, heart rate, then the sensors of hand, chest and ankle
  Optional/subject101.dat …   likewise, if wanted
"""
PAMAP2_COLUMNS = {"Acc": (4, 5, 6), "Gyro": (10, 11, 12), "Mag": (13, 14, 15)}
"""Of the hand: accelerometer of ±16 g, gyroscope, magnetometer."""
PAMAP2_ACTIVITIES = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20, 24)
PAMAP2_CUT = Cut.of(100, 2, 2, 0.4, 0.2)
RWHAR_LAYOUT = """\
RAW/
  proband1/data/acc_walking_csv.zip …   each with acc_walking_waist.csv: id, attr_time in ms, values; or unpacked
"""
RWHAR_FILES = {"acc": "acc", "gyr": "Gyroscope", "mag": "MagneticField", "lig": "Light"}
RWHAR_WIDTHS = {"acc": 3, "gyr": 3, "mag": 3, "lig": 1}
RWHAR_RATE = 50
RWHAR_CUT = Cut.of(RWHAR_RATE, 5, 5, 1, 0.5)


def open_raw(raw: Path, dataset: str, split: str | None = None) -> RawDataset:
    """PAMAP2 or RealWorld-HAR in `raw`, divided by subject (default) or time. Raises DataError."""
    spec = DATASETS[dataset]
    how = check_way(split, SUBJECT, (SUBJECT, TIME), spec)
    recordings = list(_pamap2(raw) if dataset == "pamap2" else _rwhar(raw))
    cut = PAMAP2_CUT if dataset == "pamap2" else RWHAR_CUT
    assert spec.class_names is not None
    return RawDataset(spec, spec.class_names, tuple(divide(recordings, how, str(raw), cut.dropped)))


def _sample(signals: dict[str, np.ndarray], cut: Cut, number: int) -> dict[str, np.ndarray]:
    return {name: cut.intervals(signal[cut.rows(number)]) for name, signal in signals.items()}


def _pamap2(raw: Path) -> Iterator[Recording]:
    raw_data.require_layout(raw, ("Protocol",), PAMAP2_LAYOUT)
    paths = sorted([*raw.glob("Protocol/*.dat"), *raw.glob("Optional/*.dat")])
    if not paths:
        raise DataError(f"{raw / 'Protocol'}: expected files subject101.dat …, found none")
    columns = [1, *(column for of in PAMAP2_COLUMNS.values() for column in of)]
    for row, path in enumerate(paths, 1):
        values = read_numbers(path, columns, r"\s+")
        activities, signals = values[:, 0], values[:, 1:].astype(np.float32)
        for wrong in np.flatnonzero(np.isinf(signals).any(axis=1)):
            raise DataError(f"{path}, row {wrong + 1}: expected finite numbers, or NaN for missing ones")
        for wrong in np.flatnonzero(~np.isin(activities, (0, *PAMAP2_ACTIVITIES))):
            raise DataError(f"{path}, row {wrong + 1}: expected an activity of PAMAP2, found {activities[wrong]:g}")
        of_samples = PAMAP2_CUT.labels(activities.astype(np.int64), mixed=False).tolist()
        labels = [PAMAP2_ACTIVITIES.index(activity) if activity > 0 else NO_LABEL for activity in of_samples]
        of = {name: signals[:, 3 * m : 3 * m + 3] for m, name in enumerate(PAMAP2_COLUMNS)}
        name, read = f"{path.parent.name}_{path.stem}", partial(_sample, of, PAMAP2_CUT)
        yield Recording(name, np.array(labels, dtype=np.int64), read, path.stem, row=row)


def _rwhar(raw: Path) -> Iterator[Recording]:
    raw_data.require_layout(raw, (), RWHAR_LAYOUT)
    classes = DATASETS["rwhar"].class_names or ()
    files = _waist_files(raw)
    if not files:
        raise DataError(f"{raw}: expected files of the waist below proband1/data …, found none")
    for row, (subject, part) in enumerate(sorted({key[:2] for key in files}), 1):
        activity = re.sub(r"_\d+$", "", part)
        if activity not in classes:
            raise DataError(f"{raw / subject}: expected an activity of {', '.join(classes)}, found {activity}")
        of = {}
        for name in RWHAR_FILES:
            if (subject, part, name) not in files:
                raise DataError(f"{raw / subject / 'data'}: expected a file of {name} for {part}, found none")
            of[name] = _timed(*files[subject, part, name], RWHAR_WIDTHS[name])
        begin, end = max(times[0] for times, _ in of.values()), min(times[-1] for times, _ in of.values())
        clock = np.arange(begin, end, 1000 / RWHAR_RATE)  # one for all sensors, where all of them recorded
        signals = {
            name: np.stack([np.interp(clock, times, column) for column in values.T], axis=1).astype(np.float32)
            for name, (times, values) in of.items()
        }
        labels, read = (
            np.full(RWHAR_CUT.count(len(clock)), classes.index(activity)),
            partial(_sample, signals, RWHAR_CUT),
        )
        yield Recording(f"{subject}_{part}", labels, read, subject, row=row)


def _waist_files(raw: Path) -> dict[tuple[str, str, str], tuple[Path, str | None]]:
    """By subject, activity (with the number of its part) and sensor: the file, in an archive by its name there."""
    name_of = {prefix.lower(): name for name, prefix in RWHAR_FILES.items()}
    found: dict[tuple[str, str, str], tuple[Path, str | None]] = {}
    for folder in sorted(raw.glob("proband*")):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".csv", ".zip")):
            names: list[str | None] = [None]
            if path.suffix == ".zip":
                try:
                    with zipfile.ZipFile(path) as archive:
                        names = list(archive.namelist())
                except (OSError, zipfile.BadZipFile) as error:
                    raise DataError(f"{path}: not readable as an archive: {error}") from None
            for name in names:
                match = re.fullmatch(r"(\w+?)_(\w+)_waist\.csv", (name or path.name).rsplit("/", 1)[-1])
                if match and (sensor := name_of.get(match[1].lower())):
                    part = re.sub(r"_csv$", "", path.stem if path.suffix == ".zip" else path.parent.name)
                    number = re.search(r"_(\d+)$", part)
                    key = (folder.name, match[2] + (number[0] if number and number[0] not in match[2] else ""), sensor)
                    found[key] = (path, name)
    return found


def _timed(path: Path, inside: str | None, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Times in ms, ascending, and values (N, width). Raises DataError."""
    place = f"{path}{f' ({inside})' if inside else ''}"
    try:
        if inside is None:
            data = raw_data.read_bytes(path)
        else:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(inside)
        frame = pd.read_csv(io.BytesIO(data))
        numbers = frame.drop(columns="id", errors="ignore").apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{place}: not readable as a table: {error}") from None
    if numbers.shape[1] != width + 1 or not len(numbers):
        raise DataError(f"{place}: expected a time and {width} values in each row, found {list(frame.columns)}")
    finite = np.isfinite(numbers).all(axis=1)
    if not finite.all():
        raise DataError(f"{place}, row {int(np.argmin(finite)) + 2}: expected numbers, found something else")
    order = np.argsort(numbers[:, 0], kind="stable")
    return numbers[order, 0], numbers[order, 1:]
