"""Which runs belong together: those that differ in their seed alone are one line, and give mean and deviation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from common.text import Estimate, estimate
from runs.lines import RunLine, lines_of
from runs.report.results import Pattern, ReportRun, Robustness
from runs.report.text import CAPTIONS, METRIC_TITLES, capital, conditions, dataset_title, without_home
from runs.run_reader import Run
from vilt.datasets.specs import DATASETS, DatasetSpec

METHODS = ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")
"""The published ones, as the published table writes them."""
METHOD_TITLES = {
    **{method.lower(): method for method in METHODS},
    **{"map_input": "MAP", "map_attention": "MAP, attention level", "msp": "MSP", "none": "head alone"},
}
"""Titles of the option prompt_type."""
ABLATION = {(0, 0): "baseline", (1, 0): "baseline + FAR", (0, 1): "baseline + FMB", (1, 1): "REP"}
"""Titles of REP without its parts, by the options far and fmb."""


@dataclass(frozen=True, eq=False)
class Line:
    """Runs of one method, configuration and training pattern, one per seed, lowest seed first."""

    variant: str
    """The method, with the options that set it apart from others of that method in the same report."""
    label: str
    """The variant, with the pattern where that differs within the dataset."""
    pattern: Pattern
    """Of the training."""
    runs: list[ReportRun]

    @cached_property
    def results(self) -> list[tuple[ReportRun, Robustness]]:
        """The runs that have robustness results, with them."""
        return [(run, run.robustness) for run in self.runs if run.robustness is not None]

    @cached_property
    def matrix(self) -> dict[Pattern, Estimate]:
        """The task's metric by evaluation pattern, over train seeds and table seeds alike, by type and ratio."""
        cells = pd.concat([found.cells for _, found in self.results])
        found = _estimates(cells[cells.metric == self.runs[0].metric], Pattern._fields[:3])
        spec = self.runs[0].run.spec
        patterns = [Pattern.of(spec, *key) for key in found]
        order = sorted(patterns, key=lambda p: (spec.missing_types.index(p.missing_type), p.both_ratio, p.ratio))
        return {pattern: found[pattern[:3]] for pattern in order}

    @cached_property
    def by_type(self) -> dict[str, Estimate]:
        """The task's metric over train seeds where every sample has one missing type."""
        return _estimates(pd.concat([found.scores(run.metric) for run, found in self.results]), ["type"])

    @cached_property
    def by_class(self) -> dict[tuple[str, str, str], Estimate]:
        """Over train seeds, by class, score and missing type, the most frequent class first."""
        frame = pd.concat([found.per_class for _, found in self.results])
        frame = frame.sort_values("support", ascending=False, kind="stable")
        return _estimates(frame.melt(["class", "type"], var_name="score"), ["class", "score", "type"])

    @cached_property
    def support(self) -> dict[str, int]:
        """Test samples of each class, the most frequent first."""
        complete = {name: self.by_class.get((name, "support", "complete")) for name, _, _ in self.by_class}
        return {name: int(found.mean) if found else 0 for name, found in complete.items()}

    @cached_property
    def at_own_pattern(self) -> Estimate | None:
        """Mean and deviation over train seeds of the task's metric, at the pattern of the training."""
        scores = [run.score_at_own_pattern for run in self.runs]
        return estimate([score for score in scores if score is not None])


def _estimates(frame: pd.DataFrame, by: Sequence[str]) -> dict[Any, Estimate]:
    """Mean and deviation of `value` for each group, by its key: that of one column, or a tuple."""
    groups = frame.groupby(list(by) if len(by) > 1 else by[0], sort=False).value
    return {key: found for key, values in groups if (found := estimate(values.tolist()))}


@dataclass(frozen=True, eq=False)
class Dataset:
    """The runs of one dataset. Those in `repeats` do not count: a later or more complete one is of the same seed."""

    key: str
    title: str
    spec: DatasetSpec
    runs: list[ReportRun]
    lines: list[Line]
    repeats: list[ReportRun]

    @property
    def metric_title(self) -> str:
        """As texts and figures name it."""
        return METRIC_TITLES[self.spec.monitor]

    def caption(self, name: str, **facts: object) -> str:
        """Of a figure or table."""
        facts |= {"metric": self.metric_title, "Metric": capital(self.metric_title), "dataset": self.title}
        return CAPTIONS[name].format(conditions=conditions(self.spec.type_names), **facts)

    @property
    def measured(self) -> list[Line]:
        """The lines that have robustness results."""
        return [line for line in self.lines if line.results]

    @property
    def results(self) -> list[tuple[Line, ReportRun, Robustness]]:
        """All robustness results."""
        return [(line, *result) for line in self.measured for result in line.results]

    @property
    def compared(self) -> dict[str, list[Line]]:
        """By variant, the lines with results at their training pattern; empty unless there are two to compare."""
        variants = by_variant([line for line in self.lines if line.at_own_pattern])
        return variants if len(variants) > 1 else {}


def by_variant(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each variant."""
    return {line.variant: [other for other in lines if other.variant == line.variant] for line in lines}


def by_dataset(runs: Sequence[ReportRun]) -> list[Dataset]:
    """One entry per dataset that occurs, in the order of DATASETS, then custom ones."""
    there = {run.run.dataset for run in runs}
    keys = [key for key in (*DATASETS, *sorted(there - set(DATASETS))) if key in there]
    return [_dataset(key, [run for run in runs if run.run.dataset == key]) for key in keys]


def _dataset(key: str, runs: list[ReportRun]) -> Dataset:
    groups = lines_of([run for run in runs if not run.run.is_evaluation], lambda run: run.run)
    several_patterns = len({line.items[0].pattern for line in groups}) > 1
    lines = []
    for line in groups:
        pattern, variant = line.items[0].pattern, _variant_title(line, groups)
        label = f"{variant}, trained with {pattern}" if several_patterns else variant
        lines.append(Line(variant, label, pattern, line.items))
    repeats = [run for line in groups for run in line.repeats]
    return Dataset(key, dataset_title(key), runs[0].run.spec, runs, lines, repeats)


def method_title(run: Run) -> str:
    """The method as the published table writes it, else as the option does."""
    return METHOD_TITLES.get(run.config["prompt_type"], run.config["prompt_type"])


def _variant_title(line: RunLine[ReportRun], lines: Sequence[RunLine[ReportRun]]) -> str:
    run = line.items[0].run
    title, differing = method_title(run), line.differing(lines)
    if run.config["prompt_type"] == "rep":
        title = ABLATION[bool(run.config.get("far", True)), bool(run.config.get("fmb", True))]
        differing = [option for option in differing if not option.startswith(("far=", "fmb="))]
    return " ".join([title, *map(without_home, differing)])
