"""What the report says and in which order: a section per dataset, its parts, and the details of each run."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.text import AT_OFFSET, counted, order_of
from runs.report import figures, tables
from runs.report.figures import Figure
from runs.report.lines import Dataset, Line
from runs.report.results import ReportRun, listed_runs
from runs.report.samples import SampleGrid, sample_grid
from runs.report.table import Table
from runs.report.text import listed, without, without_home

CLASSES_SHOWN = 3
"""Lines whose results by class are shown; per_class.csv of each run has all."""


class Note(NamedTuple):
    """Something to know, such as what is missing, and a command."""

    text: str
    command: str = ""


@dataclass
class Part:
    """One heading of a section with what stands under it."""

    title: str
    shown: list[Figure | Table | SampleGrid] = field(default_factory=list)
    folded: dict[str, Figure | Table] = field(default_factory=dict)  # by what is shown of them while they are
    notes: list[Note] = field(default_factory=list)


class Section(NamedTuple):
    """One dataset, or one search."""

    anchor: str
    title: str
    summary: str
    parts: list[Part]


def section_of(dataset: Dataset) -> Section:
    """The parts of a dataset, in order; those that take robustness results only where there are some."""
    trained, parts = [run for line in dataset.lines for run in line.runs], []
    runs = [run for run in trained if not run.pretrains]
    if dataset.compared:
        parts.append(Part("Methods compared", [figures.comparison_figure(dataset), tables.comparison_table(dataset)]))
    if runs:
        parts.append(Part("Robustness curves", [figures.robustness_curves(dataset)] if dataset.measured else []))
        if lacking := [run for run in runs if run.robustness is None]:
            few = ", ".join(f"{run.tag} ({run.place})" for run in lacking) if len(lacking) <= 3 else ""
            text = f"{few or listed_runs(lacking)}: no robustness results. This command makes them:"
            parts[-1].notes.append(Note(text, robustness_command(lacking)))
    if dataset.measured:
        parts.append(Part("Missing type × missing ratio", [tables.matrix_table(dataset)]))
        if dataset.decides_elsewhere:
            parts[-1].shown.append(tables.matrix_table(dataset, AT_OFFSET))
    published = {"Published results": tables.published_table(dataset), "Other papers": tables.rivals_table(dataset)}
    if published := {title: table for title, table in published.items() if table.rows}:
        ours = tables.ours_table(dataset)
        parts.append(Part("Published results and ours", [ours] if ours.rows else []))
        if dataset.is_published:
            parts[-1].shown += published.values()
        else:
            [expected, *_] = dataset.spec.published_rows["test"]
            found = f"ours has {dataset.test_rows:,}" if dataset.test_rows else "the size of ours is not known"
            text = f"the published results are on a test split of {expected:,} items, {found}"
            parts[-1].notes.append(Note(f"Not like for like: {text}."))
            parts[-1].folded |= published
    if trained:
        parts.append(_training_part(dataset, trained))
    if dataset.measured:
        parts += _results_parts(dataset)
    return Section(dataset.key, dataset.title, _summary(dataset), parts)


def _summary(dataset: Dataset) -> str:
    """One or two sentences of numbers, of the robustness results."""
    total, full = counted(len(dataset.runs), "run"), dataset.unit().full
    if not dataset.measured:
        return f"Results are missing: {total}, none of them with robustness results."
    line, n_measured, n_results = dataset.headline, len(dataset.measured), len(dataset.results)
    start = line.label if n_measured == 1 else f"The best of {n_measured} configurations, {line.label},"
    where = {"complete": "where nothing is missing"}
    values = listed([f"{full(found)} {where.get(name, without(name))}" for name, found in line.by_type.items()])
    own = line.at_own_pattern
    at_own = f", and {full(own)} at the pattern of its training ({line.pattern.title})" if own else ""
    trained = counted(sum(not run.pretrains for line in dataset.lines for run in line.runs), "trained run")
    samples = counted(dataset.results[0][2].samples, "test sample")
    measured = f"{n_results} of {trained} with robustness results, on {samples}."
    return f"{start} reaches {dataset.metric_title} {values}{at_own}. {measured}{dataset.baseline_text}"


def _training_part(dataset: Dataset, runs: Sequence[ReportRun]) -> Part:
    part, metric, unit = Part("Training curves"), f"val/{dataset.spec.monitor}", dataset.unit()
    if any(len(run.curve(metric)) for run in runs):
        part.shown.append(figures.training_figure(dataset, metric, f"Validation {dataset.axis_title}", unit.factor))
    if any(len(run.curve("train/loss")) for run in runs):
        part.folded["Training loss"] = figures.training_figure(dataset, "train/loss", "Training loss", 1)
    if lacking := [run for run in runs if not run.pretrains and not len(run.curve(metric))]:
        part.notes.append(Note(f"Missing of {listed_runs(lacking)}: metrics.csv has no {metric}, or is not there."))
    return part


def _results_parts(dataset: Dataset) -> list[Part]:
    """By class in the view that the task has, bars, confusions or ROC; confidence intervals; samples."""
    spec, parts, best = dataset.spec, [], dataset.headline
    if spec.multilabel:
        first = sorted(dataset.measured, key=lambda line: line is not best)[:CLASSES_SHOWN]
        title = f"Results by {'genre' if dataset.key == 'mmimdb' else 'class'}"
        parts.append(Part(title, [figures.class_figure(dataset, first)]))
        if more := len(dataset.measured) - len(first):
            parts[-1].notes = [
                Note(f"Not shown: {counted(more, 'other configuration')}; see per_class.csv of their runs.")
            ]
    elif spec.n_classes > 2:
        table = tables.confusion_table(dataset)
        parts.append(Part("Confusion matrix" if "as_1" in table.columns else "Most frequent confusions", [table]))
    elif spec.n_classes == 2:
        parts.append(Part("ROC curves", [figures.roc_curves(dataset)]))
    parts.append(Part("Confidence intervals", [tables.confidence_table(dataset)]))
    if lacking := [run for _, run, found in dataset.results if not found.raw["confidence"]["resamples"]]:
        parts[-1].notes = [Note(f"Confidence intervals are missing in {listed_runs(lacking)}: made with bootstrap=0.")]
    parts.append(Part("Test samples that change the most"))
    if (run := run_of_samples(best)) is not None:
        grid = sample_grid(run, best.label)
        parts[-1].shown, parts[-1].notes = [grid], [Note(grid.note)] if grid.note else []
    else:
        tags = listed_runs([run for run, _ in best.results])
        parts[-1].notes = [Note(f"Samples are missing: there is no logits.arrow in {tags}.")]
    return parts


def run_of_samples(line: Line) -> ReportRun | None:
    """Of the runs of a line that have stored logits the best one at the pattern of the training."""

    def order(run: ReportRun) -> float:
        found = run.at_own_pattern(line.spec.monitor)
        return order_of(math.nan if found is None else found, line.spec.monitor)

    return max((run for run, _ in line.results if run.test_set), key=order, default=None)


def robustness_command(runs: Sequence[ReportRun]) -> str:
    """The command that makes the robustness results of runs of one dataset."""
    paths, config = [str(run.folder / "best.ckpt") for run in runs], runs[0].config
    options = [
        f"load_path={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}",
        f"task_finetune_{config['task']}",
        f"data_root={config['data_root']}",
    ]
    return without_home(shlex.join(["python", "run.py", "robustness", "with", *options]))


def report_command(places: Sequence[Path]) -> str:
    """The command that makes a report of the folders `places`."""
    folders = ",".join(map(str, places))
    return without_home(shlex.join(["python", "run.py", "report", "with", f"runs=[{folders}]"]))
