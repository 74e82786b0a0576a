"""The content of the report in order: a section per dataset, and its parts."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.text import AT_OFFSET, LOWER_IS_BETTER, counted, order_of
from runs.report import figures, tables
from runs.report.figures import Figure
from runs.report.lines import Dataset, Line
from runs.report.results import ReportRun, listed_runs
from runs.report.samples import sample_table
from runs.report.table import Table
from runs.report.text import in_words, without, without_home
from runs.run_reader import flat_options

CLASSES_SHOWN = 3
"""Maximum number of lines whose results by class are shown; per_class.csv of each run has them all."""


class Note(NamedTuple):
    """A note, for example on missing results, and a command or other verbatim text."""

    text: str
    verbatim: str = ""


Item = Figure | Table | Note


@dataclass
class Part:
    """A heading of a section, unless it is empty, and the content under it."""

    title: str
    shown: list[Item] = field(default_factory=list)
    folded: dict[str, Item] = field(default_factory=dict)  # keyed by the title shown while folded


class Section(NamedTuple):
    """The section of a dataset or a search, whose summaries stand at the top of the page, or one about all runs."""

    anchor: str
    title: str
    summary: str
    parts: list[Part]


def section_of(dataset: Dataset) -> Section:
    """The section of a dataset; parts that need robustness results are left out if there are none."""
    trained, parts = [run for line in dataset.lines for run in line.runs], []
    runs = [run for run in trained if not run.pretrains]
    if dataset.compared:
        parts.append(Part("Methods compared", [figures.comparison_figure(dataset), tables.comparison_table(dataset)]))
    if runs:
        parts.append(Part("Robustness curves", [figures.robustness_curves(dataset)] if dataset.measured else []))
        if lacking := [run for run in runs if run.robustness is None and (run.folder / "best.ckpt").is_file()]:
            few = ", ".join(f"{run.tag} ({run.place})" for run in lacking) if len(lacking) <= 3 else ""
            text = f"{few or listed_runs(lacking)}: no robustness results. This command computes them:"
            parts[-1].shown.append(Note(text, robustness_command(lacking)))
        parts[-1].shown += [Note(f"{run.tag} ({run.place}) failed: {run.failure}") for run in runs if run.failure]
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
            found = f"ours has {dataset.test_rows:,}" if dataset.test_rows else "the size of ours is unknown"
            text = f"the published results are on a test split of {expected:,} items, {found}"
            parts[-1].shown.append(Note(f"Not comparable: {text}."))
            parts[-1].folded |= published
    if trained:
        parts.append(_training_part(dataset, trained))
    if dataset.measured:
        parts += _results_parts(dataset)
    return Section(dataset.key, dataset.title, _summary(dataset), parts)


def _summary(dataset: Dataset) -> str:
    """A summary of the robustness results in a few sentences."""
    total, full = counted(len(dataset.runs), "run"), dataset.unit().full
    if not dataset.measured:
        return f"No results: {total}, none of them with robustness results."
    line, metric = dataset.headline, dataset.spec.monitor
    conditions = {"complete": "with nothing missing"}
    values = in_words([f"{full(found)} {conditions.get(name, without(name))}" for name, found in line.by_type.items()])
    own = line.at_own_pattern
    at_own = f", and {full(own)} at its training pattern ({line.pattern.title})" if own else ""
    floor = next(iter(dataset.baselines.values()), {}).get(metric, math.nan)
    no_better = own is not None and order_of(own.mean, metric) <= order_of(floor, metric)
    at_own += ". At its training pattern, it is no better than a constant answer" * no_better
    if apart := len(dataset.measured) - len(dataset.contenders):
        at_own += f". Not compared with it: {counted(apart, 'configuration')} trained at other patterns"
    trained = counted(sum(not run.pretrains for line in dataset.lines for run in line.runs), "trained run")
    samples = counted(dataset.results[0][2].samples, "test sample")
    measured = f"{len(dataset.results)} of {trained} with robustness results, on {samples}."
    return f"{_best_line(dataset)} reaches {dataset.metric_title} {values}{at_own}. {measured}{dataset.baseline_text}"


def _best_line(dataset: Dataset) -> str:
    """The start of the summary. The best line is called so only if it is significantly ahead of its contenders."""
    line, *others = dataset.contenders
    if not others:
        return line.label
    start = f"{len(dataset.contenders)} configurations trained at {line.pattern.title}"
    level = [other for other in others if not dataset.is_behind(other)]
    if not level:
        return f"The best of {start}, {line.variant},"
    untested = [other for other in level if other not in dataset.against_best]
    names = [other.variant for other in untested or level]
    few = in_words(names) if len(names) <= 3 else f"{len(names)} of the others"
    said = f"its lead over {few} was not tested" if untested else f"does not differ significantly from {few}"
    rank = "lowest" if dataset.spec.monitor in LOWER_IS_BETTER else "highest"
    return f"Of {start}, {line.variant} has the {rank} {dataset.metric_title} there, but {said}. It"


def _training_part(dataset: Dataset, runs: Sequence[ReportRun]) -> Part:
    part, metric, unit = Part("Training curves"), f"val/{dataset.spec.monitor}", dataset.unit()
    if any(len(run.curve(metric)) for run in runs):
        part.shown.append(figures.training_figure(dataset, metric, f"Validation {dataset.axis_title}", unit.factor))
    if any(len(run.curve("train/loss")) for run in runs):
        part.folded["Training loss"] = figures.training_figure(dataset, "train/loss", "Training loss", 1)
    if lacking := [run for run in runs if not run.pretrains and not len(run.curve(metric))]:
        part.shown.append(Note(f"Missing for {listed_runs(lacking)}: metrics.csv does not exist or has no {metric}."))
    return part


def _results_parts(dataset: Dataset) -> list[Part]:
    """Results by class (as bars, confusions or ROC, depending on the task), confidence intervals and samples."""
    spec, parts, best = dataset.spec, [], dataset.headline
    if spec.multilabel:
        first = sorted(dataset.measured, key=lambda line: line is not best)[:CLASSES_SHOWN]
        title = f"Results by {'genre' if dataset.key == 'mmimdb' else 'class'}"
        parts.append(Part(title, [figures.class_figure(dataset, first)]))
        if more := len(dataset.measured) - len(first):
            text = f"Not shown: {counted(more, 'other configuration')}; see per_class.csv in their runs."
            parts[-1].shown.append(Note(text))
    elif spec.n_classes > 2:
        table = tables.confusion_table(dataset)
        parts.append(Part("Confusion matrix" if "as_1" in table.columns else "Most frequent confusions", [table]))
    elif spec.n_classes == 2:
        parts.append(Part("ROC curves", [figures.roc_curves(dataset)]))
    parts.append(Part("Confidence intervals", [tables.confidence_table(dataset)]))
    if lacking := [run for _, run, found in dataset.results if not found.raw["confidence"]["resamples"]]:
        parts[-1].shown.append(Note(f"No confidence intervals for {listed_runs(lacking)}: evaluated with bootstrap=0."))
    parts.append(Part("Test samples that change the most"))
    if (run := run_of_samples(best)) is not None:
        table, note = sample_table(run, best.label)
        parts[-1].shown = [table, *([Note(note)] if note else [])]
    else:
        tags = listed_runs([run for run, _ in best.results])
        parts[-1].shown = [Note(f"No samples: no logits.arrow in {tags}.")]
    return parts


def run_of_samples(line: Line) -> ReportRun | None:
    """The run of a line that is best at the training pattern, among those with stored logits."""

    def order(run: ReportRun) -> float:
        found = run.at_own_pattern(line.spec.monitor)
        return order_of(math.nan if found is None else found, line.spec.monitor)

    return max((run for run, _ in line.results if run.test_set), key=order, default=None)


def robustness_command(runs: Sequence[ReportRun]) -> str:
    """The command that computes the robustness results of runs of one dataset."""
    paths, config = [str(run.folder / "best.ckpt") for run in runs], runs[0].config
    options = [
        f"load_path={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}",
        f"task_finetune_{config['task']}",
        f"data_root={config['data_root']}",
    ]
    return without_home(shlex.join(["python", "run.py", "robustness", "with", *options]))


def runs_section(runs: Sequence[ReportRun], datasets: Sequence[Dataset], others: Sequence[ReportRun]) -> Section:
    """The table of all runs, and the configurations of those that are no trials of a search."""
    folded: dict[str, Item] = {title: Note("", text) for title, text in configurations(others).items()}
    part = Part("", [tables.runs_table(runs, datasets)], folded)
    return Section("runs", "Runs and configurations", "", [part])


def configurations(runs: Sequence[ReportRun]) -> dict[str, str]:
    """Options and versions as JSON, keyed by title: first those that all runs share, then what each has beyond that."""
    which = f"of {runs[0].title}" if len(runs) == 1 else "that all runs share"
    titles = [f"Configuration and versions {which}", *(f"Beyond that, {run.title}" for run in runs)]
    found: dict[str, list[str]] = {title: [] for title in titles}
    for records in ([flat_options(run.config) for run in runs], [flat_options(run.versions or {}) for run in runs]):
        first, *others = [record for record in records if record] or [{}]
        same = {name: v for name, v in first.items() if all(name in other and other[name] == v for other in others)}
        own = [{name: value for name, value in record.items() if name not in same} for record in records]
        for texts, part in zip(found.values(), [same, *own], strict=True):
            texts += [without_home(json.dumps(part, indent=2))] if part else []
    for title, run in zip(titles[1:], runs, strict=True):
        found[title] += [] if run.versions else ["Versions are unknown, since environment.json is missing."]
    return {title: "\n".join(texts) for title, texts in found.items() if texts}


def commands_section(runs: Sequence[ReportRun], places: Sequence[Path], out: Path) -> Section:
    """The commands that repeat the runs, and the one that writes a report on the folders `places` to `out`."""
    parts = [Part("", [Note("Commands as typed, to be run in the folder of the code.")])]
    unknown = Note("The command is unknown, since environment.json is missing.")
    parts += [Part(run.title, [Note("", run.command) if run.command else unknown]) for run in runs]
    words = ["python", "run.py", "report", "with", f"runs=[{','.join(map(str, places))}]", f"out={out}"]
    parts.append(Part("This report", [Note("", without_home(shlex.join(words)))]))
    return Section("reproduce", "How to reproduce this", "", parts)
