"""`resume_from=auto`: which checkpoint a run goes on from, and what it says."""

import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clip import checkpoint_file
from clip.callbacks import Checkpoints
from clip.checkpoint_file import check_whole, write_checkpoint
from clip.resume import Progress, find_progress
from common.errors import CheckpointError, StorageError
from run import command_line
from tests.conftest import Workspace

OPTIONS = ("val_check_interval=0.4", "max_epoch=1")


def auto(workspace: Workspace, name: str, *options: str) -> list[str]:
    return workspace.command(f"vit={workspace.backbone}", *OPTIONS, f"exp_name={name}", "resume_from=auto", *options)


def folder_of(workspace: Workspace, name: str, version: int) -> Path:
    return workspace.results / f"{name}_seed0" / f"version_{version}"


class Killed(BaseException):
    """Stands for the end of the process."""


def interrupt(command: list[str], monkeypatch: pytest.MonkeyPatch, checkpoints: int) -> None:
    """Runs `command` until it has written `checkpoints`, and no further."""
    save, written = Checkpoints._write_last, 0

    def save_and_end(self: Any, trainer: Any) -> None:
        nonlocal written
        save(self, trainer)
        written += 1
        if written == checkpoints:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write_last", save_and_end)
        with pytest.raises(Killed):
            command_line(command)


