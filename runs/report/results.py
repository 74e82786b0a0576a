"""The runs of a report, read and checked; their robustness results as data frames."""

import hashlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from common.errors import ConfigError, DataError
from common.hashing import file_sha256
from common.messages import quoted
from common.strict_json import read_json
from common.text import estimate
from engine.exported import DESCRIPTION
from engine.robustness import FORMAT, PATTERN
from engine.stored_logits import labels_of, logit_columns_of, read_logits
from runs.pattern import Pattern
from runs.report.text import without_home
from runs.run_reader import Run, as_written_by_run, find_runs, open_checkpoint

log = logging.getLogger("rep")
PUBLISHED_BACKBONE = "ViT-B/16"
PUBLISHED_SIZES = {"image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "text_layers": 12}
"""Of its architecture."""


@dataclass(frozen=True, eq=False)
class Robustness:
    """What `robustness/robustness.json` of a run says. A value that is undefined is NaN."""

    raw: dict[str, Any]
    cells: dict[Pattern, dict[str, Any]]
    logits: pa.Table | None  # logits.arrow, None where it is not there

    @property
    def samples(self) -> int:
        """Of the test set; a film with several plots is several."""
        return int(self.raw["samples"])


@dataclass(frozen=True, eq=False)
class ReportRun:
    """A run of the report."""

    tag: str  # short name, used throughout the report
    place: str  # NAME/version_N, without the folders above
    run: Run
    robustness: Robustness | None
    environment: dict[str, Any] | None
    backbone: str | None
    """PUBLISHED_BACKBONE where it has its sizes, else what the user named; None where best.ckpt does not say it."""

    @property
    def pattern(self) -> Pattern:
        """Of the training."""
        return self.run.pattern

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
        cell = self.robustness.cells.get(self.pattern) if self.robustness is not None else None
        if cell is not None and metric in cell["metrics"]:
            found = estimate(cell["metrics"][metric]["values"])
            return found and found.mean
        return self.tested(metric) if self.run.tested_at == self.pattern else None

    @cached_property
    def curves(self) -> pd.DataFrame:
        """metrics.csv by optimiser step, that of the runs that this one was resumed from too; empty without one."""
        curves = pd.DataFrame()
        for path in (part.folder / "metrics.csv" for part in self.run.parts):  # the last one first
            content = path.read_text("utf-8", "replace") if path.is_file() else ""
            if content := content.rpartition("\n")[0]:  # not a line that was cut off
                with as_written_by_run(path):
                    found = pd.read_csv(io.StringIO(content)).astype(float).groupby("step").first()
                curves = pd.concat([found[found.index < curves.index.min()] if len(curves) else found, curves])
        return curves

    def curve(self, column: str) -> pd.Series:
        """One of them; empty where there is none."""
        return self.curves.get(column, pd.Series(dtype=float)).dropna()

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
            environment.get("machine", {}).pop("host", None)  # a report is passed on
    if best.is_file() and (described := open_checkpoint(best).get(DESCRIPTION)):
        with as_written_by_run(best):
            published = described["architecture"].items() >= PUBLISHED_SIZES.items()
            backbone = PUBLISHED_BACKBONE if published else without_home(str(described["backbone"]["name"]))
    place = "/".join(Path(without_home(str(run.folder.resolve()))).parts[-2:])
    return ReportRun(f"R{number}", place, run, read_robustness(run), environment, backbone)


def read_robustness(run: Run) -> Robustness | None:
    """Robustness results and stored logits of a run. Raises DataError where they are damaged, or of something else."""
    path, best = run.folder / "robustness" / "robustness.json", run.folder / "best.ckpt"
    if not path.is_file():
        return None
    raw, logits = _undefined_as_nan(read_json(path)), path.with_name("logits.arrow")
    with as_written_by_run(path):
        for name, expected in {"format": FORMAT, "task": run.config["task"], "metric": run.spec.monitor}.items():
            if raw[name] != expected:
                raise ValueError(f"{name}: expected {expected}, found {quoted(raw[name])}")
        if best.is_file() and raw["checkpoint_sha256"] != file_sha256(best):  # a run may be kept without it
            raise ValueError("results of another checkpoint than best.ckpt; run `python run.py robustness` again")
        if len(raw["class_names"]) != run.spec.n_classes:
            raise ValueError(f"class_names: expected {run.spec.n_classes}, found {len(raw['class_names'])}")
        raw.setdefault("baselines", {})  # results of older versions have none
        cells = {Pattern.of(run.spec, *(cell[name] for name in PATTERN)): cell for cell in raw["cells"]}
        return Robustness(raw, cells, _read_logits(logits, run, raw) if logits.is_file() else None)


def _undefined_as_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _undefined_as_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_undefined_as_nan(each) for each in value]
    return math.nan if value is None else value


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
