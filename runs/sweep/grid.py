"""The grid: missing types × ratios × values of further options × seeds, and the table of its results."""

import logging
import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common.files import atomic_path, write_csv
from common.strict_json import read_json
from common.text import Estimate, baseline_texts, counted, estimate, figure, per_cent, terminal_table
from config import Options
from runs.command_line import written
from runs.run_reader import as_written_by_run, numbers_by_name
from runs.sweep.jobs import Job, Progress
from runs.sweep.launchers import Launcher
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import EVERY_DATASET
from vilt.missing_types import AVAILABLE, available_shares

log = logging.getLogger("rep")

COSTS = ("trained_parameters", "training_seconds")
"""What a run says of its cost. A run that was resumed does not know its time."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid; training, validation and test have the same missing type and ratio."""

    missing_type: str
    ratio: float
    variant: dict[str, Any]  # values of the options of `sweep_over`
    seed: int
    job: Job

    def result(self, metric: str) -> dict[str, float] | None:
        """Metrics and costs of the run, once it is complete. Raises DataError where its results lack `metric`."""
        path = self.job.result
        if path is None:
            return None
        written = read_json(path)
        with as_written_by_run(path):
            values = {
                **written["metrics"],
                metric: written["metrics"][metric],
                **{name: written[name] for name in COSTS if written.get(name)},
            }
            return numbers_by_name(values)


def grid_cells(options: Options, given: Sequence[str], folder: Path) -> list[Cell]:
    """The cells of the grid in the order of running: one seed of every pattern first, then the next.

    Args:
        given: options of the command line that all runs have.
        folder: of the sweep.
    """
    cells = []
    axes = (options.sweep_seeds, options.sweep_types, options.sweep_ratios, variants(options))
    for seed, missing_type, ratio, variant in product(*axes):
        name = "_".join(filter(None, [options.sweep_name, variant_name(variant), missing_type, str(ratio)]))
        own = [written(option, value) for option, value in variant.items()]
        own += [f"missing_type={missing_type}", f"missing_ratio={ratio}", f"seed={seed}"]
        job = Job(f"{name}_seed{seed}", folder, (*given, *own, f"exp_name={name}", f"log_dir={folder}"), tested=True)
        cells.append(Cell(missing_type, ratio, variant, seed, job))
    return cells


def variants(options: Options) -> list[dict[str, Any]]:
    """All combinations of the values in `sweep_over`."""
    return [dict(zip(options.sweep_over, values, strict=True)) for values in product(*options.sweep_over.values())]


def variant_name(variant: dict[str, Any]) -> str:
    """What a variant adds to the names of its runs' folders."""
    words = [value if isinstance(value, str) else f"{option}-{value}" for option, value in variant.items()]
    return "_".join(re.sub(r"[^\w.+-]", "-", word) for word in words)


def run_grid(options: Options, metric: str, cells: Sequence[Cell], launch: Launcher, folder: Path) -> None:
    """Runs what is not complete, and writes and prints the table.

    Args:
        metric: of the task; the one that is printed.

    Raises:
        SweepError: runs failed; they are listed before.
    """
    cell_of = {cell.job: cell for cell in cells}
    waiting = _incomplete(options, cells)
    progress = Progress(len(cells), len(cells) - len(waiting))

    def write() -> list[dict[str, Any]]:
        rows = table_rows(options, metric, cells, {job for job, _ in progress.failed})
        write_csv(folder / "table.csv", rows)
        return rows

    with closing(launch(waiting)) as outcomes:  # which stops what runs, if an error ends the block
        for job, outcome in outcomes:
            result = cell_of[job].result(metric)
            progress.report(job, outcome, "" if result is None else f"{metric} {figure(result[metric])}")
            write()
    print(f"\nsweep {options.sweep_name}: {options.task} test, mean ± standard deviation over seeds\n")
    print(f"{table_text(write(), options, metric)}\n")
    for path in [path for cell in cells if (path := cell.job.result) is not None][:1]:
        print("".join(f"  {text}\n" for text in baseline_texts(read_json(path).get("baselines", {}), metric)))
    print(f"  written to {folder / 'table.csv'}\n")
    progress.end(f"of {counted(len(cells), 'cell')} failed; the same command tries them again, and no other")


