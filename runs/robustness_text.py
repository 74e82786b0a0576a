"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.text import Estimate, baseline_texts, figure, pattern_text, per_cent, terminal_table
from engine.robustness import Results
from runs.evaluation import measure_target
from runs.lines import lines_of, spread_of
from runs.targets import Target, open_targets


def measure_all(config: Mapping[str, Any], given: set[str]) -> str:
    """Evaluates what `load_path` names at all missing types and ratios; "" on other processes than the first."""
    measured = [(target, measure_target(target, given)) for target in open_targets(config, given)]
    found = [(target, results) for target, results in measured if results is not None]
    return describe(found) if found else ""


def describe(measured: Sequence[tuple[Target, Results]]) -> str:
    """The results of one checkpoint, or of several side by side; what answers that look at no sample get."""
    found = measured[0][1]
    text = describe_several(measured) if len(measured) > 1 else describe_one(*measured[0])
    baselines = [f"  {line}" for line in baseline_texts(found["baselines"], found["metric"])]
    return "\n".join([text, *(["", "without looking at a sample:", *baselines] if baselines else [])])


def describe_one(target: Target, found: Results) -> str:
    """The matrix of one checkpoint: ratios down, missing types across; then each type with its interval."""
    metric, confidence, subject = found["metric"], found["confidence"], target.subject
    at, intervals = {}, {}
    for cell in found["cells"]:
        key = _kind(cell, found), cell["ratio"]
        at[key] = Estimate(*(cell["metrics"][metric][name] for name in Estimate._fields)).text()
        intervals[key] = _interval(cell["interval"]["low"], cell["interval"]["high"]) if "interval" in cell else ""
    kinds, ratios = list(dict.fromkeys(kind for kind, _ in at)), dict.fromkeys(ratio for _, ratio in at)
    level = f"{per_cent(confidence['level'])} interval over test samples"
    parts = [
        f"robustness of {subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})",
        f"  {found['task']} test, {found['samples']:,} samples; {metric}, {_over_tables(found)}\n",
    ]
    for title, shown in (("", at), (level, intervals)):
        if any(shown.values()):
            rows = [[per_cent(ratio), *(shown[kind, ratio] for kind in kinds)] for ratio in ratios]
            parts += [f"{title}:\n"] if title else []
            parts += [terminal_table(["missing", *kinds], rows, ">" * (1 + len(kinds))), ""]
    by_type = [
        [name, figure(values[metric]), _interval(*confidence[name][metric]) if confidence["resamples"] else ""]
        for name, values in found["by_type"].items()
    ]
    heads = ["every sample", metric, level if confidence["resamples"] else ""]
    return "\n".join([*parts, terminal_table(heads, by_type, "<>>")])


def describe_several(measured: Sequence[tuple[Target, Results]]) -> str:
    """The matrices of several checkpoints of one task: a block per missing type, a column per line of runs."""
    first, lines = measured[0][1], lines_of(measured, lambda entry: entry[0].run)
    metric = first["metric"]
    rows = [["name", ""], ["trained at", ""], ["seeds", ""], ["± over", ""]]
    heads = ["method", ""]
    for line in lines:
        subjects = [target.subject for target, _ in line.items]
        heads.append(" ".join([subjects[0].method, *line.differing(lines)]))
        rows[0].append(", ".join(dict.fromkeys(subject.exp_name for subject in subjects)))
        rows[1].append(pattern_text(*line.run.pattern) if line.run is not None else "not known")
        rows[2].append(", ".join("not known" if one.train_seed is None else str(one.train_seed) for one in subjects))
    table: list[list[str] | None] = [*rows]
    last_kind = None
    for place, cell in enumerate(first["cells"]):  # all checkpoints have the same
        kind = _kind(cell, first)
        of_lines = [
            [results["cells"][place]["metrics"][metric]["values"] for _, results in line.items] for line in lines
        ]
        spreads = [spread for values in of_lines if (spread := spread_of(values)) is not None]
        over = [spread.over for spread in spreads]
        table += [None] if kind != last_kind else []
        table.append(
            [kind if kind != last_kind else "", per_cent(cell["ratio"]), *(s.estimate.text() for s in spreads)]
        )
        last_kind = kind
    rows[3] += over
    left_out = [str(target.subject.checkpoint) for line in lines for target, _ in line.repeats]
    return "\n".join(
        [
            f"robustness of {len(measured)} checkpoints, {first['task']} test, {first['samples']:,} samples",
            f"  {metric}: of each checkpoint the {_over_tables(first, '')}\n",
            terminal_table(heads, table, "<" + ">" * (1 + len(lines))),
            *([f"\nnot counted, of a seed that is there already: {', '.join(left_out)}"] if left_out else []),
        ]
    )


def _kind(cell: dict[str, Any], found: Results) -> str:
    """The missing type, with both_ratio where there are several."""
    several = len({other["both_ratio"] for other in found["cells"] if other["missing_type"] == "both"}) > 1
    return f"both {cell['both_ratio']:g}" if cell["missing_type"] == "both" and several else cell["missing_type"]


def _interval(low: float, high: float) -> str:
    return f"{figure(low)} to {figure(high)}"


def _over_tables(found: Results, spread: str = " ± std") -> str:
    seeds = found["table_seeds"]
    if len(seeds) == 1:
        return f"value at the missing table of seed {seeds[0]}"
    return f"mean{spread} of {len(seeds)} missing tables (seeds {', '.join(map(str, seeds))})"
