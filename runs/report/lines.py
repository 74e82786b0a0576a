"""Which runs belong together: those that differ in their seed alone are one line, and give mean and deviation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from common.text import Estimate, estimate
from runs.report.results import Pattern, ReportRun, Robustness
from runs.report.text import METRIC_TITLES, without_home
from runs.run_reader import Run, differing_options
from vilt.datasets.specs import DATASETS, DatasetSpec

METHODS = ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")
"""The published ones, as the published table writes them."""
METHOD_TITLES = {
    **{method.lower(): method for method in METHODS},
    **{"map_input": "MAP", "map_attention": "MAP, attention level", "msp": "MSP", "none": "head alone"},
}
"""Titles of the option prompt_type."""
ABLATION = {
    (False, False): "baseline",
    (True, False): "baseline + FAR",
    (False, True): "baseline + FMB",
    (True, True): "REP",
}
"""Titles of REP without its parts, by the options far and fmb."""


@dataclass(frozen=True, eq=False)
class Line:
    """Runs of one method, configuration and training pattern, one per seed, lowest seed first."""

    variant: str
    """The method, with the options that set it apart from others of that method in the same report."""
    label: str
    """The variant, with the pattern where that differs within the dataset."""
    runs: tuple[ReportRun, ...]

    @property
    def method(self) -> str:
        """As the published table writes it, where it has it, else the option prompt_type."""
        return method_title(self.runs[0].run)

    @property
    def pattern(self) -> Pattern:
        """Of the training."""
        return self.runs[0].pattern

    @cached_property
    def results(self) -> list[tuple[ReportRun, Robustness]]:
        """The runs that have robustness results, with them."""
        return [(run, run.robustness) for run in self.runs if run.robustness is not None]

    @cached_property
    def _at(self) -> dict[tuple[Any, ...], Estimate | None]:
        """By metric and pattern: over train seeds and table seeds alike."""
        keys = ["metric", "missing_type", "ratio", "both_ratio"]
        cells = pd.concat([found.cells for _, found in self.results])
        return {key: estimate(values.tolist()) for key, values in cells.groupby(keys).value}

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns that robustness results give, by type and ratio."""
        spec = self.runs[0].run.spec
        found = {Pattern.of(spec, *key[1:]) for key in self._at} if self.results else set()
        return sorted(found, key=lambda p: (spec.missing_types.index(p.missing_type), p.both_ratio, p.ratio))

    def at(self, pattern: Pattern, metric: str) -> Estimate | None:
        """Mean and deviation at an evaluation pattern over all values, of train seeds and table seeds alike."""
        return self._at.get((metric, *pattern[:3])) if self.results else None

    def by_type(self, type_name: str, metric: str) -> Estimate | None:
        """Mean and deviation over train seeds where every sample has missing type `type_name`."""
        frames = [found.by_type for _, found in self.results]
        return estimate([float(f.value[(f.type == type_name) & (f.metric == metric)].iloc[0]) for f in frames])

    @cached_property
    def by_class(self) -> dict[str, dict[tuple[str, str], Estimate | None]]:
        """Class names, most frequent first, to score by (score, missing type); nothing without results by class."""
        if not self.results:
            return {}
        frame = pd.concat([found.per_class for _, found in self.results])
        frame = frame.sort_values("support", ascending=False, kind="stable")
        found: dict[str, dict[tuple[str, str], Estimate | None]] = {name: {} for name in frame["class"].unique()}
        for (name, type_name), rows in frame.groupby(["class", "type"]):
            for score in ("f1", "precision", "recall", "support"):
                found[name][score, type_name] = estimate(rows[score].tolist())
        return found

    def at_own_pattern(self) -> Estimate | None:
        """Mean and deviation over train seeds of the task's metric, at the pattern of the training."""
        scores = [run.score_at_own_pattern for run in self.runs]
        return estimate([score for score in scores if score is not None])


@dataclass(frozen=True, eq=False)
class Dataset:
    """The runs of one dataset."""

    key: str
    runs: tuple[ReportRun, ...]
    lines: tuple[Line, ...]
    repeats: tuple[ReportRun, ...]
    """Runs that do not count: a later or more complete one has the same configuration and seed."""

    @property
    def spec(self) -> DatasetSpec:
        """Row of the dataset."""
        return self.runs[0].run.spec

    @property
    def metric(self) -> str:
        """The metric of the task."""
        return self.runs[0].run.spec.monitor

    @property
    def metric_title(self) -> str:
        """As texts and figures name it."""
        return METRIC_TITLES[self.metric]

    @property
    def measured(self) -> tuple[Line, ...]:
        """The lines that have robustness results."""
        return tuple(line for line in self.lines if line.results)

    @property
    def results(self) -> list[tuple[Line, ReportRun, Robustness]]:
        """All robustness results."""
        return [(line, *result) for line in self.measured for result in line.results]


def by_dataset(runs: Sequence[ReportRun]) -> list[Dataset]:
    """One entry per dataset that occurs, in the order of DATASETS, then custom ones."""
    there = {run.run.dataset for run in runs}
    keys = [key for key in (*DATASETS, *sorted(there - set(DATASETS))) if key in there]
    return [_dataset(key, [run for run in runs if run.run.dataset == key]) for key in keys]


def _dataset(key: str, runs: list[ReportRun]) -> Dataset:
    groups: dict[tuple[str, Pattern], dict[int, list[ReportRun]]] = {}
    for run in runs:
        if not run.run.is_evaluation:
            by_seed = groups.setdefault((run.run.line_key, run.pattern), {})
            by_seed.setdefault(run.run.config["seed"], []).append(run)
    all_options = [next(iter(by_seed.values()))[0].run.line for by_seed in groups.values()]
    several_patterns = len({pattern for _, pattern in groups}) > 1
    lines, repeats = [], []
    for (_, pattern), by_seed in groups.items():
        kept = []
        for _, of_seed in sorted(by_seed.items()):
            *others, best = sorted(of_seed, key=lambda run: (run.robustness is not None, run.run.test is not None))
            kept.append(best)
            repeats += others
        variant = _variant_title(kept[0].run, all_options)
        label = f"{variant}, trained with {pattern}" if several_patterns else variant
        lines.append(Line(variant, label, tuple(kept)))
    return Dataset(key, tuple(runs), tuple(lines), tuple(repeats))


def method_title(run: Run) -> str:
    """The method as the published table writes it, else as the option does."""
    return METHOD_TITLES.get(run.config["prompt_type"], run.config["prompt_type"])


def _variant_title(run: Run, all_options: Sequence[dict[str, Any]]) -> str:
    title, differing = method_title(run), differing_options(all_options, run.line)
    if run.config["prompt_type"] == "rep":
        title = ABLATION[bool(run.config.get("far", True)), bool(run.config.get("fmb", True))]
        differing = [option for option in differing if not option.startswith(("far=", "fmb="))]
    return " ".join([title, *map(without_home, differing)])
