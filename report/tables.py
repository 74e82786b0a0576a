"""The tables of the report. One description of each serves the page, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from report.collect import Run
from report.estimate import Estimate
from report.series import METHODS, METRIC_TITLES, Dataset, Pattern, Series, method_title, train_pattern
from report.text import NOT_APPLICABLE, NOT_MEASURED, capital, dataset_title, percent, signed, spread
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import TYPE_NAMES

PUBLISHED = Path(__file__).with_name("published_results.csv")
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
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name for column in self.columns for name in _csv_names(column)])
        writer.writerows(
            [cell for value, column in zip(row, self.columns, strict=True) for cell in _csv_cells(value, column)]
            for row in self.rows
        )
        return file.getvalue()


def runs_table(runs: Sequence[Run], datasets: Sequence[Dataset]) -> Table:
    """All runs, whatever they lack. Those that are in none of `datasets` are trials of searches."""
    numbers = {run.number for dataset in datasets for run in dataset.runs}
    repeats = {run.number for dataset in datasets for run in dataset.repeats}
    rows: list[list[Value]] = []
    for run in runs:
        metric = run.metric
        is_trial = run.number not in numbers
        kind = "evaluation" if run.is_evaluation else "repeated" if run.number in repeats else "training"
        rows.append(
            [
                run.tag,
                str(run.config["exp_name"]),
                method_title(str(run.config["prompt_type"])),
                dataset_title(run.task),
                NOT_APPLICABLE if run.is_evaluation else str(train_pattern(run)),
                str(run.config["seed"]),
                "trial" if is_trial else kind,
                NOT_APPLICABLE if run.is_evaluation else run.best_validation,
                float(run.test["metrics"][metric]) if run.test else NOT_APPLICABLE if is_trial else None,
                "yes" if run.robustness else NOT_APPLICABLE if run.is_evaluation or is_trial else None,
                f"{run.started:%Y-%m-%d}",
                run.place,
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


def matrix_table(dataset: Dataset) -> Table:
    """Missing type × ratio, a column per series."""
    patterns = dict.fromkeys(pattern for series in dataset.series for pattern in series.patterns)
    rows: list[list[Value]] = [
        [
            pattern.kind,
            100 * pattern.ratio,
            *(100 * share for share in pattern.available),
            *(series.at(pattern, dataset.metric) for series in dataset.measured),
        ]
        for pattern in patterns
    ]
    return Table(
        f"matrix_{dataset.task}",
        f"{capital(dataset.metric_title)} in per cent by missing type and missing ratio of the test set: mean ± "
        "standard deviation over train seeds and table seeds.",
        (
            Column("missing_type", "Missing"),
            Column("missing_ratio", "Ratio, %", "number"),
            Column("image_available", "Image, %", "number"),
            Column("text_available", "Text, %", "number"),
            *(Column(series.label, series.label, "percent") for series in dataset.measured),
        ),
        rows,
    )


def read_published(task: str) -> list[dict[str, str]]:
    """The published rows of a dataset."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["dataset"] == DATASETS[task].make_arrow_name]


def published_table(dataset: Dataset) -> Table:
    """The layout of the published Table 1, ours beside it.

    Ours is what runs reach that were trained at the row's pattern, evaluated at that pattern, as in the published
    table. The difference is to the published method of the same name.
    """
    variants: dict[str, list[Series]] = {}
    for series in dataset.series:
        variants.setdefault(series.variant, []).append(series)
    columns = [
        Column("dataset", "Dataset"),
        Column("missing_ratio", "Missing, %", "number"),
        Column("image_available", "Image, %", "number"),
        Column("text_available", "Text, %", "number"),
        *(Column(method, method, "number") for method in METHODS),
    ]
    for variant, of_variant in variants.items():
        columns.append(Column(f"{variant} (ours)", f"{variant} (ours)", "percent"))
        absent = NOT_APPLICABLE if of_variant[0].method in METHODS else "not published"
        title = "Difference" if len(variants) == 1 else f"{variant}, difference"
        columns.append(Column(f"{variant} difference", title, "points", absent))
    rows: list[list[Value]] = []
    strong = set()
    for number, row in enumerate(read_published(dataset.task)):
        published = {method: float(row[method]) for method in METHODS}
        available = [float(row[name]) for name in ("image_available", "text_available")]
        cells: list[Value] = [dataset_title(dataset.task), float(row["missing_rate"]), *available]
        cells += [f"{value:.2f}" for value in published.values()]
        best = max(published.values())
        strong |= {(number, 4 + place) for place, value in enumerate(published.values()) if value == best}
        for of_variant in variants.values():
            measured = (series.at_own_pattern() for series in of_variant if _is_row(series.pattern, row))
            ours = next((value for value in measured if value is not None), None)
            theirs = published.get(of_variant[0].method)
            cells += [ours, 100 * ours.mean - theirs if ours and theirs is not None else None]
        rows.append(cells)
    return Table(
        f"published_{dataset.task}",
        f"{capital(dataset.metric_title)} in per cent in the layout of the published table: training and test have the "
        "same missing type and ratio. Image and text: share of samples that have it. Best published value in bold. "
        "Ours: mean over train seeds, ± their standard deviation where there are several. Difference: ours less the "
        "published method of the same name, in percentage points.",
        tuple(columns),
        rows,
        strong,
    )


