"""Tests which methods differ, sample by sample, from the stored logits of their runs.

Only lines of runs (`runs/lines.py`) on the same test set and trained at the same pattern are compared. Within a pair of
lines, runs with the same training seed are paired.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.text import AT_OFFSET, estimate, order_of
from engine.baselines import baselines
from engine.decision import with_offset
from engine.sample_statistics import LEVEL, bootstrap
from engine.significance import Difference, difference_interval, holm, permutation_p
from engine.tasks import Task, task_of
from runs.lines import RunLine, lines_of
from runs.pattern import Pattern
from runs.run_reader import Run
from runs.stored_results import logits_path
from vilt.datasets.specs import SPLITS, DatasetSpec
from vilt.missing_tables import NESTED, MissingPattern, after_training, load_missing_table
from vilt.missing_types import pattern_type, with_natural

log = logging.getLogger("rep")


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
