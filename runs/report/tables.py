"""The tables of the report. One description of each serves the page, Markdown and CSV."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd

from common.text import Estimate
from runs.report.lines import METHODS, Dataset, Line, method_title
from runs.report.results import Pattern, ReportRun, versions_of
from runs.report.text import (
    METRIC_TITLES,
    NOT_APPLICABLE,
    NOT_MEASURED,
    capital,
    conditions,
    dataset_title,
    percent,
    signed,
    spread,
)
from vilt.datasets.specs import DATASETS
from vilt.missing_types import AVAILABLE

PUBLISHED = Path(__file__).with_name("published_results.csv")
PUBLISHED_SHARES = ("missing_rate", "image_available", "text_available")
PUBLISHED_TEST_ROWS = {"mmimdb": 7799, "food101": 22716}
"""Rows of the test splits that published results are on, where the split is known."""
CONFUSIONS_SHOWN = 10


class Interval(NamedTuple):
    """A value with its confidence interval, fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """`share`: a fraction; `percent`: an Estimate; `interval`: an Interval; `points`: a difference in per cent."""

    key: str
    title: str
    kind: Literal["text", "code", "number", "share", "percent", "interval", "points"] = "text"
    absent: str = NOT_MEASURED
    """What stands where there is no value."""


Value = str | int | float | Estimate | Interval | None


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its CSV file."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[list[Value]]
    strong: set[tuple[int, int]] = field(default_factory=set)
    """(row, column) of the values that stand out."""

    def shown(self) -> list[list[str]]:
        """The cells as texts."""
        return [[_shown(value, column) for value, column in zip(row, self.columns, strict=True)] for row in self.rows]

    def csv(self) -> str:
        """The table as CSV: values in per cent, a deviation or the ends of an interval in columns of their own."""
        cells: dict[str, list[str]] = {}
        for place, column in enumerate(self.columns):
            names = [f"{column.key}{part}" for part in CSV_PARTS.get(column.kind, ("",))]
            parts = [_csv_cells(row[place], column, len(names)) for row in self.rows]
            cells |= {name: [of_row[number] for of_row in parts] for number, name in enumerate(names)}
        return pd.DataFrame(cells).to_csv(index=False, lineterminator="\n")


CSV_PARTS = {"percent": ("", " std"), "interval": ("", " low", " high")}
"""Of a column in several: what is added to its name."""


def runs_table(runs: Sequence[ReportRun], datasets: Sequence[Dataset]) -> Table:
    """All runs, whatever they lack. Those that are in none of `datasets` are trials of searches."""
    counted = {run for dataset in datasets for run in dataset.runs}
    repeats = {run for dataset in datasets for run in dataset.repeats}
    rows: list[list[Value]] = []
    for one in runs:
        run, is_trial = one.run, one not in counted
        none = NOT_APPLICABLE if run.is_evaluation else None
        kind = "trial" if is_trial else "evaluation" if none else "repeated" if one in repeats else "training"
        rows.append(
            [
                *(one.tag, str(run.config["exp_name"]), method_title(run), dataset_title(run.dataset)),
                none or str(one.pattern),
                str(run.config["seed"]),
                kind,
                none or run.best_validation,
                NOT_APPLICABLE if is_trial and one.test_score is None else one.test_score,
                "yes" if one.robustness else NOT_APPLICABLE if is_trial else none,
                f"{run.started:%Y-%m-%d}",
                one.place,
            ]
        )
    return Table(
        "runs",
        "All runs of this report. Best validation and test are the metric of the dataset, in per cent; the test is at "
        "the run's own test pattern. A repeated run has the configuration and seed of a later or more complete one, "
        "which counts instead. A trial is one of a search, which has a section of its own.",
        (
            Column("run", "Run"),
            Column("name", "Name"),
            Column("method", "Method"),
            Column("dataset", "Dataset"),
            Column("trained_with", "Trained with"),
            Column("seed", "Seed", "number"),
            Column("kind", "Kind"),
            Column("best_validation", "Best validation", "share", "missing"),
            Column("test", "Test", "share", "missing"),
            Column("robustness", "Robustness results", absent="missing"),
            Column("date", "Date"),
            Column("folder", "Folder"),
        ),
        rows,
    )


