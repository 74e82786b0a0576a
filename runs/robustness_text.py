"""Robustness results as tables for the terminal: of one checkpoint, and of several side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.text import AT_OFFSET, baseline_texts, counted, interval_text, per_cent, terminal_table
from engine.robustness import Results
from runs.check_options import read_load_paths
from runs.evaluation import measure_mean, measure_target
from runs.lines import RunLine, lines_of, spread_of
from runs.targets import Target, open_targets


def measure_all(config: Mapping[str, Any], given: set[str]) -> str:
    """Evaluates what `load_path` names at all missing types and ratios; "" on other processes than the first."""
    measured = [(target, measure_target(target, given)) for target in open_targets(config, given)]
    found = [(target, results) for target, results in measured if results is not None]
    if len(found) > 1 and all(path.is_file() for path in read_load_paths(config)):
        found.append(measure_mean([target for target, _ in found]))
    return describe(found) if found else ""


def describe(measured: Sequence[tuple[Target, Results]]) -> str:
    """The results side by side: a block per missing type, a column per line of runs; of one checkpoint with intervals.

    Then what answers that look at no sample get.
    """
    (target, first), lines = measured[0], lines_of(measured, lambda entry: entry[0].run)
    metric, with_interval = first["metric"], len(measured) == 1 and "interval" in first["cells"][0]
    heads, rows = ["method", ""], [["name", ""], ["trained at", ""], ["seeds", ""]]
    for line in lines:
        subjects = [target.subject for target, _ in line.items]
        heads.append(" ".join(dict.fromkeys([subjects[0].method, *subjects[0].other_input, *line.differing(lines)])))
        rows[0].append(", ".join(dict.fromkeys(subject.exp_name for subject in subjects)))
        rows[1].append(str(line.run.pattern) if line.run is not None else "not known")
        rows[2].append(", ".join("not known" if one.train_seed is None else str(one.train_seed) for one in subjects))
    heads += [f"{per_cent(first['confidence']['level'])} interval"] if with_interval else []
    table, over = _block(metric, first, lines)
    if with_interval:
        for row, cell in zip((row for row in table if row is not None), first["cells"], strict=True):
            row.append(interval_text(cell["interval"]["low"], cell["interval"]["high"]))
    if any(AT_OFFSET in found["metrics"] for _, found in measured):
        table += [None, [AT_OFFSET], *_block(AT_OFFSET, first, lines)[0]]
    filled = [row and [*row, *[""] * (len(heads) - len(row))] for row in [*rows, ["± over", "", *over], *table]]
    what = f"{target.subject.checkpoint} (sha256 {target.subject.checkpoint_sha256[:12]})"
    seeds, samples = ", ".join(map(str, first["table_seeds"])), counted(first["samples"], "sample")
    left_out = [str(target.subject.checkpoint) for line in lines for target, _ in line.repeats]
    baselines = [f"  {line}" for line in baseline_texts(first["baselines"], metric)]
    return "\n".join(
        [
            f"robustness of {what if len(measured) == 1 else counted(len(measured), 'checkpoint')}",
            f"  {first['task']} test, {samples}; {metric}, mean over missing tables (seeds {seeds})\n",
            terminal_table(heads, filled, "<" + ">" * (len(heads) - 1)),
            *([f"\nnot counted, of a seed that is there already: {', '.join(left_out)}"] if left_out else []),
            *(["", "without looking at a sample:", *baselines] if baselines else []),
        ]
    )


def _block(
    metric: str, first: Results, lines: Sequence[RunLine[tuple[Target, Results]]]
) -> tuple[list[list[str] | None], list[str]]:
    """Rows of a metric by missing type and ratio, and of each line what its deviations are over."""
    table: list[list[str] | None] = []
    over, last_kind = [""] * len(lines), None
    for place, cell in enumerate(first["cells"]):  # all checkpoints have the same
        kind = cell["missing_type"]
        of_lines = [[found["cells"][place]["metrics"].get(metric) for _, found in line.items] for line in lines]
        spreads = [spread_of([each["values"] for each in of_line if each]) for of_line in of_lines]
        over = [spread.over if spread else "" for spread in spreads]
        table += [None] if kind != last_kind else []
        shown = [spread.estimate.text() if spread else "–" for spread in spreads]
        table.append([kind if kind != last_kind else "", per_cent(cell["ratio"]), *shown])
        last_kind = kind
    return table, over
