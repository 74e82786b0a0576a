"""The runs of a dataset grouped into lines, with mean and deviation by pattern, missing type and class."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.text import AT_OFFSET, LOWER_IS_BETTER, Estimate, estimate, order_of
from engine.sample_statistics import LEVEL
from engine.significance import Difference, holm
from runs.compare import Settings, compare_runs
from runs.lines import RunLine, Spread, lines_of, spreads_of
from runs.pattern import Pattern
from runs.report.results import PUBLISHED_BACKBONE, ReportRun
from runs.report.text import CAPTIONS, Unit, capital, dataset_title, excerpt, listed, metric_title, without
from runs.run_reader import Run
from runs.stored_results import Robustness
from vilt.datasets.specs import DATASETS, DatasetSpec

RESAMPLES, PERMUTATIONS = 1000, 2000
"""Numbers of resamples and permutations for the intervals and p values of differences."""
METHODS = ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")
"""The published methods, spelled as in the published table."""
METHOD_TITLES = {
    **{method.lower(): method for method in METHODS},
    **{"map_input": "MAP", "map_attention": "MAP, attention level", "msp": "MSP", "none": "head alone"},
    **{"mora": "MoRA", "lora": "LoRA", "aoept": "AOEPT", "syp": "SyP"},
}
"""Titles of the values of `prompt_type`."""
ABLATION = {(0, 0): "baseline", (1, 0): "baseline + FAR", (0, 1): "baseline + FMB", (1, 1): "REP"}
"""Titles of REP with or without its parts, keyed by the options `far` and `fmb`."""


@dataclass(frozen=True, eq=False)
class Line:
    """Runs of one method, configuration and training pattern, one per seed in ascending order."""

    variant: str  # the method, with the options that set it apart from others of that method in the same report
    label: str  # the variant, with the pattern if the dataset's lines differ in it
    runs: list[ReportRun]

    @property
    def pattern(self) -> Pattern:
        """The missing pattern of the training."""
        return self.runs[0].pattern

    @property
    def spec(self) -> DatasetSpec:
        """The row of the dataset."""
        return self.runs[0].spec

    @cached_property
    def results(self) -> list[tuple[ReportRun, Robustness]]:
        """The runs that have robustness results, and those results."""
        return [(run, run.robustness) for run in self.runs if run.robustness is not None]

    def spreads_of(self, metric: str) -> dict[Pattern, Spread]:
        """A metric by evaluation pattern, see `runs/lines.py`."""
        return spreads_of(metric, [results for _, results in self.results], self.spec)

    @cached_property
    def matrix(self) -> dict[Pattern, Estimate]:
        """The task's metric by pattern: mean, and deviation over training seeds or, for one run, over its tables."""
        return {pattern: spread.estimate for pattern, spread in self.spreads_of(self.spec.monitor).items()}

    def mean_over_modes(self, metric: str) -> Estimate | None:
        """A metric averaged over all missing types except `complete`, over training seeds; None without results."""
        runs = [results.raw["by_type"] for _, results in self.results if metric in results.raw["metrics"]]
        return estimate([statistics.mean(run[name][metric] for name in self.spec.type_names[1:]) for run in runs])

    @cached_property
    def by_type(self) -> dict[str, Estimate]:
        """The task's metric over training seeds, with all samples of the same missing type, keyed by that type."""
        values = {
            name: [results.raw["by_type"][name][self.spec.monitor] for _, results in self.results]
            for name in self.spec.type_names
        }
        return {name: found for name, run_values in values.items() if (found := estimate(run_values))}

    @cached_property
    def support(self) -> dict[str, int]:
        """Number of test samples of each class, the most frequent first."""
        entries = sorted(self.results[0][1].raw["per_class"], key=lambda entry: -entry["support"])
        return {entry["class"]: entry["support"] for entry in entries}

    def f1_of(self, class_name: str, type_name: str) -> Estimate | None:
        """F1 of a class over training seeds, with all samples of the same missing type."""
        entries = [entry for _, results in self.results for entry in results.raw["per_class"]]
        return estimate([each["f1"] for each in entries if (each["class"], each["type"]) == (class_name, type_name)])

    @cached_property
    def at_own_pattern(self) -> Estimate | None:
        """The task's metric at the training pattern: mean and deviation over training seeds."""
        return self.estimate_of(self.spec.monitor)

    @cached_property
    def measured(self) -> list[ReportRun]:
        """The runs with results at the training pattern over several missing tables. If there are any, the line's
        result is theirs; else, it is that of the runs' own tests."""
        return [run for run in self.runs if run.measured is not None]

    @property
    def n_at_own_pattern(self) -> int:
        """Number of training seeds with a result at the training pattern, including undefined results."""
        return sum(run.at_own_pattern(self.spec.monitor) is not None for run in self.measured or self.runs)

    def estimate_of(self, metric: str) -> Estimate | None:
        """Any metric at the training pattern: mean and deviation over training seeds."""
        scores = [run.at_own_pattern(metric) for run in self.measured or self.runs]
        return estimate([score for score in scores if score is not None])

    def interval_at(self, pattern: Pattern) -> tuple[float, float] | None:
        """Confidence interval over test samples; with several training seeds, the mean of their intervals."""
        cells = [cell for _, results in self.results if (cell := results.at(pattern))]
        found = [cell["interval"] for cell in cells if "interval" in cell]
        if not found:
            return None
        return statistics.fmean(each["low"] for each in found), statistics.fmean(each["high"] for each in found)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The runs of one dataset. Those in `repeats` do not count: a later or more complete run has the same seed."""

    key: str
    spec: DatasetSpec
    runs: list[ReportRun]
    lines: list[Line]
    repeats: list[ReportRun]

    @property
    def name(self) -> str:
        """Name of the dataset, which says so if the data is not the published one."""
        is_other = self.spec.published_rows and self.test_rows and not self.is_published
        return f"{dataset_title(self.key)} format, other data" if is_other else dataset_title(self.key)

    @property
    def title(self) -> str:
        """Name of the dataset, and of any backbones other than the published one."""
        others = {run.backbone for run in self.runs if run.backbone not in (None, PUBLISHED_BACKBONE)}
        return (
            f"{self.name} ({' and '.join(sorted(map(str, others)))})"
            if others and self.spec.published_rows
            else self.name
        )

    @property
    def test_rows(self) -> int | None:
        """Number of rows of the test split, if any run records it."""
        return next((run.test_rows for run in self.runs if run.test_rows), None)

    @property
    def is_published(self) -> bool:
        """Whether the test split has the size of the published one."""
        return self.test_rows in self.spec.published_rows.get("test", ())

    def unit(self, metric: str = "") -> Unit:
        """How to write a metric (by default the task's)."""
        samples = [run.robustness.samples for run in self.runs if run.robustness]
        samples += [run.test.get("samples", 0) for run in self.runs if run.test]
        return Unit.of(metric or self.spec.monitor, samples[0] if samples else 0)

    @property
    def metric_title(self) -> str:
        """Name of the metric for text and figures."""
        return metric_title(self.spec.monitor)

    @property
    def decides_elsewhere(self) -> bool:
        """Whether any run also has macro F1 at an offset chosen in its validation (`engine/decision.py`)."""
        return any(line.estimate_of(AT_OFFSET) or line.spreads_of(AT_OFFSET) for line in self.lines)

    @property
    def axis_title(self) -> str:
        """The metric with its unit."""
        return f"{capital(self.metric_title)}{self.unit().sign and ', %'}"

    def caption(self, name: str, **facts: object) -> str:
        """Caption of a figure or table."""
        *first, last = map(without, self.spec.type_names)
        in_per_cent = bool(self.unit().sign)
        at_offset = " F1-macro at offset: with the threshold chosen in the run's validation instead of 1/2."
        of_dataset = {
            "dataset": self.name,
            "metric": self.metric_title,
            "Metric": capital(self.metric_title),
            "better": "lower" if self.spec.monitor in LOWER_IS_BETTER else "higher",
            "unit": " in per cent" * in_per_cent,
            "points": " in percentage points" * in_per_cent,
            "baselines": self.baseline_text,
            "conditions": f"{', '.join(first)}, or {last}",
            "at_offset": at_offset if self.decides_elsewhere else "",
            "tables": self.tables_text,
        }
        return CAPTIONS[name].format(**of_dataset, **facts)  # a name in both is an error

    @cached_property
    def tables_text(self) -> str:
        """The missing tables of the results at training patterns, as a sentence."""
        lines = [line for line in self.lines if line.at_own_pattern]
        seeds = [run.robustness.raw["table_seeds"] for line in lines for run in line.measured if run.robustness]
        known = " or ".join(dict.fromkeys(listed([str(seed) for seed in each]) for each in seeds))
        measured = f" A run's value is its mean over the missing tables of seeds {known}."
        if all(line.measured for line in lines):
            return measured if lines else ""
        test = "its own test's, at the one missing table drawn with its training seed"
        return f"{measured} For lines marked as own test, it is {test}." if seeds else f" A run's value is {test}."

    def marked(self, line: Line) -> str:
        """` (own test)` for a line whose value is that of its runs' own tests if others' values are not."""
        return " (own test)" if not line.measured and any(other.measured for other in self.lines) else ""

    def order(self, found: Estimate | None) -> float:
        """Sort key for values of the metric: the higher the better."""
        return order_of(found.mean, self.spec.monitor) if found else -float("inf")

    @cached_property
    def measured(self) -> list[Line]:
        """The lines that have robustness results."""
        return [line for line in self.lines if line.results]

    @cached_property
    def contenders(self) -> list[Line]:
        """The measured lines of the training pattern that most of them share, best first.

        Training with nothing missing, which has another aim, counts only if there is no other.
        """
        groups = [[line for line in lines if line in self.measured] for lines in self.by_pattern.values()]
        groups = [lines for lines in groups if lines] or [self.measured]
        return max(groups, key=lambda lines: (lines[0].pattern.ratio > 0, len(lines)))

    @property
    def headline(self) -> Line:
        """The line whose results are shown in detail: the best of the contenders."""
        return self.contenders[0]

    @property
    def results(self) -> list[tuple[Line, ReportRun, Robustness]]:
        """All robustness results."""
        return [(line, *result) for line in self.measured for result in line.results]

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of the baselines that ignore the sample, keyed by their answer, the constant one first."""
        found: dict[str, Any] = next((r.raw["baselines"] for _, _, r in self.results if r.raw["baselines"]), {})
        return {str(baseline["answer"]): baseline["metrics"] for baseline in found.values()}

    @property
    def baseline_text(self) -> str:
        """The baselines' values of the task's metric, as a sentence."""
        metric, unit = self.spec.monitor, self.unit()
        figures = [f"{unit.full(metrics[metric])} ({answer})" for answer, metrics in self.baselines.items()]
        return f" Baselines that ignore the sample: {listed(figures)}." if figures else ""

    @cached_property
    def by_pattern(self) -> dict[Pattern, list[Line]]:
        """Lines with results at their training pattern, keyed by it, best first.

        Lines that only have their runs' own tests, at other missing tables, come last.
        """
        found = sorted(
            (line for line in self.lines if line.at_own_pattern),
            key=lambda x: (not x.measured, -self.order(x.at_own_pattern)),
        )
        patterns = dict.fromkeys(line.pattern for line in self.lines if line in found)
        return {p: [line for line in found if line.pattern == p] for p in patterns}

    @property
    def compared(self) -> dict[Pattern, list[Line]]:
        """`by_pattern`, but empty for fewer than two variants."""
        several = len({line.variant for lines in self.by_pattern.values() for line in lines}) > 1
        return self.by_pattern if several else {}

    @cached_property
    def against_best(self) -> dict[Line, Difference]:
        """Difference between a line and the best line of its training pattern, if both have stored logits and the same
        missing tables.

        p is corrected for the number of lines. Comparing every pair of a large report would take too long.
        """
        found: dict[Line, Difference] = {}
        for pattern, (best, *others) in self.by_pattern.items():
            at, differences = ((pattern.missing_type,), (pattern.ratio,), pattern.both_ratio), {}
            for line in others:
                runs = [run for each in (best, line) for run in each.measured if run.test_set]
                seeds = {tuple(run.robustness.raw["table_seeds"]) for run in runs if run.robustness}
                settings = Settings(next(iter(seeds), ()), RESAMPLES, PERMUTATIONS, *at)
                for group in compare_runs(runs, settings) if len(seeds) == 1 else ():
                    value, low, high, p = group.comparisons[0].difference  # best minus other, since its runs come first
                    differences[line] = Difference(-value, -high, -low, p)
            corrected = holm([each.p for each in differences.values()])
            found |= {line: each._replace(p=p) for (line, each), p in zip(differences.items(), corrected, strict=True)}
        return found

    def is_behind(self, line: Line) -> bool:
        """Whether this line differs significantly from the best of its training pattern."""
        found = self.against_best.get(line)
        return found is not None and found.p <= 1 - LEVEL and not found.low <= 0 <= found.high

    def is_significantly_best(self, line: Line) -> bool:
        """Whether this line is the best of its training pattern and all others differ significantly from it."""
        first, *others = self.by_pattern[line.pattern]
        return line is first and bool(others) and all(map(self.is_behind, others))


def by_dataset(runs: Sequence[ReportRun]) -> list[Dataset]:
    """Groups runs by dataset, in the order of DATASETS, then others."""
    present = {run.dataset for run in runs}
    keys = [key for key in (*DATASETS, *sorted(present - set(DATASETS))) if key in present]
    return [_dataset(key, [run for run in runs if run.dataset == key]) for key in keys]


def _dataset(key: str, runs: list[ReportRun]) -> Dataset:
    groups = lines_of([run for run in runs if not run.is_evaluation], lambda run: run)
    several_patterns = len({group.items[0].pattern for group in groups if not group.items[0].pretrains}) > 1
    titles = [(_variant_title(group, groups), group.items[0].pattern) for group in groups]
    lines = []
    for group, (title, at) in zip(groups, titles, strict=True):
        variant = title if titles.count((title, at)) == 1 else f"{title} ({group.items[0].tag})"
        pattern = f", trained at {at.title}" if several_patterns else ""
        lines.append(Line(variant, variant + pattern, group.items))
    return Dataset(key, runs[0].spec, runs, lines, [run for group in groups for run in group.repeats])


def method_title(run: Run) -> str:
    """Title of the method as in the published table, if it is there; else the value of `prompt_type`."""
    return METHOD_TITLES.get(run.config["prompt_type"], run.config["prompt_type"])


def _variant_title(line: RunLine[ReportRun], lines: Sequence[RunLine[ReportRun]]) -> str:
    """The method and, in short, the options that set it apart; paths are cut to their last part."""
    run, words = line.items[0], line.differing(lines)
    title = method_title(run)
    if run.config["prompt_type"] == "rep":
        title = ABLATION[bool(run.config.get("far", True)), bool(run.config.get("fmb", True))]
        words = [word for word in words if not word.startswith(("far=", "fmb="))]
    options = [word.split("=", 1) for word in words]
    return ", ".join([title, *(f"{name} {excerpt(value.rstrip('/').rsplit('/')[-1], 40)}" for name, value in options)])
