"""The tables of the report: those of a dataset, of all runs, and of what they ran on."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from runs.report import table
from runs.report.lines import METHODS, Dataset, Line, by_variant, method_title
from runs.report.results import Pattern, ReportRun, versions_of
from runs.report.table import (
    MISSING,
    NOT_APPLICABLE,
    NOT_MEASURED,
    Row,
    Table,
    Value,
    interval,
    mean_std,
    points,
    share,
)
from runs.report.text import CAPTIONS, METRIC_TITLES, capital, dataset_title, without_home
from runs.run_reader import flat_options
from vilt.datasets.specs import DATASETS
from vilt.missing_types import AVAILABLE

PUBLISHED = Path(__file__).with_name("published_results.csv")
PUBLISHED_TEST_ROWS = {"mmimdb": 7799, "food101": 22716}
"""Rows of the test splits that published results are on, where the split is known."""
SHARES = ["missing_rate", "image_available", "text_available"]
CONFUSIONS_SHOWN = 10


def runs_table(runs: Sequence[ReportRun], datasets: Sequence[Dataset]) -> Table:
    """All runs, whatever they lack. Those that are in none of `datasets` are trials of searches."""
    counted = {run for dataset in datasets for run in dataset.runs}
    repeats = {run for dataset in datasets for run in dataset.repeats}
    rows: list[Row] = []
    for one in runs:
        run, is_trial = one.run, one not in counted
        kind = "evaluation" if run.is_evaluation else "repeated" if one in repeats else "training"
        untrained, untested = (NOT_APPLICABLE if why else MISSING for why in (run.is_evaluation, is_trial))
        rows.append(
            {
                "run": one.tag,
                "name": str(run.config["exp_name"]),
                "method": method_title(run),
                "dataset": dataset_title(run.dataset),
                "trained_with": NOT_APPLICABLE if run.is_evaluation else str(one.pattern),
                "seed": str(run.config["seed"]),
                "kind": "trial" if is_trial else kind,
                "best_validation": share(run.best_validation, untrained),
                "test": share(one.test_score, untested),
                "robustness": "yes" if one.robustness else NOT_APPLICABLE if is_trial else untrained,
                "date": f"{run.started:%Y-%m-%d}",
                "folder": one.place,
            }
        )
    return Table("runs", CAPTIONS["runs"], rows, {"robustness": "Robustness results"})


def versions_table(runs: Sequence[ReportRun]) -> Table:
    """Packages, machine and commit, a column per run."""
    versions = {run.tag: versions_of(run.environment) if run.environment else {} for run in runs}
    names = dict.fromkeys(name for of_run in versions.values() for name in of_run)
    rows = [{"what": name, **{tag: found.get(name, MISSING) for tag, found in versions.items()}} for name in names]
    return Table("versions", CAPTIONS["versions"], rows, {"what": ""})


def options_table(runs: Sequence[ReportRun], defaults: dict[str, Any]) -> Table:
    """The options in which a run differs from the defaults, a column per run."""
    configs = {"default": defaults, **{run.tag: run.run.config for run in runs}}
    frame = pd.DataFrame({name: pd.Series(flat_options(config)).map(_option_text) for name, config in configs.items()})
    frame = frame.reindex(dict.fromkeys(name for run in runs for name in flat_options(run.run.config)))
    differs = frame.fillna("").ne(frame["default"].fillna(""), axis=0)
    frame, differs = frame[differs.any(axis=1)], differs[differs.any(axis=1)]
    texts = frame.astype(object).where(frame.notna(), NOT_APPLICABLE)
    rows: list[Row] = [{"option": name, **row} for name, row in texts.to_dict("index").items()]
    strong = {(number, tag) for number, row in enumerate(differs.to_dict("records")) for tag in row if row[tag]}
    return Table("options", CAPTIONS["options"], rows, strong=strong)


def _option_text(value: Any) -> str:
    """An option's value as text; nothing and None are the same, as are 1 and 1.0."""
    if value is None or value == "":
        return "none"
    return f"{value:.12g}" if isinstance(value, float) else without_home(str(value))


