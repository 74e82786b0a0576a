"""The grid: missing types × ratios × values of further options × seeds, and the table of its results."""

import logging
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from clip.run_folder import read_json, write_csv
from clip.text_table import per_cent, ruled_table
from common.errors import DataError, SweepError
from common.files import atomic_path
from common.messages import quoted
from config import Options
from sweep.jobs import Job
from sweep.launchers import Launcher
from sweep.progress import Progress, duration

log = logging.getLogger("rep")


COSTS = ("trained_parameters", "training_seconds")
"""What a run says of its cost. A run that was interrupted does not know its time."""


class Result(NamedTuple):
    """What a complete run reached, and what it cost."""

    metrics: dict[str, float]
    costs: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One run of the grid; training, validation and test have the same missing type and ratio."""

    missing_type: str
    ratio: float
    variant: dict[str, Any]
    """Values of the options of `sweep_over`."""
    seed: int
    job: Job

    @property
    def pattern(self) -> tuple[Any, ...]:
        """What the seeds of a row of the table have in common."""
        return (*self.variant.values(), self.missing_type, self.ratio)

    def result(self) -> "Result | None":
        """Of the run, once it is complete.

        Raises:
            SweepError: the file of its results is damaged.
        """
        result = self.job.result
        if result is None:
            return None
        try:
            written = read_json(result)
            costs = {name: written[name] for name in COSTS if written.get(name)}
            return Result(_numbers(dict(written["metrics"])), _numbers(costs))
        except DataError as error:
            raise SweepError(str(error)) from error
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise SweepError(f"{result}: not the results of a test: {type(error).__name__}: {error}") from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Raises ValueError or OverflowError where `values` are not numbers."""
    for name, value in values.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name}: expected a number, found {quoted(value)}")
    return {name: float(value) for name, value in values.items()}


def grid_cells(options: Options, given: Sequence[str], folder: Path) -> list[Cell]:
    """The cells of the grid in the order of running: one seed of every pattern first, then the next.

    Args:
        given: options of the command line that all runs have.
        folder: of the sweep.
    """
    return [
        _cell(options.sweep_name, missing_type, ratio, variant, seed, given, folder)
        for seed in options.sweep_seeds
        for missing_type in options.sweep_types
        for ratio in options.sweep_ratios
        for variant in variants(options)
    ]


def variants(options: Options) -> list[dict[str, Any]]:
    """All combinations of the values in `sweep_over`."""
    return [dict(zip(options.sweep_over, values, strict=True)) for values in product(*options.sweep_over.values())]


def variant_name(variant: dict[str, Any]) -> str:
    """What a variant adds to the names of its runs' folders."""
    words = [value if isinstance(value, str) else f"{option}-{value}" for option, value in variant.items()]
    return "_".join(re.sub(r"[^\w.+-]", "-", word) for word in words)


def _cell(
    sweep: str, missing_type: str, ratio: float, variant: dict[str, Any], seed: int, given: Sequence[str], folder: Path
) -> Cell:
    name = "_".join(filter(None, [sweep, variant_name(variant), missing_type, str(ratio)]))
    own = [f"{option}={value}" for option, value in variant.items()]
    own += [f"missing_type={missing_type}", f"missing_ratio={ratio}", f"seed={seed}"]
    job = Job(f"{name}_seed{seed}", folder, (*given, *own, f"exp_name={name}", f"log_dir={folder}"), tested=True)
    return Cell(missing_type, ratio, variant, seed, job)


def run_grid(options: Options, metric: str, cells: Sequence[Cell], launch: Launcher, folder: Path) -> None:
    """Runs what is not complete, and writes and prints the table.

    Args:
        metric: of the task; the one that is printed.

    Raises:
        SweepError: runs failed; they are listed before.
    """
    waiting = [cell for cell in cells if cell.job.state != "complete"]
    cell_of = {cell.job: cell for cell in cells}
    log.info("sweep %s: %s", options.sweep_name, count_states(cells))
    progress = Progress(len(cells), len(cells) - len(waiting))
    for job, outcome in launch([cell.job for cell in waiting]):
        result = cell_of[job].result()
        progress.tell(job, outcome, "" if result is None else f"{metric} {result.metrics[metric]:.4f}")
        write_table(options, metric, cells, progress, folder / "table.csv")
    rows = write_table(options, metric, cells, progress, folder / "table.csv")
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
    """A pattern of a variant, and the results of its seeds."""

    variant: dict[str, Any]
    missing_type: str
    ratio: float
    image_available: float
    text_available: float
    metrics: dict[str, tuple[float, float]]
    """Mean and sample standard deviation (0 for one seed) by name; empty while no seed is complete."""
    costs: dict[str, float]
    """Mean of what is known, likewise."""
    complete: int
    failed: int
    open: int
    """Seeds that were cut off or have not begun."""


