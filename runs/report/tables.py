"""The report's tables: those of each dataset, and the table of all runs."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torchmetrics.functional.classification import multiclass_confusion_matrix

from common.text import AT_OFFSET
from runs.comparable import additions, other_input
from runs.pattern import Pattern
from runs.report.lines import Dataset, Line, method_title
from runs.report.results import PUBLISHED_BACKBONE, ReportRun
from runs.report.table import (
    MISSING,
    NOT_APPLICABLE,
    NOT_MEASURED,
    Cell,
    Row,
    Table,
    absent,
    difference,
    interval,
    mean_std,
    number,
)
from runs.report.text import CAPTIONS, Unit, capital, dataset_title, metric_title
from vilt.missing_types import AVAILABLE, available_shares

PUBLISHED = Path(__file__).with_name("published_results.csv")
MEAN_OVER_MODES = "mean over modes"
"""Missing type of published results that are averaged over all missing types except `complete`."""
CONFUSIONS_SHOWN = 10
MATRIX_CLASSES = 30
"""Maximum number of classes shown as a confusion matrix."""


def runs_table(runs: Sequence[ReportRun], datasets: Sequence[Dataset]) -> Table:
    """The table of all runs. Runs in none of `datasets` are trials of searches."""
    dataset_of = {run: dataset for dataset in datasets for run in dataset.runs}
    repeats = {run for dataset in datasets for run in dataset.repeats}
    elsewhere = any(dataset.decides_elsewhere for dataset in datasets)
    rows: list[Row] = []
    for run in runs:
        dataset = dataset_of.get(run)
        unit = dataset.unit() if dataset else Unit.of(run.spec.monitor, 100)
        kind = "pretraining" if run.pretrains else "training" if dataset else "trial"
        kind = "evaluation" if run.is_evaluation else "repeated" if run in repeats else kind
        none = (run.is_evaluation or run.pretrains, run.pretrains or not dataset)
        untrained, untested = (NOT_APPLICABLE if why else MISSING for why in none)
        rows.append(
            {
                "run": run.tag,
                "method": ", ".join([method_title(run), *other_input(run.config), *additions(run.config)]),
                "dataset": dataset.name if dataset else dataset_title(run.dataset),
                "trained_at": NOT_APPLICABLE if run.is_evaluation else run.pattern.title,
                "seed": str(run.config["seed"]),
                "kind": kind,
                "best_validation": number(run.best_validation, unit, untrained),
                "test": number(run.tested(run.spec.monitor), unit, untested),
                **({AT_OFFSET: number(run.tested(AT_OFFSET), unit, NOT_APPLICABLE)} if elsewhere else {}),
                "robustness": "yes" if run.robustness else untrained if dataset else NOT_APPLICABLE,
                "date": f"{run.parts[-1].started:%Y-%m-%d}",
                "folder": run.place,
            }
        )
    titles = {"best_validation": "Validation", AT_OFFSET: capital(metric_title(AT_OFFSET))}
    return Table("runs", CAPTIONS["runs"], rows, titles)


def comparison_table(dataset: Dataset) -> Table:
    """A row per training pattern and line: the metric there, the difference to the best line, the cost of training."""
    metric, unit = dataset.spec.monitor, dataset.unit()
    rows: list[Row] = []
    for line in (line for lines in dataset.compared.values() for line in lines):
        own, found = mean_std(line.at_own_pattern, unit), dataset.against_best.get(line)
        row: Row = {"trained_at": line.pattern.title, "method": line.variant, "seeds": len(line.scores_of(metric))}
        row[metric] = replace(own, text=own.text + dataset.marked(line), strong=dataset.is_significantly_best(line))
        if dataset.decides_elsewhere:
            row[AT_OFFSET] = mean_std(line.estimate_of(AT_OFFSET), dataset.unit(AT_OFFSET))
        row["difference_to_best"] = difference(found.value, unit, found[1:3]) if found else NOT_APPLICABLE
        row["p"] = Cell(f"{found.p:.2g}", {"": found.p}) if found else NOT_APPLICABLE
        row["trained_parameters"] = _cost(line, "trained_parameters", "{:,.0f}")
        rows.append(row | {"training_minutes": _cost(line, "training_seconds", "{:,.1f}", 60)})
    for answer, metrics in dataset.baselines.items() if rows else ():
        rows.append({**dict.fromkeys(rows[0], NOT_APPLICABLE), "method": answer, metric: number(metrics[metric], unit)})
    titles = {"trained_parameters": "Trainable parameters", "training_minutes": "Minutes", "p": "p (Holm)"}
    titles |= {name: capital(metric_title(name)) for name in (metric, AT_OFFSET)}
    return Table(f"comparison_{dataset.key}", dataset.caption("comparison"), rows, titles)


def _cost(line: Line, name: str, form: str, unit: float = 1) -> Cell:
    """Mean over a line's runs of a cost of training, from their test results."""
    found = [run.test[name] / unit for run in line.runs if run.test is not None and run.test.get(name)]
    mean = statistics.fmean(found) if found else None
    return NOT_MEASURED if mean is None else Cell(form.format(mean), {"": mean})


