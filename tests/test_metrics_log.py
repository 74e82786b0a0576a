"""metrics.csv keeps its lines whatever happens while it is written."""

import csv
from pathlib import Path
from typing import Any

import pytest

from clip import metrics_log
from clip.metrics_log import MetricsLogger
from tests.test_resume import files_up_to


def logged(folder: Path) -> MetricsLogger:
    logger = MetricsLogger(folder, "", "")
    for step in range(3):
        logger.log_metrics({"train/loss": 0.1 + step}, step)
        logger.save()
    return logger


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_keep_the_lines_before(tmp_path: Path) -> None:
    logger = logged(tmp_path)
    logger.log_metrics({"val/loss": 0.25, "epoch": 0}, 2)
    logger.save()
    logger.save()  # of nothing
    assert [line["train/loss"] for line in lines(tmp_path)] == ["0.1", "1.1", "2.1", ""]
    assert lines(tmp_path)[3] == {"epoch": "0", "step": "2", "train/loss": "", "val/loss": "0.25"}


def test_a_run_killed_while_the_columns_change_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logged(tmp_path)
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


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    logger = logged(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"train/loss": 1 / 3}, 3)
    with files_up_to(len(before) + 5), pytest.raises(OSError, match="File too large"):
        logger.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    logger.save()  # there is room again
    assert [line["step"] for line in lines(tmp_path)] == ["0", "1", "2", "3"]
