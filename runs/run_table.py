"""The table of the runs below a folder: their configurations, progress and results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from common.files import write_csv, writing
from common.text import AT_OFFSET, baseline_texts, figure, natural_key, terminal_table
from runs.comparable import additions, other_input
from runs.lines import lines_of
from runs.run_reader import Run, find_runs

COLUMNS = {
    **dict.fromkeys(("name", "method", "dataset", "train"), "<"),
    **dict.fromkeys(("seed", "validation", "test", AT_OFFSET), ">"),
    **dict.fromkeys(("tested_at", "date", "state", "folder", "note"), "<"),
}
"""Columns of the table and their alignment; each is a field of RunRow."""
REPEATS = "repeats"
"""First word of the note on a run with the configuration and seed of another run."""


@dataclass
class RunRow:
    """One run. Fields are None if the run has no such value or it cannot be read."""

    folder: Path  # including log_dir
    name: str  # the option exp_name; for an evaluation, the name of its folder
    state: str = "damaged"  # or finished, unfinished, failed
    note: str = ""  # what is unfinished or damaged, or the error
    method: str | None = None
    dataset: str | None = None
    train: str | None = None  # training pattern, such as `70 % both`; None for an evaluation (test_only)
    seed: int | None = None
    metric: str | None = None  # name of the metric that chooses the best model
    validation: float | None = None  # best validation value of the metric, as a fraction
    test: float | None = None  # test value of the metric, as a fraction
    f1_macro_at_offset: float | None = None  # for multi-label tasks, at the offset chosen in validation
    tested_at: str | None = None  # test pattern, in the form of `train`
    date: datetime | None = None  # start of the run
    baselines: dict[str, Any] = field(default_factory=dict)  # on the test split, see `engine/baselines.py`

    def text(self, column: str, log_dir: Path) -> str:
        """The text of a cell of the table."""
        value = getattr(self, column)
        if isinstance(value, Path):
            return str(value.relative_to(log_dir))
        if isinstance(value, datetime):
            return f"{value:%Y-%m-%d %H:%M}"
        return "–" if value is None else figure(value) if isinstance(value, float) else str(value)


def list_runs(log_dir: Path) -> list[RunRow]:
    """All runs below `log_dir`, including unfinished, failed and damaged ones, sorted by folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not log_dir.is_dir():
        raise ConfigError(f"log_dir: expected a folder of runs, found no folder at {log_dir}")
    runs, damaged = find_runs(log_dir)
    rows = {folder: RunRow(folder, folder.parent.name, note=_short(error, folder)) for folder, error in damaged.items()}
    rows |= {run.folder: _row(run) for run in runs}
    for line in lines_of([run for run in runs if not run.is_evaluation], lambda run: run):
        counts = {run.config["seed"]: run.folder.relative_to(log_dir) for run in line.items}
        for repeat in line.repeats:
            row = rows[repeat.folder]
            row.note = ", ".join(filter(None, (row.note, f"{REPEATS} {counts[row.seed]}")))
    return sorted(rows.values(), key=lambda row: natural_key(row.folder))


def _row(run: Run) -> RunRow:
    config = run.config
    row = RunRow(
        run.folder,
        name=run.folder.parent.name if run.is_evaluation else config["exp_name"],
        method=" ".join([config["prompt_type"], *other_input(config), *additions(config)]),
        dataset=run.dataset,
        train=None if run.is_evaluation else str(run.pattern),
        seed=config["seed"],
        metric=run.spec.monitor,
        date=run.parts[-1].started,
    )
    try:
        row.validation = run.best_validation
        if run.test is not None:
            row.test, row.tested_at = run.test["metrics"][row.metric], str(run.tested_at)
            row.f1_macro_at_offset = run.test["metrics"].get(AT_OFFSET)
            row.baselines = run.test.get("baselines", {})
        row.state, row.note = run.state
    except DataError as error:
        row.note = _short(error, run.folder)
    return row


def _short(error: DataError, folder: Path) -> str:
    return str(error).removeprefix(f"{folder}/")


def sort_runs(rows: Sequence[RunRow], order: str) -> list[RunRow]:
    """Sorts by the column `order`, descending if preceded by `-`; rows with no value or NaN there come last."""
    name = order.removeprefix("-")
    defined = [row for row in rows if (value := getattr(row, name)) is not None and value == value]
    lacking = [row for row in rows if row not in defined]

    def key(row: RunRow) -> object:
        value = getattr(row, name)
        return natural_key(value) if isinstance(value, (str, Path)) else value

    return sorted(defined, key=key, reverse=order != name) + lacking  # type: ignore[arg-type]


def describe_runs(rows: Sequence[RunRow], log_dir: Path) -> str:
    """The table for the terminal, without columns that the folder implies; values common to all rows go below it."""
    if not rows:
        return f"no runs below {log_dir}"
    columns = {"folder": "<", **COLUMNS}
    texts = {name: [row.text(name, log_dir) for row in rows] for name in columns}
    datasets = {row.dataset: row.metric for row in rows if row.metric is not None}
    same = [name for name in ("method", "train", "state") if len(rows) > 1 and len({*texts[name]}) == 1]
    same = [name for name in same if texts[name][0] not in ("–", "damaged")]
    shared = [f"{name} {texts[name][0]}" for name in same]
    if len(rows) > 1 and len({row.folder.name for row in rows}) == 1 and all("/" in text for text in texts["folder"]):
        texts["folder"] = [text.rpartition("/")[0] for text in texts["folder"]]
        shared.append(f"folder …/{rows[0].folder.name}")
    left_out = {"name", "seed", *same}
    left_out |= {"dataset"} if len(datasets) == 1 else set()
    long = [row.state == "failed" or row.note.startswith(REPEATS) for row in rows]
    below = [row.note if is_long else "" for is_long, row in zip(long, rows, strict=True)]
    texts["note"] = ["" if said else row.note for said, row in zip(below, rows, strict=True)]
    left_out |= set() if any(texts["note"]) else {"note"}
    left_out |= {AT_OFFSET} if all(row.f1_macro_at_offset is None for row in rows) else set()
    left_out |= {"tested_at"} if all(row.tested_at in (None, row.train) for row in rows) else set()
    shown = {name: side for name, side in columns.items() if name not in left_out}
    heads = [name.replace("_", " ") for name in shown]
    table = terminal_table(heads, [*zip(*(texts[name] for name in shown), strict=True)], "".join(shown.values()))
    legend = ", ".join(f"{metric} ({dataset})" for dataset, metric in datasets.items())
    lines = ["", f"validation (the best) and test: {legend}"] if legend else []
    for dataset, metric in datasets.items():
        found = next((row.baselines for row in rows if row.dataset == dataset and row.baselines), {})
        lines += [f"  {text} ({dataset})" for text in baseline_texts(found, metric)]
    lines += [f"{folder}: {note}" for folder, note in zip(texts["folder"], below, strict=True) if note]
    lines += [f"all {len(rows)} runs: {', '.join(shared)}"] if shared else []
    return "\n".join([table, *lines])


def write_runs(rows: Sequence[RunRow], path: Path) -> None:
    """Writes the table as CSV with unrounded numbers. Raises DataError if it cannot be written."""
    columns = [*COLUMNS, "metric"]
    lines = [
        {name: row.text(name, path) if name == "date" and row.date else getattr(row, name) for name in columns}
        for row in rows
    ]
    with writing(path):
        write_csv(path, lines, columns)
