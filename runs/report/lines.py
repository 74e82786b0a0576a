"""The runs of a dataset grouped into lines, with mean and deviation by pattern, missing type and class."""

import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from common.text import AT_OFFSET, LOWER_IS_BETTER, Estimate, estimate, order_of
from engine.sample_statistics import LEVEL
from engine.significance import Difference, holm
from runs.compare import Settings, compare_runs
from runs.lines import RunLine, Spread, lines_of, spreads_of
from runs.pattern import Pattern
from runs.report.results import PUBLISHED_BACKBONE, ReportRun
from runs.report.text import CAPTIONS, Unit, capital, dataset_title, excerpt, in_words, metric_title, without
from runs.run_reader import Run
from vilt.datasets.specs import DATASETS

RESAMPLES, PERMUTATIONS = 1000, 2000
"""Numbers of resamples and permutations for the intervals and p values of differences."""
METHOD_TITLES = {
    **{method.lower(): method for method in ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")},  # as published
    **{"map_input": "MAP", "map_attention": "MAP, attention level", "msp": "MSP", "none": "head alone"},
    **{"mora": "MoRA", "lora": "LoRA", "aoept": "AOEPT", "syp": "SyP"},
}
"""Titles of the values of `prompt_type`."""
ABLATION = {(0, 0): "baseline", (1, 0): "baseline + FAR", (0, 1): "baseline + FMB", (1, 1): "REP"}
"""Titles of REP with or without its parts, keyed by the options `far` and `fmb`."""


class Line:
    """Runs of one method, configuration and training pattern, one per seed in ascending order.

    Deviations are over training seeds; in `matrix` and `spreads_of`, those of a single run are over its missing tables.
    """

    def __init__(self, variant: str, label: str, runs: list[ReportRun]) -> None:
        self.variant = variant  # the method, with the options that set it apart from others of that method
        self.label = label  # the variant, with the training pattern if the dataset's lines differ in it
        self.runs, self.pattern, self.spec = runs, runs[0].pattern, runs[0].spec
        self.results = [(run, run.robustness) for run in runs if run.robustness is not None]
        self.matrix = {pattern: spread.estimate for pattern, spread in self.spreads_of(self.spec.monitor).items()}
        by_type = {
            name: estimate([results.raw["by_type"][name][self.spec.monitor] for _, results in self.results])
            for name in self.spec.type_names
        }
        self.by_type = {name: found for name, found in by_type.items() if found}
        """The task's metric with all samples of the same missing type."""
        self.over_tables = [run for run in runs if run.own_values is not None]
        """The runs with results at the training pattern over several missing tables. If there are any, the line's
        result there is theirs; else, it is that of the runs' own tests."""
        self.at_own_pattern = self.estimate_of(self.spec.monitor)

    def spreads_of(self, metric: str) -> dict[Pattern, Spread]:
        """A metric by evaluation pattern, see `runs/lines.py`."""
        return spreads_of(metric, [results for _, results in self.results], self.spec)

    def scores_of(self, metric: str) -> list[float]:
        """A metric at the training pattern, for each training seed that has it, undefined ones included."""
        scores = [run.at_own_pattern(metric) for run in self.over_tables or self.runs]
        return [score for score in scores if score is not None]

    def estimate_of(self, metric: str) -> Estimate | None:
        """A metric at the training pattern."""
        return estimate(self.scores_of(metric))

    def mean_over_modes(self, metric: str) -> Estimate | None:
        """A metric averaged over all missing types except `complete`; None without results."""
        runs = [results.raw["by_type"] for _, results in self.results if metric in results.raw["metrics"]]
        return estimate([statistics.mean(run[name][metric] for name in self.spec.type_names[1:]) for run in runs])

    @property
    def support(self) -> dict[str, int]:
        """Number of test samples of each class, the most frequent first."""
        entries = sorted(self.results[0][1].raw["per_class"], key=lambda entry: -entry["support"])
        return {entry["class"]: entry["support"] for entry in entries}

    def f1_of(self, class_name: str, type_name: str) -> Estimate | None:
        """F1 of a class, with all samples of the same missing type."""
        entries = [entry for _, results in self.results for entry in results.raw["per_class"]]
        return estimate([each["f1"] for each in entries if (each["class"], each["type"]) == (class_name, type_name)])

    def interval_at(self, pattern: Pattern) -> tuple[float, float] | None:
        """Confidence interval over test samples; with several training seeds, the mean of their intervals."""
        cells = [cell for _, results in self.results if (cell := results.at(pattern))]
        found = [cell["interval"] for cell in cells if "interval" in cell]
        if not found:
            return None
        return statistics.fmean(each["low"] for each in found), statistics.fmean(each["high"] for each in found)


class Dataset:
    """The runs of one dataset."""

    def __init__(self, key: str, runs: list[ReportRun]) -> None:
        self.key, self.runs, self.spec = key, runs, runs[0].spec
        self.metric_title = metric_title(self.spec.monitor)
        groups = lines_of([run for run in runs if not run.is_evaluation], lambda run: run)
        self.lines = _named(groups)
        self.repeats = [run for group in groups for run in group.repeats]
        """Runs that do not count, since a later or more complete run has the same seed."""
        self.measured = [line for line in self.lines if line.results]
        self.results = [(line, *result) for line in self.measured for result in line.results]
        self.decides_elsewhere = any(line.estimate_of(AT_OFFSET) or line.spreads_of(AT_OFFSET) for line in self.lines)
        """Whether any run also has macro F1 at an offset chosen in its validation (`engine/decision.py`)."""

        self.test_rows = next((run.test_rows for run in runs if run.test_rows), None)
        """Number of rows of the test split, if any run records it."""
        self.is_published = self.test_rows in self.spec.published_rows.get("test", ())
        """Whether the test split has the size of the published one."""
        is_other = self.spec.published_rows and self.test_rows and not self.is_published
        self.name = f"{dataset_title(key)} format, other data" if is_other else dataset_title(key)
        backbones = {run.backbone for run in runs if run.backbone not in (None, PUBLISHED_BACKBONE)}
        others = f" ({' and '.join(sorted(map(str, backbones)))})" if backbones and self.spec.published_rows else ""
        self.title = self.name + others

        found: dict[str, Any] = next((r.raw["baselines"] for _, _, r in self.results if r.raw["baselines"]), {})
        self.baselines: dict[str, dict[str, float]] = {each["answer"]: each["metrics"] for each in found.values()}
        """Metrics of the baselines that ignore the sample, keyed by their answer, the constant one first."""

        own = sorted(
            (line for line in self.lines if line.at_own_pattern),
            key=lambda line: (not line.over_tables, -self.order(line.at_own_pattern)),
        )
        patterns = dict.fromkeys(line.pattern for line in self.lines if line in own)
        self.by_pattern = {pattern: [line for line in own if line.pattern == pattern] for pattern in patterns}
        """Lines with results at their training pattern, keyed by it, best first.

        Lines that only have their runs' own tests, at other missing tables, come last.
        """
        self.compared = self.by_pattern if len({line.variant for line in own}) > 1 else {}
        measured = [[line for line in lines if line.results] for lines in self.by_pattern.values()]
        self.contenders = max(
            filter(None, measured), key=lambda lines: (lines[0].pattern.ratio > 0, len(lines)), default=self.measured
        )
        """The measured lines of the training pattern that most of them share, best first.

        Training with nothing missing, which has another aim, counts only if there is no other.
        """

    @property
    def headline(self) -> Line:
        """The line whose results are shown in detail: the best of the contenders."""
        return self.contenders[0]

    def unit(self, metric: str = "") -> Unit:
        """How to write a metric (by default the task's)."""
        samples = [run.robustness.samples for run in self.runs if run.robustness]
        samples += [run.test.get("samples", 0) for run in self.runs if run.test]
        return Unit.of(metric or self.spec.monitor, samples[0] if samples else 0)

    @property
    def axis_title(self) -> str:
        """The metric with its unit."""
        return f"{capital(self.metric_title)}{self.unit().sign and ', %'}"

    @property
    def baseline_text(self) -> str:
        """The baselines' values of the task's metric, as a sentence."""
        metric, unit = self.spec.monitor, self.unit()
        figures = [f"{unit.full(metrics[metric])} ({answer})" for answer, metrics in self.baselines.items()]
        return f" Baselines that ignore the sample: {in_words(figures)}." if figures else ""

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
            "tables": self._tables_text(),
        }
        return CAPTIONS[name].format(**of_dataset, **facts)  # a name in both is an error

    def _tables_text(self) -> str:
        """The missing tables of the results at training patterns, as a sentence."""
        lines = [line for line in self.lines if line.at_own_pattern]
        seeds = [run.robustness.raw["table_seeds"] for line in lines for run in line.over_tables if run.robustness]
        known = " or ".join(dict.fromkeys(in_words([str(seed) for seed in each]) for each in seeds))
        measured = f" A run's value is its mean over the missing tables of seeds {known}."
        if all(line.over_tables for line in lines):
            return measured if lines else ""
        test = "its own test's, at the one missing table drawn with its training seed"
        return f"{measured} For lines marked as own test, it is {test}." if seeds else f" A run's value is {test}."

    def marked(self, line: Line) -> str:
        """` (own test)` for a line whose value is that of its runs' own tests if others' values are not."""
        return " (own test)" if not line.over_tables and any(other.over_tables for other in self.lines) else ""

    def order(self, found: Estimate | None) -> float:
        """Sort key for values of the metric: the higher the better."""
        return order_of(found.mean, self.spec.monitor) if found else -float("inf")

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
                runs = [run for each in (best, line) for run in each.over_tables if run.test_set]
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
    return [Dataset(key, [run for run in runs if run.dataset == key]) for key in keys]


def _named(groups: Sequence[RunLine[ReportRun]]) -> list[Line]:
    """The lines under names that are unique among those of a pattern."""
    several_patterns = len({group.items[0].pattern for group in groups if not group.items[0].pretrains}) > 1
    titles = [(_variant_title(group, groups), group.items[0].pattern) for group in groups]
    lines = []
    for group, (title, at) in zip(groups, titles, strict=True):
        variant = title if titles.count((title, at)) == 1 else f"{title} ({group.items[0].tag})"
        lines.append(Line(variant, variant + (f", trained at {at.title}" if several_patterns else ""), group.items))
    return lines


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
