"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

from collections.abc import Sequence

from clip.robustness import Cell, Robustness, mean, std
from clip.sample_statistics import LEVEL
from clip.text_table import align, pattern_text, per_cent
from vilt.missing_tables import TYPE_NAMES

GAP = 3


def describe_one(found: Robustness) -> str:
    """The matrix of one checkpoint: ratios down, missing types across; then each type with its interval."""
    subject, metric, seeds = found.subject, found.subject.task.monitor, found.seeds
    kinds = _kinds(found)
    at = {(_kind(cell, found), cell.ratio): _spread(cell.values[metric]) for cell in found.cells}
    matrix = [["missing", *kinds]]
    matrix += [[per_cent(ratio), *(at[kind, ratio] for kind in kinds)] for ratio in _ratios(found)]
    head = [
        f"robustness of {subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})",
        f"  {subject.task.name} test, {found.samples:,} samples; {metric}, {_over_tables(seeds)}",
    ]
    return "\n".join([*head, "", *_indented(matrix, ">" * len(matrix[0])), "", *_by_type(found)])


def describe_several(results: Sequence[Robustness]) -> str:
    """The matrices of several checkpoints of one task: a block per missing type, a column per method.

    Checkpoints of equal method, name and training pattern that differ in their seed make one column.
    """
    first, metric = results[0], results[0].subject.task.monitor
    column_of: dict[tuple[str, str, str], list[Robustness]] = {}
    for result in results:
        subject = result.subject
        column_of.setdefault((subject.method, subject.exp_name, _trained_at(result)), []).append(result)
    columns = list(column_of.values())
    rows = [
        ["method", "", *(method for method, _, _ in column_of)],
        ["name", "", *(exp_name for _, exp_name, _ in column_of)],
        ["trained at", "", *(trained_at for _, _, trained_at in column_of)],
        ["seeds", "", *(_seeds(column) for column in columns)],
    ]
    last_kind = None
    for place, cell in enumerate(first.cells):  # all checkpoints have the same
        kind = _kind(cell, first)
        means = [[one.cells[place].mean(metric) for one in column] for column in columns]
        rows += [[]] if kind != last_kind else []
        rows.append([kind if kind != last_kind else "", per_cent(cell.ratio), *map(_spread, means)])
        last_kind = kind
    head = [
        f"robustness of {len(results)} checkpoints, {first.subject.task.name} test, {first.samples:,} samples",
        f"  {metric}: of each checkpoint the {_over_tables(first.seeds, '')}; of these, mean ± std over training seeds",
    ]
    return "\n".join([*head, "", *_indented(rows, "<" + ">" * (len(rows[0]) - 1))])


def _by_type(found: Robustness) -> list[str]:
    metric = found.subject.task.monitor
    rows = [["every sample", metric, f"{per_cent(LEVEL)} interval" if found.resamples else ""]]
    for name in TYPE_NAMES:
        interval = found.intervals[name].get(metric)
        said = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        rows.append([name, f"{found.by_type[name][metric]:.4f}", said])
    return _indented(rows, "<>>")


def _trained_at(found: Robustness) -> str:
    pattern = found.subject.train_pattern
    if pattern is None:
        return "not known"
    return pattern_text(**pattern)


def _seeds(column: Sequence[Robustness]) -> str:
    return ", ".join("not known" if one.subject.train_seed is None else str(one.subject.train_seed) for one in column)


def _kind(cell: Cell, found: Robustness) -> str:
    """The missing type, with both_ratio where there are several."""
    several = len({other.both_ratio for other in found.cells if other.missing_type == "both"}) > 1
    return f"both {cell.both_ratio:g}" if cell.missing_type == "both" and several else cell.missing_type


def _kinds(found: Robustness) -> list[str]:
    return list(dict.fromkeys(_kind(cell, found) for cell in found.cells))


def _ratios(found: Robustness) -> list[float]:
    return list(dict.fromkeys(cell.ratio for cell in found.cells))


def _over_tables(seeds: Sequence[int], figure: str = " ± std") -> str:
    if len(seeds) == 1:
        return f"value at the missing table of seed {seeds[0]}"
    return f"mean{figure} of {len(seeds)} missing tables (seeds {', '.join(map(str, seeds))})"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {std(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _indented(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    return [f"  {line}".rstrip() for line in align(rows, sides, GAP)]
