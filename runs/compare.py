"""`run.py compare`: tests which methods differ, sample by sample, from the stored logits of their runs.

Only lines of runs (`runs/lines.py`) on the same test set and trained at the same pattern are compared. Within a pair of
lines, runs with the same training seed are paired. The differences are printed as tables and written as JSON.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.files import writing
from common.readers import integer, several, text
from common.strict_json import write_json
from common.text import (
    AT_OFFSET,
    baseline_texts,
    counted,
    estimate,
    figure,
    interval_text,
    metric_text,
    order_of,
    per_cent,
    terminal_table,
)
from engine.baselines import baselines
from engine.decision import with_offset
from engine.sample_statistics import LEVEL, bootstrap
from engine.significance import Difference, difference_interval, holm, permutation_p
from engine.tasks import Task, task_of
from runs.check_options import read_options
from runs.lines import RunLine, lines_of
from runs.pattern import Pattern
from runs.run_reader import Run, runs_of_each
from runs.stored_results import logits_path
from vilt.datasets.specs import SPLITS, DatasetSpec
from vilt.missing_tables import NESTED, MissingPattern, after_training, load_missing_table
from vilt.missing_types import pattern_type, with_natural

log = logging.getLogger("rep")

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison."""

    table_seeds: tuple[int, ...]
    resamples: int
    permutations: int
    types: tuple[str, ...] | None = None  # missing types to evaluate at; None for all
    ratios: tuple[float, ...] | None = None  # missing ratios; None for 0, 1 and the one used in training
    both_ratio: float | None = None  # None for the one used in training
    missing_table_root: Path | None = None
    """Folder of stored missing tables; None for the first run's. Tables missing there are drawn but not stored."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of two lines at one pattern."""

    one: int  # indices into `Group.labels`
    other: int
    pattern: Pattern
    values: tuple[float, float]  # each line's metric, averaged over seeds and missing tables
    difference: Difference  # first minus second
    of_seeds: tuple[float, ...]  # difference of each pair of runs
    metric: str
    p_corrected: float = math.nan  # Holm-corrected for all comparisons made together

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 1 - LEVEL and the interval, which covers seeds too, excludes 0."""
        outside = self.difference.low > 0 or self.difference.high < 0
        return self.p_corrected <= 1 - LEVEL and outside

    @property
    def ahead(self) -> int:
        """Number of pairs of runs in which the first line is better."""
        return sum(order_of(1.0, self.metric) * value > 0 for value in self.of_seeds)


class _Stored:
    """The stored logits of a run, with its offset (`engine/decision.py`) added if `at_offset`."""

    def __init__(self, run: Run, *, at_offset: bool) -> None:
        results, logits = run.robustness, run.logits
        assert results is not None and logits is not None
        self.run, self.results, self.split, self.test_set = run, results, logits.split, logits.test_set
        if at_offset and results.offset is not None:
            self.split = replace(self.split, logits_TNC=self.split.logits_TNC.double() + results.offset)

    def at(self, task: Task, tables: Sequence[np.ndarray], resamples: int) -> tuple[float, Tensor]:
        """The task's metric, averaged over tables, and its values (R,) in resamples of the test samples."""
        found = estimate([task.metrics(self.split.at(table), self.split.labels)[task.monitor] for table in tables])
        assert found is not None
        values_KR = bootstrap(task.metrics.measures[task.monitor], self.split, tables, resamples)
        return found.mean, values_KR.nanmean(0)


