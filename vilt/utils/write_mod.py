"""Converts MOD: recordings of a microphone and a geophone, or the published samples with their index files."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from common.errors import DataError
from common.messages import first_line, listed
from common.torch_file import load_inert
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.utils import raw_data
from vilt.utils.raw_data import RawDataset, RawSplit, Sample
from vilt.utils.recordings import (
    NO_LABEL,
    PUBLISHED,
    TIME,
    Recording,
    check_finite,
    check_split_method,
    note_on,
    read_numbers,
    read_row,
    time_split,
)
from vilt.utils.tables import read_text, table_rows

LAYOUT = """\
RAW/
  RUN/NODE/aud16000.csv   microphone, 16 kHz, a value in each line; or aud.csv
  RUN/NODE/ehz.csv        geophone, 100 Hz
or the published samples:
RAW/
  ANY/RUN_NODE_NUMBER.pt
  ANY/train_index.txt, test_index.txt; and pretrain_index.txt, if there is one
"""
RUNS = Path(__file__).parents[1] / "datasets" / "mod_runs.csv"
LABELLED = DATASETS["mod"].class_names or ()
CLASSES = (*LABELLED, "bicycle", "forester", "pickup", "scooter")
SECONDS, INTERVALS = 2, 10
PRETRAIN, UNUSED = "pretrain", "unused"
RATES = {"seismic": 100, "audio": 8000}
ZERO_CROSSINGS, ROLL_OFF, TAPS, BEFORE = 6, 0.99, 28, 13
VALIDATION_OF_PUBLISHED = 10
"""With the published split, every tenth training sample in order of name is for validation."""


def half_rate_kernel() -> np.ndarray:
    """The filter that halves a sampling rate: a sinc with a Hann window, float64 (28,)."""
    t = np.clip(ROLL_OFF * (np.arange(TAPS) - BEFORE) / 2, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    kernel: np.ndarray = ROLL_OFF / 2 * np.sinc(t) * np.cos(math.pi * t / (2 * ZERO_CROSSINGS)) ** 2
    return kernel


def at_half_rate(signal_N: np.ndarray, first: int, count: int) -> np.ndarray:
    """Resamples a recording to half its rate and returns `count` values from `first` on, float64; zeros outside it."""
    begin, length = 2 * first - BEFORE, 2 * count - 2 + TAPS
    padded = np.zeros(length)
    inside = signal_N[max(0, begin) : begin + length]
    padded[max(0, -begin) : max(0, -begin) + len(inside)] = inside
    resampled: np.ndarray = np.lib.stride_tricks.sliding_window_view(padded, TAPS)[::2] @ half_rate_kernel()
    return resampled


def class_of(run: str) -> int:
    """The label of a run, taken from its name; NO_LABEL if the name has none."""
    return next((label for label, name in enumerate(CLASSES) if name in run), NO_LABEL)


class Listed(NamedTuple):
    """A row of mod_runs.csv."""

    run: str
    node: str
    cut_start: int
    cut_end: int
    used_for: str
    """`supervised`, `pretrain` or `unused`."""


@cache
def runs() -> list[Listed]:
    """The rows of mod_runs.csv, which lists the recordings of MOD."""
    columns = ["run", "node", "cut_start_s", "cut_end_s", "used_for"]
    rows = [values for _, values in table_rows(RUNS, columns)]
    return [Listed(v["run"], v["node"], int(v["cut_start_s"]), int(v["cut_end_s"]), v["used_for"]) for v in rows]


@dataclass(frozen=True)
class Node:
    """The raw recording of one sensor node in a run."""

    folder: Path
    listed: Listed

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Paths of the audio and seismic files. Raises DataError if one is missing."""
        audio = next(
            (self.folder / name for name in ("aud16000.csv", "aud.csv") if (self.folder / name).is_file()), None
        )
        seismic = self.folder / "ehz.csv"
        if audio is None or not seismic.is_file():
            raise DataError(f"{self.folder}: expected {'aud16000.csv' if audio is None else 'ehz.csv'}, found none")
        return {"audio": audio, "seismic": seismic}

    @cached_property
    def seconds(self) -> list[float]:
        """Durations of audio and seismic."""
        return [_lines(self.paths["audio"]) / RATES["audio"] / 2, _lines(self.paths["seismic"]) / RATES["seismic"]]

    @property
    def count(self) -> int:
        """Number of samples that both signals cover."""
        cut = self.listed.cut_start + self.listed.cut_end
        return max(0, int(min(self.seconds) - cut) // SECONDS)

    def recording(self, label: int) -> Recording:
        """The recording, with the same label for all samples."""
        differ = max(self.seconds) > 1.1 * min(self.seconds)
        remark = "audio at 16 kHz and seismic at 100 Hz differ in length; the excess is left out" if differ else ""
        name = f"{self.listed.run}_{self.listed.node}"
        return Recording(name, np.full(self.count, label), self.read, remark=remark)

    def read(self, number: int) -> dict[str, np.ndarray]:
        """The signals of a sample, (1, 10, S) for each modality. Raises DataError."""
        with _LOCK:
            signals = _loaded(self)
        audio = at_half_rate(signals["audio"], number * SECONDS * RATES["audio"], SECONDS * RATES["audio"])
        values = SECONDS * RATES["seismic"]
        seismic = signals["seismic"][number * values : (number + 1) * values]
        return {
            name: np.asarray(x, dtype=np.float32).reshape(1, INTERVALS, -1)
            for name, x in (("seismic", seismic), ("audio", audio))
        }


_LOCK = Lock()


@lru_cache(maxsize=1)
def _loaded(node: Node) -> dict[str, np.ndarray]:
    """The signals of a node, cut at both ends as listed. Raises DataError, which names file and row.

    Only the last recording is cached, since samples are read in order.
    """
    found = {}
    for name, rate in (("audio", 2 * RATES["audio"]), ("seismic", RATES["seismic"])):
        path, separator = node.paths[name], "," if name == "audio" else r"\s+"
        values = read_numbers(path, [0], separator)[:, 0]
        check_finite(values, path, 1, name)
        found[name] = values[node.listed.cut_start * rate : len(values) - node.listed.cut_end * rate]
    return found


def _lines(path: Path) -> int:
    count, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                count, last = count + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return count + (last != b"\n")


def open_raw(raw: Path, split: str | None = None) -> RawDataset:
    """Opens MOD in `raw`.

    Args:
        split: `time` (default), or `published`, which needs the index files.

    Raises:
        DataError: files are missing or not as expected; the message names them.
    """
    raw_data.require_layout(raw, (), LAYOUT)
    spec = DATASETS["mod"]
    how = check_split_method(split, TIME, (TIME, PUBLISHED), spec)
    samples = _by_name(raw.rglob("*.pt"))
    indices = {name.removesuffix("_index"): path for name, path in _by_name(raw.rglob("*_index.txt")).items()}
    nodes = [Node(raw / one.run / one.node, one) for one in runs() if (raw / one.run / one.node).is_dir()]
    if not samples and not nodes:
        raise raw_data.not_as_in(LAYOUT, f"{raw}: found neither recordings of MOD nor its samples")
    notes, listed_samples = [], {name for path in indices.values() for name in _names(path)}
    if not nodes or indices or how == PUBLISHED:
        if missing := [name for name in ("train", "test") if name not in indices]:
            raise DataError(f"{raw}: expected {missing[0]}_index.txt, which lists samples for training or test")
        splits = _of_index(raw, samples, nodes, indices, how)
    else:
        splits = _of_recordings(nodes)
        notes.append(note_on([node.recording(NO_LABEL) for node in nodes if node.listed.used_for != UNUSED]))
    known = {raw / one.run / one.node for one in runs()}
    strays = {path.parent for path in raw.rglob("ehz.csv")} - known | {*raw.rglob("*.zip")}
    strays |= {path for name, path in samples.items() if name not in listed_samples}
    if strays:
        found = listed([str(path.relative_to(raw)) for path in sorted(strays)])
        notes.append(f"warning: not in any list of MOD's recordings or samples, and left out: {found}")
    if how == PUBLISHED:
        notes.append("--split published: test samples lie between training samples of the same recording")
    return RawDataset(spec, LABELLED, tuple(splits), "\n".join(filter(None, notes)))


def _by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """The paths, keyed by their stems. Raises DataError if two have the same stem."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        if (other := found.setdefault(path.stem, path)) != path:
            raise DataError(f"{path}: expected one file of this name, found {other} too")
    return found


def _of_recordings(nodes: Sequence[Node]) -> list[RawSplit]:
    """Splits raw recordings by time."""
    found: dict[str, list[Sample]] = {split: [] for split in (*SPLITS, PRETRAIN)}
    held_out: set[tuple[str, int]] = set()
    """Run and start, in seconds, of each validation and test sample."""
    for use in ("supervised", PRETRAIN):
        for row, node in enumerate(nodes, 1):
            if node.listed.used_for != use:
                continue
            recording = node.recording(class_of(node.listed.run) if use == "supervised" else NO_LABEL)
            for number in range(node.count):
                sample, at = (row, partial(read_row, recording, number)), node.listed.cut_start + SECONDS * number
                if use == PRETRAIN:
                    if _is_clear(node.listed.run, at, held_out):
                        found[PRETRAIN].append(sample)
                elif (split := time_split(number, node.count, 1)) is not None:
                    found[split].append(sample)
                    if split == "train":
                        found[PRETRAIN].append(sample)
                    else:
                        held_out.add((node.listed.run, at))
    return _splits(found, "mod_runs.csv")


def _is_clear(run: str, at: int, held_out: set[tuple[str, int]]) -> bool:
    """Whether the sample that starts at second `at` of a run overlaps no held-out sample."""
    return not any((run, at + step) in held_out for step in range(1 - SECONDS, SECONDS))


def _splits(found: dict[str, list[Sample]], source: str) -> list[RawSplit]:
    return [RawSplit(split, source, samples) for split, samples in found.items() if samples or split != PRETRAIN]  # type: ignore[arg-type]


def _of_index(
    raw: Path, samples: dict[str, Path], nodes: Sequence[Node], indices: dict[str, Path], how: str
) -> list[RawSplit]:
    """Splits the samples that the index files list, whether published or cut from recordings."""
    of_node = {f"{node.listed.run}_{node.listed.node}": node for node in nodes}
    listed_in = {name: _names(path) for name, path in indices.items()}

    def entry(name: str, label: int) -> Sample:
        recording, number = _by_number(name)
        index = next(index for index, rows in listed_in.items() if name in rows)
        row = listed_in[index][name]
        if name in samples:
            source = Recording(recording, np.full(number + 1, label), partial(read_sample, samples[name]))
        elif recording in of_node and number < of_node[recording].count:
            source = of_node[recording].recording(label)
        else:
            expected = f"expected {name}.pt, or its recording, below {raw}, found none"
            raise DataError(f"{indices[index]}, row {row}: {expected}")
        return row, partial(read_row, source, number)

    train, test = sorted(listed_in["train"]), sorted(listed_in["test"])
    if how == PUBLISHED and (shared := [name for name in test if name in listed_in["train"]]):
        row = listed_in["test"][shared[0]]
        raise DataError(f"{indices['test']}, row {row}: {shared[0]}: expected a sample that is not also for training")
    split_of: dict[str, str | None] = {**dict.fromkeys(train, "train"), **dict.fromkeys(test, "test")}
    if how == PUBLISHED:
        split_of |= dict.fromkeys(train[::VALIDATION_OF_PUBLISHED], "val")
    else:
        counts: dict[str, int] = {}
        for recording, number in map(_by_number, split_of):
            counts[recording] = max(counts.get(recording, 0), number + 1)
        split_of = {name: time_split(_by_number(name)[1], counts[_by_number(name)[0]], 1) for name in split_of}
    found: dict[str, list[Sample]] = {split: [] for split in (*SPLITS, PRETRAIN)}
    cuts = {(one.run, one.node): one.cut_start for one in runs()}
    held_out: set[tuple[str, int]] = set()

    def place_of(name: str) -> tuple[str, int]:
        """The run of a sample, and the second in it at which the sample starts."""
        recording, number = _by_number(name)
        run, node = recording.rsplit("_", 1) if "_" in recording else (recording, "")
        return run, cuts.get((run, node), 0) + SECONDS * number

    for name in sorted(split_of, key=_by_number):
        if (split := split_of[name]) is None:  # next to a border
            continue
        label = class_of(name)
        if not 0 <= label < len(LABELLED):
            index = "train" if name in listed_in["train"] else "test"
            expected = f"expected one of {listed(LABELLED)} in the name"
            raise DataError(f"{indices[index]}, row {listed_in[index][name]}: {name}: {expected}")
        found[split].append(entry(name, label))
        if split != "train":
            held_out.add(place_of(name))
    for name in sorted({*listed_in.get(PRETRAIN, {}), *train}, key=_by_number):
        split = split_of.get(name)
        unused = name not in train and split is None
        if how == PUBLISHED or ((split == "train" or unused) and _is_clear(*place_of(name), held_out)):
            found[PRETRAIN].append(entry(name, class_of(name) if split == "train" else NO_LABEL))
    return _splits(found, "train_index.txt")


def _names(path: Path) -> dict[str, int]:
    """Row of each sample in an index file, keyed by the sample's name without the folder of another machine."""
    found: dict[str, int] = {}
    for row, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name = line.strip().replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".pt")
        if not re.fullmatch(r".+_\d+", name):
            raise DataError(f"{path}, row {row}: expected a file RUN_NODE_NUMBER.pt, found {line.strip()[:100]!r}")
        found.setdefault(name, row)
    return found


