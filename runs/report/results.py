"""The runs of a report, read and checked; their robustness results as data frames."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from common.errors import ConfigError, DataError
from common.hashing import file_sha256
from common.messages import quoted
from common.strict_json import read_json
from common.text import counted
from engine.exported import DESCRIPTION
from engine.robustness import FORMAT, PATTERN
from engine.stored_logits import labels_of, logit_columns_of, read_logits
from runs.report.text import without_home
from runs.run_reader import Run, as_written_by_run, check_pattern, find_runs, open_checkpoint
from vilt.datasets.specs import DatasetSpec
from vilt.missing_types import BOTH, available_shares

log = logging.getLogger("rep")
PUBLISHED_BACKBONE = "ViT-B/16"
PUBLISHED_SIZES = {"image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "text_layers": 12}
"""Of its architecture."""


class Pattern(NamedTuple):
    """What was missing, in training or in an evaluation. `both_ratio` is 0.5 where it has no effect."""

    missing_type: str
    ratio: float
    both_ratio: float
    modalities: tuple[str, ...]

    @classmethod
    def of(cls, spec: DatasetSpec, missing_type: str, ratio: float, both_ratio: float) -> "Pattern":
        """The one spelling of a pattern, so that equal ones compare equal."""
        both_ratio = round(float(both_ratio), 9) if missing_type == BOTH else 0.5
        return cls(missing_type, round(float(ratio), 9), both_ratio, tuple(spec.modalities))

    @property
    def available(self) -> dict[str, float]:
        """By modality, the share of samples that have it."""
        return {name: round(share, 9) for name, share in available_shares(self.modalities, *self[:3]).items()}

    @property
    def kind(self) -> str:
        """The missing type, with the share that loses the first modality where that is not a half."""
        return self.missing_type + ("" if self.both_ratio == 0.5 else f" ({self.both_ratio:.0%} {self.modalities[0]})")

    def __str__(self) -> str:
        return f"{100 * self.ratio:g} % {self.kind}" if self.ratio else "nothing missing"


@dataclass(frozen=True, eq=False)
class Robustness:
    """What `robustness/robustness.json` of a run says. A value that is undefined is NaN."""

    raw: dict[str, Any]
    cells: pd.DataFrame
    """missing_type, ratio, both_ratio, metric, value: a row per table seed."""
    intervals: dict[Pattern, tuple[float, float]]
    """Of the task's metric over test samples, by pattern; empty where there are none."""
    by_type: pd.DataFrame
    """type (of every sample), metric, value, low, high."""
    per_class: pd.DataFrame
    """type, class, precision, recall, f1, support."""
    confusions: pd.DataFrame
    """type, true, predicted, count, share."""
    logits: pa.Table | None
    """logits.arrow, None where it is not there."""

    @property
    def samples(self) -> int:
        """Of the test set; a film with several plots is several."""
        return int(self.raw["samples"])


@dataclass(frozen=True, eq=False)
class ReportRun:
    """A run of the report."""

    tag: str
    """Short name, used throughout the report."""
    place: str
    """NAME/version_N, without the folders above."""
    run: Run
    pattern: Pattern
    """Of the training."""
    robustness: Robustness | None
    environment: dict[str, Any] | None
    backbone: str | None
    """PUBLISHED_BACKBONE where it has its sizes, else what the user named; None where best.ckpt does not say it."""

    @property
    def metric(self) -> str:
        """Of the task."""
        return self.run.spec.monitor

    @property
    def test_score(self) -> float | None:
        """The task's metric in the test."""
        return self.tested(self.metric)

    @property
    def test_rows(self) -> int | None:
        """Rows of the test split, if they are known; a film with several plots is one."""
        if self.robustness is not None and self.robustness.logits is not None:
            return len(np.unique(self.robustness.logits["row"].to_numpy()))
        return None if self.run.test is None else self.run.test.get("rows")

    @property
    def score_at_own_pattern(self) -> float | None:
        """The task's metric at the pattern of the training."""
        return self.at_own_pattern(self.metric)

    def at_own_pattern(self, metric: str) -> float | None:
        """A metric at the pattern of the training: mean over table seeds, else the test result there."""
        if self.robustness is not None:
            cells = self.robustness.cells
            same = (cells[list(PATTERN)] == list(self.pattern[:3])).all(axis=1) & (cells.metric == metric)
            if same.any():
                return float(cells.value[same].mean())
        at = self.run.tested_at
        return self.tested(metric) if at is not None and Pattern.of(self.run.spec, *at) == self.pattern else None

    def tested(self, metric: str) -> float | None:
        """A metric of the test, whatever was missing there; NaN where it is undefined."""
        return None if self.run.test is None else self.run.test["metrics"].get(metric)


