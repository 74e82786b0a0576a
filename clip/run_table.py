"""The runs below a folder: which there are, how far each came, and what it reached."""

import csv
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from clip.run_folder import custom_in, read_json, write_csv
from clip.tasks import task_of
from clip.text_table import align, pattern_text
from common.errors import ConfigError, DataError, reason_of
from common.files import whole_lines
from common.messages import first_line, quoted
from common.torch_file import load_inert

log = logging.getLogger("rep")

RUN_FILES = ("best.ckpt", "last.ckpt", "metrics.csv", "test_results.json")
"""Each tells a run folder, where its config.json does not."""
COLUMNS = {
    "name": "<",
    "method": "<",
    "dataset": "<",
    "train": "<",
    "seed": ">",
    "validation": ">",
    "test": ">",
    "tested_at": "<",
    "date": "<",
    "state": "<",
    "folder": "<",
    "note": "<",
}
"""Of the table, each with the side that it is aligned to; they are fields of RunRow."""
NOT_AS_WRITTEN = (KeyError, TypeError, ValueError, ArithmeticError)
"""What odd content of a file leads to."""


@dataclass(frozen=True)
class RunRow:
    """One run. What it lacks, or what cannot be read, is None."""

    folder: Path
    """With log_dir in front."""
    name: str
    """Option exp_name, or the name of the folder of an evaluation."""
    state: str = "damaged"
    """`finished`, `unfinished` or `damaged`."""
    note: str = ""
    """What is unfinished or damaged."""
    method: str | None = None
    dataset: str | None = None
    train: str | None = None
    """Pattern that it was trained at, such as `70 % both`; None for an evaluation (test_only)."""
    seed: int | None = None
    metric: str | None = None
    """Name of the metric that chooses the best model."""
    validation: float | None = None
    """Its best value in validation, a fraction; likewise in the test."""
    test: float | None = None
    tested_at: str | None = None
    """Pattern of the test, as in `train`."""
    date: datetime | None = None
    """When the run began."""


def list_runs(log_dir: Path) -> list[RunRow]:
    """Every run below `log_dir`, also unfinished and damaged ones, by folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not log_dir.is_dir():
        raise ConfigError(f"log_dir: expected a folder of runs, found no folder at {log_dir}")
    return [_read_run(folder) for folder in _run_folders(log_dir)]


def sort_runs(rows: Sequence[RunRow], order: str) -> list[RunRow]:
    """By the column `order`, descending with `-` in front; rows that lack it come last either way."""
    name = order.removeprefix("-")
    there = [row for row in rows if getattr(row, name) is not None]
    lacking = [row for row in rows if getattr(row, name) is None]
    there.sort(key=lambda row: _sort_key(getattr(row, name)), reverse=order != name)
    return there + lacking


def describe_runs(rows: Sequence[RunRow], log_dir: Path) -> str:
    """The table for the terminal."""
    header = [name.replace("_", " ") for name in COLUMNS]
    texts = [[_say(row, name, log_dir) for name in COLUMNS] for row in rows]
    shown = align([header, *texts], "".join(COLUMNS.values()), gap=2)
    metrics = {row.dataset: row.metric for row in rows if row.metric is not None}
    legend = ", ".join(f"{metric} ({dataset})" for dataset, metric in metrics.items())
    return "\n".join([*shown, *(["", f"validation (the best) and test: {legend}"] if legend else [])])


def write_runs(rows: Sequence[RunRow], path: Path) -> None:
    """Writes the table as CSV, numbers unrounded; DataError where that is impossible."""
    header = [*COLUMNS, "metric"]
    values = [[getattr(row, name) for name in header] for row in rows]
    try:
        write_csv(path, header, [[_say_date(v) if isinstance(v, datetime) else v for v in line] for line in values])
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {reason_of(error)}") from error


def find_checkpoints(places: Sequence[Path]) -> list[Path]:
    """The checkpoints among `places`, and the best.ckpt of each run in or below those that are folders.

    Runs without one are named in a warning.

    Raises:
        ConfigError: a place is not there, or has no checkpoint below it; a checkpoint is named twice.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            if not place.is_file():
                raise ConfigError(
                    f"load_path: expected a checkpoint file or a folder of runs, found nothing at {place}"
                )
            found.append(place)
            continue
        below = sorted(place.rglob("best.ckpt"), key=_natural)
        without = [str(folder) for folder in _run_folders(place) if _lacks_checkpoint(folder)]
        if not below:
            what = f"runs without one: {', '.join(without)}" if without else "no run"
            raise ConfigError(f"load_path: expected runs with a best.ckpt in {place}, found {what}")
        if without:
            log.warning("without a checkpoint, and left out: %s", ", ".join(without))
        found += below
    resolved = [checkpoint.resolve() for checkpoint in found]
    for number, checkpoint in enumerate(found):
        if resolved[number] in resolved[:number]:
            raise ConfigError(f"load_path: expected each checkpoint once, found {checkpoint} twice")
    return found


