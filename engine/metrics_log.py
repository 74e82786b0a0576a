"""`metrics.csv`, of which no line is lost when its columns change."""

import csv
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from common.files import atomic_path


class MetricsLogger(CSVLogger):
    """Lightning's logger with a writer of ours."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file; made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """As Lightning's, which empties the file first: a run killed there would lose all its metrics."""
        path = Path(self.metrics_file_path)
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(lines)