def read_report_runs(places: Sequence[Path]) -> list[ReportRun]:
    """The runs in and below `places`. One whose config.json cannot be read is left out, with a warning.

    Raises:
        ConfigError: a place is not there, or neither is a run nor holds one.
        DataError: a file is damaged, or results belong to another checkpoint, dataset or test set.
    """
    if not places:
        raise ConfigError("runs: expected run folders, or folders with runs below them, found nothing")
    for place in places:
        runs, damaged = find_runs(place)
        if not runs and damaged:
            raise next(iter(damaged.values()))
        if not runs:
            found = "no run" if place.is_dir() else "a file" if place.exists() else "no such folder"
            raise ConfigError(f"runs={place}: expected a run folder or a folder with runs below it, found {found}")
    runs, damaged = find_runs(*places)
    for error in damaged.values():
        log.warning("left out of the report: %s", error)
    read = [_read(number, run) for number, run in enumerate(runs, start=1)]
    _check_same_test_sets(read)
    return read


def _read(number: int, run: Run) -> ReportRun:
    path, best, environment, backbone = run.folder / "environment.json", run.folder / "best.ckpt", None, None
    if path.is_file():
        environment = read_json(path)
        with as_written_by_run(path):
            words = environment["command"]
            if not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"command: expected words, found {quoted(words)}")
            versions_of(environment)
    run.curves, run.best_validation  # noqa: B018  # damage shows here
    if best.is_file() and (described := open_checkpoint(best).get(DESCRIPTION)):
        with as_written_by_run(best):
            published = described["architecture"].items() >= PUBLISHED_SIZES.items()
            backbone = PUBLISHED_BACKBONE if published else without_home(str(described["backbone"]["name"]))
    place = "/".join(Path(without_home(str(run.folder.resolve()))).parts[-2:])
    robustness, pattern = read_robustness(run), Pattern.of(run.spec, *run.pattern)
    return ReportRun(f"R{number}", place, run, pattern, robustness, environment, backbone)


def versions_of(environment: dict[str, Any]) -> dict[str, str]:
    """Packages, machine and commit."""
    machine, git = environment.get("machine") or {}, environment.get("git") or {}
    changed = len(git.get("changed") or [])
    return {
        "python": str(environment.get("python")),
        **{name: str(version) for name, version in environment["packages"].items()},
        "platform": str(machine.get("platform")),
        "cores": str(machine.get("cores")),
        "GPUs": ", ".join(map(str, machine.get("gpus") or [])) or "none",
        "commit": str(git.get("commit", "not known"))[:12]
        + (f" + {counted(changed, 'changed file')}" if changed else ""),
    }