def matrix_table(dataset: Dataset, metric: str = "") -> Table:
    """A row per line and missing type, a column per missing ratio; the darker the better.

    Args:
        metric: a metric other than the task's.
    """
    spreads_by_line = {line: line.spreads_of(metric or dataset.spec.monitor) for line in dataset.measured}
    every = [dataset.order(found) for spreads in spreads_by_line.values() for found, _ in spreads.values() if found.n]
    low, width = min(every, default=0), (max(every, default=0) - min(every, default=0)) or 1
    ratios = sorted({pattern.ratio for spreads in spreads_by_line.values() for pattern in spreads})
    rows: list[Row] = []
    for line, spreads in spreads_by_line.items():
        for kind in dict.fromkeys(pattern.kind for pattern in spreads):
            row: Row = {"method": line.label, "missing_type": kind}
            row |= {f"{100 * ratio:g} %": NOT_APPLICABLE for ratio in ratios}
            same_kind = {pattern: spread for pattern, spread in spreads.items() if pattern.kind == kind}
            for pattern, (found, _) in same_kind.items():
                shade = (dataset.order(found) - low) / width if found.n else None
                row[f"{100 * pattern.ratio:g} %"] = replace(mean_std(found, dataset.unit()), shade=shade)
            over = dict.fromkeys(spread.over or "one run" for spread in same_kind.values())
            rows.append(row | {"deviation_over": " or ".join(over)})
    name = "matrix_at_offset" if metric else "matrix"
    return Table(f"{name}_{dataset.key}", dataset.caption(name), rows, {"deviation_over": "± over"})


def read_published(task: str) -> pd.DataFrame:
    """Published results of a dataset, with `set` (`rep`: Table 1 of REP's paper; others: other publications), method,
    source, venue, protocol, missing_type, ratio, metric, value (ratio and value in per cent), `read` (where it was
    read: the paper or notes on it) and note."""
    frame = pd.read_csv(PUBLISHED, dtype=dict.fromkeys(("value", "ratio"), float), keep_default_na=False)
    return frame[frame.dataset == task]


def published_of_rep(dataset: Dataset) -> dict[Pattern, dict[str, Any]]:
    """The table of REP's paper: the rows of `read_published`, keyed by pattern and method."""
    found: dict[Pattern, dict[str, Any]] = {}
    frame = read_published(dataset.key)
    for row in frame[frame.set == "rep"].to_dict("records"):
        pattern = Pattern.of(dataset.spec, row["missing_type"], row["ratio"] / 100, 0.5)
        found.setdefault(pattern, {})[row["method"]] = row
    return found


def published_table(dataset: Dataset) -> Table:
    """Table 1 of REP's paper, with a star on numbers known to differ from the paper they come from."""
    rows: list[Row] = []
    for pattern, by_method in published_of_rep(dataset).items():
        shares = {f"{name}{AVAILABLE}": 100 * share for name, share in available_of(dataset, pattern).items()}
        rows.append({"missing_ratio": 100 * pattern.ratio, **shares})
        best = max(row["value"] for row in by_method.values())
        for method, row in by_method.items():
            value, star = row["value"], "*" if row["note"] else ""
            rows[-1][method] = Cell(f"{value:.2f}{star}", {"": value}, strong=value == best)
    return Table(f"published_{dataset.key}", dataset.caption("published"), rows)


def rivals_table(dataset: Dataset) -> Table:
    """Results from other papers, by method and pattern."""
    frame = read_published(dataset.key)
    rows: list[Row] = [
        {name: row[name] for name in ("method", "missing_type")}
        | {"missing_ratio": row["ratio"], "metric": metric_title(row["metric"])}
        | {"value": Cell(f"{row['value']:.2f}", {"": row["value"]})}
        | {name: row[name] for name in ("source", "venue", "protocol", "read", "note")}
        for row in frame[frame.set != "rep"].to_dict("records")
    ]
    for metric in frame[frame.missing_type == MEAN_OVER_MODES].metric.unique():
        for line in dataset.measured:
            if (found := line.mean_over_modes(metric)) is not None:
                ours: Row = {"method": line.label, "missing_type": MEAN_OVER_MODES, "missing_ratio": 100.0}
                ours |= {"metric": metric_title(metric), "value": mean_std(found, dataset.unit(metric))}
                rows.append(ours | {"source": "ours"})
    return Table(f"rivals_{dataset.key}", dataset.caption("rivals"), rows, {"read": "Read in"})


