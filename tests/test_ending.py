"""Exit statuses and last words of run.py: user's errors, ours, the machine's, Ctrl-C and SIGTERM."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import make_arrow
from clip.run_folder import write_json
from clip.training import FinetuneModule
from common.errors import NO_SPACE, MachineError, UserError, machine_error
from run import command_line
from runs import start, training
from tests.conftest import Workspace
from vilt.utils import arrow_writer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What run.py and Lightning set is put back: Lightning leaves Ctrl-C ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def small_run(workspace: Workspace, log_dir: Path, *options: str) -> list[str]:
    wanted = (f"vit={workspace.backbone}", f"log_dir={log_dir}", "exp_name=x", "max_epoch=1", "test_after_fit=False")
    return workspace.command(*wanted, *options)


def in_training_step(monkeypatch: pytest.MonkeyPatch, act: Any, at_step: int = 0) -> None:
    """Runs `act` in the training step of that number."""
    step = FinetuneModule.training_step

    def acting(self: FinetuneModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == at_step:
            act()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FinetuneModule, "training_step", acting)


def raising(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


def test_a_fault_of_ours_is_a_traceback_a_line_and_a_file(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_training_step(monkeypatch, raising(KeyError("lost")))
    assert command_line(small_run(workspace, tmp_path)) == 1
    lines = capsys.readouterr().err.splitlines()
    kept = tmp_path / "x_seed0" / "version_0" / "error.txt"
    assert lines[-1] == (
        f"internal error: KeyError 'lost': a fault of this program, not of what it was given (traceback in {kept})"
    )
    assert "Traceback (most recent call last):" in lines and "KeyError: 'lost'" in lines
    text = kept.read_text()
    assert text.startswith("Traceback (most recent call last):") and text.endswith("KeyError: 'lost'\n")


def test_a_fault_of_ours_before_the_run_has_a_folder(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does the folder of an earlier run in this process get its traceback."""
    monkeypatch.setattr(training, "load_backbone", lambda *_, **__: 1 / 0)
    assert command_line(small_run(workspace, tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.endswith(
        "internal error: ZeroDivisionError: division by zero: a fault of this program, not of what it was given\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_of_a_user_error_is_kept_too(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(small_run(workspace, tmp_path, "learning_rate=1e30")) == 2
    said = capsys.readouterr().err
    kept = tmp_path / "x_seed0" / "version_0" / "error.txt"
    last = said.splitlines()[-1]
    assert last.startswith("error: the loss became nan at step ") and last.endswith(f" (traceback in {kept})")
    assert "Traceback" not in said
    assert "common.errors.NonFiniteLossError: the loss became nan" in kept.read_text()


@pytest.mark.parametrize(
    "options", [[], ["with", "no.such"], ["with", "run.py"], ["with", "clip"], ["with", "seed=0", "-l", "x"]]
)
def test_a_command_line_that_sacred_cannot_read_is_one_line(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert command_line(["run.py", *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")


@pytest.mark.parametrize("told", [("-h",), ("--help",), ("help",), ("help", "robustness")])
def test_help_is_no_error(told: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["run.py", *told]) == 0
    said = capsys.readouterr()
    assert ("three passes" if "robustness" in told else "python run.py with task_finetune_mmimdb") in said.out
    assert said.err == ""


@pytest.mark.parametrize("inside", ["", "/record"])
def test_a_record_of_sacred_that_cannot_be_made(
    workspace: Workspace, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command_line([*workspace.command(f"log_dir={tmp_path}"), f"-F{tmp_path / 'file'}{inside}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")


def test_configuration_files_cannot_run_code(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sacred reads pickles, and JSON with jsonpickle, which makes any object that a file asks for."""
    made = tmp_path / "made"
    write_json(
        tmp_path / "bad.json", {"exp_name": {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(made)]}]}}
    )
    (tmp_path / "bad.pickle").write_bytes(b"cos\nmkdir\n(V%s\ntR." % str(made).encode())
    (tmp_path / "bad.yaml").write_text(f"exp_name: !!python/object/apply:os.mkdir ['{made}']\n")
    (tmp_path / "broken.json").write_text("{")
    for name in ("bad.json", "bad.pickle", "bad.yaml", "broken.json"):
        assert command_line(["run.py", "with", str(tmp_path / name), "task_finetune_mmimdb"]) == 2, name
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not made.exists(), name


def test_a_configuration_file_sets_options(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "mine.json", {"memory_length": 7})
    command = small_run(workspace, tmp_path / "result")
    assert command_line([*command[:4], str(tmp_path / "mine.json"), f"log_dir={tmp_path / 'result'}"]) == 2
    assert "error: memory_length: expected a positive multiple of 3" in capsys.readouterr().err


def test_a_fault_of_ours_in_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("lost")

    monkeypatch.setattr(arrow_writer, "convert", fail)
    raw = ROOT / "tests" / "data" / "golden" / "raw" / "mmimdb"
    assert make_arrow.main(["--dataset", "mmimdb", "--root", str(raw), "--target", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith("internal error: LookupError: lost: a fault of this program, not of what it was given\n")


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writing more than that to a file fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = small_run(workspace, tmp_path)
    with largest_file(100_000):
        assert command_line(command) == 2
    folder = tmp_path / "x_seed0" / "version_0"
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {folder / 'best.ckpt'}: cannot be written: File too large; ")
    assert last.endswith(f" free; there is no earlier checkpoint (traceback in {folder / 'error.txt'})")
    assert "Traceback" not in said
    assert not any("ckpt" in path.name for path in folder.iterdir())


def test_a_disk_that_is_full_from_the_start(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the traceback can be kept."""
    with largest_file(50):
        assert command_line(small_run(workspace, tmp_path)) == 2
    folder = tmp_path / "x_seed0" / "version_0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {re.escape(str(folder))}/config\.json: File too large; [\d,]+ bytes free", last)
    assert list(folder.iterdir()) == []


def test_a_log_dir_that_cannot_be_written(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command_line(small_run(workspace, tmp_path / "file")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: log_dir: cannot make a folder in ")

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(start, "write_json", refuse)
    assert command_line(small_run(workspace, tmp_path / "result")) == 2
    folder = tmp_path / "result" / "x_seed0" / "version_0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {folder / 'config.json'}: Permission denied (traceback in ")


def test_a_gpu_that_is_full(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_training_step(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")))
    assert command_line(small_run(workspace, tmp_path)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: CUDA out of memory. Tried to allocate 2 GiB. A smaller per_gpu_batchsize needs less. (traceback in "
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_what_the_machine_refuses_is_the_users(number: int) -> None:
    found = machine_error(OSError(number, os.strerror(number), "some/file"))
    assert isinstance(found, MachineError) and isinstance(found, UserError)
    room = r"; [\d,]+ bytes free" if number in NO_SPACE else ""
    assert re.fullmatch(f"some/file: {os.strerror(number)}{room}", str(found))
    assert str(machine_error(OSError(number, os.strerror(number)))) == os.strerror(number)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), OSError("no number"), IsADirectoryError(21, "x")]
)
def test_other_errors_of_the_system_are_ours(error: OSError) -> None:
    assert machine_error(error) is None


def test_ctrl_c_in_a_loop_of_lightning(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first validation there is something to go on from."""
    in_training_step(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT), at_step=7)
    assert command_line(small_run(workspace, tmp_path, "val_check_interval=4")) == 130
    folder = tmp_path / "x_seed0" / "version_0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted; to go on, repeat the command with resume_from={folder / 'last.ckpt'}"
    assert not (folder / "error.txt").exists()


def test_ctrl_c_before_the_loops(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_backbone", interrupt)
    assert command_line(small_run(workspace, tmp_path)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_sigterm_in_a_loop_of_lightning(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_training_step(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert command_line(small_run(workspace, tmp_path)) == 143
    last = tmp_path / "x_seed0" / "version_0" / "last.ckpt"
    expected = f"terminated; to go on, repeat the command with resume_from={last}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_sigterm_of_a_process(workspace: Workspace, tmp_path: Path) -> None:
    """The status reaches the shell, and unfinished files are gone."""
    command = small_run(workspace, tmp_path, "max_epoch=10000", "val_check_interval=1.0")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("epoch 0:"):
                break
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert said.splitlines()[-1].startswith("terminated")
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"seed": null}', "seed: expected an integer"),
        ("[1]", "expected an object with options, found [1]"),
        ('{"seed"', "expected options as JSON"),
    ],
)
def test_a_configuration_file_that_is_none(
    workspace: Workspace, tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.json").write_text(content)
    assert command_line([*workspace.command(f"log_dir={tmp_path}"), str(tmp_path / "options.json")]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_options_of_a_file_count_as_given(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that contradicts the checkpoint's is refused."""
    start = workspace.command(f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_steps=1", "test_after_fit=False")
    assert command_line(start) == 0
    (tmp_path / "options.json").write_text('{"prompt_type": "coop"}')
    best = next(tmp_path.rglob("best.ckpt"))
    command = workspace.command("test_only=True", f"load_path={best}", f"log_dir={tmp_path}")
    assert command_line([*command, str(tmp_path / "options.json")]) == 2
    assert "prompt_type" in capsys.readouterr().err.splitlines()[-1]
