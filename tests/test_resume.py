"""`resume_from=auto`: which checkpoint a run resumes from and what it logs; how checkpoints are written."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clip.modules.method import MethodOptions
from common.errors import CheckpointError
from config import DEFAULTS
from engine import callbacks
from engine.callbacks import Checkpoints
from engine.checkpoint import ModelSpec
from engine.checkpoint_file import AtomicCheckpointIO, check_intact, write_checkpoint
from engine.contents import CONTENTS_FILE
from engine.training import FinetuneModule
from run import command_line
from runs import resume
from runs.resume import Progress
from tests.archives import Touch
from tests.conftest import Captured, Patch, Workspace, call, error_line, read_csv, read_json
from tests.interrupted import differences, files_up_to
from tests.models import TINY, tiny_classifier
from tests.report_files import edit_json, write_run

WEIGHT = "model.memory_learner.text_memory_complete"
OPTIONS = ("val_check_interval=0.4", "max_epoch=1")


def find_progress(parent: Path, config: dict[str, Any], any_precision: bool = False, **other_contents: str) -> Progress:
    """Progress found for a run with the same input contents as the first one in `parent`, except `other_contents`."""
    path = parent / "version_0" / CONTENTS_FILE
    contents = {**(read_json(path) if path.is_file() else {}), **other_contents}
    return resume.find_progress(parent, config, contents, any_precision=any_precision)


def auto(workspace: Workspace, name: str, *options: str) -> list[str]:
    return workspace.command(f"vit={workspace.backbone}", *OPTIONS, f"exp_name={name}", "resume_from=auto", *options)


def folder_of(workspace: Workspace, name: str, version: int) -> Path:
    return workspace.results / f"{name}_seed0" / f"version_{version}"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def after_checkpoint(patch: Patch, number: int, act: Callable[[], object]) -> None:
    """Writes a checkpoint at each optimiser step, and runs `act` once the one of the given number is on disk."""
    patch.setattr(callbacks, "SECONDS_BETWEEN", 0.0)
    save, written = Checkpoints._write_last, 0

    def save_and_act(self: Any, trainer: Any) -> None:
        nonlocal written
        save(self, trainer)
        self._finish(trainer)
        written += 1
        if written == number:
            act()

    patch.setattr(Checkpoints, "_write_last", save_and_act)


def interrupt(command: list[str], monkeypatch: Patch, checkpoints: int) -> None:
    """Runs `command` until it has written the given number of checkpoints."""

    class Killed(BaseException):
        """Simulates the death of the process."""

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        after_checkpoint(patch, checkpoints, kill)
        with pytest.raises(Killed):
            command_line(command)


@pytest.mark.parametrize("checkpoints", range(1, 6))
def test_step_numbers_continue_in_a_resumed_run(workspace, monkeypatch, capsys, checkpoints):
    """Even right after a validation, where Lightning counts the step only after the checkpoint."""

    def between_steps(self: Any, trainer: Any) -> bool:
        return not trainer.validating and trainer.global_step > self._kept_step

    monkeypatch.setattr(Checkpoints, "_is_due", between_steps)
    name = f"numbered_{checkpoints}"
    interrupt(auto(workspace, name), monkeypatch, checkpoints)
    assert command_line(auto(workspace, name)) == 0
    numbers = [int(row["step"]) for row in read_csv(folder_of(workspace, name, 1) / "metrics.csv")]
    assert numbers == [*range(checkpoints, 7)]  # six steps, and the test
    assert ": 0 training samples" not in capsys.readouterr().err  # of an epoch that was over before


def test_a_new_run_starts_afresh_and_a_finished_one_is_left_alone(workspace, capsys):
    command = auto(workspace, "auto")
    assert command_line(command) == 0
    parent = workspace.results / "auto_seed0"
    assert f"no checkpoint of this run in {parent}" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    assert command_line(command) == 0
    assert f"{parent / 'version_0'} is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before
    results = parent / "version_0" / "test_results.json"
    results.write_text("{}")
    assert command_line(command) == 2
    assert f"error: {results}: not as written by run.py: " in (said := capsys.readouterr().err) and "metrics" in said


def test_a_trained_but_untested_run_is_only_tested(workspace: Workspace, capsys: Captured) -> None:
    def said_by(*options: str) -> str:
        assert command_line(auto(workspace, "untested", *options)) == 0
        return capsys.readouterr().err

    first, second, third = (folder_of(workspace, "untested", version) for version in range(3))
    said_by("test_after_fit=False")
    assert f"{first} is finished" in said_by("test_after_fit=False")
    said = said_by()
    assert f"from {first / 'last.ckpt'} (1 epoch, 6 steps)" in said and "step 6" not in said
    assert not differences(load(first / "best.ckpt"), load(second / "best.ckpt"))
    assert read_json(second / "test_results.json")["checkpoint"] == str(second / "best.ckpt")
    # Another test pattern is another test of the same training. test_ratio overrides, so this one was tested.
    assert "is finished" in said_by("test_ratio=0.7", "test_type=both", "missing_ratio.test=0.5")
    said_by("missing_ratio.test=0.5")
    assert read_json(third / "test_results.json")["missing_pattern"]["ratio"] == 0.5


def test_the_newest_intact_checkpoint_is_resumed(workspace, monkeypatch, capsys):
    command = auto(workspace, "chain", "learning_rate=0.003")
    interrupt(command, monkeypatch, checkpoints=2)
    interrupt(command, monkeypatch, checkpoints=2)
    first, second, third = (folder_of(workspace, "chain", version) for version in range(3))
    assert [load(folder / "last.ckpt")["global_step"] for folder in (first, second)] == [2, 4]
    assert load(second / "best.ckpt")["score"] >= load(first / "best.ckpt")["score"]
    content = bytearray((second / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor: torch reads it without a complaint
    (second / "last.ckpt").write_bytes(content)
    load(second / "last.ckpt")
    capsys.readouterr()
    assert command_line(command) == 0
    said = capsys.readouterr().err
    assert f"{second / 'last.ckpt'}: damaged: the checksum of its entry " in said
    assert f"from {first / 'last.ckpt'} (0 epochs, 2 steps)" in said
    assert read_json(third / "config.json")["resume_from"] == str(first / "last.ckpt")
    assert command_line(auto(workspace, "uninterrupted_chain", "learning_rate=0.003")) == 0
    uninterrupted = load(folder_of(workspace, "uninterrupted_chain", 0) / "last.ckpt")
    assert not differences(load(third / "last.ckpt")["state_dict"], uninterrupted["state_dict"])


def test_a_run_with_other_options_is_left_alone(workspace: Workspace, monkeypatch: Patch, capsys: Captured) -> None:
    interrupt(auto(workspace, "left_alone"), monkeypatch, checkpoints=2)
    first = folder_of(workspace, "left_alone", 0)
    config = {**read_json(first / "config.json"), "test_after_fit": True}
    irrelevant = {"num_workers": 3, "data_root": "moved", "exp_name": "renamed", "compile": True, "cpu_processes": 2}
    irrelevant |= {"vit": "moved", "tokenizer": "moved"}  # their contents are the same
    for same in ({}, {**irrelevant, "per_gpu_batchsize": 2}):
        found = find_progress(first.parent, {**config, **same})
        assert found == Progress(checkpoint=first / "last.ckpt")
    others = {"missing_ratio": {**config["missing_ratio"], "val": 0.1}}, {"new": 1}, {"per_gpu_batchsize": 8}
    for changed in ({"learning_rate": 0.5}, *others):
        assert find_progress(first.parent, {**config, **changed}) == Progress()
    capsys.readouterr()
    assert command_line(auto(workspace, "left_alone", "learning_rate=0.5", "batch_size=4")) == 0
    said = capsys.readouterr().err
    assert f"{first}: " in said and "batch_size (there 8, here 4), learning_rate (there 0.01, here 0.5)" in said
    assert "no checkpoint of this run" in said


def test_an_unset_precision_is_that_of_the_resumed_run(workspace: Workspace, monkeypatch: Patch) -> None:
    """The default on this machine does not matter."""
    command = auto(workspace, "in_bf16", "precision=bf16")
    interrupt(command, monkeypatch, checkpoints=2)
    first, second, third = (folder_of(workspace, "in_bf16", version) for version in range(3))
    left_open = [word for word in command if not word.startswith("precision=")]
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert command_line(left_open) == 0
    assert read_json(second / "config.json")["precision"] == "bf16-mixed"
    last = f"resume_from={first / 'last.ckpt'}"
    assert command_line([last if word == "resume_from=auto" else word for word in left_open]) == 0
    assert read_json(third / "config.json")["precision"] == "bf16-mixed"
    config = read_json(second / "config.json")
    for precision, any_precision in (("32-true", False), ("16-mixed", True)):  # given, or impossible on a CPU
        for folder in (first, second, third):
            edit_json(folder, "config.json", precision=precision)
        assert find_progress(first.parent, config, any_precision=any_precision) == Progress()


def test_folders_without_a_configuration_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 10):
        (tmp_path / f"version_{number}").mkdir()
    (tmp_path / "version_10" / "config.json").write_text('{"half')
    with caplog.at_level(logging.INFO, "rep"):
        assert find_progress(tmp_path, DEFAULTS) == Progress()
    skipped = [record.message.partition(": ")[0] for record in caplog.records if "skipped" in record.message]
    assert skipped == [str(tmp_path / "version_10"), str(tmp_path / "version_0")]


def test_a_resumed_run_does_not_repeat_its_warm_start(workspace, monkeypatch, capsys):
    assert command_line(auto(workspace, "source", "test_after_fit=False")) == 0
    source = folder_of(workspace, "source", 0) / "best.ckpt"
    command = auto(workspace, "warmed", f"load_path={source}", "finetune_first=True")
    interrupt(command, monkeypatch, checkpoints=1)
    assert "warm start from" in capsys.readouterr().err
    assert command_line(command) == 0
    said = capsys.readouterr().err
    assert "resumes from" in said and "warm start from" not in said
    assert command_line([*command, "test_only=True"]) == 2
    assert "test_only contradicts it" in capsys.readouterr().err


def test_two_runs_of_the_same_name_have_separate_folders(workspace: Workspace, monkeypatch: Patch) -> None:
    """The second one starts and finishes while the first is training."""
    command = [option for option in auto(workspace, "twice") if option != "resume_from=auto"]
    statuses: list[int] = []
    after_checkpoint(monkeypatch, 1, lambda: statuses.append(command_line(command)))
    assert [command_line(command), *statuses] == [0, 0]
    one, other = (folder_of(workspace, "twice", version) for version in (0, 1))
    assert {path.name for path in one.parent.iterdir()} == {"version_0", "version_1"}
    results = [read_json(folder / "test_results.json") for folder in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert [result["checkpoint"] for result in results] == [str(one / "best.ckpt"), str(other / "best.ckpt")]
    logged = [[{**row, "seconds": ""} for row in read_csv(folder / "metrics.csv")] for folder in (one, other)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize(("metric", "best"), [("f1_macro", [3, 4, 4, 4]), ("mae", [3, 3, 3, 6])])
def test_the_best_checkpoint_is_the_first_with_the_best_score_after_training_began(tmp_path, metric, best):
    """An undefined score is never best; the lowest error is; the first warm-up step (rate 0) does not count."""
    module = FinetuneModule(tiny_classifier(), ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY), {})
    module._rate_at = lambda step: step / 10
    checkpoints, found = Checkpoints(tmp_path, f"val/{metric}"), []
    for step, score in enumerate([0.9, 0.9, float("nan"), 0.2, 0.5, 0.5, 0.1]):
        state = {"callback_metrics": {f"val/{metric}": score}, "current_epoch": 0, "global_step": step}
        strategy = SimpleNamespace(checkpoint_io=AtomicCheckpointIO())
        trainer: Any = SimpleNamespace(**state, strategy=strategy, is_global_zero=True, world_size=1, should_stop=False)
        checkpoints.on_validation_end(trainer, module)
        checkpoints._finish(trainer)
        found.append(load(tmp_path / "best.ckpt")["global_step"] if checkpoints.best is not None else None)
    assert found == [None, None, None, *best]


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"weights": torch.full((50_000,), float(value))}, "names": ["a"], "step": (1, 2)}


def test_a_checkpoint_holds_the_values_from_when_saving_began(tmp_path: Path) -> None:
    """A failure to write is raised by the next save, or at the end."""
    io, given = AtomicCheckpointIO(), content(1)
    io.save_checkpoint(given, tmp_path / "last.ckpt")
    given["state_dict"]["weights"].zero_()
    io.finish()
    assert not differences(load(tmp_path / "last.ckpt"), content(1))
    for then in (lambda: io.save_checkpoint(given, tmp_path / "last.ckpt"), io.teardown):
        io.save_checkpoint(given, tmp_path / "last.ckpt" / "below a file.ckpt")
        with pytest.raises(OSError, match=r"last\.ckpt"):
            then()
    io.save_checkpoint(given, tmp_path / "last.ckpt" / "below a file.ckpt")
    with pytest.raises(ValueError, match="what ended the training"):
        try:
            raise ValueError("what ended the training")
        except ValueError:
            io.teardown()
            raise


def test_no_thread_is_left_if_an_error_interrupts_its_start(tmp_path: Path, monkeypatch: Patch) -> None:
    """The death of a loader worker or a signal may do so; the process would wait for the thread when it exits."""
    io, before, start = AtomicCheckpointIO(), threading.active_count(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise RuntimeError("a loader worker was killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="was killed"):
        patch.setattr(threading.Thread, "start", interrupted)
        io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    io.teardown()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("keep", [0, 100, 100_000, -1])
def test_a_truncated_checkpoint_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(1), path)
    check_intact(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged: "):
        check_intact(path)


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's thread has no room either
@pytest.mark.parametrize(("what", "n_bytes"), [("last.ckpt", 1_000_000), ("metrics.csv", 1_000)])
def test_a_run_on_a_full_disk_ends_with_one_line_and_is_resumed_later(workspace, monkeypatch, capsys, what, n_bytes):
    name = f"full_{what.partition('.')[0]}"
    command, limit = auto(workspace, name), files_up_to(n_bytes)
    folder = folder_of(workspace, name, 0)
    with monkeypatch.context() as patch:
        after_checkpoint(patch, 1, limit.__enter__)
        try:
            assert command_line(command) == 2
        finally:
            limit.__exit__(None, None, None)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder}") and "File too large" in error and "bytes free" in error
    assert f"repeat the command with resume_from={folder / 'last.ckpt'}" in error
    check_intact(folder / "last.ckpt")
    assert not list(folder.glob(".*.part"))
    assert command_line(command) == 0
    assert (folder_of(workspace, name, 1) / "test_results.json").is_file()


def test_code_in_the_checkpoints_of_listed_runs_does_not_run(workspace, tmp_path, capsys):
    marker = tmp_path / "marker"
    for name, missing in (("best.ckpt", "last.ckpt"), ("last.ckpt", "best.ckpt")):
        made = write_run(tmp_path / "result" / name / "version_0", tested=None)
        (made / missing).unlink(missing_ok=True)
        torch.save({"score": Touch(marker)}, made / name)
    assert call("runs", f"log_dir={tmp_path / 'result'}") == 0
    assert capsys.readouterr().out.count("not readable as a checkpoint: it mentions") == 2
    made = tmp_path / "result" / "best.ckpt" / "version_0"
    for options in (["load_path={}", "test_only=True"], ["resume_from={}"], ["load_path={}"]):
        given = [option.format(made / "best.ckpt") for option in options]
        assert command_line(workspace.command(f"vit={workspace.backbone}", *given)) == 2
        assert "which might run code; not opened" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize(("option", "trained"), [("max_epoch=1", 2), ("max_steps=3", 12)])
def test_a_run_trained_longer_than_asked_is_not_resumed(workspace, fitted, tmp_path, capsys, option, trained):
    """Before there is a folder."""
    name, _, limit = option.partition("=")
    path = fitted / "last.ckpt"
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", option, f"resume_from={path}")
    assert command_line(workspace.command(*options)) == 2
    reached = f"the number that resume_from={path} has trained"
    assert error_line(capsys) == f"error: {name}: expected at least {trained}, {reached}; found {limit}"
    assert not any(tmp_path.iterdir())


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: [content.pop(name) for name in names]


def having(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


NOT_RESUMABLE = "does not hold the training state"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        *((without(name), NOT_RESUMABLE) for name in ("epoch", "loops", "callbacks", "MissingModalityData")),
        (having(optimizer_states=[]), NOT_RESUMABLE),
        (having(lr_schedulers=5), "cannot be resumed"),
        (having(optimizer_states=[{}]), "cannot be resumed: KeyError 'param_groups'"),
        (having(loops={"a": 1}), "cannot be resumed: KeyError 'fit_loop'"),
        (having(lr_schedulers=[5]), "cannot be resumed"),
        (having(MissingModalityData={"epoch": 1}), "was trained with samples per batch = None, now it is 4"),
        (lambda c: c["callbacks"].update(Checkpoints={"best": {"score": 1.0}}), "cannot be resumed: KeyError 'best'"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "different number of parameter groups"),
        (lambda c: c["state_dict"].popitem(), "1 names missing"),
        (lambda c: c["state_dict"][WEIGHT].fill_(float("nan")), f"{WEIGHT} holds values that are not finite"),
    ],
)
def test_an_unusable_training_state_is_an_error(workspace, fitted, tmp_path, capsys, change, found):
    content = load(fitted / "last.ckpt")
    change(content)
    torch.save(content, tmp_path / "last.ckpt")
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_epoch=3")
    assert command_line(workspace.command(*options, f"resume_from={tmp_path / 'last.ckpt'}")) == 2
    error = error_line(capsys)
    assert found in error and ("last.ckpt" in error or "resume_from" in error)