def versions_table(runs: Sequence[ReportRun]) -> Table:
    """Packages, machine and commit, a column per run."""
    versions = {run: versions_of(run.environment) if run.environment else {} for run in runs}
    names = dict.fromkeys(name for of_run in versions.values() for name in of_run)
    return Table(
        "versions",
        "What the runs ran on.",
        (Column("what", ""), *(Column(run.tag, run.tag, "code", "missing") for run in runs)),
        [[name, *(versions[run].get(name) for run in runs)] for name in names],
    )


def compared_variants(dataset: Dataset) -> dict[str, list[Line]]:
    """The lines of each variant; empty unless there are two variants with results to compare."""
    variants: dict[str, list[Line]] = {}
    for line in dataset.lines:
        if line.at_own_pattern() is not None:
            variants.setdefault(line.variant, []).append(line)
    return variants if len(variants) > 1 else {}


def compared_patterns(dataset: Dataset) -> list[Pattern]:
    """Training patterns of the compared lines, in order of appearance."""
    return list(dict.fromkeys(line.pattern for lines in compared_variants(dataset).values() for line in lines))


def comparison_table(dataset: Dataset) -> Table:
    """A row per variant: trainable parameters, time of a training, and the metric at each training pattern."""
    patterns = compared_patterns(dataset)
    rows: list[list[Value]] = []
    for variant, lines in compared_variants(dataset).items():
        at = {line.pattern: line.at_own_pattern() for line in lines}
        seeds = sorted({len(line.runs) for line in lines})
        costs: list[Value] = [_cost(lines, "trained_parameters", 1), _cost(lines, "training_seconds", 60)]
        rows.append([variant, *costs, "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), *map(at.get, patterns)])
    strong = set()
    for place in range(4, 4 + len(patterns)):
        means = {number: cell.mean for number, row in enumerate(rows) if isinstance(cell := row[place], Estimate)}
        strong |= {(number, place) for number, mean in means.items() if mean == max(means.values())}
    return Table(
        f"comparison_{dataset.key}",
        f"{capital(dataset.metric_title)} in per cent on the test split, at the pattern of the training: mean over "
        "train seeds, ± their standard deviation where there are several; the best mean in bold. Trainable parameters: "
        "the head's too. Minutes are those of a training, its validation included, where the run was not interrupted.",
        (
            Column("method", "Method"),
            Column("trained_parameters", "Trainable parameters"),
            Column("training_minutes", "Minutes"),
            Column("seeds", "Seeds", "number"),
            *(Column(f"trained at {pattern}", str(pattern), "percent") for pattern in patterns),
        ),
        rows,
        strong,
    )


def _cost(lines: Sequence[Line], name: str, unit: float) -> str | None:
    """Mean of what test results say of the cost of their training, or None."""
    tests = [run.run.test for line in lines for run in line.runs if run.run.test is not None]
    found = [float(test[name]) / unit for test in tests if test.get(name)]
    return None if not found else f"{statistics.fmean(found):,.{0 if unit == 1 else 1}f}"


def matrix_table(dataset: Dataset) -> Table:
    """Missing type × ratio, a column per line."""
    patterns = dict.fromkeys(pattern for line in dataset.lines for pattern in line.patterns)
    return Table(
        f"matrix_{dataset.key}",
        f"{capital(dataset.metric_title)} in per cent by missing type and missing ratio of the test set: mean ± "
        "standard deviation over train seeds and table seeds.",
        (
            Column("missing_type", "Missing"),
            Column("missing_ratio", "Ratio, %", "number"),
            *(Column(f"{name}{AVAILABLE}", f"{capital(name)}, %", "number") for name in dataset.spec.modalities),
            *(Column(line.label, line.label, "percent") for line in dataset.measured),
        ),
        [
            [
                pattern.kind,
                *(100 * share for share in (pattern.ratio, *pattern.available.values())),
                *(line.at(pattern, dataset.metric) for line in dataset.measured),
            ]
            for pattern in patterns
        ],
    )


def read_published(task: str) -> pd.DataFrame:
    """The published rows of a dataset: shares of 1, and the methods' results in per cent."""
    frame = pd.read_csv(PUBLISHED)
    frame = frame[frame.dataset == DATASETS[task].make_arrow_name].reset_index(drop=True)
    return frame.assign(**{name: frame[name] / 100 for name in PUBLISHED_SHARES})


def published_table(dataset: Dataset) -> Table:
    """The layout of the published Table 1, ours beside it.

    Ours is what runs reach that were trained at the row's pattern, evaluated at that pattern, as in the published
    table. The difference is to the published method of the same name.
    """
    variants: dict[str, list[Line]] = {}
    for line in dataset.lines:
        variants.setdefault(line.variant, []).append(line)
    columns = [
        Column("dataset", "Dataset"),
        Column("missing_ratio", "Missing, %", "number"),
        Column("image_available", "Image, %", "number"),
        Column("text_available", "Text, %", "number"),
        *(Column(method, method, "number") for method in METHODS),
    ]
    for variant, lines in variants.items():
        columns.append(Column(f"{variant} (ours)", f"{variant} (ours)", "percent"))
        absent = NOT_APPLICABLE if lines[0].method in METHODS else "not published"
        title = "Difference" if len(variants) == 1 else f"{variant}, difference"
        columns.append(Column(f"{variant} difference", title, "points", absent))
    rows: list[list[Value]] = []
    strong = set()
    for number, row in read_published(dataset.key).iterrows():
        published = row[list(METHODS)].astype(float)
        shares = [float(100 * row[name]) for name in PUBLISHED_SHARES]
        cells: list[Value] = [dataset_title(dataset.key), *shares, *(f"{value:.2f}" for value in published)]
        strong |= {
            (int(str(number)), 4 + place) for place in range(len(METHODS)) if published.iloc[place] == published.max()
        }
        for lines in variants.values():
            measured = (line.at_own_pattern() for line in lines if _is_row(line.pattern, row))
            ours = next((value for value in measured if value is not None), None)
            theirs = published.get(lines[0].method)
            cells += [ours, 100 * ours.mean - float(theirs) if ours and theirs is not None else None]
        rows.append(cells)
    return Table(
        f"published_{dataset.key}",
        f"{capital(dataset.metric_title)} in per cent in the layout of the published table: training and test have the "
        "same missing type and ratio. Image and text: share of samples that have it. Best published value in bold. "
        "Ours: mean over train seeds, ± their standard deviation where there are several. Difference: ours less the "
        "published method of the same name, in percentage points.",
        tuple(columns),
        rows,
        strong,
    )


def outside_published(dataset: Dataset) -> list[Line]:
    """The lines whose training pattern is no row of the published table."""
    rows = [row for _, row in read_published(dataset.key).iterrows()]
    return [line for line in dataset.lines if not any(_is_row(line.pattern, row) for row in rows)]


def _is_row(pattern: Pattern, row: "pd.Series[float]") -> bool:
    theirs = [row[name] for name in PUBLISHED_SHARES]
    return all(abs(a - b) < 1e-6 for a, b in zip((pattern.ratio, *pattern.available.values()), theirs, strict=True))


def confidence_table(dataset: Dataset) -> Table:
    """Every metric of every run where all samples are of one missing type."""
    results = [(line, run, found) for line, run, found in dataset.results if found.resamples]
    metrics = list(dict.fromkeys(metric for _, _, found in results for metric in found.metrics))
    rows: list[list[Value]] = []
    for line, run, found in results:
        for name, of_type in found.by_type.groupby("type", sort=False):
            at = {row.metric: Interval(row.value, row.low, row.high) for row in of_type.itertuples()}
            rows.append([line.label, run.tag, str(run.run.config["seed"]), str(name), *map(at.get, metrics)])
    levels = sorted({(found.level, found.resamples) for _, _, found in results})
    how = " or ".join(f"{100 * level:g} % from {resamples:,} resamples" for level, resamples in levels)
    return Table(
        f"confidence_{dataset.key}",
        f"Results in per cent with every test sample {conditions(dataset.spec.type_names)}, and their bootstrap "
        f"confidence intervals over samples ({how}).",
        (
            Column("method", "Method"),
            Column("run", "Run"),
            Column("seed", "Seed", "number"),
            Column("test_samples_are", "Test samples are"),
            *(Column(metric, capital(METRIC_TITLES.get(metric, metric)), "interval") for metric in metrics),
        ),
        rows,
    )


def per_class_table(dataset: Dataset) -> Table:
    """Precision, recall and F1 of each class and type, mean over train seeds."""
    scores = [(score, type_name) for score in ("f1", "precision", "recall") for type_name in dataset.spec.type_names]
    return Table(
        f"per_class_{dataset.key}",
        f"F1, precision and recall in per cent by class, with every test sample {conditions(dataset.spec.type_names)}: "
        "mean over train seeds, ± their standard deviation where there are several. Most frequent class first.",
        (
            Column("method", "Method"),
            Column("class", "Class"),
            Column("support", "Samples", "number"),
            *(
                Column(f"{score}_{name.replace(' ', '_')}", f"{capital(score)}, {name}", "percent")
                for score, name in scores
            ),
        ),
        [
            [line.label, name, support_of(of_class), *map(of_class.get, scores)]
            for line in dataset.measured
            for name, of_class in line.by_class.items()
        ],
    )


def support_of(of_class: dict[tuple[str, str], Estimate | None]) -> int:
    """Test samples of a class."""
    found = of_class["support", "complete"]
    return int(found.mean) if found else 0


def confusion_table(dataset: Dataset) -> Table:
    """The most frequent confusions of the first run of each line."""
    rows: list[list[Value]] = []
    for line in dataset.measured:
        run, found = line.results[0]
        for name in dataset.spec.type_names:
            pairs = found.confusions[found.confusions.type == name].sort_values("count", ascending=False, kind="stable")
            for pair in pairs.head(CONFUSIONS_SHOWN).itertuples(index=False):
                rows.append([line.label, run.tag, name, pair.true, pair.predicted, int(pair[3]), pair.share])
    return Table(
        f"confusions_{dataset.key}",
        f"The {CONFUSIONS_SHOWN} most frequent confusions by missing type, of the first train seed of each method. "
        "Share: of the samples of the true class, in per cent.",
        (
            Column("method", "Method"),
            Column("run", "Run"),
            Column("test_samples_are", "Test samples are"),
            Column("true", "True class"),
            Column("predicted", "Predicted"),
            Column("count", "Samples", "number"),
            Column("share", "Share", "share"),
        ),
        rows,
    )


def _shown(value: Value, column: Column) -> str:
    if value is None:
        return column.absent
    if isinstance(value, Estimate):
        return spread(value)
    if isinstance(value, Interval):
        return f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"
    if isinstance(value, str):
        return value
    if column.kind == "points":
        return signed(value)
    return percent(value) if column.kind == "share" else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _csv_cells(value: Value, column: Column, width: int) -> list[str]:
    if value in (None, NOT_APPLICABLE):
        return [""] * width
    if isinstance(value, Estimate):
        return [f"{100 * value.mean:.4f}", f"{100 * value.std:.4f}" if value.n > 1 else ""]
    if isinstance(value, Interval):
        return [f"{100 * part:.4f}" for part in value]
    if isinstance(value, float) and column.kind in ("share", "points"):
        return [f"{100 * value if column.kind == 'share' else value:.4f}"]
    return [f"{value:g}" if isinstance(value, float) else str(value)]