def _by_number(name: str) -> tuple[str, int]:
    recording, _, number = name.rpartition("_")
    return recording, int(number)


def read_sample(path: Path, number: int) -> dict[str, np.ndarray]:
    """The signals of a published sample, keyed by modality. Raises DataError."""
    try:
        loaded = load_inert(path)
        found = {name: loaded["data"]["shake"][name] for name in RATES}
        label = loaded["label"]["vehicle_type"] if isinstance(loaded["label"], dict) else loaded["label"]
        if int(label) not in (class_of(path.stem), NO_LABEL):
            raise ValueError(f"expected the label {class_of(path.stem)} given by its name, found {int(label)}")
        for name, rate in RATES.items():
            shape = (1, INTERVALS, SECONDS * rate // INTERVALS)
            if not isinstance(found[name], torch.Tensor) or tuple(found[name].shape) != shape:
                raise ValueError(f"{name}: expected an array of shape {shape}")
            if not torch.isfinite(found[name].float()).all():
                raise ValueError(f"{name}: expected finite float32 numbers")
    except KeyError as error:
        raise DataError(f"{path}: expected data['shake'] with {' and '.join(RATES)}, found no {error}") from None
    except Exception as error:  # torch.load raises many types on damaged files
        raise DataError(f"{path}: not readable as a sample of MOD: {first_line(error)}") from None
    return {name: x.float().numpy() for name, x in found.items()}
