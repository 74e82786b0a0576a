"""Prints robustness results as tables, for one checkpoint or several side by side."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from common.logs import without_repeats
from common.text import (
    AT_OFFSET,
    Estimate,
    baseline_texts,
    counted,
    interval_text,
    metric_text,
    per_cent,
    terminal_table,
)
from engine.exported import is_exported
from engine.robustness import Results
from runs.check_options import read_load_paths
from runs.evaluation import measure_mean, measure_target
from runs.lines import RunLine, lines_of, spread_of
from runs.pattern import Pattern
from runs.stored_results import cells_by_pattern
from runs.targets import Target, dataset_of, open_targets
from vilt.missing_types import BOTH

log = logging.getLogger("rep")


def measure_all(config: Mapping[str, Any], given: set[str]) -> str:
    """Evaluates the checkpoints in `load_path` at all missing types and ratios; "" except on the first process."""
    with without_repeats(log):
        measured = [(target, measure_target(target, given)) for target in open_targets(config, given)]
    found = [(target, results) for target, results in measured if results is not None]
    if len(found) > 1 and all(path.is_file() or is_exported(path) for path in read_load_paths(config)):
        if len({target.subject.other_input for target, _ in found}) == 1:
            found.append(measure_mean([target for target, _ in found]))
        else:
            log.info("the logits are not averaged, since text_windows or group_texts differ")
    names = dict.fromkeys(dataset_of(target) for target, _ in found)
    return "\n\n".join(describe([each for each in found if dataset_of(each[0]) == name]) for name in names)


def describe(measured: Sequence[tuple[Target, Results]]) -> str:
    """The results of one checkpoint, or of several side by side, then the baselines that ignore the sample."""
    (target, first), several = measured[0], len(measured) > 1
    subject, samples = target.subject, counted(first["samples"], "sample")
    one = " ".join([f"{subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})", *subject.other_input])
    over = f"mean{'' if several else ' ± std'} over missing tables (seeds {', '.join(map(str, first['table_seeds']))})"
    baselines = [f"  {line}" for line in baseline_texts(first["baselines"], first["metric"])]
    return "\n".join(
        [
            f"robustness of {counted(len(measured), 'checkpoint') if several else one}",
            f"  {first['task']} test, {samples}; {metric_text(first['metric'])}, {over}\n",
            *(_side_by_side(measured) if several else _matrices(target, first)),
            *(["", "baselines that ignore the sample:", *baselines] if baselines else []),
        ]
    )


Cells = dict[Pattern, dict[str, Any]]
"""The cells of robustness results, keyed by pattern."""


def _cells(target: Target, found: Results) -> Cells:
    return cells_by_pattern(target.store.dataset.spec, found["cells"])


def _kinds(patterns: Iterable[Pattern]) -> dict[Pattern, str]:
    """The missing type of each pattern, followed by both_ratio if there are several or it is not 0.5."""
    several = len({pattern.both_ratio for pattern in patterns if pattern.missing_type == BOTH}) > 1
    return {p: f"{BOTH} {p.both_ratio:g}" if p.missing_type == BOTH and several else p.kind for p in patterns}


def _matrices(target: Target, found: Results) -> list[str]:
    """Tables of one checkpoint (ratios down, missing types across): metric, intervals, and F1 at the offset."""

    def matrix(title: str, text_of: Callable[[dict[str, Any]], str]) -> list[str]:
        cells = _cells(target, found)
        at = {(kind, pattern.ratio): text_of(cells[pattern]) for pattern, kind in _kinds(cells).items()}
        kinds, ratios = dict.fromkeys(kind for kind, _ in at), sorted({ratio for _, ratio in at})
        rows = [[per_cent(ratio), *(at.get((kind, ratio), "–") for kind in kinds)] for ratio in ratios]
        table = terminal_table(["missing", *kinds], rows, ">" * (1 + len(kinds)))
        return [f"\n{title}:\n", table] if title else [table]

    def metric(name: str, cell: dict[str, Any]) -> str:
        return Estimate(*(cell["metrics"][name][part] for part in Estimate._fields)).text()

    parts = matrix("", partial(metric, found["metric"]))
    if found["confidence"]["resamples"]:
        level = f"{per_cent(found['confidence']['level'])} interval over test samples"
        parts += matrix(level, lambda cell: interval_text(cell["interval"]["low"], cell["interval"]["high"]))
    return parts + (matrix(AT_OFFSET, partial(metric, AT_OFFSET)) if AT_OFFSET in found["metrics"] else [])


def _side_by_side(measured: Sequence[tuple[Target, Results]]) -> list[str]:
    """A block per missing type, a column per line of runs."""
    first, lines = measured[0][1], lines_of(measured, lambda entry: entry[0].run)
    heads, rows = ["method", ""], [["name", ""], ["trained at", ""], ["seeds", ""]]
    for line in lines:
        subjects = [target.subject for target, _ in line.items]
        heads.append(" ".join(dict.fromkeys([subjects[0].method, *subjects[0].other_input, *line.differing(lines)])))
        rows[0].append(", ".join(dict.fromkeys(subject.exp_name for subject in subjects)))
        trained = subjects[0].train_pattern  # the same for all runs of a line
        rows[1].append("not known" if trained is None else str(Pattern(**trained)))
        rows[2].append(", ".join("not known" if one.train_seed is None else str(one.train_seed) for one in subjects))
    table, over = _block(first["metric"], lines)
    side_by_side = partial(terminal_table, heads, sides="<" + ">" * (len(heads) - 1), repeated=2)
    tables = [side_by_side([*rows, ["± over", "", *over], *table])]
    if any(AT_OFFSET in found["metrics"] for _, found in measured):
        tables += [f"\n{AT_OFFSET}:\n", side_by_side(_block(AT_OFFSET, lines)[0])]
    left_out = [str(target.subject.checkpoint) for line in lines for target, _ in line.repeats]
    return [
        *tables,
        *([f"\nnot counted, since another run has the seed: {', '.join(left_out)}"] if left_out else []),
    ]


def _block(metric: str, lines: Sequence[RunLine[tuple[Target, Results]]]) -> tuple[list[list[str] | None], list[str]]:
    """Rows of a metric by missing type and ratio, and what the deviations of each line are taken over."""
    cells_of_lines = [[_cells(*item) for item in line.items] for line in lines]
    patterns = {pattern for line_cells in cells_of_lines for cells in line_cells for pattern in cells}
    spec = lines[0].items[0][0].store.dataset.spec
    kinds = _kinds(sorted(patterns, key=lambda pattern: pattern.place(spec)))
    table: list[list[str] | None] = []
    over: list[dict[str, None]] = [{} for _ in lines]
    last_kind = None
    for pattern, kind in kinds.items():
        row = [kind if kind != last_kind else "", per_cent(pattern.ratio)]
        for line_cells, line_over in zip(cells_of_lines, over, strict=True):
            values = [cells[pattern]["metrics"].get(metric) for cells in line_cells if pattern in cells]
            spread = spread_of([each["values"] for each in values if each])
            row.append(spread.estimate.text() if spread else "–")
            line_over |= {spread.over: None} if spread else {}
        table += [None, row] if kind != last_kind else [row]
        last_kind = kind
    return table, [" or ".join(filter(None, each)) for each in over]
