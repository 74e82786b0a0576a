"""What the report says and in which order: a section per dataset, its parts, and the details of each run."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import DEFAULTS
from report import figures
from report.collect import Run
from report.comparison import compared_variants, comparison_figure, comparison_table
from report.estimate import Estimate
from report.figures import Figure
from report.samples import SampleGrid, sample_grid
from report.series import Dataset, Pattern, Series, flat
from report.tables import (
    PUBLISHED_TEST_ROWS,
    Column,
    Table,
    Value,
    confidence_table,
    confusion_table,
    matrix_table,
    outside_published,
    per_class_table,
    published_table,
)
from report.text import NOT_APPLICABLE, counted, dataset_title, listed, percent, spread, without_home
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import TYPE_NAMES


@dataclass(frozen=True)
class Missing:
    """Something that is not there, and the command that makes it."""

    text: str
    command: str = ""


@dataclass
class Part:
    """One heading of a section with what stands under it."""

    anchor: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    folded_figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded_tables: list[Table] = field(default_factory=list)
    grid: SampleGrid | None = None
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass
class Section:
    """One dataset."""

    anchor: str
    title: str
    summary: str
    parts: list[Part]


@dataclass
class RunDetails:
    """Configuration and commands of a run."""

    run: Run
    title: str
    configuration: str
    """JSON."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """What a command does, and the command."""
    missing: list[Missing] = field(default_factory=list)


def section_of(dataset: Dataset) -> Section:
    """The parts of a dataset, in order; what is missing is said where it would stand."""
    title = dataset_title(dataset.task)
    parts = [
        *([_comparison_part(dataset)] if compared_variants(dataset) else []),
        _curves_part(dataset),
        _matrix_part(dataset),
        *([_published_part(dataset)] if dataset.task in DATASETS else []),
        _training_part(dataset),
        *_classes_parts(dataset),
        _confidence_part(dataset),
        _samples_part(dataset),
    ]
    return Section(dataset.task, title, _summary(dataset), parts)


def _summary(dataset: Dataset) -> str:
    """One or two sentences of numbers."""
    if not dataset.measured:
        return _summary_without_robustness(dataset)
    metric = dataset.metric
    best = max(dataset.measured, key=lambda series: series.by_type("complete", metric) or Estimate(0, None))
    n_measured = len(dataset.measured)
    start = best.label if n_measured == 1 else f"The best of {n_measured} configurations, {best.label},"
    values = [f"{spread(best.by_type(name, metric))} %" for name in TYPE_NAMES]
    sentence = (
        f"{start} reaches {dataset.metric_title} {values[0]} where nothing is missing, {values[1]} without any text "
        f"and {values[2]} without any image"
    )
    own = best.at_own_pattern()
    if own is not None:
        sentence += f", and {spread(own)} % at the pattern of its training ({best.pattern})"
    results = [robustness for series in dataset.measured for _, robustness in series.results]
    have = "has" if len(results) == 1 else "have"
    total = counted(sum(len(series.runs) for series in dataset.series), "trained run")
    return f"{sentence}. {len(results)} of {total} {have} robustness results, on {results[0].samples:,} test samples."


def _summary_without_robustness(dataset: Dataset) -> str:
    """The best test result, at whatever pattern it is."""
    metric = dataset.metric
    tested = [
        (float(run.test["metrics"][metric]), run.test["missing_pattern"], run) for run in dataset.runs if run.test
    ]
    total = counted(len(dataset.runs), "run")
    if not tested:
        return f"Results are missing: {total}, none of them tested."
    value, raw, run = max(tested, key=lambda entry: entry[0])
    pattern = Pattern.of(raw["missing_type"], raw["ratio"], raw["both_ratio"])
    return (
        f"The best of {total}, {run.tag}, reaches a test {dataset.metric_title} of {percent(value)} % ({pattern}). "
        "No run has robustness results."
    )


def _comparison_part(dataset: Dataset) -> Part:
    return Part(
        f"{dataset.task}-comparison",
        "Methods compared",
        figures=[comparison_figure(dataset)],
        tables=[comparison_table(dataset)],
    )


def _curves_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-curves", "Robustness curves", missing=_without_robustness(dataset))
    if any(series.patterns for series in dataset.measured):
        part.figures.append(figures.robustness_curves(dataset))
    else:
        part.missing.append(Missing("The curves are missing: no run has robustness results."))
    return part


def _matrix_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-matrix", "Missing type × missing ratio")
    if any(series.patterns for series in dataset.measured):
        part.figures.append(figures.heat_map(dataset))
        part.folded_tables.append(matrix_table(dataset))
    else:
        part.missing.append(Missing("The matrix is missing: no run has robustness results."))
    return part


def _published_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-published", "Published results and ours", tables=[published_table(dataset)])
    outside = outside_published(dataset)
    if outside:
        told = listed([f"{_tags(series)} ({series.pattern})" for series in outside])
        part.notes.append(f"Trained at patterns that the published table does not have: {told}.")
    expected = PUBLISHED_TEST_ROWS.get(dataset.task)
    found = next((r.logits.rows for series in dataset.measured for _, r in series.results if r.logits), None)
    if expected and found and expected != found:
        part.notes.append(
            f"Not like for like: the published results are on a test split of {expected:,} items, ours has {found:,}."
        )
    return part


def _training_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-training", "Training curves")
    drawn = figures.training_curves(dataset)
    if drawn is not None:
        part.figures.append(drawn)
    lacking = [run.tag for s in dataset.series for run in s.runs if not run.curves]
    if lacking:
        part.missing.append(Missing(f"No training curves of {listed(lacking)}: metrics.csv is not there or is empty."))
    if not dataset.series:
        part.missing.append(Missing("No run of this dataset trained a model."))
    return part


def _classes_parts(dataset: Dataset) -> list[Part]:
    """The view by class that the task has: bars, confusions or ROC."""
    data = dataset.runs[0].data
    if data.multilabel:
        part = Part(f"{dataset.task}-classes", f"Results by {'genre' if dataset.task == 'mmimdb' else 'class'}")
        drawn = [
            figures.class_bars(dataset, series, number)
            for number, series in enumerate(dataset.measured, start=1)
            if series.classes
        ]
        part.figures, part.folded_figures = drawn[:1], drawn[1:]
        part.folded_tables = [per_class_table(dataset)] if drawn else []
        there = bool(drawn)
    elif data.n_classes > 2:
        part = Part(f"{dataset.task}-confusions", "Most frequent confusions")
        table = confusion_table(dataset)
        part.tables = [table] if table.rows else []
        there = bool(table.rows)
    else:
        part = Part(f"{dataset.task}-roc", "ROC curves")
        there = any(robustness.roc for series in dataset.measured for _, robustness in series.results)
        part.figures = [figures.roc_curves(dataset)] if there else []
    if not there:
        part.missing.append(Missing(f"{part.title} are missing: no run has robustness results with them."))
    return [part]


def _confidence_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-confidence", "Confidence intervals")
    results = [result for series in dataset.measured for result in series.results]
    without = [run.tag for run, robustness in results if not robustness.resamples]
    if len(without) < len(results):
        part.tables.append(confidence_table(dataset))
    if without:
        part.missing.append(Missing(f"Confidence intervals are missing in {listed(without)}: made with bootstrap=0."))
    if not results:
        part.missing.append(Missing("Confidence intervals are missing: no run has robustness results."))
    return part


def _samples_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.task}-samples", "Test samples that change the most")
    results = [result for series in dataset.measured for result in series.results]
    with_logits = [(run, robustness) for run, robustness in results if robustness.logits]
    if with_logits:
        run, robustness = max(with_logits, key=lambda result: result[1].by_type["complete"][dataset.metric])
        part.grid = sample_grid(run, robustness)
        part.missing += [Missing(part.grid.note)] if part.grid.note else []
    elif results:
        lacking = listed([run.tag for run, _ in results])
        part.missing.append(Missing(f"Samples are missing: there is no logits.arrow in {lacking}."))
    else:
        part.missing.append(Missing("Samples are missing: no run has robustness results."))
    return part


def _without_robustness(dataset: Dataset) -> list[Missing]:
    """The runs of the dataset that trained and have no robustness results."""
    return [
        Missing(f"{run.tag} ({run.place}) has no robustness results. They are made by:", _robustness_command(run))
        for series in dataset.series
        for run in series.runs
        if run.robustness is None
    ]


def run_details(run: Run) -> RunDetails:
    """What a run was, and how to repeat it."""
    kind = "evaluation" if run.is_evaluation else "training"
    details = RunDetails(
        run,
        f"{run.tag}: {run.place} ({dataset_title(run.task)}, {kind}, seed {run.config['seed']})",
        without_home(json.dumps(run.config, indent=2)),
    )
    if run.environment is None:
        details.missing.append(
            Missing(f"environment.json of {run.tag} is not there: versions and command are not known.")
        )
    else:
        program, *arguments = run.environment["command"]
        details.commands.append((kind.capitalize(), shlex.join(["python", Path(program).name, *arguments])))
    if run.robustness is not None:
        details.commands.append(("Robustness", _robustness_command(run)))
    if run.test is None and run.config.get("test_after_fit") is not False:  # a run that is not to test lacks nothing
        details.missing.append(Missing(f"test_results.json of {run.tag} is not there."))
    return details


def options_table(runs: Sequence[Run]) -> Table:
    """The options in which a run differs from the defaults, a column per run."""
    defaults = {name: _said(value) for name, value in flat(dict(DEFAULTS))}
    options = {run: {name: _said(value) for name, value in flat(run.config)} for run in runs}
    names = dict.fromkeys(name for of_run in options.values() for name in of_run)
    differing = [name for name in names if any(of_run.get(name) != defaults.get(name) for of_run in options.values())]
    rows: list[list[Value]] = [
        [name, defaults.get(name), *(options[run].get(name) for run in runs)] for name in differing
    ]
    return Table(
        "options",
        "Options that differ from the defaults; those that do in bold. What is not set is none.",
        (
            Column("option", "Option"),
            Column("default", "Default", "code", NOT_APPLICABLE),
            *(Column(run.tag, run.tag, "code", NOT_APPLICABLE) for run in runs),
        ),
        rows,
        {(place, 2 + r) for place, row in enumerate(rows) for r in range(len(runs)) if row[2 + r] != row[1]},
    )


def versions_table(runs: Sequence[Run]) -> Table:
    """Packages, machine and commit, a column per run."""
    versions = {run: _versions(run.environment) for run in runs}
    names = dict.fromkeys(name for of_run in versions.values() for name in of_run)
    return Table(
        "versions",
        "What the runs ran on.",
        (Column("what", ""), *(Column(run.tag, run.tag, "code", "missing") for run in runs)),
        [[name, *(versions[run].get(name) for run in runs)] for name in names],
    )


def _said(value: Any) -> str:
    """An option's value as text; nothing and None are the same, as are 1 and 1.0."""
    if value is None or value == "":
        return "none"
    if isinstance(value, float):
        return f"{value:.12g}"
    return without_home(str(value))