def ours_table(dataset: Dataset) -> Table:
    """Results of lines trained and evaluated at a pattern of the published table. The difference is to the method of
    the same name in REP's table."""
    rows: list[Row] = []
    for pattern, by_method in published_of_rep(dataset).items():
        for line in dataset.lines:
            ours = line.at_own_pattern
            if ours is None or available_of(dataset, line.pattern) != available_of(dataset, pattern):
                continue
            row: Row = {"trained_at": line.pattern.title, "method": line.variant}
            row["training_seeds"] = len(line.scores_of(dataset.spec.monitor))
            cell = mean_std(ours, dataset.unit())
            row["ours"] = replace(cell, text=cell.text + dataset.marked(line))
            row |= {"published": NOT_APPLICABLE, "difference": absent("not published")}
            if theirs := by_method.get(method_title(line.runs[0])):
                row["published"] = Cell(f"{theirs['value']:.2f}", {"": theirs["value"]})
                row["difference"] = difference(ours.mean - theirs["value"] / 100, dataset.unit())
                if reason := unlike_published(dataset, line):
                    row["difference"] = absent(reason)
            rows.append(row)
    return Table(f"ours_{dataset.key}", dataset.caption("ours"), rows)


def unlike_published(dataset: Dataset, line: Line) -> str:
    """Why results of a line cannot be compared with published ones, such as another test split; "" if they can."""
    backbones = {run.backbone for run in line.runs}
    if other_input(line.runs[0].config):
        return "other input"
    if line.runs[0].config.get("label_ratio", 1) != 1:
        return "fewer labels"
    if additions(line.runs[0].config):
        return "other head or teacher"
    if not dataset.is_published:
        return "other data" if dataset.test_rows else "test split unknown"
    if backbones != {PUBLISHED_BACKBONE}:
        return "backbone unknown" if None in backbones else "other backbone"
    return ""


def available_of(dataset: Dataset, pattern: Pattern) -> dict[str, float]:
    """Share of samples that have each modality."""
    shares = available_shares(dataset.spec.modalities, *pattern)
    return {name: round(share, 9) for name, share in shares.items()}


def confidence_table(dataset: Dataset) -> Table:
    """Every metric of every run with all samples of the same missing type, with confidence intervals."""
    results = [(line, run, found) for line, run, found in dataset.results if found.raw["confidence"]["resamples"]]
    titles = {name: capital(metric_title(name)) for _, _, found in results for name in found.raw["metrics"]}
    rows: list[Row] = []
    for line, run, found in results:
        for name in dataset.spec.type_names:
            row: Row = {"method": line.label, "run": run.tag, "seed": str(run.config["seed"])}
            values, ends = found.raw["by_type"][name], found.raw["confidence"][name]
            cells = {metric: interval(value, ends[metric], dataset.unit(metric)) for metric, value in values.items()}
            rows.append(row | {"test_samples_are": name} | dict.fromkeys(titles, NOT_APPLICABLE) | cells)
    for answer, metrics in dataset.baselines.items() if rows else ():
        baseline_row: Row = {**dict.fromkeys(rows[0], NOT_APPLICABLE), "method": answer}
        cells = {name: number(value, dataset.unit(name)) for name, value in metrics.items()}
        rows.append(baseline_row | cells)
    levels = sorted(
        {tuple(found.raw["confidence"][name] for name in ("level", "resamples")) for _, _, found in results}
    )
    how = " or ".join(f"{100 * level:g} % from {resamples:,} resamples" for level, resamples in levels)
    return Table(f"confidence_{dataset.key}", dataset.caption("confidence", how=how), rows, titles)


def confusion_table(dataset: Dataset) -> Table:
    """The confusion matrix of the best line's first run or, with more than MATRIX_CLASSES classes or without stored
    logits, the most frequent confusions."""
    line, spec = dataset.headline, dataset.spec
    run, found = line.results[0]
    name, facts = f"confusions_{dataset.key}", {"line": line.label, "run": run.tag}
    titles, rows = {"true": "True class", "count": "Samples"}, []
    logits = run.logits if spec.n_classes <= MATRIX_CLASSES else None
    if logits is None:
        for type_name in spec.type_names:
            pairs = [pair for pair in found.raw["confusions"] if pair["type"] == type_name]
            for pair in sorted(pairs, key=lambda pair: -pair["count"])[:CONFUSIONS_SHOWN]:
                row: Row = {"test_samples_are": type_name, "true": pair["true"], "predicted": pair["predicted"]}
                rows.append(row | {"count": pair["count"], "share": number(pair["share"], Unit.of("", 0))})
        return Table(name, dataset.caption("confusions", shown=CONFUSIONS_SHOWN, **facts), rows, titles)
    for type_name, logits_NC in zip(spec.type_names, logits.split.logits_TNC, strict=True):
        counts_CC = multiclass_confusion_matrix(logits_NC.argmax(-1), logits.split.labels, spec.n_classes).numpy()
        shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
        for true, class_name in enumerate(found.raw["class_names"]):
            rows.append({"test_samples_are": type_name, "true": f"{true + 1}. {class_name}"})
            for place, (count, part) in enumerate(zip(counts_CC[true], shares_CC[true], strict=True)):
                cell = Cell(str(count), {"": str(count)}, strong=place == true, shade=float(part))
                rows[-1][f"as_{place + 1}"] = cell
    titles |= {f"as_{place}": str(place) for place in range(1, spec.n_classes + 1)}
    return Table(name, dataset.caption("confusion_matrix", **facts), rows, titles)