def _run_folders(top: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """In natural order: version_10 after version_9. A run has no runs below it, and links lead to no folder twice."""
    seen = set() if seen is None else seen
    if top.resolve() in seen:
        return
    seen.add(top.resolve())
    try:
        if _is_run(top):
            yield top
            return
        below = sorted((path for path in top.iterdir() if path.is_dir()), key=_natural)
    except OSError as error:
        raise ConfigError(f"{top}: not readable: {error.strerror}") from error
    for folder in below:
        yield from _run_folders(folder, seen)


def _is_run(folder: Path) -> bool:
    if (folder / "run.json").is_file():  # Sacred's record of a run, which has a config.json too, like CLIP's weights
        return False
    if re.fullmatch(r"version_\d+", folder.name) or any((folder / name).is_file() for name in RUN_FILES):
        return True
    try:
        return {"task", "exp_name"} <= set(read_json(folder / "config.json"))
    except DataError:
        return False


def _lacks_checkpoint(run: Path) -> bool:
    if (run / "best.ckpt").is_file():
        return False
    try:
        return not read_json(run / "config.json").get("test_only")
    except DataError:
        return True


def _read_run(folder: Path) -> RunRow:
    row = RunRow(folder, folder.parent.name)
    try:
        row = _configured(row, read_json(folder / "config.json"))
        if row.train is not None:
            row = replace(row, validation=best_validation(folder, f"val/{row.metric}"))
        row = _tested(row)
        return row if row.test is not None else _how_far(row)
    except DataError as error:
        return replace(row, state="damaged", note=str(error).removeprefix(f"{folder}/"))


def _configured(row: RunRow, config: dict[str, Any]) -> RunRow:
    """What the options say."""
    path = row.folder / "config.json"
    try:
        types, ratios, custom = config["missing_type"], config["missing_ratio"], custom_in(config)
        for option, kind in (("exp_name", str), ("prompt_type", str), ("task", str), ("seed", int)):
            if type(config[option]) is not kind:
                raise ValueError(f"{option}: expected {kind.__name__}, found {quoted(config[option])}")
        return replace(
            row,
            name=row.name if config["test_only"] else config["exp_name"],
            method=config["prompt_type"],
            dataset=config["task"] if custom is None else custom.key,
            train=None if config["test_only"] else pattern_text(types["train"], ratios["train"], config["both_ratio"]),
            seed=config["seed"],
            metric=task_of(config["task"], custom).monitor,
            date=datetime.fromtimestamp(path.stat().st_mtime),
        )
    except NOT_AS_WRITTEN as error:
        raise DataError(f"{path}: not as written by run.py: {first_line(error)}") from error


def best_validation(folder: Path, monitor: str) -> float | None:
    """The best value of the metric `monitor` (`val/…`) in validation, a fraction; None where there is none.

    Of the best checkpoint, else of metrics.csv, which in a resumed run knows only what came after.

    Raises:
        DataError: the file is damaged.
    """
    if (folder / "best.ckpt").is_file():
        score = _open_checkpoint(folder / "best.ckpt", "score")["score"]
        if type(score) is not float:
            raise DataError(
                f"{folder / 'best.ckpt'}: not as written by run.py: expected a score, found {quoted(score)}"
            )
        return score
    path = folder / "metrics.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(whole_lines(file))
        try:
            values = [float(line[monitor]) for line in reader if line.get(monitor)]
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path}: line {reader.line_num}: {first_line(error)}") from error
    return max((value for value in values if not math.isnan(value)), default=None)


def _tested(row: RunRow) -> RunRow:
    """What test_results.json says, if it is there."""
    path = row.folder / "test_results.json"
    if not path.is_file():
        return row
    results = read_json(path)
    try:
        pattern = results["missing_pattern"]
        return replace(
            row,
            test=float(results["metrics"][row.metric]),
            tested_at=pattern_text(pattern["missing_type"], pattern["ratio"], pattern["both_ratio"]),
            state="finished",
        )
    except NOT_AS_WRITTEN as error:
        raise DataError(f"{path}: not as written by run.py: {first_line(error)}") from error


def _how_far(row: RunRow) -> RunRow:
    """The state of a run without a test result."""
    config = read_json(row.folder / "config.json")
    if row.train is None:
        return replace(row, state="unfinished", note="no test result")
    path = row.folder / "last.ckpt"
    if not path.is_file():
        return replace(row, state="unfinished", note="no validation yet")
    last = _open_checkpoint(path, "MissingModalityData", "global_step")
    try:
        epochs, steps = last["MissingModalityData"]["epoch"], last["global_step"]
        trained = epochs >= config["max_epoch"] or steps >= (config["max_steps"] or math.inf)
        if trained and not config["test_after_fit"]:
            return replace(row, state="finished", note="not tested")
        note = "not tested" if trained else f"{epochs} of {config['max_epoch']} epochs"
    except NOT_AS_WRITTEN as error:
        raise DataError(f"{path}: not as written by run.py: {first_line(error)}") from error
    return replace(row, state="unfinished", note=note)


def _open_checkpoint(path: Path, *needed: str) -> dict[str, Any]:
    """The content of a checkpoint of ours, with the `needed` keys; its tensors stay on disk."""
    try:
        content = load_inert(path, mmap=True)
        if not isinstance(content, dict) or not set(needed) <= set(content):
            raise ValueError(f"expected a checkpoint of a run, with {' and '.join(needed)}")
    except Exception as error:  # torch.load raises many types on damaged files
        raise DataError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
    return content


def _say(row: RunRow, name: str, log_dir: Path) -> str:
    value = getattr(row, name)
    if value is None:
        return "–"
    if isinstance(value, Path):
        return str(value.relative_to(log_dir))
    if isinstance(value, datetime):
        return _say_date(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _say_date(date: datetime) -> str:
    return f"{date:%Y-%m-%d %H:%M}"


def _sort_key(value: Any) -> Any:
    return _natural(value) if isinstance(value, (str, Path)) else value


def _natural(value: str | Path) -> list[tuple[int, str]]:
    """Numbers in names count as numbers."""
    parts = re.split(r"([0-9]+)", str(value))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
