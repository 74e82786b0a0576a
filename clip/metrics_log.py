"""`metrics.csv`: a line is written whole or not at all, and no line is lost when the columns change."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from common.files import atomic_path


class MetricsLogger(CSVLogger):
    """Lightning's logger, which by itself empties the file before it writes it anew with other columns."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file; made when it is first asked for."""
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def save(self) -> None:
        path = Path(self.metrics_file_path)
        there = path.is_file()
        if self._record_new_keys() and there:
            with path.open(encoding="utf-8", newline="") as file:
                lines = list(csv.DictReader(file))
            with atomic_path(path) as temporary:
                self._append(temporary, lines, header=True)
        n_bytes = path.stat().st_size if there else 0
        try:
            self._append(path, self.metrics, header=not there)
        except OSError:  # a full disk, which may have taken a part of a line
            if path.is_file():
                os.truncate(path, n_bytes)
            raise
        self.metrics = []

    def _append(self, path: Path, lines: Sequence[Mapping[str, Any]], *, header: bool) -> None:
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            if header:
                writer.writeheader()
            writer.writerows(lines)
