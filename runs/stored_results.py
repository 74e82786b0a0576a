"""Reads the results that `run.py robustness` stored in a run folder, for the report and comparisons."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import DataError
from common.hashing import file_sha256
from common.messages import quoted
from common.strict_json import read_json
from engine.robustness import FORMAT, PATTERN
from engine.stored_logits import SplitLogits, read_split
from runs.pattern import Pattern
from runs.run_reader import Run, as_written_by_run
from vilt.datasets.specs import DatasetSpec


@dataclass(frozen=True, eq=False)
class Robustness:
    """The content of a run's robustness.json. Undefined values are NaN."""

    raw: dict[str, Any]
    cells: dict[Pattern, dict[str, Any]]
    offset: float | None  # chosen in the run's validation, see `engine/decision.py`

    @classmethod
    def of(cls, content: dict[str, Any], spec: DatasetSpec) -> "Robustness":
        """The results in the content of a robustness.json."""
        raw = {"baselines": {}, **_undefined_as_nan(content)}  # results of older versions have no baselines
        return cls(raw, cells_by_pattern(spec, raw["cells"]), content.get("offset"))

    def at(self, pattern: Pattern) -> dict[str, Any] | None:
        """The results at a pattern, if any; at ratio 0, all missing types are the same."""
        complete = (cell for found, cell in self.cells.items() if found.ratio == pattern.ratio == 0)
        return self.cells.get(pattern) or next(complete, None)

    @property
    def rows_before(self) -> tuple[int, ...]:
        """Rows of the splits drawn before the test split, if missing tables are drawn as published; else empty."""
        return tuple(self.raw.get("rows_before", ()))

    @property
    def samples(self) -> int:
        """Number of test samples; a film with several plots counts as several."""
        return int(self.raw["samples"])


class StoredLogits(NamedTuple):
    """A run's logits for its test samples."""

    split: SplitLogits
    names: tuple[str, ...]  # sample names

    @property
    def test_set(self) -> str:
        """Digest of the samples, their labels and their naturally missing modalities."""
        natural = np.broadcast_to(self.split.natural, self.split.table_rows).astype(np.int8)
        arrays = (each.tobytes() for each in (self.split.row_of_sample_N, self.split.labels.numpy(), natural))
        return hashlib.sha256(b"\0".join(["\0".join(self.names).encode(), *arrays])).hexdigest()


def logits_path(run: Run) -> Path:
    """Path of a run's stored logits."""
    return run.folder / "robustness" / "logits.arrow"


def read_robustness(run: Run) -> Robustness | None:
    """Reads a run's robustness results; None if there are none. Raises DataError if they do not belong to the run."""
    path, best = run.folder / "robustness" / "robustness.json", run.folder / "best.ckpt"
    if not path.is_file():
        return None
    written = read_json(path)
    with as_written_by_run(path):
        for name, expected in {"format": FORMAT, "task": run.config["task"], "metric": run.spec.monitor}.items():
            if written[name] != expected:
                raise ValueError(f"{name}: expected {expected}, found {quoted(written[name])}")
        if best.is_file() and written["checkpoint_sha256"] != file_sha256(best):  # best.ckpt may have been deleted
            raise ValueError("results of another checkpoint than best.ckpt; run `python run.py robustness` again")
        if len(written["class_names"]) != run.spec.n_classes:
            raise ValueError(f"class_names: expected {run.spec.n_classes}, found {len(written['class_names'])}")
        offset = written.get("offset")
        if not (offset is None or (type(offset) is float and math.isfinite(offset))):
            raise ValueError(f"offset: expected a number, found {quoted(offset)}")
        rows = written.get("rows_before", [])
        if not isinstance(rows, list) or len(rows) not in (0, 2) or any(type(n) is not int or n < 1 for n in rows):
            raise ValueError(f"rows_before: expected an empty list or two numbers of rows, found {quoted(rows)}")
        return Robustness.of(written, run.spec)


def _undefined_as_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _undefined_as_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_undefined_as_nan(each) for each in value]
    return math.nan if value is None else value


def read_logits(run: Run) -> StoredLogits | None:
    """Reads a run's stored logits; None if there are none. Raises DataError unless they belong to its results."""
    path, results = logits_path(run), run.robustness
    if results is None or not path.is_file():
        return None
    split, names, described = read_split(path, run.spec)
    for what, ours, theirs in (
        ("dataset", run.config["task"], described.get("task")),
        ("checkpoint", results.raw["checkpoint_sha256"], described.get("checkpoint_sha256")),
        ("test set", f"{results.samples} samples", f"{len(names)} samples"),
    ):
        if ours != theirs:
            raise DataError(f"{path}: logits of another {what}: expected {ours}, found {quoted(theirs)}")
    return StoredLogits(split, names)


def cells_by_pattern(spec: DatasetSpec, cells: Iterable[dict[str, Any]]) -> dict[Pattern, dict[str, Any]]:
    """The cells of robustness.json, keyed by their pattern."""
    return {Pattern.of(spec, *(cell[name] for name in PATTERN)): cell for cell in cells}
