"""Training on two CPU processes: it equals one process, and what ends one of them ends the run in good order."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Workspace

ROOT = Path(__file__).parents[1]
WITHOUT_DROPOUT = """
from clip.modules import clip_dynamic_memory
clip_dynamic_memory.RDN_DROPOUT = 0.0
"""
"""Each process draws dropout masks of its own."""


def in_processes(script: Path, command: list[str], change: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, which may start others, after the code `change` in each."""
    script.write_text(f"import sys\n{change}\nfrom run import command_line\nsys.exit(command_line(sys.argv))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(script), *command[1:]]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def logged(folder: Path) -> dict[tuple[int, str], float]:
    """Every value in metrics.csv by step and column."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }


def test_two_processes_train_what_one_does(workspace: Workspace, tmp_path: Path) -> None:
    """The same batches of 8, by accumulation of 2: all logged metrics, the weights and the test."""
    folders = []
    for processes, batch in ((1, 4), (2, 2)):
        name = f"processes_{processes}"
        command = workspace.command(
            f"vit={workspace.backbone}",
            *(f"exp_name={name}", f"log_dir={tmp_path}", "max_steps=5", "val_check_interval=2"),
            *("simulate_missing=True", f"cpu_processes={processes}", f"per_gpu_batchsize={batch}"),
        )
        done = in_processes(tmp_path / f"{name}.py", command, WITHOUT_DROPOUT)
        assert done.returncode == 0, done.stderr[-3000:]
        folders.append(tmp_path / f"{name}_seed0" / "version_0")
    one, two = (logged(folder) for folder in folders)
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    one_state, two_state = (torch.load(f / "last.ckpt", weights_only=True)["state_dict"] for f in folders)
    for key in one_state:
        torch.testing.assert_close(one_state[key], two_state[key], rtol=1e-3, atol=1e-5)
    results: list[dict[str, Any]] = [json.loads((f / "test_results.json").read_text()) for f in folders]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-4)
    assert results[0]["samples"] == results[1]["samples"]


IN_A_STEP = """
import os, signal, torch
from engine.training import FinetuneModule
training_step = FinetuneModule.training_step
def changed(self, batch, batch_idx):
    if self.global_step == 2 and os.environ.get("LOCAL_RANK", "0") == "{rank}":
        {change}
    return training_step(self, batch, batch_idx)
FinetuneModule.training_step = changed
"""
SPOIL = 'torch.nn.init.constant_(self.classifier.get_parameter("mmimdb_classifier.bias"), float("nan"))'
BAD_IMAGE = """
import os
from common.errors import DataError
from vilt.datasets.kinds import ImageKind
def refuse(self, row):
    raise DataError(f"{self.data.path}: row {row}: the image cannot be decoded: made up")
if os.environ.get("LOCAL_RANK", "0") == "{rank}":
    ImageKind._decoded = refuse
"""


def in_a_step(change: str) -> str:
    """Code that has a process do `change` in its third optimiser step."""
    return IN_A_STEP.replace("{change}", change)


@pytest.mark.parametrize(
    ("change", "ranks", "status", "said"),
    [
        (in_a_step(SPOIL), (1,), 2, "loss became nan at step 2 (epoch 0, batch 4), first in the parameter mmimdb"),
        (BAD_IMAGE, (0, 1), 2, "the image cannot be decoded: made up"),
        (in_a_step("raise ZeroDivisionError"), (1,), 1, "internal error: ZeroDivisionError"),
        (in_a_step("os.kill(os.getpid(), signal.SIGKILL)"), (1,), 2, "was killed by SIGKILL"),
    ],
    ids=["loss", "image", "fault", "killed"],
)
def test_what_ends_one_process_ends_both_with_its_message(
    workspace: Workspace, tmp_path: Path, change: str, ranks: tuple[int, ...], status: int, said: str
) -> None:
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "cpu_processes=2", "per_gpu_batchsize=2")
    command = workspace.command(*options, "missing_ratio.train=0.0")
    for rank in ranks:
        done = in_processes(tmp_path / "script.py", command, change.replace("{rank}", str(rank)))
        assert done.returncode == status, done.stderr[-3000:]
        assert done.stderr.count(said) == 1
        assert done.stderr.count("Traceback") == (status == 1)