def write_commands(options: Options, cells: Sequence[Cell], folder: Path) -> None:
    """Prints a command for each run that is not complete, one a line, and writes them to `commands.txt`."""
    commands = [shlex.join(job.command()) for job in _incomplete(options, cells)]
    with atomic_path(folder / "commands.txt") as temporary:
        temporary.write_text("".join(f"{command}\n" for command in commands), "utf-8")
    for command in commands:
        print(command)
    log.info("%s, written to %s; nothing was run", counted(len(commands), "command"), folder / "commands.txt")


def _incomplete(options: Options, cells: Sequence[Cell]) -> list[Job]:
    waiting = [cell.job for cell in cells if cell.job.result is None]
    log.info("sweep %s: %s, %d complete", options.sweep_name, counted(len(cells), "cell"), len(cells) - len(waiting))
    return waiting


def table_rows(options: Options, metric: str, cells: Sequence[Cell], failed: Collection[Job]) -> list[dict[str, Any]]:
    """A row per pattern, with the names of the columns of table.csv; `metric` is there before any seed is complete."""
    results = {cell.job: cell.result(metric) for cell in cells}
    metrics = dict.fromkeys(name for result in results.values() if result for name in result if name not in COSTS)
    patterns: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        patterns.setdefault((*cell.variant.values(), cell.missing_type, cell.ratio), []).append(cell)
    rows = []
    for seeds in patterns.values():
        cell, complete = seeds[0], [result for one in seeds if (result := results[one.job]) is not None]
        row = {**cell.variant, "missing_type": cell.missing_type, "ratio": cell.ratio}
        modalities = _modalities(options)
        shares = available_shares(modalities, cell.missing_type, cell.ratio, options.both_ratio)
        row |= {f"{name}{AVAILABLE}": round(share, 6) for name, share in shares.items()}
        for name in (*(metrics or [metric]), *COSTS):
            of_all = [result[name] for result in complete] if all(name in result for result in complete) else []
            mean, std, _, undefined = estimate(of_all) or ("", "", 0, 0)
            of_metric = {f"{name}_mean": mean, f"{name}_std": std, f"{name}_undefined": undefined}
            row |= {name: mean} if name in COSTS else of_metric
        n_failed = sum(one.job in failed for one in seeds)
        counts = {"complete": len(complete), "failed": n_failed, "open": len(seeds) - len(complete) - n_failed}
        rows.append({**row, **counts})
    return rows


def _modalities(options: Options) -> list[str]:
    """Those of the dataset, which for a set of sensors its arrow files say."""
    known = EVERY_DATASET[options.task].modalities
    return list(known or open_spec(options.task, options.data_root, options.splits[:1]).modalities)


def table_text(rows: Sequence[dict[str, Any]], options: Options, metric: str) -> str:
    """The table for the terminal, with one metric."""
    any_failed = any(row["failed"] for row in rows)
    modalities = _modalities(options)
    heads = [*options.sweep_over, "missing", "ratio", *modalities, metric, "seeds complete"]
    heads += ["failed"] if any_failed else []
    shown = []
    for row in rows:
        mean, std, undefined = (row[f"{metric}_{name}"] for name in ("mean", "std", "undefined"))
        value = "–" if mean == "" else Estimate(mean, std, row["complete"] - undefined, undefined).text()
        value += "" if "±" in value else " " * 9
        line = [*(str(row[name]) for name in options.sweep_over), row["missing_type"], f"{row['ratio']:.4g}"]
        line += [*(per_cent(row[f"{name}{AVAILABLE}"]) for name in modalities), value]
        line.append(f"{row['complete']} of {row['complete'] + row['failed'] + row['open']}")
        shown.append([*line, *([str(row["failed"] or "")] if any_failed else [])])
    n_left = len(options.sweep_over) + 1
    return terminal_table(heads, shown, "<" * n_left + ">" * (len(heads) - n_left))
