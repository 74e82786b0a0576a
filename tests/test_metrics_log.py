"""metrics.csv keeps its lines when its columns change, whatever happens meanwhile."""

import csv
from pathlib import Path
from typing import Any

import pytest

from engine import metrics_log
from engine.metrics_log import MetricsLogger
from runs.run_reader import read_curves
from tests.conftest import Patch
from tests.interrupted import files_up_to


@pytest.fixture
def logger(tmp_path: Path) -> MetricsLogger:
    """With three lines in its file."""
    logger = MetricsLogger(tmp_path, "", "")
    for step in range(3):
        logger.log_metrics({"train/loss": 0.1 + step}, step)
        logger.save()
    return logger


def test_new_columns_keep_the_lines_before(tmp_path: Path, logger: MetricsLogger) -> None:
    logger.log_metrics({"val/loss": 0.25, "epoch": 0}, 2)
    logger.save()
    logger.save()  # of nothing
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["train/loss"] for line in lines] == ["0.1", "1.1", "2.1", ""]
    assert lines[3] == {"epoch": "0", "step": "2", "train/loss": "", "val/loss": "0.25"}


def test_a_run_killed_while_the_columns_change_keeps_its_lines(
    tmp_path: Path, logger: MetricsLogger, monkeypatch: Patch
) -> None:
    before = (tmp_path / "metrics.csv").read_bytes()

    class Killed(BaseException):
        pass

    class Writer(csv.DictWriter):
        def writerows(self, rows: Any) -> None:
            raise Killed

    monkeypatch.setattr(metrics_log.csv, "DictWriter", Writer)
    logger.log_metrics({"val/loss": 0.25}, 2)
    with pytest.raises(Killed):
        logger.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_full_disk_loses_no_line_and_part_of_one_is_not_read(tmp_path: Path, logger: MetricsLogger) -> None:
    path = tmp_path / "metrics.csv"
    curves = read_curves(path)
    logger.log_metrics({"train/loss": 1 / 3}, 3)
    with files_up_to(path.stat().st_size + 5), pytest.raises(OSError, match="File too large"):
        logger.save()
    assert read_curves(path) == curves
