"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.text import AT_OFFSET, Estimate, baseline_texts, counted, figure, pattern_text, per_cent, terminal_table
from engine.robustness import Results
from runs.evaluation import measure_target
from runs.lines import RunLine, lines_of, spread_of
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
    metrics = [metric, *({AT_OFFSET} & set(found["metrics"]))]
    at: dict[str, dict[tuple[str, float], str]] = {name: {} for name in [*metrics, "interval"]}
    for cell in found["cells"]:
        key = _kind(cell, found), cell["ratio"]
        for name in metrics:
            at[name][key] = Estimate(*(cell["metrics"][name][field] for field in Estimate._fields)).text()
        at["interval"][key] = _interval(cell["interval"]["low"], cell["interval"]["high"]) if "interval" in cell else ""
    kinds, ratios = list(dict.fromkeys(kind for kind, _ in at[metric])), dict.fromkeys(ratio for _, ratio in at[metric])
    level = f"{per_cent(confidence['level'])} interval over test samples"
    parts = [
        f"robustness of {subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})",
        f"  {found['task']} test, {counted(found['samples'], 'sample')}; {metric}, {_over_tables(found)}\n",
    ]
    titles = {metric: "", "interval": f"{level}:\n", AT_OFFSET: f"{AT_OFFSET}, logits {subject.offset or 0:+.4f}:\n"}
    for name, shown in at.items():
        if any(shown.values()):
            rows = [[per_cent(ratio), *(shown[kind, ratio] for kind in kinds)] for ratio in ratios]
            parts += [titles[name]] if titles[name] else []
            parts += [terminal_table(["missing", *kinds], rows, ">" * (1 + len(kinds))), ""]
    by_type = [
        [name, *(figure(values[shown]) for shown in metrics)]
        + ([_interval(*confidence[name][metric])] if confidence["resamples"] else [""])
        for name, values in found["by_type"].items()
    ]
    heads = ["every sample", *metrics, level if confidence["resamples"] else ""]
    return "\n".join([*parts, terminal_table(heads, by_type, "<" + ">" * (len(heads) - 1))])


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
    table, over = _block(metric, first, lines)
    rows[3] += over
    if any(AT_OFFSET in found["metrics"] for _, found in measured):
        table += [None, [AT_OFFSET, *[""] * (1 + len(lines))], *_block(AT_OFFSET, first, lines)[0]]
    samples = counted(first["samples"], "sample")
    left_out = [str(target.subject.checkpoint) for line in lines for target, _ in line.repeats]
    return "\n".join(
        [
            f"robustness of {counted(len(measured), 'checkpoint')}, {first['task']} test, {samples}",
            f"  {metric}: of each checkpoint the {_over_tables(first, '')}\n",
            terminal_table(heads, [*rows, *table], "<" + ">" * (1 + len(lines))),
            *([f"\nnot counted, of a seed that is there already: {', '.join(left_out)}"] if left_out else []),
        ]
    )


def _block(
    metric: str, first: Results, lines: Sequence[RunLine[tuple[Target, Results]]]
) -> tuple[list[list[str] | None], list[str]]:
    """Rows of a metric by missing type and ratio, and of each line what its deviations are over."""
    table: list[list[str] | None] = []
    over, last_kind = [""] * len(lines), None
    for place, cell in enumerate(first["cells"]):  # all checkpoints have the same
        kind = _kind(cell, first)
        of_lines = [[found["cells"][place]["metrics"].get(metric) for _, found in line.items] for line in lines]
        spreads = [spread_of([each["values"] for each in of_line if each]) for of_line in of_lines]
        over = [spread.over if spread else "" for spread in spreads]
        table += [None] if kind != last_kind else []
        shown = [spread.estimate.text() if spread else "–" for spread in spreads]
        table.append([kind if kind != last_kind else "", per_cent(cell["ratio"]), *shown])
        last_kind = kind
    return table, over


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
