"""The grid: missing types × ratios × seeds, and the table of its results."""

import csv
import json
import logging
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip.tasks import TASKS
from config import Options
from sweep.jobs import Job
from sweep.launchers import Launcher
from sweep.progress import Progress, as_table
from vilt.errors import SweepError
from vilt.utils.files import atomic_path

log = logging.getLogger("rep")


@dataclass(frozen=True)
class Cell:
    """One run of the grid; training, validation and test have the same missing type and ratio."""

    missing_type: str
    ratio: float
    seed: int
    job: Job

    def metrics(self) -> dict[str, float] | None:
        """Of the test, once the run is complete.

        Raises:
            SweepError: the file of its results is damaged.
        """
        result = self.job.result
        if result is None:
            return None
        try:
            return dict(json.loads(result.read_text("utf-8"))["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise SweepError(f"{result}: not readable as the results of a test: {kind}: {error}") from error


def grid_cells(options: Options, given: Sequence[str], folder: Path) -> list[Cell]:
    """The cells of the grid in the order of running: one seed of every pattern first, then the next.

    Args:
        given: options of the command line that all runs have.
        folder: of the sweep.
    """
    return [
        _cell(options.sweep_name, missing_type, ratio, seed, given, folder)
        for seed in options.sweep_seeds
        for missing_type in options.sweep_types
        for ratio in options.sweep_ratios
    ]


def _cell(sweep: str, missing_type: str, ratio: float, seed: int, given: Sequence[str], folder: Path) -> Cell:
    name = f"{sweep}_{missing_type}_{ratio}"
    own = (f"missing_type={missing_type}", f"missing_ratio={ratio}", f"seed={seed}")
    job = Job(f"{name}_seed{seed}", folder, (*given, *own, f"exp_name={name}", f"log_dir={folder}"), tested=True)
    return Cell(missing_type, ratio, seed, job)


def run_grid(options: Options, cells: Sequence[Cell], launch: Launcher, folder: Path) -> None:
    """Runs what is not complete, and writes and prints the table.

    Raises:
        SweepError: runs failed; they are listed before.
    """
    metric = TASKS[options.task].monitor
    waiting = [cell for cell in cells if cell.job.state != "complete"]
    cell_of = {cell.job: cell for cell in cells}
    log.info("sweep %s: %s", options.sweep_name, count_states(cells))
    progress = Progress(len(cells), len(cells) - len(waiting))
    for job, outcome in launch([cell.job for cell in waiting]):
        metrics = cell_of[job].metrics() or {}
        progress.tell(job, outcome, f"{metric} {metrics.get(metric, float('nan')):.4f}")
        write_table(options, cells, progress, folder / "table.csv")
    rows = write_table(options, cells, progress, folder / "table.csv")
    print(f"\nsweep {options.sweep_name}: {options.task} test, mean ± standard deviation over seeds\n")
    print(f"{table_text(rows, metric)}\n\n  written to {folder / 'table.csv'}\n")
    if progress.failed:
        print(f"failed:\n{progress.failures()}\n")
        raise SweepError(
            f"{len(progress.failed)} of {len(cells)} cells failed; the same command tries them again, and no other"
        )


def write_commands(options: Options, cells: Sequence[Cell], folder: Path) -> None:
    """Prints a command for each run that is not complete, one a line, and writes them to `commands.txt`."""
    log.info("sweep %s: %s", options.sweep_name, count_states(cells))
    commands = [shlex.join(cell.job.command()) for cell in cells if cell.job.state != "complete"]
    with atomic_path(folder / "commands.txt") as temporary:
        temporary.write_text("".join(f"{command}\n" for command in commands), "utf-8")
    for command in commands:
        print(command)
    log.info("%d commands, written to %s; nothing was run", len(commands), folder / "commands.txt")


def count_states(cells: Iterable[Cell]) -> str:
    """How many cells there are, and how far they got, in words."""
    states = [cell.job.state for cell in cells]
    counts = [(states.count(state), state) for state in ("complete", "cut off", "not begun")]
    return f"{len(states)} cells, " + ", ".join(f"{count} {state}" for count, state in counts if count)


@dataclass(frozen=True)
class Row:
    """Missing type and ratio, and the results of their seeds."""

    missing_type: str
    ratio: float
    image_available: float
    text_available: float
    metrics: dict[str, tuple[float, float]]
    """Mean and sample standard deviation (0 for one seed) by name; empty while no seed is complete."""
    complete: int
    failed: int
    open: int
    """Seeds that were cut off or have not begun."""


def table_rows(options: Options, cells: Iterable[Cell], failed: Iterable[Job]) -> list[Row]:
    """The rows of the table, by type and ratio in the order given."""
    cells, failed = list(cells), set(failed)
    rows = []
    for missing_type in options.sweep_types:
        for ratio in options.sweep_ratios:
            seeds = [cell for cell in cells if (cell.missing_type, cell.ratio) == (missing_type, ratio)]
            results = [metrics for cell in seeds if (metrics := cell.metrics()) is not None]
            share = options.both_ratio if missing_type == "both" else float(missing_type == "image")
            broken = sum(cell.job in failed for cell in seeds)
            rows.append(
                Row(
                    missing_type,
                    ratio,
                    image_available=round(1 - ratio * share, 6),
                    text_available=round(1 - ratio * (1 - share), 6),
                    metrics={name: mean_and_std([result[name] for result in results]) for name in (results or [{}])[0]},
                    complete=len(results),
                    failed=broken,
                    open=len(seeds) - len(results) - broken,
                )
            )
    return rows


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_table(options: Options, cells: Sequence[Cell], progress: Progress, path: Path) -> list[Row]:
    """Writes the table with all metrics as CSV, and returns its rows."""
    rows = table_rows(options, cells, [job for job, _ in progress.failed])
    names = list(dict.fromkeys(name for row in rows for name in row.metrics)) or [TASKS[options.task].monitor]
    columns = [f"{name}_{figure}" for name in names for figure in ("mean", "std")]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["missing_type", "ratio", "image_available", "text_available", *columns, "complete", "failed", "open"]
        )
        for row in rows:
            figures = [figure for name in names for figure in row.metrics.get(name, ("", ""))]
            available = (row.image_available, row.text_available)
            counts = (row.complete, row.failed, row.open)
            writer.writerow([row.missing_type, row.ratio, *available, *figures, *counts])
    return rows


def table_text(rows: Sequence[Row], metric: str) -> str:
    """The table for the eye, with one metric."""
    any_failed = any(row.failed for row in rows)
    shown = []
    for row in rows:
        mean, std = row.metrics.get(metric, (None, 0.0))
        value = "–" if mean is None else f"{mean:.4f} ± {std:.4f}" if row.complete > 1 else f"{mean:.4f}" + " " * 9
        available = [f"{share:.0%}".replace("%", " %") for share in (row.image_available, row.text_available)]
        seeds = f"{row.complete} of {row.complete + row.failed + row.open}"
        failed = [str(row.failed or "")] if any_failed else []
        shown.append([row.missing_type, f"{row.ratio:.4g}", *available, value, seeds, *failed])
    head = ["missing", "ratio", "image", "text", metric, "seeds complete", *(["failed"] if any_failed else [])]
    return as_table(head, shown)