def comparison_table(dataset: Dataset) -> Table:
    """A row per variant: trainable parameters, time of a training, and the metric at each training pattern."""
    patterns = dict.fromkeys(line.pattern for lines in dataset.compared.values() for line in lines)
    at = {(variant, line.pattern): line for variant, lines in dataset.compared.items() for line in lines}
    rows: list[Row] = []
    strong = set()
    for number, (variant, lines) in enumerate(dataset.compared.items()):
        seeds = sorted({len(line.runs) for line in lines})
        costs = {
            "trained_parameters": _cost(lines, "trained_parameters", "{:,.0f}"),
            "training_minutes": _cost(lines, "training_seconds", "{:,.1f}", 60),
        }
        rows.append({"method": variant, **costs, "seeds": "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))})
        for pattern in patterns:
            found = at[variant, pattern].at_own_pattern if (variant, pattern) in at else None
            rows[-1][f"trained at {pattern}"] = mean_std(found)
            best = max(line.at_own_pattern.order for (_, p), line in at.items() if p == pattern and line.at_own_pattern)
            strong |= {(number, f"trained at {pattern}")} if found and found.mean == best else set()
    titles = {"trained_parameters": "Trainable parameters", "training_minutes": "Minutes"}
    return Table(f"comparison_{dataset.key}", dataset.caption("comparison"), rows, titles, strong)


def _cost(lines: Sequence[Line], name: str, form: str, unit: float = 1) -> Value:
    """Mean of what test results say of the cost of their training."""
    tests = [run.run.test for line in lines for run in line.runs if run.run.test is not None]
    found = [float(test[name]) / unit for test in tests if test.get(name)]
    return form.format(statistics.fmean(found)) if found else NOT_MEASURED


def matrix_table(dataset: Dataset) -> Table:
    """Missing type × ratio, a column per line."""
    rows: list[Row] = []
    for pattern in dict.fromkeys(pattern for line in dataset.measured for pattern in line.matrix):
        shares = {f"{name}{AVAILABLE}": 100 * available for name, available in pattern.available.items()}
        values = {line.label: mean_std(line.matrix.get(pattern)) for line in dataset.measured}
        rows.append({"missing_type": pattern.kind, "missing_ratio": 100 * pattern.ratio, **shares, **values})
    return Table(f"matrix_{dataset.key}", dataset.caption("matrix"), rows)


def read_published(task: str) -> pd.DataFrame:
    """The published rows of a dataset: shares of 1, and the methods' results in per cent."""
    frame = pd.read_csv(PUBLISHED)
    frame = frame[frame.dataset == DATASETS[task].make_arrow_name].reset_index(drop=True)
    return frame.assign(**frame[SHARES] / 100)


def published_table(dataset: Dataset) -> Table:
    """The layout of the published Table 1, ours beside it.

    Ours is what runs reach that were trained at the row's pattern, evaluated at that pattern, as in the published
    table. The difference is to the published method of the same name.
    """
    rows: list[Row] = []
    strong = set()
    for number, row in enumerate(read_published(dataset.key).to_dict("records")):
        strong |= {(number, method) for method in METHODS if row[method] == max(row[name] for name in METHODS)}
        shares = {name.replace("rate", "ratio"): 100 * row[name] for name in SHARES}
        rows.append({"dataset": dataset.title, **shares, **{method: f"{row[method]:.2f}" for method in METHODS}})
        for variant, lines in by_variant(dataset.lines).items():
            measured = (line.at_own_pattern for line in lines if is_row(line.pattern, row))
            ours = next((found for found in measured if found), None)
            theirs = row.get(method_title(lines[0].runs[0].run))
            difference = table.absent("not published") if theirs is None else NOT_APPLICABLE
            if ours and theirs is not None:
                difference = points(100 * ours.mean - theirs)
            rows[-1] |= {f"{variant} (ours)": mean_std(ours), f"{variant} difference": difference}
    return Table(f"published_{dataset.key}", dataset.caption("published"), rows, strong=strong)


def is_row(pattern: Pattern, row: dict[Any, Any]) -> bool:
    """Whether a pattern is that of a row of the published table."""
    ours = (pattern.ratio, *pattern.available.values())
    return all(math.isclose(available, row[name], abs_tol=1e-6) for available, name in zip(ours, SHARES, strict=True))


def confidence_table(dataset: Dataset) -> Table:
    """Every metric of every run where all samples are of one missing type."""
    results = [(line, run, found) for line, run, found in dataset.results if found.resamples]
    rows: list[Row] = []
    for line, run, found in results:
        for name, of_type in found.by_type.groupby("type", sort=False):
            cells = {row.metric: interval(row.value, row.low, row.high) for row in of_type.itertuples()}
            of_run: Row = {"method": line.label, "run": run.tag, "seed": str(run.run.config["seed"])}
            rows.append(of_run | {"test_samples_are": str(name)} | cells)
    levels = sorted({(found.level, found.resamples) for _, _, found in results})
    how = " or ".join(f"{100 * level:g} % from {resamples:,} resamples" for level, resamples in levels)
    titles = {name: capital(title) for name, title in METRIC_TITLES.items()}
    return Table(f"confidence_{dataset.key}", dataset.caption("confidence", how=how), rows, titles)


def per_class_table(dataset: Dataset) -> Table:
    """Precision, recall and F1 of each class and type, mean over train seeds."""
    scores = [(score, name) for score in ("f1", "precision", "recall") for name in dataset.spec.type_names]
    rows: list[Row] = []
    for line in dataset.measured:
        for name, support in line.support.items():
            rows.append({"method": line.label, "class": name, "support": support})
            for score, kind in scores:
                rows[-1][f"{score} {kind}".replace(" ", "_")] = mean_std(line.by_class.get((name, score, kind)))
    return Table(f"per_class_{dataset.key}", dataset.caption("per_class"), rows, {"support": "Samples"})


def confusion_table(dataset: Dataset) -> Table:
    """The most frequent confusions of the first run of each line."""
    rows: list[Row] = []
    for line in dataset.measured:
        run, found = line.results[0]
        for name in dataset.spec.type_names:
            pairs = found.confusions[found.confusions.type == name].sort_values("count", ascending=False, kind="stable")
            for pair in pairs.head(CONFUSIONS_SHOWN).to_dict("records"):
                row: Row = {"method": line.label, "run": run.tag, "test_samples_are": name}
                row |= {"true": pair["true"], "predicted": pair["predicted"]}
                rows.append({**row, "count": int(pair["count"]), "share": share(pair["share"])})
    caption = dataset.caption("confusions", shown=CONFUSIONS_SHOWN)
    return Table(f"confusions_{dataset.key}", caption, rows, {"true": "True class", "count": "Samples"})
