"""metrics.csv has a row for each step and loses none, whatever happens; the other loggers get the options too."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from config import OPTIONS
from engine import metrics_log
from engine.metrics_log import MetricsLogger
from run import command_line
from runs import option_readers
from runs.start import environment
from tests.conftest import Patch, read_csv
from tests.interrupted import files_up_to


@pytest.fixture
def logger(tmp_path: Path) -> MetricsLogger:
    """A logger with the rows of three steps in its file."""
    logger = MetricsLogger(tmp_path, "", "")
    for step in range(3):
        logger.log_metrics({"train/loss": 0.1 + step}, step)
        logger.save()
    logger.finalize("")
    return logger


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_all_metrics_of_a_step_share_a_row_however_often_it_is_written(tmp_path, logger, writes):
    """A checkpoint saved in between writes the newest row to the file."""
    measured: list[dict[str, Any]] = [{"lr": 0.5}, {"train/loss": 3.1, "epoch": 0}, {"val/loss": 0.25, "epoch": 0}]
    for metrics in measured:
        logger.log_metrics(metrics, 3)
        logger.save()
        for _ in range(writes):
            logger.experiment.write()
    logger.log_metrics({"lr": 0.25}, 4)
    logger.save()
    rows = read_csv(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["epoch", "step", "seconds", "lr", "train/loss", "val/loss"]
    assert [row["train/loss"] for row in rows] == ["0.1", "1.1", "2.1", "3.1"]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"] and rows[3].pop("seconds")
    assert rows[3] == {"epoch": "0", "step": "3", "lr": "0.5", "train/loss": "3.1", "val/loss": "0.25"}
    logger.finalize("")
    assert len(read_csv(tmp_path / "metrics.csv")) == 5


def test_a_run_killed_while_the_columns_change_keeps_its_rows(tmp_path, logger, monkeypatch):
    before = (tmp_path / "metrics.csv").read_bytes()

    class Killed(BaseException):
        pass

    class Writer(csv.DictWriter):
        def writerows(self, rows: Any) -> None:
            raise Killed

    monkeypatch.setattr(metrics_log.csv, "DictWriter", Writer)
    logger.log_metrics({"val/loss": 0.25}, 2)
    with pytest.raises(Killed):
        logger.finalize("")
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_full_disk_loses_no_row(tmp_path: Path, logger: MetricsLogger) -> None:
    path = tmp_path / "metrics.csv"
    rows = read_csv(path)
    logger.log_metrics({"train/loss": 1 / 3}, 3)
    with files_up_to(path.stat().st_size + 5), pytest.raises(OSError, match="File too large"):
        logger.finalize("")
    assert read_csv(path) == rows
    logger.finalize("")
    assert [row["train/loss"] for row in read_csv(path)[len(rows) :]] == [str(1 / 3)], "the next try has room"


def test_a_service_without_its_package_is_refused(monkeypatch: Patch) -> None:
    monkeypatch.setattr(option_readers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^logger=wandb: .*pip install wandb"):
        OPTIONS["logger"].read("logger", "wandb")
    with pytest.raises(ConfigError, match=r"wandb or mlflow.*'comet'"):
        OPTIONS["logger"].read("logger", "comet")


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_services_and_tensorboard_get_options_and_metrics(workspace, tmp_path, monkeypatch, service):
    package = pytest.importorskip(service)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "exp_name=x", f"logger={service}", "max_steps=2")
    assert command_line([*workspace.command(*given), "test_after_fit=False"]) == 0
    folder = tmp_path / "x_seed0" / "version_0"
    assert "max_steps: 2" in (folder / "tensorboard" / "hparams.yaml").read_text()
    if service == "wandb":
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
        package.finish()
    else:
        package.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
        found = package.search_runs(experiment_names=["rep"]).iloc[0]
        assert found["params.max_steps"] == "2" and found["metrics.val/loss"] > 0


def test_the_environment_describes_the_machine() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["started"].endswith("+00:00")
    assert {"host", "cpu", "cores", "threads"} <= found["machine"].keys() and found["machine"]["threads"] >= 1
