"""The grid: missing types × ratios × values of further options × seeds, and the table of its results."""

import logging
import re
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common.files import atomic_path, write_csv
from common.strict_json import read_json
from common.text import Estimate, baseline_texts, counted, estimate, figure, per_cent, terminal_table
from config import OPTIONS, Options
from runs.check_options import NEEDS
from runs.command_line import written
from runs.run_reader import as_written_by_run, numbers_by_name
from runs.sweep.jobs import Job, Progress
from runs.sweep.launchers import Launcher
from vilt.datasets.specs import DatasetSpec
from vilt.missing_types import AVAILABLE, available_shares

log = logging.getLogger("rep")

COSTS = ("trained_parameters", "training_seconds")
"""Costs of a run in its test results. A resumed run does not record its time."""


def variants(options: Options) -> list[dict[str, Any]]:
    """All combinations of the values in `sweep_over`."""
    return [dict(zip(options.sweep_over, values, strict=True)) for values in product(*options.sweep_over.values())]


def options_of(variant: dict[str, Any]) -> dict[str, Any]:
    """The options that a variant sets: its own, and those off that need an option it switches off (`far`, `fmb`)."""
    return {name: OPTIONS[name].default for name, needed in NEEDS.items() if not variant.get(needed, True)} | variant


def variant_name(variant: dict[str, Any]) -> str:
    """The part of its runs' folder names that identifies a variant."""
    words = [value if isinstance(value, str) else f"{option}-{value}" for option, value in variant.items()]
    return "_".join(re.sub(r"[^\w.+-]", "-", word) for word in words)


@dataclass(frozen=True)
class Cell:
    """Runs of the grid that differ only in their seed; missing type and ratio are the same in all splits."""

    missing_type: str
    ratio: float
    variant: dict[str, Any]  # values of the options in `sweep_over`
    jobs: list[Job]  # one for each seed


