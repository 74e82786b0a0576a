"""`run.py compare`: prints the significant differences as tables, and writes them as JSON."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common.errors import ConfigError
from common.files import writing
from common.readers import integer, several, text
from common.strict_json import write_json
from common.text import baseline_texts, counted, figure, interval_text, metric_text, per_cent, terminal_table
from engine.sample_statistics import LEVEL
from runs.check_options import read_options
from runs.compare import Group, Settings, compare_runs, drawing_of
from runs.run_reader import runs_of_each
from vilt.missing_tables import NESTED

log = logging.getLogger("rep")

FORMAT = 1


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
