"""Writes `metrics.csv`, one row per step; no row is lost when the columns change."""

import csv
import os
import time
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from common.files import atomic_path

FIRST = ("epoch", "step", "seconds")
"""The first columns, which say when a row was measured; the others are metrics."""


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger with our own writer."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file, created on first use."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    def finalize(self, status: str) -> None:
        """Writes the newest step too, even if no further value follows."""
        if self._experiment is not None:
            self.experiment.write()


class _Writer(ExperimentWriter):
    """Collects the values logged for one step into one row, and writes it once the next step begins."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._began = time.monotonic()
        self._written: int | None = None
        """Step of the newest row in the file."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Adds values to the row of `step`, or starts that row."""
        super().log_metrics(metrics_dict, step)
        *before, new = self.metrics
        if before and before[-1]["step"] == new["step"]:
            before[-1] |= new
            self.metrics = before
        else:
            new["seconds"] = round(time.monotonic() - self._began, 3)

    def save(self) -> None:
        """Writes the rows of finished steps; Lightning calls this whenever it has logged something."""
        self.write(self.metrics[:-1])

    def write(self, rows: list[dict[str, float]] | None = None) -> None:
        """Writes `rows`, by default all; values that follow for the newest step are added to its row in the file."""
        rows = self.metrics if rows is None else rows
        if not rows:
            return
        path = Path(self.metrics_file_path)
        columns = [*FIRST, *sorted({*self.metrics_keys, *set().union(*rows)} - set(FIRST))]
        if columns == self.metrics_keys and rows[0]["step"] != self._written:
            length = path.stat().st_size
            try:
                with path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, columns).writerows(rows)
            except OSError:  # cuts off a partial row, to which the next one would be appended
                os.truncate(path, length)
                raise
        else:  # rewritten atomically: a run killed here would lose its metrics
            lines: list[dict[str, Any]] = []
            if path.is_file():
                with path.open(encoding="utf-8", newline="") as file:
                    lines = list(csv.DictReader(file))
            if lines and rows[0]["step"] == self._written:
                rows = [{**rows[0], **{name: value for name, value in lines.pop().items() if value}}, *rows[1:]]
            with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows([*lines, *rows])
        self.metrics_keys, self._written = columns, int(rows[-1]["step"])
        self.metrics = self.metrics[len(rows) :]