def read_robustness(run: Run) -> Robustness | None:
    """Robustness results and stored logits of a run. Raises DataError where they are damaged, or of something else."""
    path, best = run.folder / "robustness" / "robustness.json", run.folder / "best.ckpt"
    if not path.is_file():
        return None
    raw, logits = read_json(path), path.with_name("logits.arrow")
    with as_written_by_run(path):
        for name, expected in {"format": FORMAT, "task": run.config["task"], "metric": run.spec.monitor}.items():
            if raw[name] != expected:
                raise ValueError(f"{name}: expected {expected}, found {quoted(raw[name])}")
        if best.is_file() and raw["checkpoint_sha256"] != file_sha256(best):  # a run may be kept without it
            raise ValueError("results of another checkpoint than best.ckpt; run `python run.py robustness` again")
        if len(raw["class_names"]) != run.spec.n_classes:
            raise ValueError(f"class_names: expected {run.spec.n_classes}, found {len(raw['class_names'])}")
        cells, by_type, intervals, confidence = [], [], {}, raw["confidence"]
        for cell in raw["cells"]:
            check_pattern(run.spec, *(cell[name] for name in PATTERN))
            pattern = Pattern.of(run.spec, *(cell[name] for name in PATTERN))
            if "interval" in cell:
                intervals[pattern] = _number(cell["interval"]["low"]), _number(cell["interval"]["high"])
            for metric in raw["metrics"]:
                if len(values := cell["metrics"][metric]["values"]) != len(raw["table_seeds"]):
                    raise ValueError(f"table_seeds: expected {len(raw['table_seeds'])} values per cell")
                cells += [(*pattern[:3], metric, value) for value in values]
        if not cells:
            raise ValueError("cells: expected at least one")
        for name in run.spec.type_names:
            for metric, value in raw["by_type"][name].items():
                by_type.append((name, metric, value, *(confidence[name].get(metric) or (None, None))))
        for name, curve in raw["roc"].items():
            raw["roc"][name] = _frame(curve, [], ["fpr", "tpr"]).to_dict("list")
        float(confidence["level"]), int(confidence["resamples"]), int(raw["samples"])
        for baseline in raw.setdefault("baselines", {}).values():  # results of older versions have none
            baseline["metrics"] = {name: _number(value) for name, value in baseline["metrics"].items()}
        return Robustness(
            raw,
            _frame(cells, [*PATTERN, "metric"], ["value"]),
            intervals,
            _frame(by_type, ["type", "metric"], ["value", "low", "high"]),
            _frame(raw["per_class"], ["type", "class"], ["precision", "recall", "f1", "support"]),
            _frame(raw["confusions"], ["type", "true", "predicted"], ["count", "share"]),
            _read_logits(logits, run, raw) if logits.is_file() else None,
        )


def _number(value: Any) -> float:
    """NaN where it is undefined."""
    return math.nan if value is None else float(value)


def _frame(records: Any, texts: list[str], numbers: list[str]) -> pd.DataFrame:
    """Raises ValueError or TypeError where a column of numbers holds something else."""
    frame = pd.DataFrame(records, columns=[*texts, *numbers]).astype(dict.fromkeys(numbers, float))
    if frame[[name for name in numbers if name in ("support", "count")]].isna().any(axis=None):  # never undefined
        raise ValueError(f"expected numbers in {', '.join(numbers)}")
    return frame


def _read_logits(path: Path, run: Run, raw: dict[str, Any]) -> pa.Table:
    """Stored logits. Raises DataError unless they are of the result `raw`."""
    table, described = read_logits(path, run.spec, logit_columns_of(run.spec))
    for what, ours, theirs in (
        ("dataset", run.config["task"], described.get("task")),
        ("checkpoint", raw["checkpoint_sha256"], described.get("checkpoint_sha256")),
        ("test set", f"{raw['samples']} samples", f"{table.num_rows} samples"),
    ):
        if ours != theirs:
            raise DataError(f"{path}: logits of another {what}: expected {ours}, found {quoted(theirs)}")
    return table


def _test_set(run: ReportRun) -> str | None:
    """Digest of ids and labels of the test samples."""
    if run.robustness is None or (table := run.robustness.logits) is None:
        return None
    digest = hashlib.sha256("\0".join(table["id"].to_pylist()).encode())
    digest.update(np.ascontiguousarray(labels_of(table, run.run.spec), dtype=np.int64).tobytes())
    return digest.hexdigest()


def _check_same_test_sets(runs: Sequence[ReportRun]) -> None:
    """Raises DataError where runs of one dataset were measured on different test sets: their numbers do not compare."""
    first: dict[tuple[str, str], tuple[Path, Any]] = {}
    for run in runs:
        for what, found in (
            ("classes, labels or metric", run.run.custom),
            ("test samples", run.robustness and run.robustness.samples),
            ("test samples", run.run.test and run.run.test.get("samples")),
            ("ids or labels of the test samples", _test_set(run)),
        ):
            if found:
                other, expected = first.setdefault((run.run.dataset, what), (run.run.folder, found))
                if found != expected:
                    values = f": expected {expected}, found {found}" if isinstance(found, int) else ""
                    said = f"results on another dataset than {other}, with other {what}{values}; make a report of each"
                    raise DataError(f"{run.run.folder}: {said}")