class Group:
    """The lines with one test set and training pattern, and all their comparisons."""

    def __init__(self, lines: list[RunLine[Run]], settings: Settings, *, at_offset: bool) -> None:
        run = lines[0].items[0]
        self.lines, self.dataset, self.trained_at, self.drawing = lines, run.dataset, run.pattern, drawing_of(run)
        self.labels = [" ".join([str(line.options["prompt_type"]), *line.differing(lines)]) for line in lines]
        task = task_of(run.config["task"], run.custom)
        self.metric = AT_OFFSET if at_offset else task.monitor
        self.task = task = replace(task, monitor="f1_macro") if at_offset else task
        stored = [{run.config["seed"]: _Stored(run, at_offset=at_offset) for run in line.items} for line in lines]
        first = next(iter(stored[0].values()))
        for each in (each for line_stored in stored for each in line_stored.values()):
            if each.test_set != first.test_set:
                said = f"logits of other test samples than in {logits_path(first.run)}"
                raise DataError(f"{logits_path(each.run)}: {said}; compare each test set separately")
            if each.results.rows_before != first.results.rows_before:
                said = f"missing tables drawn after splits of other sizes than in {logits_path(first.run).parent}"
                raise DataError(f"{logits_path(each.run).parent}: {said}; run `python run.py robustness` again")
        self.samples = len(first.split.labels)
        self.baselines = baselines(task, first.split.labels, first.results.raw["class_names"])
        self.comparisons: list[Comparison] = []
        measure = task.metrics.measures[task.monitor]
        for pattern in _patterns(run.spec, run.pattern, settings):
            tables = _tables(first, run.pattern, pattern, settings)
            found = [{s: each.at(task, tables, settings.resamples) for s, each in runs.items()} for runs in stored]
            for one, other in itertools.combinations(range(len(lines)), 2):
                seeds = _paired(list(stored[one]), list(stored[other]))
                values = [(found[one][a][0], found[other][b][0]) for a, b in seeds]
                of_seeds = tuple(a - b for a, b in values)
                value = sum(of_seeds) / len(seeds)
                resampled_SR = torch.stack([found[one][a][1] - found[other][b][1] for a, b in seeds])
                low, high = difference_interval(resampled_SR, value, first.split.units)
                pairs = [(stored[one][a].split, stored[other][b].split) for a, b in seeds]
                p = permutation_p(measure, pairs, tables, value, settings.permutations)
                first_mean, second_mean = (sum(side) / len(seeds) for side in zip(*values, strict=True))
                means, difference = (first_mean, second_mean), Difference(value, low, high, p)
                self.comparisons.append(Comparison(one, other, pattern, means, difference, of_seeds, task.monitor))
            shown = ", ".join(self.labels)
            log.info("%s, %s: compared %s by %s", self.dataset, pattern.title, shown, self.metric)


