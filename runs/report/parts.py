"""What the report says and in which order: a section per dataset, its parts, and the details of each run."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.text import order_of
from runs.report import figures, tables
from runs.report.figures import Figure
from runs.report.lines import Dataset
from runs.report.results import Pattern, ReportRun
from runs.report.samples import SampleGrid, sample_grid
from runs.report.table import Table
from runs.report.text import counted, dataset_title, listed, percent, spread, without, without_home


@dataclass(frozen=True)
class Note:
    """Something to know, such as what is missing, and a command."""

    text: str
    command: str = ""


@dataclass
class Part:
    """One heading of a section with what stands under it."""

    title: str
    shown: list[Figure | Table | SampleGrid] = field(default_factory=list)
    folded: list[Figure | Table] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


@dataclass
class Section:
    """One dataset, or one search."""

    anchor: str
    title: str
    summary: str
    parts: list[Part]


@dataclass
class RunDetails:
    """Configuration and commands of a run."""

    tag: str
    title: str
    configuration: str
    """JSON."""
    commands: dict[str, str]
    """By what they do."""
    notes: list[Note]


def section_of(dataset: Dataset) -> Section:
    """The parts of a dataset, in order; those that take robustness results only where there are some."""
    runs = [run for line in dataset.lines for run in line.runs]
    notes = [
        Note(f"{run.tag} ({run.place}) has no robustness results. They are made by:", robustness_command(run))
        for run in runs
        if run.robustness is None
    ]
    recorded = [run.tag for run in runs if run.run.curves]
    lacking = listed([run.tag for run in runs if not run.run.curves])
    parts = []
    if dataset.compared:
        parts.append(Part("Methods compared", [figures.comparison_figure(dataset), tables.comparison_table(dataset)]))
    if runs:
        parts.append(
            Part("Robustness curves", [figures.robustness_curves(dataset)] if dataset.measured else [], [], notes)
        )
    if dataset.measured:
        parts.append(Part("Missing type × missing ratio", [figures.heat_map(dataset)], [tables.matrix_table(dataset)]))
    if dataset.spec.published_rows:
        parts.append(
            Part("Published results and ours", [tables.published_table(dataset)], [], _published_notes(dataset))
        )
    if runs:
        notes = [Note(f"metrics.csv of {lacking} is not there or is empty.")] if lacking else []
        parts.append(Part("Training curves", [figures.training_curves(dataset)] if recorded else [], [], notes))
    if dataset.measured:
        parts += _results_parts(dataset)
    return Section(dataset.key, dataset.title, _summary(dataset), parts)


def _summary(dataset: Dataset) -> str:
    """One or two sentences of numbers; without robustness results, the best test result at whatever pattern it is."""
    total = counted(len(dataset.runs), "run")
    if not dataset.measured:
        tested = [(run.test_score, run) for run in dataset.runs if run.test_score is not None]
        if not tested:
            return f"Results are missing: {total}, none of them tested."
        value, run = max(tested, key=lambda entry: order_of(entry[0]))
        assert run.run.tested_at is not None
        return (
            f"The best of {total}, {run.tag}, reaches a test {dataset.metric_title} of {percent(value)} % "
            f"({Pattern.of(run.run.spec, *run.run.tested_at)}). No run has robustness results."
        )
    best = max(dataset.measured, key=lambda line: line.by_type["complete"].order)
    n_measured, n_results = len(dataset.measured), len(dataset.results)
    start = best.label if n_measured == 1 else f"The best of {n_measured} configurations, {best.label},"
    where = {"complete": "where nothing is missing"}
    values = [f"{spread(best.by_type[name])} % {where.get(name, without(name))}" for name in dataset.spec.type_names]
    sentence = f"{start} reaches {dataset.metric_title} {listed(values)}"
    if (own := best.at_own_pattern) is not None:
        sentence += f", and {spread(own)} % at the pattern of its training ({best.pattern})"
    trained = counted(sum(len(line.runs) for line in dataset.lines), "trained run")
    have = "has" if n_results == 1 else "have"
    samples = dataset.results[0][2].samples
    return f"{sentence}. {n_results} of {trained} {have} robustness results, on {samples:,} test samples."


def _published_notes(dataset: Dataset) -> list[Note]:
    notes = []
    published = tables.read_published(dataset.key).to_dict("records")
    outside = [
        f"{listed([run.tag for run in line.runs])} ({line.pattern})"
        for line in dataset.lines
        if not any(tables.is_row(line.pattern, row) for row in published)
    ]
    if outside:
        notes.append(Note(f"Trained at patterns that the published table does not have: {listed(outside)}."))
    expected = tables.PUBLISHED_TEST_ROWS.get(dataset.key)
    found = next((result.test_rows for _, _, result in dataset.results if result.test_rows), None)
    if expected and found and expected != found:
        said = f"the published results are on a test split of {expected:,} items, ours has {found:,}"
        notes.append(Note(f"Not like for like: {said}."))
    return notes


def _results_parts(dataset: Dataset) -> list[Part]:
    """By class in the view that the task has, bars, confusions or ROC; confidence intervals; samples."""
    spec, results = dataset.runs[0].run.spec, dataset.results
    if spec.multilabel:
        bars = [figures.class_bars(dataset, line, number) for number, line in enumerate(dataset.measured, start=1)]
        title = f"Results by {'genre' if dataset.key == 'mmimdb' else 'class'}"
        classes = Part(title, [bars[0]], [*bars[1:], tables.per_class_table(dataset)])
    elif spec.n_classes > 2:
        classes = Part("Most frequent confusions", [tables.confusion_table(dataset)])
    else:
        classes = Part("ROC curves", [figures.roc_curves(dataset)])
    intervals = Part("Confidence intervals", [tables.confidence_table(dataset)])
    if lacking := [run.tag for _, run, found in results if not found.resamples]:
        intervals.notes = [Note(f"Confidence intervals are missing in {listed(lacking)}: made with bootstrap=0.")]
    samples = Part("Test samples that change the most")
    if with_logits := [(run, found) for _, run, found in results if found.test_set]:
        grid = sample_grid(*max(with_logits, key=lambda entry: entry[1].scores(dataset.spec.monitor).value.iloc[0]))
        samples.shown, samples.notes = [grid], [Note(grid.note)] if grid.note else []
    else:
        lacking = [run.tag for _, run, _ in results]
        samples.notes = [Note(f"Samples are missing: there is no logits.arrow in {listed(lacking)}.")]
    return [classes, intervals, samples]


def run_details(one: ReportRun) -> RunDetails:
    """What a run was, and how to repeat it."""
    run, kind = one.run, "Evaluation" if one.run.is_evaluation else "Training"
    commands, notes = {}, []
    if one.environment is None:
        notes.append(Note(f"environment.json of {one.tag} is not there: versions and command are not known."))
    else:
        program, *arguments = one.environment["command"]
        commands[kind] = shlex.join(["python", Path(program).name, *arguments])
    if one.robustness is not None:
        commands["Robustness"] = robustness_command(one)
    if run.test is None and run.config.get("test_after_fit") is not False:  # a run that is not to test lacks nothing
        notes.append(Note(f"test_results.json of {one.tag} is not there."))
    title = f"{one.tag}: {one.place} ({dataset_title(run.dataset)}, {kind.lower()}, seed {run.config['seed']})"
    return RunDetails(one.tag, title, without_home(json.dumps(run.config, indent=2)), commands, notes)


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