def flip_byte(path: Path) -> None:
    """Damages the largest tensor in a checkpoint, so that torch reads it without a complaint."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def test_without_an_earlier_run_it_starts_and_then_nothing_is_left_to_do(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = auto(workspace, "auto")
    assert command_line(command) == 0
    parent = workspace.results / "auto_seed0"
    assert f"resume_from=auto: no checkpoint of this run in {parent}; starts anew" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    assert command_line(command) == 0
    assert f"nothing is left to do: {parent / 'version_0'} is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


def test_a_run_that_lacks_its_test_is_tested_alone(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(auto(workspace, "untested", "test_after_fit=False")) == 0
    first = folder_of(workspace, "untested", 0)
    capsys.readouterr()
    assert command_line(auto(workspace, "untested", "test_after_fit=False")) == 0
    assert f"nothing is left to do: {first} is finished" in capsys.readouterr().err
    assert command_line(auto(workspace, "untested")) == 0
    said = capsys.readouterr().err
    assert f"goes on from {first / 'last.ckpt'} (1 epochs, 6 steps)" in said and "step 6" not in said
    second = folder_of(workspace, "untested", 1)
    best = [torch.load(folder / "best.ckpt", weights_only=True) for folder in (first, second)]
    assert best[0]["score"] == best[1]["score"] and best[0]["global_step"] == best[1]["global_step"]
    assert all(torch.equal(value, best[1]["state_dict"][name]) for name, value in best[0]["state_dict"].items())
    assert json.loads((second / "test_results.json").read_text())["checkpoint"] == str(second / "best.ckpt")
    # Another test pattern is another test of the same training.
    assert command_line(auto(workspace, "untested", "test_ratio=0.7", "test_type=both", "missing_ratio.test=0.5")) == 0
    assert "nothing is left to do" in capsys.readouterr().err  # test_ratio wins, and is what was tested
    assert command_line(auto(workspace, "untested", "missing_ratio.test=0.5")) == 0
    tested = json.loads((folder_of(workspace, "untested", 2) / "test_results.json").read_text())
    assert tested["missing_pattern"]["ratio"] == 0.5


def test_the_newest_whole_checkpoint_is_taken_and_the_best_one_carries_over(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = auto(workspace, "chain", "learning_rate=0.003")
    interrupt(command, monkeypatch, checkpoints=1)
    interrupt(command, monkeypatch, checkpoints=1)
    first, second = (folder_of(workspace, "chain", version) for version in (0, 1))
    steps = [torch.load(folder / "last.ckpt", weights_only=True)["global_step"] for folder in (first, second)]
    assert steps == [2, 4]
    best = torch.load(second / "best.ckpt", weights_only=True)
    assert best["score"] >= torch.load(first / "best.ckpt", weights_only=True)["score"]
    flip_byte(second / "last.ckpt")
    capsys.readouterr()
    assert command_line(command) == 0
    said = capsys.readouterr().err
    assert f"{second / 'last.ckpt'}: damaged: the checksum of its entry " in said
    assert f"goes on from {first / 'last.ckpt'} (0 epochs, 2 steps)" in said
    third = folder_of(workspace, "chain", 2)
    assert json.loads((third / "config.json").read_text())["resume_from"] == str(first / "last.ckpt")
    assert command_line(auto(workspace, "chain_whole", "learning_rate=0.003")) == 0
    whole = torch.load(folder_of(workspace, "chain_whole", 0) / "last.ckpt", weights_only=True)["state_dict"]
    state = torch.load(third / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, whole[name]) for name, value in state.items())


def test_a_run_with_other_options_is_left_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(auto(workspace, "other"), monkeypatch, checkpoints=2)
    first = folder_of(workspace, "other", 0)
    config = {**json.loads((first / "config.json").read_text()), "test_after_fit": True}
    assert find_progress(first.parent, config, samples_per_batch=4) == Progress(checkpoint=first / "last.ckpt")
    elsewhere = {"num_workers": 3, "data_root": "moved", "exp_name": "renamed", "compile": True, "cpu_processes": 2}
    moved = {**config, **elsewhere, "per_gpu_batchsize": 2}
    assert find_progress(first.parent, moved, samples_per_batch=4) == Progress(checkpoint=first / "last.ckpt")
    for changed in ({"learning_rate": 0.5}, {"missing_ratio": {**config["missing_ratio"], "val": 0.1}}, {"new": 1}):
        assert find_progress(first.parent, {**config, **changed}, samples_per_batch=4) == Progress()
    assert find_progress(first.parent, config, samples_per_batch=8) == Progress()
    capsys.readouterr()
    assert command_line(auto(workspace, "other", "learning_rate=0.5", "batch_size=4")) == 0
    said = capsys.readouterr().err
    assert (
        f"{first}: a run with other options: batch_size (there 8, here 4), learning_rate (there 0.01, here 0.5)" in said
    )
    assert "starts anew" in said


def test_folders_that_say_nothing_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 10):
        (tmp_path / f"version_{number}").mkdir()
    (tmp_path / "version_10" / "config.json").write_text('{"half')
    with caplog.at_level(logging.INFO, "rep"):
        assert find_progress(tmp_path, {"test_after_fit": True}, 4) == Progress()
    passed = [record.message.partition(": ")[0] for record in caplog.records if "passed over" in record.message]
    assert passed == [str(tmp_path / "version_10"), str(tmp_path / "version_0")]


def test_a_warm_start_is_the_start_of_a_run_and_not_of_its_resumption(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(auto(workspace, "source", "test_after_fit=False")) == 0
    source = folder_of(workspace, "source", 0) / "best.ckpt"
    command = auto(workspace, "warmed", f"load_path={source}", "finetune_first=True")
    interrupt(command, monkeypatch, checkpoints=1)
    assert "warm start from" in capsys.readouterr().err
    assert command_line(command) == 0
    said = capsys.readouterr().err
    assert "goes on from" in said and "warm start from" not in said
    assert command_line([*command, "test_only=True"]) == 2
    assert "resume_from: goes on with a training run; test_only contradicts it" in capsys.readouterr().err


def test_two_runs_of_a_name_have_folders_of_their_own(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first one trains."""
    command = [option for option in auto(workspace, "twice") if option != "resume_from=auto"]
    save, started = Checkpoints._write_last, False

    def start_another(self: Any, trainer: Any) -> None:
        nonlocal started
        save(self, trainer)
        if not started:
            started = True
            assert command_line(command) == 0

    monkeypatch.setattr(Checkpoints, "_write_last", start_another)
    assert command_line(command) == 0
    one, other = (folder_of(workspace, "twice", version) for version in (0, 1))
    assert {path.name for path in one.parent.iterdir()} == {"version_0", "version_1"}
    results = [json.loads((folder / "test_results.json").read_text()) for folder in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert [result["checkpoint"] for result in results] == [str(one / "best.ckpt"), str(other / "best.ckpt")]
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


# Writing checkpoints.


@contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """No file may become longer: a write beyond fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"weights": torch.full((50_000,), float(value))}, "names": ["a"], "step": (1, 2)}


def test_a_checkpoint_replaces_the_one_before_only_when_it_reads_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(1), path)
    before = path.read_bytes()

    def damage_and_check(written: Path) -> None:
        assert path.read_bytes() == before  # until it is known to be whole
        flip_byte(written)
        check_whole(written)

    monkeypatch.setattr(checkpoint_file, "check_whole", damage_and_check)
    with pytest.raises(StorageError, match=r"last.ckpt: does not read back as it was written \(.*checksum.*is whole"):
        write_checkpoint(content(2), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("keep", [0, 100, 100_000, -1])
def test_a_cut_checkpoint_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(1), path)
    check_whole(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged: "):
        check_whole(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    with (
        files_up_to(10_000),
        pytest.raises(StorageError, match=r"large; 200,000 bytes needed, .*; there is no earlier"),
    ):
        write_checkpoint(content(1), path)
    write_checkpoint(content(1), path)
    before = path.read_bytes()
    with files_up_to(150_000), pytest.raises(StorageError, match=r"File too large; 200,000 bytes needed, .* is whole"):
        write_checkpoint(content(2), path)
    free = shutil.disk_usage(tmp_path)._replace(free=199_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageError, match=r"No space left on device; 200,000 bytes needed, 199,999 free; the check"):
        write_checkpoint(content(2), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("what", "n_bytes"), [("last.ckpt", 1_000_000), ("metrics.csv", 1_000)])
def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_later(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, n_bytes: int
) -> None:
    name = f"full_{what.partition('.')[0]}"
    command, save, written = auto(workspace, name), Checkpoints._write_last, 0
    limit = files_up_to(n_bytes)

    def save_and_fill(self: Any, trainer: Any) -> None:
        nonlocal written
        save(self, trainer)
        written += 1
        if written == 1:
            limit.__enter__()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write_last", save_and_fill)
        try:
            status = command_line(command)
        finally:
            limit.__exit__(None, None, None)
    assert status == 2
    folder = folder_of(workspace, name, 0)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "File too large" in error and "free" in error
    assert f"the checkpoint before, {folder / 'last.ckpt'}, is whole: make room and go on with resume_from" in error
    check_whole(folder / "last.ckpt")
    assert not list(folder.glob(".*.part"))
    assert command_line(command) == 0
    assert (folder_of(workspace, name, 1) / "test_results.json").is_file()
