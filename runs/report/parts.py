"""What the report says and in which order: a section per dataset, its parts, and the details of each run."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.text import estimate
from runs.report import figures, tables
from runs.report.figures import Figure
from runs.report.lines import Dataset
from runs.report.results import Pattern, ReportRun
from runs.report.samples import SampleGrid, sample_grid
from runs.report.table import Table
from runs.report.text import counted, dataset_title, listed, listed_runs, without, without_home

CLASSES_SHOWN = 3
"""Lines whose results by class are not folded."""


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
    folded: dict[str, Figure | Table] = field(default_factory=dict)
    """By what is shown of them while they are."""
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


def section_of(dataset: Dataset) -> Section:
    """The parts of a dataset, in order; those that take robustness results only where there are some."""
    runs = [run for line in dataset.lines for run in line.runs]
    parts = []
    if dataset.compared:
        parts.append(Part("Methods compared", [figures.comparison_figure(dataset), tables.comparison_table(dataset)]))
    if runs:
        part = Part("Robustness curves", [figures.robustness_curves(dataset)] if dataset.measured else [])
        if lacking := [run for run in runs if run.robustness is None]:
            have = "has" if len(lacking) == 1 else "have"
            named = ", ".join(f"{run.tag} ({run.place})" for run in lacking) if len(lacking) <= 3 else _tags(lacking)
            text = f"{named} {have} no robustness results. This command makes them:"
            part.notes.append(Note(text, robustness_command(lacking)))
        parts.append(part)
    if dataset.measured:
        parts.append(Part("Missing type × missing ratio", [tables.matrix_table(dataset)]))
    if len(tables.read_published(dataset.key)):
        published, ours = tables.published_table(dataset), tables.ours_table(dataset)
        part = Part("Published results and ours", [ours] if ours.rows else [], notes=_published_notes(dataset))
        if dataset.is_published:
            part.shown.append(published)
        else:
            part.folded = {"Published results": published}
        parts.append(part)
    if runs:
        parts.append(Part("Training curves"))
        if recorded := [run for run in runs if run.run.curves]:
            first, *loss = figures.training_curves(dataset)
            parts[-1].shown, parts[-1].folded = [first], {"Training loss": loss[0]} if loss else {}
        if lacking := [run for run in runs if run not in recorded]:
            parts[-1].notes = [Note(f"metrics.csv of {_tags(lacking)} is not there or is empty.")]
    if dataset.measured:
        parts += _results_parts(dataset)
    return Section(dataset.key, dataset.title, _summary(dataset), parts)


def _tags(runs: Sequence[ReportRun]) -> str:
    return listed_runs([run.tag for run in runs])


def _summary(dataset: Dataset) -> str:
    """One or two sentences of numbers; without robustness results, the best test result at whatever pattern it is."""
    total = counted(len(dataset.runs), "run")
    if not dataset.measured:
        tested = [(run.test_score, run) for run in dataset.runs if run.test_score is not None]
        if not tested:
            return f"Results are missing: {total}, none of them tested."
        value, run = max(tested, key=lambda entry: dataset.order(estimate([entry[0]])))
        assert run.run.tested_at is not None
        return (
            f"The best of {total}, {run.tag}, reaches a test {dataset.metric_title} of "
            f"{dataset.unit().full(value)} ({Pattern.of(run.run.spec, *run.run.tested_at)}). "
            f"No run has robustness results."
        )
    best = dataset.headline
    n_measured, n_results = len(dataset.measured), len(dataset.results)
    start = best.label if n_measured == 1 else f"The best of {n_measured} configurations, {best.label},"
    where = {"complete": "where nothing is missing"}
    values = [f"{dataset.unit().full(found)} {where.get(name, without(name))}" for name, found in best.by_type.items()]
    sentence = f"{start} reaches {dataset.metric_title} {listed(values)}"
    if (own := best.at_own_pattern) is not None:
        sentence += f", and {dataset.unit().full(own)} at the pattern of its training ({best.pattern})"
    trained = counted(sum(len(line.runs) for line in dataset.lines), "trained run")
    have = "has" if n_results == 1 else "have"
    samples = dataset.results[0][2].samples
    measured = f"{n_results} of {trained} {have} robustness results, on {samples:,} test samples."
    return f"{sentence}. {measured}{dataset.baseline_text}"


def _published_notes(dataset: Dataset) -> list[Note]:
    notes = []
    if not dataset.is_published:
        [expected, *_] = dataset.spec.published_rows["test"]
        found = f"ours has {dataset.test_rows:,}" if dataset.test_rows else "the size of ours is not known"
        text = f"the published results are on a test split of {expected:,} items, {found}"
        notes.append(Note(f"Not like for like: {text}."))
    published = tables.read_published(dataset.key).to_dict("records")
    outside: dict[Pattern, list[ReportRun]] = {}
    for line in dataset.lines:
        if not any(tables.is_row(line.pattern, row) for row in published):
            outside.setdefault(line.pattern, []).extend(line.runs)
    if outside:
        named = listed([f"{_tags(runs)} ({pattern})" for pattern, runs in outside.items()])
        notes.append(Note(f"Trained at patterns that the published table does not have: {named}."))
    return notes


def _results_parts(dataset: Dataset) -> list[Part]:
    """By class in the view that the task has, bars, confusions or ROC; confidence intervals; samples."""
    spec, results = dataset.spec, dataset.results
    if spec.multilabel:
        lines = sorted(dataset.measured, key=lambda line: line is not dataset.headline)
        first, rest = lines[:CLASSES_SHOWN], lines[CLASSES_SHOWN:]
        title = f"Results by {'genre' if dataset.key == 'mmimdb' else 'class'}"
        classes = Part(title, [figures.class_figure(dataset, first, 1)])
        if rest:
            classes.folded["Of the other configurations"] = figures.class_figure(dataset, rest, 2)
        classes.folded["All numbers"] = tables.per_class_table(dataset)
    elif spec.n_classes == 1:
        classes = None  # a regression
    elif spec.n_classes > 2:
        classes = Part("Most frequent confusions", [tables.confusion_table(dataset)])
    else:
        classes = Part("ROC curves", [figures.roc_curves(dataset)])
    intervals = Part("Confidence intervals", [tables.confidence_table(dataset)])
    if lacking := [run for _, run, found in results if not found.raw["confidence"]["resamples"]]:
        intervals.notes = [Note(f"Confidence intervals are missing in {_tags(lacking)}: made with bootstrap=0.")]
    samples = Part("Test samples that change the most")
    if with_logits := [(run, found) for run, found in dataset.headline.results if found.logits is not None]:
        best = max(with_logits, key=lambda entry: entry[0].score_at_own_pattern or 0)
        grid = sample_grid(*best, dataset.headline.label)
        samples.shown, samples.notes = [grid], [Note(grid.note)] if grid.note else []
    else:
        lacking = [run for run, _ in dataset.headline.results]
        samples.notes = [Note(f"Samples are missing: there is no logits.arrow in {_tags(lacking)}.")]
    return [*([classes] if classes else []), intervals, samples]


def missing_notes(runs: Sequence[ReportRun]) -> list[Note]:
    """Files that runs lack, a note for each kind."""
    unknown = [run for run in runs if run.environment is None]
    untested = [run for run in runs if run.run.test is None and run.run.config.get("test_after_fit") is not False]
    notes = []
    if unknown:
        notes.append(Note(f"environment.json of {_tags(unknown)} is not there: versions and command are not known."))
    if untested:
        notes.append(Note(f"test_results.json of {_tags(untested)} is not there."))
    return notes


def run_details(one: ReportRun) -> RunDetails:
    """What a run was, and how to repeat it."""
    kind, commands = "Evaluation" if one.run.is_evaluation else "Training", {}
    if one.environment is not None:
        program, *arguments = one.environment["command"]
        commands[kind] = shlex.join(["python", Path(program).name, *arguments])
    if one.robustness is not None:
        commands["Robustness"] = robustness_command([one])
    title = f"{one.tag}: {one.place} ({dataset_title(one.run.dataset)}, {kind.lower()}, seed {one.run.config['seed']})"
    return RunDetails(one.tag, title, without_home(json.dumps(one.run.config, indent=2)), commands)


def robustness_command(runs: Sequence[ReportRun]) -> str:
    """The command that makes the robustness results of runs of one dataset."""
    paths, config = [str(one.run.folder / "best.ckpt") for one in runs], runs[0].run.config
    options = [
        f"load_path={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}",
        f"task_finetune_{config['task']}",
        f"data_root={config['data_root']}",
    ]
    return without_home(shlex.join(["python", "run.py", "robustness", "with", *options]))


def report_command(places: Sequence[Path]) -> str:
    """The command that makes this report of the folders `places`."""
    folders = [without_home(str(folder)) for folder in places]
    return shlex.join(["python", "run.py", "report", "with", f"runs={folders[0] if len(folders) == 1 else folders}"])
