"""The runs of a dataset as lines: of each the mean and the deviation, by pattern, missing type and class."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.text import AT_OFFSET, LOWER_IS_BETTER, Estimate, estimate, order_of
from engine.sample_statistics import LEVEL
from engine.significance import Difference, holm
from runs.compare import Settings, compare_runs
from runs.lines import RunLine, Spread, lines_of, spread_of
from runs.pattern import Pattern
from runs.report.results import PUBLISHED_BACKBONE, ReportRun
from runs.report.text import CAPTIONS, Unit, capital, dataset_title, excerpt, listed, metric_title, without
from runs.run_reader import Run
from runs.stored_results import Robustness
from vilt.datasets.specs import DATASETS, DatasetSpec

RESAMPLES, PERMUTATIONS = 1000, 2000
"""Behind the intervals and p-values of differences."""
METHODS = ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")
"""The published ones, as the published table writes them."""
METHOD_TITLES = {
    **{method.lower(): method for method in METHODS},
    **{"map_input": "MAP", "map_attention": "MAP, attention level", "msp": "MSP", "none": "head alone"},
    **{"mora": "MoRA", "lora": "LoRA", "aoept": "AOEPT", "syp": "SyP"},
}
"""Titles of the option prompt_type."""
ABLATION = {(0, 0): "baseline", (1, 0): "baseline + FAR", (0, 1): "baseline + FMB", (1, 1): "REP"}
"""Titles of REP without its parts, by the options far and fmb."""


@dataclass(frozen=True, eq=False)
class Line:
    """Runs of one method, configuration and training pattern, one per seed, lowest seed first."""

    variant: str  # the method, with the options that set it apart from others of that method in the same report
    label: str  # the variant, with the pattern where that differs within the dataset
    runs: list[ReportRun]

    @property
    def pattern(self) -> Pattern:
        """Of the training."""
        return self.runs[0].pattern

    @property
    def spec(self) -> DatasetSpec:
        """Of the dataset."""
        return self.runs[0].spec

    @cached_property
    def results(self) -> list[tuple[ReportRun, Robustness]]:
        """The runs that have robustness results, with them."""
        return [(run, run.robustness) for run in self.runs if run.robustness is not None]

    def spreads_of(self, metric: str) -> dict[Pattern, Spread]:
        """A metric by evaluation pattern, by type and ratio; nothing where the results have none of it."""
        found: dict[Pattern, list[list[float]]] = {}
        for _, results in self.results:
            for pattern, cell in results.cells.items():
                if metric in cell["metrics"]:
                    found.setdefault(pattern, []).append(cell["metrics"][metric]["values"])
        types = self.spec.missing_types

        def place(pattern: Pattern) -> tuple[Any, ...]:
            kind = pattern.missing_type
            return types.index(kind) if kind in types else len(types), kind, pattern.both_ratio, pattern.ratio

        order = sorted(found, key=place)
        return {pattern: spread for pattern in order if (spread := spread_of(found[pattern]))}

    @cached_property
    def matrix(self) -> dict[Pattern, Estimate]:
        """Means of the task's metric, with deviations over training seeds, or of one run over its missing tables."""
        return {pattern: spread.estimate for pattern, spread in self.spreads_of(self.spec.monitor).items()}

    def mean_over_modes(self, metric: str) -> Estimate | None:
        """Of a metric over training seeds, the mean over all missing types but `complete`; None where there is none."""
        of_runs = [results.raw["by_type"] for _, results in self.results if metric in results.raw["metrics"]]
        return estimate([statistics.mean(of[name][metric] for name in self.spec.type_names[1:]) for of in of_runs])

    @cached_property
    def by_type(self) -> dict[str, Estimate]:
        """The task's metric over training seeds where every sample has one missing type."""
        values = {
            name: [results.raw["by_type"][name][self.spec.monitor] for _, results in self.results]
            for name in self.spec.type_names
        }
        return {name: found for name, of_runs in values.items() if (found := estimate(of_runs))}

    @cached_property
    def support(self) -> dict[str, int]:
        """Test samples of each class, the most frequent first."""
        entries = sorted(self.results[0][1].raw["per_class"], key=lambda entry: -entry["support"])
        return {entry["class"]: entry["support"] for entry in entries}

    def f1_of(self, class_name: str, type_name: str) -> Estimate | None:
        """F1 of a class over training seeds where every sample has one missing type."""
        entries = [entry for _, results in self.results for entry in results.raw["per_class"]]
        return estimate([each["f1"] for each in entries if (each["class"], each["type"]) == (class_name, type_name)])

    @cached_property
    def at_own_pattern(self) -> Estimate | None:
        """Mean and deviation over training seeds of the task's metric, at the pattern of the training."""
        return self.estimate_of(self.spec.monitor)

    @property
    def n_at_own_pattern(self) -> int:
        """The training seeds that have a result there, an undefined one too."""
        return sum(run.at_own_pattern(self.spec.monitor) is not None for run in self.runs)

    def estimate_of(self, metric: str) -> Estimate | None:
        """Likewise of another metric."""
        scores = [run.at_own_pattern(metric) for run in self.runs]
        return estimate([score for score in scores if score is not None])

    def interval_at(self, pattern: Pattern) -> tuple[float, float] | None:
        """Confidence interval over test samples; of several training seeds, the mean of their intervals."""
        cells = [results.cells[pattern] for _, results in self.results if pattern in results.cells]
        found = [cell["interval"] for cell in cells if "interval" in cell]
        if not found:
            return None
        return statistics.fmean(each["low"] for each in found), statistics.fmean(each["high"] for each in found)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The runs of one dataset. Those in `repeats` do not count: a later or more complete one is of the same seed."""

    key: str
    spec: DatasetSpec
    runs: list[ReportRun]
    lines: list[Line]
    repeats: list[ReportRun]

    @property
    def name(self) -> str:
        """The dataset; other data in its place is named."""
        is_other = self.spec.published_rows and self.test_rows and not self.is_published
        return f"{dataset_title(self.key)} format, other data" if is_other else dataset_title(self.key)

    @property
    def title(self) -> str:
        """The dataset, with backbones that no published result has."""
        others = {run.backbone for run in self.runs if run.backbone not in (None, PUBLISHED_BACKBONE)}
        return (
            f"{self.name} ({' and '.join(sorted(map(str, others)))})"
            if others and self.spec.published_rows
            else self.name
        )

    @property
    def test_rows(self) -> int | None:
        """Rows of the test split, where a run says it."""
        return next((run.test_rows for run in self.runs if run.test_rows), None)

    @property
    def is_published(self) -> bool:
        """Whether the test split has the size of the published one."""
        return self.test_rows in self.spec.published_rows.get("test", ())

    def unit(self, metric: str = "") -> Unit:
        """How a metric is written, that of the task or another one."""
        samples = [run.robustness.samples for run in self.runs if run.robustness]
        samples += [run.test.get("samples", 0) for run in self.runs if run.test]
        return Unit.of(metric or self.spec.monitor, samples[0] if samples else 0)

    @property
    def metric_title(self) -> str:
        """As texts and figures name it."""
        return metric_title(self.spec.monitor)

    @property
    def decides_elsewhere(self) -> bool:
        """Whether any run has macro F1 at an offset that its validation chose, too (`engine/decision.py`)."""
        return any(line.estimate_of(AT_OFFSET) or line.spreads_of(AT_OFFSET) for line in self.lines)

    @property
    def axis_title(self) -> str:
        """The metric with its unit."""
        return f"{capital(self.metric_title)}{self.unit().sign and ', %'}"

    def caption(self, name: str, **facts: object) -> str:
        """Of a figure or table."""
        *first, last = map(without, self.spec.type_names)
        facts |= {"metric": self.metric_title, "Metric": capital(self.metric_title), "dataset": self.name}
        facts |= {"baselines": self.baseline_text, "conditions": f"{', '.join(first)}, or {last}"}
        facts |= {"better": "lower" if self.spec.monitor in LOWER_IS_BETTER else "higher"}
        in_per_cent = bool(self.unit().sign)
        facts |= {"unit": " in per cent" * in_per_cent, "points": " in percentage points" * in_per_cent}
        chosen = " F1-macro at offset: where the run's validation chose to decide, in place of 1/2."
        facts |= {"at_offset": chosen if self.decides_elsewhere else ""}
        return CAPTIONS[name].format(**facts)

    def order(self, found: Estimate | None) -> float:
        """What to choose the best value of the metric by, as the highest."""
        return order_of(found.mean, self.spec.monitor) if found else -float("inf")

    @cached_property
    def measured(self) -> list[Line]:
        """The lines that have robustness results."""
        return [line for line in self.lines if line.results]

    @property
    def headline(self) -> Line:
        """The measured line that is best where nothing is missing."""
        return max(self.measured, key=lambda line: self.order(line.by_type["complete"]))

    @property
    def results(self) -> list[tuple[Line, ReportRun, Robustness]]:
        """All robustness results."""
        return [(line, *result) for line in self.measured for result in line.results]

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """What answers that look at no sample get: metrics by what is answered."""
        found: dict[str, Any] = next((r.raw["baselines"] for _, _, r in self.results if r.raw["baselines"]), {})
        return {str(baseline["answer"]): baseline["metrics"] for baseline in found.values()}

    @property
    def baseline_text(self) -> str:
        """Their figures of the task's metric, as a sentence."""
        metric, unit = self.spec.monitor, self.unit()
        figures = [f"{unit.full(metrics[metric])} ({answer})" for answer, metrics in self.baselines.items()]
        return f" Without looking at a sample: {listed(figures)}." if figures else ""

    @cached_property
    def compared(self) -> dict[Pattern, list[Line]]:
        """By training pattern, the lines with results there, best first; none unless two variants have some."""
        found = sorted(
            (line for line in self.lines if line.at_own_pattern), key=lambda x: -self.order(x.at_own_pattern)
        )
        patterns = dict.fromkeys(line.pattern for line in self.lines if line in found)
        several = len({line.variant for line in found}) > 1
        return {p: [line for line in found if line.pattern == p] for p in patterns} if several else {}

    @cached_property
    def against_best(self) -> dict[Line, Difference]:
        """By line that has stored logits, what it has less than the best one of its training pattern, if that has some
        too; p is corrected for the number of lines. Every pair of a large report would take too long."""
        found: dict[Line, Difference] = {}
        for pattern, (best, *others) in self.compared.items():
            at, of_pattern = ((pattern.missing_type,), (pattern.ratio,), pattern.both_ratio), {}
            for line in others:
                results = [entry for each in (best, line) for entry in each.results if entry[0].test_set]
                seeds = tuple(results[0][1].raw["table_seeds"]) if results else ()
                for group in compare_runs([run for run, _ in results], Settings(seeds, RESAMPLES, PERMUTATIONS, *at)):
                    value, low, high, p = group.comparisons[0].difference  # of the best one, whose runs come first
                    of_pattern[line] = Difference(-value, -high, -low, p)
            corrected = holm([each.p for each in of_pattern.values()])
            found |= {line: each._replace(p=p) for (line, each), p in zip(of_pattern.items(), corrected, strict=True)}
        return found

    def is_significantly_best(self, line: Line) -> bool:
        """Whether each other line of the training pattern differs significantly from this one, which is the best."""
        first, *others = self.compared[line.pattern]
        found = [self.against_best.get(other) for other in others]
        return (
            line is first and bool(others) and all(d and d.p <= 1 - LEVEL and not d.low <= 0 <= d.high for d in found)
        )


def by_dataset(runs: Sequence[ReportRun]) -> list[Dataset]:
    """One entry per dataset that occurs, in the order of DATASETS, then others."""
    there = {run.dataset for run in runs}
    keys = [key for key in (*DATASETS, *sorted(there - set(DATASETS))) if key in there]
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
    """The method as the published table writes it, else as the option does."""
    return METHOD_TITLES.get(run.config["prompt_type"], run.config["prompt_type"])


def _variant_title(line: RunLine[ReportRun], lines: Sequence[RunLine[ReportRun]]) -> str:
    """The method and in few words the options that set it apart; of a path its end."""
    run, words = line.items[0], line.differing(lines)
    title = method_title(run)
    if run.config["prompt_type"] == "rep":
        title = ABLATION[bool(run.config.get("far", True)), bool(run.config.get("fmb", True))]
        words = [word for word in words if not word.startswith(("far=", "fmb="))]
    options = [word.split("=", 1) for word in words]
    return ", ".join([title, *(f"{name} {excerpt(value.rstrip('/').rsplit('/')[-1], 40)}" for name, value in options)])