def outside_published(dataset: Dataset) -> list[Series]:
    """The series whose training pattern is no row of the published table."""
    rows = read_published(dataset.task)
    return [series for series in dataset.series if not any(_is_row(series.pattern, row) for row in rows)]


def confidence_table(dataset: Dataset) -> Table:
    """Every metric of every run where all samples are complete, without text, or without image."""
    results = [(series, run, found) for series in dataset.measured for run, found in series.results if found.resamples]
    metrics = list(dict.fromkeys(metric for _, _, found in results for metric in found.metrics))
    rows: list[list[Value]] = [
        [
            series.label,
            run.tag,
            str(run.config["seed"]),
            name,
            *(Interval(found.by_type[name][metric], *found.intervals[name][metric]) for metric in metrics),
        ]
        for series, run, found in results
        for name in TYPE_NAMES
    ]
    levels = sorted({(found.level, found.resamples) for _, _, found in results})
    how = " or ".join(f"{100 * level:g} % from {resamples:,} resamples" for level, resamples in levels)
    return Table(
        f"confidence_{dataset.task}",
        f"Results in per cent with every test sample complete, without text, or without image, and their bootstrap "
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
    rows: list[list[Value]] = [
        [
            series.label,
            name,
            series.support(name),
            *(
                series.of_class(type_name, name, score)
                for score in ("f1", "precision", "recall")
                for type_name in TYPE_NAMES
            ),
        ]
        for series in dataset.measured
        for name in series.classes
    ]
    return Table(
        f"per_class_{dataset.task}",
        "F1, precision and recall in per cent by class, with every test sample complete, without text, or without "
        "image: mean over train seeds, ± their standard deviation where there are several. Most frequent class first.",
        (
            Column("method", "Method"),
            Column("class", "Class"),
            Column("support", "Samples", "number"),
            *(
                Column(f"{score}_{type_name.replace(' ', '_')}", f"{title}, {type_name}", "percent")
                for score, title in (("f1", "F1"), ("precision", "Precision"), ("recall", "Recall"))
                for type_name in TYPE_NAMES
            ),
        ),
        rows,
    )


def confusion_table(dataset: Dataset) -> Table:
    """The most frequent confusions of the first run of each series."""
    rows: list[list[Value]] = []
    for series in dataset.measured:
        run, found = series.results[0]
        for name in TYPE_NAMES:
            pairs = [pair for pair in found.confusions if pair.type_name == name]
            pairs.sort(key=lambda pair: -pair.count)
            rows += [
                [series.label, run.tag, name, pair.true, pair.predicted, pair.count, pair.share]
                for pair in pairs[:CONFUSIONS_SHOWN]
            ]
    return Table(
        f"confusions_{dataset.task}",
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


def _is_row(pattern: Pattern, row: dict[str, str]) -> bool:
    image, text = pattern.available
    ours = (pattern.ratio, image, text)
    theirs = tuple(float(row[name]) / 100 for name in ("missing_rate", "image_available", "text_available"))
    return all(abs(a - b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


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
    if column.kind == "share":
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _csv_names(column: Column) -> list[str]:
    if column.kind == "percent":
        return [column.key, f"{column.key} std"]
    return [column.key, f"{column.key} low", f"{column.key} high"] if column.kind == "interval" else [column.key]


def _csv_cells(value: Value, column: Column) -> list[str]:
    width = len(_csv_names(column))
    if value in (None, NOT_APPLICABLE):
        return [""] * width
    if isinstance(value, (Estimate, Interval)):
        return ["" if part is None else f"{100 * part:.4f}" for part in value]
    if isinstance(value, float) and column.kind == "share":
        return [f"{100 * value:.4f}"]
    if column.kind == "points":
        return [f"{value:.4f}"]
    return [f"{value:g}" if isinstance(value, float) else str(value)]
