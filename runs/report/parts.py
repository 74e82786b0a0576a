"""What the report says and in which order: a section per dataset, its parts, and the details of each run."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.text import Estimate
from runs.report import figures, tables
from runs.report.figures import Figure
from runs.report.lines import Dataset, Line
from runs.report.results import Pattern, ReportRun
from runs.report.samples import SampleGrid, sample_grid
from runs.report.tables import Column, Table, Value
from runs.report.text import NOT_APPLICABLE, counted, dataset_title, listed, percent, spread, without_home
from runs.run_reader import flat_options


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

    run: ReportRun
    title: str
    configuration: str
    """JSON."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """What a command does, and the command."""
    missing: list[Missing] = field(default_factory=list)


def section_of(dataset: Dataset) -> Section:
    """The parts of a dataset, in order; what is missing is said where it would stand."""
    parts = [
        *([_comparison_part(dataset)] if tables.compared_variants(dataset) else []),
        *_matrix_parts(dataset),
        *([_published_part(dataset)] if dataset.spec.published_rows else []),
        _training_part(dataset),
        _classes_part(dataset),
        _confidence_part(dataset),
        _samples_part(dataset),
    ]
    summary = _summary(dataset) if dataset.measured else _summary_without_robustness(dataset)
    return Section(dataset.key, dataset_title(dataset.key), summary, parts)


def _summary(dataset: Dataset) -> str:
    """One or two sentences of numbers."""
    metric, n_measured = dataset.metric, len(dataset.measured)
    best = max(dataset.measured, key=lambda line: line.by_type("complete", metric) or Estimate(0, 0, 0))
    start = best.label if n_measured == 1 else f"The best of {n_measured} configurations, {best.label},"
    types = {"where nothing is missing": "complete"}
    types |= {f"without any {name}": f"{name} missing" for name in reversed(dataset.spec.modalities)}
    values = listed([f"{spread(best.by_type(name, metric))} % {where}" for where, name in types.items()])
    sentence = f"{start} reaches {dataset.metric_title} {values}"
    if (own := best.at_own_pattern()) is not None:
        sentence += f", and {spread(own)} % at the pattern of its training ({best.pattern})"
    n_results, samples = len(dataset.results), dataset.results[0][2].samples
    have = "has" if n_results == 1 else "have"
    total = counted(sum(len(line.runs) for line in dataset.lines), "trained run")
    return f"{sentence}. {n_results} of {total} {have} robustness results, on {samples:,} test samples."


def _summary_without_robustness(dataset: Dataset) -> str:
    """The best test result, at whatever pattern it is."""
    tested = [(run.test_score, run) for run in dataset.runs if run.test_score is not None]
    total = counted(len(dataset.runs), "run")
    if not tested:
        return f"Results are missing: {total}, none of them tested."
    value, best = max(tested, key=lambda entry: entry[0])
    assert best.run.tested_at is not None
    return (
        f"The best of {total}, {best.tag}, reaches a test {dataset.metric_title} of {percent(value)} % "
        f"({Pattern.of(best.run.spec, *best.run.tested_at)}). No run has robustness results."
    )


def _comparison_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.key}-comparison", "Methods compared")
    part.figures, part.tables = [figures.comparison_figure(dataset)], [tables.comparison_table(dataset)]
    return part


def _matrix_parts(dataset: Dataset) -> list[Part]:
    curves = Part(f"{dataset.key}-curves", "Robustness curves")
    matrix = Part(f"{dataset.key}-matrix", "Missing type × missing ratio")
    curves.missing = [
        Missing(f"{run.tag} ({run.place}) has no robustness results. They are made by:", robustness_command(run))
        for line in dataset.lines
        for run in line.runs
        if run.robustness is None
    ]
    if any(line.patterns for line in dataset.measured):
        curves.figures.append(figures.robustness_curves(dataset))
        matrix.figures.append(figures.heat_map(dataset))
        matrix.folded_tables.append(tables.matrix_table(dataset))
    else:
        curves.missing.append(Missing("The curves are missing: no run has robustness results."))
        matrix.missing.append(Missing("The matrix is missing: no run has robustness results."))
    return [curves, matrix]


def _published_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.key}-published", "Published results and ours", tables=[tables.published_table(dataset)])
    outside = [f"{_tags(line)} ({line.pattern})" for line in tables.outside_published(dataset)]
    if outside:
        part.notes.append(f"Trained at patterns that the published table does not have: {listed(outside)}.")
    expected = tables.PUBLISHED_TEST_ROWS.get(dataset.key)
    found = next((result.test_rows for _, _, result in dataset.results if result.test_rows), None)
    if expected and found and expected != found:
        part.notes.append(
            f"Not like for like: the published results are on a test split of {expected:,} items, ours has {found:,}."
        )
    return part


def _training_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.key}-training", "Training curves")
    drawn = figures.training_curves(dataset)
    if drawn is not None:
        part.figures.append(drawn)
    lacking = [run.tag for line in dataset.lines for run in line.runs if not run.run.curves]
    if lacking:
        part.missing.append(Missing(f"No training curves of {listed(lacking)}: metrics.csv is not there or is empty."))
    if not dataset.lines:
        part.missing.append(Missing("No run of this dataset trained a model."))
    return part


def _classes_part(dataset: Dataset) -> Part:
    """The view by class that the task has: bars, confusions or ROC."""
    spec = dataset.runs[0].run.spec
    if spec.multilabel:
        part = Part(f"{dataset.key}-classes", f"Results by {'genre' if dataset.key == 'mmimdb' else 'class'}")
        drawn = [
            figures.class_bars(dataset, line, number)
            for number, line in enumerate(dataset.measured, start=1)
            if line.by_class
        ]
        part.figures, part.folded_figures = drawn[:1], drawn[1:]
        part.folded_tables = [tables.per_class_table(dataset)] if drawn else []
    elif spec.n_classes > 2:
        part = Part(f"{dataset.key}-confusions", "Most frequent confusions")
        table = tables.confusion_table(dataset)
        part.tables = [table] if table.rows else []
    else:
        part = Part(f"{dataset.key}-roc", "ROC curves")
        there = any(result.roc for _, _, result in dataset.results)
        part.figures = [figures.roc_curves(dataset)] if there else []
    if not part.figures and not part.tables:
        part.missing.append(Missing(f"{part.title} are missing: no run has robustness results with them."))
    return part


def _confidence_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.key}-confidence", "Confidence intervals")
    without = [run.tag for _, run, result in dataset.results if not result.resamples]
    if len(without) < len(dataset.results):
        part.tables.append(tables.confidence_table(dataset))
    if without:
        part.missing.append(Missing(f"Confidence intervals are missing in {listed(without)}: made with bootstrap=0."))
    if not dataset.results:
        part.missing.append(Missing("Confidence intervals are missing: no run has robustness results."))
    return part


def _samples_part(dataset: Dataset) -> Part:
    part = Part(f"{dataset.key}-samples", "Test samples that change the most")
    with_logits = [(_complete_score(run, dataset), run, result) for _, run, result in dataset.results if result.logits]
    if with_logits:
        _, run, result = max(with_logits, key=lambda entry: entry[0])
        part.grid = sample_grid(run, result)
        part.missing += [Missing(part.grid.note)] if part.grid.note else []
    elif dataset.results:
        lacking = listed([run.tag for _, run, _ in dataset.results])
        part.missing.append(Missing(f"Samples are missing: there is no logits.arrow in {lacking}."))
    else:
        part.missing.append(Missing("Samples are missing: no run has robustness results."))
    return part


def _complete_score(run: ReportRun, dataset: Dataset) -> float:
    found = Line("", "", (run,)).by_type("complete", dataset.metric)
    return found.mean if found else 0.0


def run_details(one: ReportRun) -> RunDetails:
    """What a run was, and how to repeat it."""
    run = one.run
    kind = "evaluation" if run.is_evaluation else "training"
    details = RunDetails(
        one,
        f"{one.tag}: {one.place} ({dataset_title(run.dataset)}, {kind}, seed {run.config['seed']})",
        without_home(json.dumps(run.config, indent=2)),
    )
    if one.environment is None:
        details.missing.append(
            Missing(f"environment.json of {one.tag} is not there: versions and command are not known.")
        )
    else:
        program, *arguments = one.environment["command"]
        details.commands.append((kind.capitalize(), shlex.join(["python", Path(program).name, *arguments])))
    if one.robustness is not None:
        details.commands.append(("Robustness", robustness_command(one)))
    if run.test is None and run.config.get("test_after_fit") is not False:  # a run that is not to test lacks nothing
        details.missing.append(Missing(f"test_results.json of {one.tag} is not there."))
    return details


def options_table(runs: Sequence[ReportRun], defaults: dict[str, Any]) -> Table:
    """The options in which a run differs from the defaults, a column per run."""
    default = {name: _option_text(value) for name, value in flat_options(defaults).items()}
    options = [{name: _option_text(value) for name, value in flat_options(run.run.config).items()} for run in runs]
    names = dict.fromkeys(name for of_run in options for name in of_run)
    differing = [name for name in names if any(of_run.get(name) != default.get(name) for of_run in options)]
    rows: list[list[Value]] = [
        [name, default.get(name), *(of_run.get(name) for of_run in options)] for name in differing
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
        {(row, 2 + r) for row, cells in enumerate(rows) for r in range(len(runs)) if cells[2 + r] != cells[1]},
    )


def _option_text(value: Any) -> str:
    """An option's value as text; nothing and None are the same, as are 1 and 1.0."""
    if value is None or value == "":
        return "none"
    return f"{value:.12g}" if isinstance(value, float) else without_home(str(value))


def robustness_command(one: ReportRun) -> str:
    """The command that makes the robustness results of a run."""
    options = [
        f"load_path={one.run.folder / 'best.ckpt'}",
        f"task_finetune_{one.run.config['task']}",
        f"data_root={one.run.config['data_root']}",
    ]
    return without_home(shlex.join(["python", "run.py", "robustness", "with", *options]))


def report_command(places: Sequence[Path]) -> str:
    """The command that makes this report of the folders `places`."""
    folders = [without_home(str(folder)) for folder in places]
    return shlex.join(["python", "run.py", "report", "with", f"runs={folders[0] if len(folders) == 1 else folders}"])


def _tags(line: Line) -> str:
    return listed([run.tag for run in line.runs])
