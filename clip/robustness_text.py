"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

import json
from collections.abc import Sequence

from clip.robustness import Cell, Robustness
from clip.run_reader import differing_options
from clip.sample_statistics import LEVEL
from common.text import estimate, pattern_text, per_cent, terminal_table
from vilt.missing_tables import TYPE_NAMES


def describe_one(found: Robustness) -> str:
    """The matrix of one checkpoint: ratios down, missing types across; then each type with its interval."""
    subject, metric = found.subject, found.subject.task.monitor
    kinds = list(dict.fromkeys(_kind(cell, found) for cell in found.cells))
    at = {(_kind(cell, found), cell.ratio): cell.estimate(metric).text() for cell in found.cells}
    ratios = dict.fromkeys(cell.ratio for cell in found.cells)
    matrix = [[per_cent(ratio), *(at[kind, ratio] for kind in kinds)] for ratio in ratios]
    by_type = []
    for name in TYPE_NAMES:
        interval = found.intervals[name].get(metric)
        shown = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        by_type.append([name, f"{found.by_type[name][metric]:.4f}", shown])
    return "\n".join(
        [
            f"robustness of {subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})",
            f"  {subject.task.name} test, {found.samples:,} samples; {metric}, {_over_tables(found.seeds)}\n",
            terminal_table(["missing", *kinds], matrix, ">" * (1 + len(kinds))),
            "",
            terminal_table(
                ["every sample", metric, f"{per_cent(LEVEL)} interval" if found.resamples else ""], by_type, "<>>"
            ),
        ]
    )


def describe_several(results: Sequence[Robustness]) -> str:
    """The matrices of several checkpoints of one task: a block per missing type, a column per line.

    Checkpoints whose runs differ in their seed alone make one column; of two with the same seed the later one counts.
    """
    first, metric = results[0], results[0].subject.task.monitor
    columns: dict[str, dict[object, Robustness]] = {}
    for result in results:
        subject = result.subject
        known = [subject.line, subject.train_pattern] if subject.line else str(subject.checkpoint)
        seeds = columns.setdefault(json.dumps(known, sort_keys=True, default=str), {})
        seeds[subject.train_seed] = result
    subjects = [next(iter(column.values())).subject for column in columns.values()]
    lines = [subject.line for subject in subjects if subject.line]
    trained_at = [pattern_text(**one.train_pattern) if one.train_pattern else "not known" for one in subjects]
    names = [", ".join({one.subject.exp_name: None for one in column.values()}) for column in columns.values()]
    seeds_shown = [", ".join("not known" if s is None else str(s) for s in column) for column in columns.values()]
    methods = [
        " ".join([subject.method, *(differing_options(lines, subject.line) if subject.line else [])])
        for subject in subjects
    ]
    rows: list[list[str] | None] = [["name", "", *names], ["trained at", "", *trained_at], ["seeds", "", *seeds_shown]]
    last_kind = None
    for place, cell in enumerate(first.cells):  # all checkpoints have the same
        kind = _kind(cell, first)
        means = [[one.cells[place].estimate(metric).mean for one in column.values()] for column in columns.values()]
        shown = [found.text() for of_column in means if (found := estimate(of_column))]
        rows += [None] if kind != last_kind else []
        rows.append([kind if kind != last_kind else "", per_cent(cell.ratio), *shown])
        last_kind = kind
    return "\n".join(
        [
            f"robustness of {len(results)} checkpoints, {first.subject.task.name} test, {first.samples:,} samples",
            f"  {metric}: of each checkpoint the {_over_tables(first.seeds, '')}; "
            "of these, mean ± std over training seeds\n",
            terminal_table(["method", "", *methods], rows, "<" + ">" * (1 + len(methods))),
        ]
    )


def _kind(cell: Cell, found: Robustness) -> str:
    """The missing type, with both_ratio where there are several."""
    several = len({other.both_ratio for other in found.cells if other.missing_type == "both"}) > 1
    return f"both {cell.both_ratio:g}" if cell.missing_type == "both" and several else cell.missing_type


def _over_tables(seeds: Sequence[int], figure: str = " ± std") -> str:
    if len(seeds) == 1:
        return f"value at the missing table of seed {seeds[0]}"
    return f"mean{figure} of {len(seeds)} missing tables (seeds {', '.join(map(str, seeds))})"