def _versions(environment: dict[str, Any] | None) -> dict[str, str]:
    if environment is None:
        return {}
    machine, git = environment.get("machine") or {}, environment.get("git") or {}
    changed = len(git.get("changed") or [])
    return {
        "python": str(environment.get("python")),
        **{name: str(version) for name, version in environment["packages"].items()},
        "platform": str(machine.get("platform")),
        "cores": str(machine.get("cores")),
        "GPUs": ", ".join(map(str, machine.get("gpus") or [])) or "none",
        "commit": str(git.get("commit", "not known"))[:12]
        + (f" + {counted(changed, 'changed file')}" if changed else ""),
    }


def _robustness_command(run: Run) -> str:
    options = [
        f"load_path={run.folder / 'best.ckpt'}",
        f"task_finetune_{run.config['task']}",
        f"data_root={run.config.get('data_root')}",
    ]
    return without_home(shlex.join(["python", "run.py", "robustness", "with", *options]))


def report_command(runs: Sequence[Path]) -> str:
    """The command that makes this report of the folders `runs`."""
    folders = [without_home(str(folder)) for folder in runs]
    return shlex.join(["python", "run.py", "report", "with", f"runs={folders[0] if len(folders) == 1 else folders}"])


def _tags(series: Series) -> str:
    return listed([run.tag for run in series.runs])