def values_at(run: Run, pattern: Pattern, table_seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """Every metric of a run at a pattern, with each missing table, from its stored logits."""
    stored = _Stored(run, at_offset=False)
    task = with_offset(task_of(run.config["task"], run.custom), stored.results.offset)
    tables = _tables(stored, run.pattern, pattern, Settings(table_seeds, 0, 0))
    found = [task.metrics(stored.split.at(table), stored.split.labels) for table in tables]
    return {name: [metrics[name] for metrics in found] for name in task.metrics.measures}


def compare_runs(runs: Sequence[Run], settings: Settings, *, at_offset: bool = False) -> list[Group]:
    """Makes all valid comparisons between lines of runs, with p values corrected for their total number.

    Runs without stored logits are left out.

    Args:
        at_offset: compares multi-label macro F1 at each run's offset instead, among the runs that have one.

    Raises:
        ConfigError: the dataset has no such missing type.
        DataError: logits are damaged, belong to another checkpoint, or cover other test samples than the other runs'.
    """
    with_logits = [run for run in runs if not run.is_evaluation and run.has_logits]
    if at_offset:
        with_logits = [run for run in with_logits if run.robustness and run.robustness.offset is not None]
    by_pattern: dict[tuple[str, Pattern, str], list[RunLine[Run]]] = {}
    for line in lines_of(with_logits, lambda run: run):
        run = line.items[0]
        by_pattern.setdefault((run.dataset, run.pattern, drawing_of(run)), []).append(line)
    groups = [Group(lines, settings, at_offset=at_offset) for lines in by_pattern.values() if len(lines) > 1]
    corrected = iter(holm([each.difference.p for group in groups for each in group.comparisons]))
    for group in groups:
        group.comparisons[:] = [replace(each, p_corrected=next(corrected)) for each in group.comparisons]
    return groups


def drawing_of(run: Run) -> str:
    """How the missing tables of a training run were drawn."""
    return str(run.config.get("missing_tables", NESTED))


def _paired(one: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Pairs of training seeds: the seeds that both lines have or, if there are none, the lowest seeds of each."""
    common = [seed for seed in one if seed in other]
    return [(seed, seed) for seed in common] or list(zip(one, other, strict=False))


def _patterns(spec: DatasetSpec, trained_at: Pattern, settings: Settings) -> list[Pattern]:
    """The patterns to compare at, each once: at ratio 0 all missing types are the same."""
    types = settings.types or spec.missing_types
    if unknown := [name for name in types if pattern_type(spec.modalities, name) != name]:
        raise ConfigError(f"robustness_types: expected {' or '.join(spec.missing_types)}, found {unknown[0]}")
    ratios = settings.ratios or sorted({0.0, trained_at.ratio, 1.0})
    cells = [(types[0], 0.0)] if 0 in ratios else []
    cells += [(name, ratio) for name in types for ratio in ratios if ratio]
    both_ratio = trained_at.both_ratio if settings.both_ratio is None else settings.both_ratio
    return [Pattern.of(spec, *cell, both_ratio) for cell in cells]


def _tables(stored: _Stored, trained_at: Pattern, pattern: Pattern, settings: Settings) -> list[np.ndarray]:
    """The missing tables of all table seeds, drawn as for the robustness results; only one if all are equal."""
    root = settings.missing_table_root or Path(str(stored.run.config.get("missing_table_root", "")))
    spec, split = stored.run.spec, stored.split
    described = [MissingPattern(*pattern, seed) for seed in settings.table_seeds]
    if before := stored.results.rows_before:
        rows = dict(zip(SPLITS, (*before, split.table_rows), strict=True))
        described = [after_training(MissingPattern(*trained_at, each.seed), each, rows) for each in described]
    drawn = [
        load_missing_table(root, spec.table_name, "test", each, split.table_rows, keep=False) for each in described
    ]
    tables = [with_natural(spec.modalities, split.natural, table) for table in drawn]
    return tables[:1] if all(np.array_equal(table, tables[0]) for table in tables) else tables


def compare_places(config: Mapping[str, Any], given: set[str]) -> str:
    """Compares the runs in and below `runs`; writes `compare.json` to the first of these folders, and returns the text.

    Raises:
        ConfigError: an option is invalid, or there are no two lines of runs to compare.
        DataError: a file is damaged or cannot be written.
    """
    names = ("runs", "robustness_seeds", "robustness_ratios", "both_ratio", "missing_table_root", "bootstrap")
    options = read_options(config, [*names, "permutations"])
    options["robustness_types"] = several(text)("robustness_types", config["robustness_types"])
    chosen = ("robustness_types", "robustness_ratios", "both_ratio", "missing_table_root")
    places, resamples = options["runs"], integer(1)("bootstrap", options["bootstrap"])
    at = [options[name] if name in given else None for name in chosen]
    settings = Settings(options["robustness_seeds"], resamples, options["permutations"], *at)
    runs, damaged = runs_of_each(places)
    for error in damaged.values():
        log.warning("left out: %s", error)
    without = [run.folder for run in runs if not (run.is_evaluation or run.pretrains or run.has_logits)]
    if without:
        others = [f"{len(without) - 3} more"] if len(without) > 3 else []
        log.warning("left out for lack of stored logits: %s", " and ".join([", ".join(map(str, without[:3])), *others]))
    groups = compare_runs(runs, settings)
    if not groups:
        stored = [run for run in runs if run.has_logits]
        existing = dict.fromkeys(
            f"{run.config['prompt_type']} on {run.dataset} at {run.pattern}{_drawn(drawing_of(run))}" for run in stored
        )
        raise ConfigError(
            f"runs: expected at least two configurations in {', '.join(map(str, places))} that were trained on one "
            f"dataset at one pattern and have stored logits, found {'; '.join(existing) or 'none with logits'}"
            + (f"; `python run.py robustness with load_path={places[0]}` stores them" if without else "")
        )
    at_offset = compare_runs(runs, settings, at_offset=True)
    path = (places[0] if places[0].is_dir() else places[0].parent) / "compare.json"
    total = max(sum(len(group.comparisons) for group in found) for found in (groups, at_offset))
    with writing(path):
        write_json(path, _content([*groups, *at_offset], total, settings))
    if any(len(each.of_seeds) == 1 for group in groups for each in group.comparisons):
        log.warning("with one training seed each, a difference may be due to the seeds, not the methods")
    return "\n".join([*map(_text, [*groups, *at_offset]), "", *_legend(total, settings), f"written to {path}"])


def _content(groups: Sequence[Group], total: int, settings: Settings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "level": LEVEL,
        "correction": "Holm",
        "comparisons": total,
        "settings": asdict(settings),
        "groups": [
            {
                "dataset": group.dataset,
                "metric": group.metric,
                "samples": group.samples,
                "trained_at": group.trained_at,
                "missing_tables": group.drawing,
                "methods": [
                    {"name": label, "runs": {str(run.config["seed"]): str(run.folder) for run in line.items}}
                    for label, line in zip(group.labels, group.lines, strict=True)
                ],
                "baselines": group.baselines,
                "differences": [
                    {
                        "one": group.labels[each.one],
                        "other": group.labels[each.other],
                        **each.pattern._asdict(),
                        "values": each.values,
                        **each.difference._asdict(),
                        "p_corrected": each.p_corrected,
                        "significant": each.significant,
                        "of_seeds": each.of_seeds,
                    }
                    for each in group.comparisons
                ],
            }
            for group in groups
        ],
    }


def _text(group: Group) -> str:
    letters = [chr(ord("A") + place) if place < 26 else str(place) for place in range(len(group.lines))]
    known = [
        f"  {letter}  {label}, seeds {', '.join(str(run.config['seed']) for run in line.items)}"
        for letter, label, line in zip(letters, group.labels, group.lines, strict=True)
    ]
    rows: list[list[str] | None] = []
    ordered = sorted(group.comparisons, key=lambda each: (each.one, each.other))
    for (one, other), comparisons in itertools.groupby(ordered, key=lambda each: (each.one, each.other)):
        rows += [None] if rows else []
        for each in comparisons:
            difference = each.difference
            rows.append(
                [
                    f"{letters[one]}-{letters[other]}",
                    str(each.pattern) if each.pattern.ratio else "complete",
                    *map(figure, each.values),
                    _signed(difference.value),
                    interval_text(difference.low, difference.high, _signed),
                    f"{each.ahead}/{len(each.of_seeds)}",
                    figure(each.p_corrected) + ("*" if each.significant else " "),
                ]
            )
    interval = f"{per_cent(LEVEL)} interval"
    heads = ["", "missing", "first", "second", "difference", interval, "ahead", "p "]
    return "\n".join(
        [
            f"\n{group.dataset} test, {counted(group.samples, 'sample')}, {metric_text(group.metric)}; trained at "
            f"{group.trained_at}{_drawn(group.drawing)}",
            *known,
            *(f"     {text}" for text in baseline_texts(group.baselines, group.task.monitor)),
            "",
            terminal_table(heads, rows, "<<" + ">" * 6),
        ]
    )


def _drawn(drawing: str) -> str:
    return "" if drawing == NESTED else f" ({drawing} tables)"


def _signed(value: float) -> str:
    return f"+{figure(value)}" if value > 0 else figure(value)


def _legend(total: int, settings: Settings) -> list[str]:
    lines = [
        f"difference: mean over pairs of training seeds and missing tables (seeds "
        f"{', '.join(map(str, settings.table_seeds))})",
        f"interval: bootstrap, {settings.resamples:,} resamples of the test samples and, if several, training seeds",
        "ahead: pairs of training seeds in which the first is better",
        f"p: paired permutation test over samples, Holm-corrected for {counted(total, 'comparison')} of a metric",
        f"*: significant: p at most {1 - LEVEL:g}, and an interval that excludes 0",
    ]
    if total / (settings.permutations + 1) > 1 - LEVEL:
        needed = math.ceil(2 * total / (1 - LEVEL))
        lines.append(f"nothing can be significant with so many comparisons; expected permutations={needed} or more")
    return lines