def table_rows(options: Options, cells: Iterable[Cell], failed: Iterable[Job]) -> list[Row]:
    """The rows of the table, in the order of the cells."""
    failed, rows = set(failed), []
    seeds_of: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        seeds_of.setdefault(cell.pattern, []).append(cell)
    for seeds in seeds_of.values():
        missing_type, ratio = seeds[0].missing_type, seeds[0].ratio
        results = [result for cell in seeds if (result := cell.result()) is not None]
        share = options.both_ratio if missing_type == "both" else float(missing_type == "image")
        broken = sum(cell.job in failed for cell in seeds)
        rows.append(
            Row(
                seeds[0].variant,
                missing_type,
                ratio,
                image_available=round(1 - ratio * share, 6),
                text_available=round(1 - ratio * (1 - share), 6),
                metrics=mean_and_std_of([result.metrics for result in results]),
                costs={name: mean for name, (mean, _) in mean_and_std_of([result.costs for result in results]).items()},
                complete=len(results),
                failed=broken,
                open=len(seeds) - len(results) - broken,
            )
        )
    return rows


def mean_and_std_of(values: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of the values that all have."""
    common = [name for name in (values or [{}])[0] if all(name in of_one for of_one in values)]
    return {name: mean_and_std([of_one[name] for of_one in values]) for name in common}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_table(options: Options, metric: str, cells: Sequence[Cell], progress: Progress, path: Path) -> list[Row]:
    """Writes the table with all metrics (`metric` while none is known) as CSV, and returns its rows."""
    rows = table_rows(options, cells, [job for job, _ in progress.failed])
    names = list(dict.fromkeys(name for row in rows for name in row.metrics)) or [metric]
    columns = [f"{name}_{figure}" for name in names for figure in ("mean", "std")]
    pattern_columns = [*options.sweep_over, "missing_type", "ratio", "image_available", "text_available"]
    lines = []
    for row in rows:
        figures = [figure for name in names for figure in row.metrics.get(name, ("", ""))]
        pattern = (*row.variant.values(), row.missing_type, row.ratio, row.image_available, row.text_available)
        costs = [row.costs.get(name, "") for name in COSTS]
        lines.append([*pattern, *figures, *costs, row.complete, row.failed, row.open])
    write_csv(path, [*pattern_columns, *columns, *COSTS, "complete", "failed", "open"], lines)
    return rows


def table_text(rows: Sequence[Row], metric: str) -> str:
    """The table for the eye, with one metric."""
    varied, any_failed = list(rows[0].variant), any(row.failed for row in rows)
    any_costs = any(row.costs for row in rows)
    shown = []
    for row in rows:
        mean, std = row.metrics.get(metric, (None, 0.0))
        value = "–" if mean is None else f"{mean:.4f} ± {std:.4f}" if row.complete > 1 else f"{mean:.4f}" + " " * 9
        available = [per_cent(share) for share in (row.image_available, row.text_available)]
        seeds = [f"{row.complete} of {row.complete + row.failed + row.open}"]
        failed = [str(row.failed or "")] if any_failed else []
        variant = [str(value) for value in row.variant.values()]
        if any_costs:
            trained, seconds = (row.costs.get(name) for name in COSTS)
            seeds += ["–" if trained is None else f"{trained:,.0f}", "–" if seconds is None else duration(seconds)]
        shown.append([*variant, row.missing_type, f"{row.ratio:.4g}", *available, value, *seeds, *failed])
    head = [*varied, "missing", "ratio", "image", "text", metric, "seeds complete"]
    head += [*(["values trained", "time of a run"] if any_costs else []), *(["failed"] if any_failed else [])]
    return ruled_table(head, shown, "<" * (len(varied) + 1) + ">" * (len(head) - len(varied) - 1))