class Grid:
    """The runs of a grid and the table of their results.

    Args:
        options: the sweep's options.
        spec: the row of the dataset.
        given: options from the command line that all runs get.
        folder: the sweep's folder.
    """

    def __init__(self, options: Options, spec: DatasetSpec, given: Sequence[str], folder: Path) -> None:
        self.options, self.spec, self.given, self.folder = options, spec, given, folder
        self.cells = [
            Cell(kind, ratio, variant, [self._job(kind, ratio, variant, seed) for seed in options.sweep_seeds])
            for kind, ratio, variant in product(options.sweep_types, options.sweep_ratios, variants(options))
        ]
        self.jobs = [job for seed_jobs in zip(*(cell.jobs for cell in self.cells), strict=True) for job in seed_jobs]
        """The runs in the order they are started: the first seed of every pattern, then the second, and so on."""

    def _job(self, missing_type: str, ratio: float, variant: dict[str, Any], seed: int) -> Job:
        name = "_".join(filter(None, [self.options.sweep_name, variant_name(variant), missing_type, str(ratio)]))
        own = [written(option, value) for option, value in options_of(variant).items()]
        own += [f"missing_type={missing_type}", f"missing_ratio={ratio}", f"seed={seed}", f"exp_name={name}"]
        return Job(f"{name}_seed{seed}", self.folder, (*self.given, *own, f"log_dir={self.folder}"), tested=True)

    def incomplete(self) -> list[Job]:
        """The runs still to be done."""
        waiting = [job for job in self.jobs if job.result is None]
        n, complete = counted(len(self.jobs), "cell"), len(self.jobs) - len(waiting)
        log.info("sweep %s: %s, %d complete", self.options.sweep_name, n, complete)
        return waiting

    def run(self, launch: Launcher) -> None:
        """Runs the incomplete runs, and writes and prints the table.

        Raises:
            SweepError: runs failed, or are still running elsewhere; they are listed first.
        """
        waiting, path, metric = self.incomplete(), self.folder / "table.csv", self.spec.monitor
        progress = Progress(len(self.jobs), len(self.jobs) - len(waiting))
        with closing(launch(waiting)) as outcomes:  # stops running jobs if an error ends the block
            for job, outcome in outcomes:
                result = self._result(job)
                progress.report(job, outcome, "" if result is None else f"{metric} {figure(result[metric])}")
                write_csv(path, self._rows({job for job, _ in progress.failed}))
        rows = self._rows({job for job, _ in progress.failed})
        write_csv(path, rows)
        print(f"\nsweep {self.options.sweep_name}: {self.options.task} test, mean ± standard deviation over seeds\n")
        print(f"{self._text(rows)}\n")
        for result_path in [result for job in self.jobs if (result := job.result) is not None][:1]:
            texts = baseline_texts(read_json(result_path).get("baselines", {}), metric)
            print("".join(f"  {text}\n" for text in texts))
        print(f"  written to {path}\n")
        progress.end(counted(len(self.jobs), "cell"), "tries only these again")

    def write_commands(self) -> None:
        """Prints a command for each incomplete run, one per line, and writes them to `commands.txt`."""
        commands, path = [shlex.join(job.command()) for job in self.incomplete()], self.folder / "commands.txt"
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{command}\n" for command in commands), "utf-8")
        for command in commands:
            print(command)
        log.info("%s, written to %s; no run was started", counted(len(commands), "command"), path)

    def _result(self, job: Job) -> dict[str, float] | None:
        """Metrics and costs of a run; None until it is complete. Raises DataError if its results lack the metric."""
        if (path := job.result) is None:
            return None
        found = read_json(path)
        with as_written_by_run(path):
            found["metrics"][self.spec.monitor]  # the KeyError names it
            return numbers_by_name(found["metrics"] | {name: found[name] for name in COSTS if found.get(name)})

    def _rows(self, failed: set[Job]) -> list[dict[str, Any]]:
        """A row of table.csv per cell; the column of the task's metric exists even before any seed is complete."""
        results = {job: result for job in self.jobs if (result := self._result(job)) is not None}
        metrics = dict.fromkeys(name for result in results.values() for name in result if name not in COSTS)
        rows = []
        for cell in self.cells:
            complete = [results[job] for job in cell.jobs if job in results]
            row = {**cell.variant, "missing_type": cell.missing_type, "ratio": cell.ratio}
            pattern = cell.missing_type, cell.ratio, self.options.both_ratio
            shares = available_shares(list(self.spec.modalities), *pattern)
            row |= {f"{name}{AVAILABLE}": round(share, 6) for name, share in shares.items()}
            for name in (*(metrics or [self.spec.monitor]), *COSTS):
                values = [result[name] for result in complete] if all(name in result for result in complete) else []
                mean, std, _, undefined = estimate(values) or ("", "", 0, 0)
                columns = {f"{name}_mean": mean, f"{name}_std": std, f"{name}_undefined": undefined}
                row |= {name: mean} if name in COSTS else columns
            n_failed = len(failed & set(cell.jobs))
            n_open = len(cell.jobs) - len(complete) - n_failed
            rows.append({**row, "complete": len(complete), "failed": n_failed, "open": n_open})
        return rows

    def _text(self, rows: Sequence[dict[str, Any]]) -> str:
        """The table for the terminal, with the task's metric."""
        over, modalities, metric = list(self.options.sweep_over), list(self.spec.modalities), self.spec.monitor
        heads = [*over, "missing", "ratio", *modalities, metric, "seeds complete"]
        any_failed = ["failed"] if any(row["failed"] for row in rows) else []
        shown = []
        for row in rows:
            mean, std, undefined = (row[f"{metric}_{name}"] for name in ("mean", "std", "undefined"))
            value = "–" if mean == "" else Estimate(mean, std, row["complete"] - undefined, undefined).text()
            value += "" if "±" in value else " " * 9
            line = [*(str(row[name]) for name in over), row["missing_type"], f"{row['ratio']:.4g}"]
            line += [*(per_cent(row[f"{name}{AVAILABLE}"]) for name in modalities), value]
            line.append(f"{row['complete']} of {len(self.options.sweep_seeds)}")
            shown.append([*line, *(str(row[name] or "") for name in any_failed)])
        sides = "<" * (len(over) + 1) + ">" * (len(heads) + len(any_failed) - len(over) - 1)
        return terminal_table([*heads, *any_failed], shown, sides)
