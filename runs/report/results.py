"""Reads and checks the runs of a report before anything is drawn."""

import io
import logging
import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from common.errors import ConfigError, DataError
from common.messages import quoted
from common.strict_json import read_json
from common.text import estimate
from engine.exported import DESCRIPTION
from runs.comparable import checkpoint_label
from runs.compare import values_at
from runs.report.text import dataset_title, without_home
from runs.run_reader import Run, as_written_by_run, open_checkpoint, runs_of_each
from vilt.missing_tables import PUBLISHED

log = logging.getLogger("rep")
PUBLISHED_BACKBONE = "ViT-B/16"
PUBLISHED_SIZES = {"image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "text_layers": 12}
"""Sizes that identify its architecture."""


class ReportRun(Run):
    """A run in the report, where its short name is `tag`, such as R1."""

    def __init__(self, folder: Path, tag: str) -> None:
        super().__init__(folder)
        self.tag = tag

    @cached_property
    def place(self) -> str:
        """The folder as NAME/version_N."""
        return "/".join(Path(without_home(str(self.folder.resolve()))).parts[-2:])

    @property
    def title(self) -> str:
        """Title for headings."""
        kind, seed = "evaluation" if self.is_evaluation else "training", self.config["seed"]
        return f"{self.tag}: {self.place} ({dataset_title(self.dataset)}, {kind}, seed {seed})"

    @cached_property
    def test_set(self) -> tuple[str, int] | None:
        """Digest of the test set in the stored logits, and its number of rows; None without stored logits."""
        return None if (logits := self.logits) is None else (logits.test_set, logits.split.units)

    @property
    def test_rows(self) -> int | None:
        """Number of rows of the test split, if known; a film with several plots counts once."""
        return self.test_set[1] if self.test_set else None if self.test is None else self.test.get("rows")

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        """The content of environment.json without the host name, since reports are shared."""
        path = self.folder / "environment.json"
        if not path.is_file():
            return None
        environment = read_json(path)
        with as_written_by_run(path):
            words = environment["command"]
            if not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"command: expected words, found {quoted(words)}")
            environment.get("machine", {}).pop("host", None)
        return environment

    @property
    def versions(self) -> dict[str, Any] | None:
        """Versions, machine and commit; None if unknown."""
        if self.environment is None:
            return None
        return {name: self.environment.get(name) for name in ("python", "packages", "machine", "git")}

    @property
    def command(self) -> str:
        """The command that repeats the run; empty if unknown."""
        if self.environment is None:
            return ""
        program, *arguments = self.environment["command"]
        name = Path(program).name
        return shlex.join([*([] if name == "rep" else ["python"]), name, *arguments])

    @cached_property
    def backbone(self) -> str | None:
        """PUBLISHED_BACKBONE if the sizes match, else the name the user gave; None if best.ckpt does not record it."""
        best = self.folder / "best.ckpt"
        described = open_checkpoint(best).get(DESCRIPTION) if best.is_file() else None
        if not described:
            return None
        with as_written_by_run(best):
            published = described["architecture"].items() >= PUBLISHED_SIZES.items()
            named = str(described["backbone"]["name"])
            if published or named.endswith(".ckpt"):
                return PUBLISHED_BACKBONE if published else checkpoint_label(named)
            return Path(named).name if Path(named).is_absolute() else named

    @cached_property
    def own_values(self) -> dict[str, list[float]] | None:
        """Every metric at the training pattern with each missing table, from the robustness results or, if these lack
        the pattern, from the stored logits; None without either, or if tables were not drawn as in training."""
        found, published = self.robustness, self.config.get("missing_tables") == PUBLISHED
        if found is None or bool(found.rows_before) != published:
            return None
        if cell := found.at(self.pattern):
            return {metric: figures["values"] for metric, figures in cell["metrics"].items()}
        return values_at(self, self.pattern, tuple(found.raw["table_seeds"])) if self.has_logits else None

    def at_own_pattern(self, metric: str) -> float | None:
        """A metric at the training pattern: mean over missing tables or, if it was not measured, the test result."""
        if self.own_values is not None:
            over_tables = estimate(self.own_values.get(metric, []))
            return over_tables and over_tables.mean
        return self.tested(metric) if self.tested_at == self.pattern else None

    def tested(self, metric: str) -> float | None:
        """A test metric, at any test pattern; NaN if undefined."""
        return None if self.test is None else self.test["metrics"].get(metric)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """metrics.csv by optimiser step, including the runs that this one was resumed from; empty without the file."""
        curves = pd.DataFrame()
        for path in (part.folder / "metrics.csv" for part in self.parts):  # latest first
            content = path.read_text("utf-8", "replace") if path.is_file() else ""
            if content := content.rpartition("\n")[0]:  # drops a last line that was cut off
                with as_written_by_run(path):
                    found = pd.read_csv(io.StringIO(content)).astype(float).groupby("step").first()
                curves = curves.combine_first(found[found.index <= curves.index.min()]) if len(curves) else found
        return curves

    def curve(self, column: str) -> pd.Series:
        """A column of `curves`; empty if it does not exist."""
        return self.curves.get(column, pd.Series(dtype=float)).dropna()


def listed_runs(runs: Sequence[ReportRun]) -> str:
    """The tags of runs, with consecutive ones as a range: `R1, R3 to R5`."""
    ranges: list[list[int]] = []
    for number in sorted(int(run.tag[1:]) for run in runs):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"R{first} to R{more[-1]}" if more else f"R{first}" for first, *more in ranges)


def read_report_runs(places: Sequence[Path]) -> list[ReportRun]:
    """Reads the runs in and below `places`. Runs with an unreadable config.json are left out, with a warning.

    Raises:
        ConfigError: no place is given, or one does not exist, or neither is a run nor contains one.
        DataError: a file is damaged, or results belong to another checkpoint, dataset or test set.
    """
    if not places:
        raise ConfigError("runs: expected run folders, or folders with runs below them, found nothing")
    runs, damaged = runs_of_each(places)
    for error in damaged.values():
        log.warning("left out of the report: %s", error)
    read = [ReportRun(run.folder, f"R{number}") for number, run in enumerate(runs, start=1)]
    for run in read:  # report damaged files now, not after minutes of drawing
        _ = run.environment, run.backbone
    _check_same_test_sets(read)
    return read


def _check_same_test_sets(runs: Sequence[ReportRun]) -> None:
    """Raises DataError if runs of one dataset were evaluated on different test sets, and so cannot be compared."""
    first: dict[tuple[str, str], tuple[Path, Any]] = {}
    for run in runs:
        for what, found in (
            ("classes, labels or metric", run.custom),
            ("test samples", run.robustness and run.robustness.samples),
            ("test samples", run.test and run.test.get("samples")),
            ("test samples, by id, label and what they lack", run.test_set and run.test_set[0]),
        ):
            if found:
                other, expected = first.setdefault((run.dataset, what), (run.folder, found))
                if found != expected:
                    values = f": expected {expected}, found {found}" if isinstance(found, int) else ""
                    said = (
                        f"results on another dataset than in {other}, with other {what}{values}; make a report of each"
                    )
                    raise DataError(f"{run.folder}: {said}")
