"""Training on two CPU processes equals training on one, and an error in either ends the run in order."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine.processes
from common.errors import ConfigError, MachineError, OtherProcessError
from common.launcher import check_launcher
from config import DEFAULTS
from engine.processes import ending_together
from engine.trainer import make_trainer
from run import command_line
from runs.check_options import check
from tests.conftest import LONG, Captured, Patch, Workspace, read_json
from tests.custom_files import convert, write_labelled

ROOT = Path(__file__).parents[1]
WITHOUT_DROPOUT = """
from clip.modules import clip_dynamic_memory
clip_dynamic_memory.RDN_DROPOUT = 0.0
"""
"""Code that turns dropout off, since each process draws its own masks."""


def in_processes(script: Path, command: list[str], change: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line in a new process, which may start others; each runs the code `change` first."""
    script.write_text(f"import sys\n{change}\nfrom run import command_line\nsys.exit(command_line(sys.argv))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(script), *command[1:]]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def logged(folder: Path) -> dict[tuple[int, str], float]:
    """Every value in metrics.csv, keyed by step and column."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch", "seconds")
        }


def test_two_processes_train_like_one(workspace: Workspace, tmp_path: Path) -> None:
    """With the same batches of 8 (accumulation of 2), all logged metrics, the weights and the test results agree."""
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
    for key in one_state:  # for a tiny gradient, Adam turns a rounding error into a step
        torch.testing.assert_close(one_state[key], two_state[key], rtol=1e-3, atol=1e-4)
    results: list[dict[str, Any]] = [read_json(f / "test_results.json") for f in folders]
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
    """Code that makes a process run `change` in its third optimiser step."""
    return IN_A_STEP.replace("{change}", change)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (in_a_step(SPOIL), 2, "loss became nan at step 2 (epoch 0, batch 4), first in the parameter mmimdb"),
        pytest.param(BAD_IMAGE, 2, "the image cannot be decoded: made up", marks=LONG),
        (in_a_step("raise ZeroDivisionError"), 1, "internal error: ZeroDivisionError"),
        (in_a_step("os.kill(os.getpid(), signal.SIGKILL)"), 2, "was killed by SIGKILL"),
    ],
    ids=["loss", "image", "fault", "killed"],
)
def test_an_error_in_one_process_ends_both_with_its_message(workspace, tmp_path, change, status, said):
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "cpu_processes=2", "per_gpu_batchsize=2")
    command = workspace.command(*options, "missing_ratio.train=0.0")
    done = in_processes(tmp_path / "script.py", command, change.replace("{rank}", "1"))
    assert done.returncode == status, done.stderr[-3000:]
    assert done.stderr.count(said) == 1
    assert done.stderr.count("Traceback") == (status == 1)


def test_a_split_with_fewer_samples_than_processes_is_refused_before_training(workspace, tmp_path, capsys):
    spec = write_labelled(tmp_path / "raw", {"train": 6, "val": 1, "test": 4}, ["green", "red"])
    assert convert(tmp_path / "raw", tmp_path / "arrow", "--spec", str(spec)) == 0
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path / 'result'}", "cpu_processes=2")
    assert command_line(workspace.command(*options, task="custom", data_root=tmp_path / "arrow")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(fact in error for fact in ("custom_val.arrow", "2 processes", "found 1 in val", "cpu_processes"))
    assert not (tmp_path / "result").exists()


def test_a_port_in_use_is_a_clear_error(monkeypatch: Patch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29777")
    trainer: Any = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(launcher=None))
    refused = torch.distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE\nTrace")
    with pytest.raises(MachineError) as raised, ending_together(trainer):
        raise refused
    assert all(fact in str(raised.value) for fact in ("127.0.0.1:29777", "EADDRINUSE", "MASTER_PORT"))


def test_an_error_of_a_lost_connection_waits_for_the_process_that_fails(monkeypatch: Patch) -> None:
    """Otherwise this process would print a traceback of its own next to the other's message."""
    monkeypatch.setattr(engine.processes, "SECONDS_TO_END", 0)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); raise SystemExit(2)"]) as other:
        trainer: Any = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[other])))
        with pytest.raises(OtherProcessError, match=r"process 1 .* status 2"), ending_together(trainer):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")


@pytest.mark.parametrize(("step", "left"), [(None, set()), ("0", {"SLURM_NTASKS", "SLURM_PROCID"})])
def test_slurm_variables_count_only_if_srun_started_the_process(monkeypatch, step, left):
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    check_launcher()
    assert {name for name in ("SLURM_NTASKS", "SLURM_PROCID") if name in os.environ} == left


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "http"), ("MASTER_PORT", "70000"), ("LOCAL_RANK", "-1")])
def test_invalid_launcher_variables_are_refused(monkeypatch: Patch, name: str, value: str, capsys: Captured) -> None:
    monkeypatch.setenv(name, value)
    assert command_line(["run.py", "print_config"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: ") and value in error


def test_more_slurm_tasks_than_processes_are_refused(workspace: Workspace, monkeypatch: Patch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    options = check({**DEFAULTS, "task": "mmimdb", "data_root": str(workspace.arrow), "num_gpus": 0})
    with pytest.raises(ConfigError, match="srun started 2 processes, but the run has 1"):
        make_trainer(options, None, steps_per_epoch=1)
