"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

import json
from collections.abc import Sequence
from typing import Any

from common.text import Estimate, estimate, figure, pattern_text, per_cent, terminal_table
from engine.robustness import Results, Subject
from runs.run_reader import differing_options


def describe(measured: Sequence[tuple[Subject, Results]]) -> str:
    """The results of one checkpoint, or of several side by side."""
    return describe_several(measured) if len(measured) > 1 else describe_one(*measured[0])


def describe_one(subject: Subject, found: Results) -> str:
    """The matrix of one checkpoint: ratios down, missing types across; then each type with its interval."""
    metric, confidence = found["metric"], found["confidence"]
    at = {}
    for cell in found["cells"]:
        figures = cell["metrics"][metric]
        at[_kind(cell, found), cell["ratio"]] = Estimate(*(figures[name] for name in Estimate._fields)).text()
    kinds, ratios = list(dict.fromkeys(kind for kind, _ in at)), dict.fromkeys(ratio for _, ratio in at)
    matrix = [[per_cent(ratio), *(at[kind, ratio] for kind in kinds)] for ratio in ratios]
    by_type = []
    for name in found["by_type"]:
        interval = confidence[name].get(metric)
        shown = " to ".join(map(figure, interval)) if interval else ""
        by_type.append([name, figure(found["by_type"][name][metric]), shown])
    title = f"{per_cent(confidence['level'])} interval" if confidence["resamples"] else ""
    return "\n".join(
        [
            f"robustness of {subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})",
            f"  {found['task']} test, {found['samples']:,} samples; {metric}, {_over_tables(found)}\n",
            terminal_table(["missing", *kinds], matrix, ">" * (1 + len(kinds))),
            "",
            terminal_table(["every sample", metric, title], by_type, "<>>"),
        ]
    )


def describe_several(measured: Sequence[tuple[Subject, Results]]) -> str:
    """The matrices of several checkpoints of one task: a block per missing type, a column per line.

    Checkpoints whose runs differ in their seed alone make one column; of two with the same seed the later one counts.
    """
    lines: dict[str, dict[object, tuple[Subject, Results]]] = {}
    for subject, result in measured:
        known = [subject.line, subject.train_pattern] if subject.line else str(subject.checkpoint)
        seeds = lines.setdefault(json.dumps(known, sort_keys=True, default=str), {})
        seeds[subject.train_seed] = subject, result
    first, columns = measured[0][1], [list(seeds.values()) for seeds in lines.values()]
    metric, known_lines = first["metric"], [column[0][0].line for column in columns if column[0][0].line]
    heads, rows = ["method", ""], [["name", ""], ["trained at", ""], ["seeds", ""]]
    for column in columns:
        subject = column[0][0]
        heads.append(
            " ".join([subject.method, *(differing_options(known_lines, subject.line) if subject.line else [])])
        )
        rows[0].append(", ".join({one.exp_name: None for one, _ in column}))
        rows[1].append(pattern_text(**subject.train_pattern) if subject.train_pattern else "not known")
        rows[2].append(", ".join("not known" if one.train_seed is None else str(one.train_seed) for one, _ in column))
    table: list[list[str] | None] = [*rows]
    last_kind = None
    for place, cell in enumerate(first["cells"]):  # all checkpoints have the same
        kind = _kind(cell, first)
        means = [[result["cells"][place]["metrics"][metric]["mean"] for _, result in column] for column in columns]
        shown = [found.text() for of_column in means if (found := estimate(of_column))]
        table += [None] if kind != last_kind else []
        table.append([kind if kind != last_kind else "", per_cent(cell["ratio"]), *shown])
        last_kind = kind
    return "\n".join(
        [
            f"robustness of {len(measured)} checkpoints, {first['task']} test, {first['samples']:,} samples",
            f"  {metric}: of each checkpoint the {_over_tables(first, '')}; of these, mean ± std over training seeds\n",
            terminal_table(heads, table, "<" + ">" * (1 + len(columns))),
        ]
    )


def _kind(cell: dict[str, Any], found: Results) -> str:
    """The missing type, with both_ratio where there are several."""
    several = len({other["both_ratio"] for other in found["cells"] if other["missing_type"] == "both"}) > 1
    return f"both {cell['both_ratio']:g}" if cell["missing_type"] == "both" and several else cell["missing_type"]


def _over_tables(found: Results, figure: str = " ± std") -> str:
    seeds = found["table_seeds"]
    if len(seeds) == 1:
        return f"value at the missing table of seed {seeds[0]}"
    return f"mean{figure} of {len(seeds)} missing tables (seeds {', '.join(map(str, seeds))})"
