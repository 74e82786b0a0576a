"""`run.py report` on what `run.py robustness` really leaves."""

import json
from pathlib import Path

import pytest

from run import command_line
from tests.conftest import Workspace


@pytest.mark.parametrize("bootstrap", [0, 20])
def test_the_report_of_a_run(workspace: Workspace, tmp_path: Path, bootstrap: int) -> None:
    options = (f"vit={workspace.backbone}", "exp_name=reported", "test_after_fit=False", "max_epoch=1")
    assert command_line(workspace.command(*options, f"log_dir={tmp_path}")) == 0
    folder = tmp_path / "reported_seed0" / "version_0"
    wanted = ("robustness_ratios=[0.0,0.7,1.0]", "robustness_seeds=[0,1]", f"bootstrap={bootstrap}")
    command = workspace.command(f"load_path={folder / 'best.ckpt'}", *wanted)
    assert command_line([command[0], "robustness", *command[1:]]) == 0
    found = json.loads((folder / "robustness" / "robustness.json").read_text())
    assert bool(found["confidence"]["complete"]) == bool(bootstrap)

    out = tmp_path / "report"
    assert command_line(["run.py", "report", "with", f"runs={tmp_path}", f"out={out}"]) == 0
    assert "default-src 'none'" in (out / "index.html").read_text()
    page = (out / "report.md").read_text()
    assert "Robustness curves" in page
    told = "Confidence intervals are missing in R1: made with bootstrap=0."
    assert (told in page) == (not bootstrap)


def test_a_folder_that_holds_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert command_line(["run.py", "report", "with", f"runs={tmp_path / 'empty'}", f"out={tmp_path / 'report'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "report").exists()
