"""Exit statuses and final messages of run.py: user errors, internal and machine errors, Ctrl-C and SIGTERM."""

import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import make_arrow
from common.errors import NO_SPACE, MachineError, UserError, machine_error
from common.strict_json import write_json
from engine import families
from engine.training import FinetuneModule
from run import command_line
from runs import start
from tests.conftest import Captured, Patch, Workspace
from tests.interrupted import files_up_to

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restores the signal handlers that run.py and Lightning set; Lightning would leave Ctrl-C ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def small_run(workspace: Workspace, log_dir: Path, *options: str) -> list[str]:
    wanted = (f"vit={workspace.backbone}", f"log_dir={log_dir}", "exp_name=x", "max_epoch=1", "test_after_fit=False")
    return workspace.command(*wanted, *options)


def folder_in(log_dir: Path) -> Path:
    """The run folder of `small_run`."""
    return log_dir / "x_seed0" / "version_0"


def ends_with(status: int, command: list[str], capsys: Captured) -> tuple[str, bool]:
    """The last line on standard error, and whether a traceback was printed."""
    assert command_line(command) == status
    said = capsys.readouterr().err
    return said.splitlines()[-1], "Traceback (most recent call last):" in said


def in_training_step(monkeypatch: Patch, act: Callable[[], object], at_step: int = 0) -> None:
    """Runs `act` in the training step of batch `at_step`."""
    step = FinetuneModule.training_step

    def acting(self: FinetuneModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == at_step:
            act()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FinetuneModule, "training_step", acting)


def raising(error: BaseException) -> Callable[..., Any]:
    def act(*_: Any, **__: Any) -> None:
        raise error

    return act


def test_an_internal_error_gives_a_traceback_a_line_and_a_file(workspace, tmp_path, monkeypatch, capsys):
    in_training_step(monkeypatch, raising(KeyError("lost")))
    last, traced = ends_with(1, small_run(workspace, tmp_path), capsys)
    kept = folder_in(tmp_path) / "error.txt"
    assert last.startswith("internal error: KeyError 'lost'") and str(kept) in last and traced
    text = kept.read_text()
    assert text.startswith("Traceback (most recent call last):") and text.endswith("KeyError: 'lost'\n")


def test_an_internal_error_before_the_run_folder_exists_leaves_no_file(workspace, tmp_path, monkeypatch, capsys):
    """Nor is its traceback written to the folder of an earlier run in this process."""
    monkeypatch.setattr(families, "load_backbone", lambda *_, **__: 1 / 0)
    last, traced = ends_with(1, small_run(workspace, tmp_path), capsys)
    assert last.startswith("internal error: ZeroDivisionError: division by zero") and traced
    assert "error.txt" not in last and list(tmp_path.iterdir()) == []


def test_an_internal_error_in_a_conversion_gives_a_traceback_and_a_line(
    tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    monkeypatch.setattr(make_arrow, "convert", raising(LookupError("lost")))
    raw = ROOT / "tests" / "data" / "golden" / "raw" / "mmimdb"
    assert make_arrow.main(["--dataset", "mmimdb", "--root", str(raw), "--target", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.splitlines()[-1].startswith("internal error: LookupError: lost")


def test_a_non_finite_loss_ends_the_run_and_its_traceback_is_saved(workspace, tmp_path, capsys):
    last, traced = ends_with(2, small_run(workspace, tmp_path, "learning_rate=1e30"), capsys)
    kept = folder_in(tmp_path) / "error.txt"
    assert last.startswith("error: the loss became nan at step ") and str(kept) in last and not traced
    assert "samples: 1" in last and re.search(
        r", first in the (parameter model\.memory_learner|output of model)\.", last
    )
    assert "common.errors.NonFiniteLossError: the loss became nan" in kept.read_text()


@pytest.mark.parametrize(
    "options", [[], ["with", "no.such"], ["with", "run.py"], ["with", "clip"], ["with", "seed=0", "-l", "x"]]
)
def test_a_command_line_that_cannot_be_parsed_gives_one_line(options, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert command_line(["run.py", *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")


@pytest.mark.parametrize("asked", ["-h", "--help", "help"])
def test_help_is_no_error(asked: str, capsys: Captured) -> None:
    assert command_line(["run.py", asked]) == 0
    said = capsys.readouterr()
    assert "python run.py with task_finetune_mmimdb" in said.out and "robustness" in said.out and said.err == ""


def test_configuration_files_cannot_run_code(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    """As pickles, YAML and jsonpickle could, which create any object a file names."""
    made = tmp_path / "made"
    write_json(
        tmp_path / "bad.json", {"exp_name": {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(made)]}]}}
    )
    (tmp_path / "bad.pickle").write_bytes(b"cos\nmkdir\n(V%s\ntR." % str(made).encode())
    (tmp_path / "bad.yaml").write_text(f"exp_name: !!python/object/apply:os.mkdir ['{made}']\n")
    for name in ("bad.json", "bad.pickle", "bad.yaml"):
        assert command_line(["run.py", "with", str(tmp_path / name), "task_finetune_mmimdb"]) == 2, name
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not made.exists(), name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"memory_length": 7}', "memory_length: expected a positive multiple of 3"),
        ('{"seed": null}', "seed: expected an integer"),
        ("[1]", "expected a JSON object, found a list"),
        ('{"seed"', "expected a JSON file of options"),
    ],
)
def test_options_from_a_configuration_file_are_checked(workspace, tmp_path, content, said, capsys):
    (tmp_path / "options.json").write_text(content)
    named = [option for option in small_run(workspace, tmp_path) if "memory_length" not in option]
    assert said in ends_with(2, [*named, str(tmp_path / "options.json")], capsys)[0]


def test_options_from_a_file_count_as_given(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    """A method from a file that contradicts the checkpoint's is refused."""
    assert command_line(small_run(workspace, tmp_path, "max_steps=1")) == 0
    (tmp_path / "options.json").write_text('{"prompt_type": "coop"}')
    command = workspace.command("test_only=True", f"load_path={folder_in(tmp_path) / 'best.ckpt'}")
    assert "prompt_type" in ends_with(2, [*command, str(tmp_path / "options.json")], capsys)[0]


@pytest.mark.parametrize(("room", "at"), [(100_000, "best.ckpt"), (50, "config.json")])
def test_a_full_disk_gives_one_line_with_the_file_and_free_space(
    workspace: Workspace, tmp_path: Path, room: int, at: str, capsys: Captured
) -> None:
    """With room for only 50 bytes, not even the traceback can be saved."""
    with files_up_to(room):
        last, traced = ends_with(2, small_run(workspace, tmp_path), capsys)
    folder = folder_in(tmp_path)
    kept = f" (traceback in {folder / 'error.txt'})" if room > 50 else ""
    said = rf"{re.escape(f'error: {folder / at}')}: File too large; [\d,]+ bytes free{re.escape(kept)}"
    assert re.fullmatch(said, last) and not traced
    assert not [path for path in folder.iterdir() if "ckpt" in path.name or room == 50]


def test_an_unwritable_log_dir_gives_one_line(workspace, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert ends_with(2, small_run(workspace, tmp_path / "file"), capsys)[0].startswith("error: log_dir: ")
    path = folder_in(tmp_path) / "config.json"
    monkeypatch.setattr(start, "write_json", raising(PermissionError(errno.EACCES, "Permission denied", str(path))))
    last, _ = ends_with(2, small_run(workspace, tmp_path), capsys)
    assert last.startswith(f"error: {path}: Permission denied")


def test_running_out_of_gpu_memory_suggests_a_smaller_batch(
    workspace: Workspace, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    in_training_step(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")))
    last, _ = ends_with(2, small_run(workspace, tmp_path), capsys)
    assert last.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. ") and "per_gpu_batchsize" in last


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_refusals_by_the_machine_are_user_errors(number: int) -> None:
    room = r"; [\d,]+ bytes free" if number in NO_SPACE else ""
    for error in (OSError(number, os.strerror(number), "some/file"), OSError(number, os.strerror(number))):
        found = machine_error(error, Path("some/file"))
        assert isinstance(found, MachineError) and isinstance(found, UserError)
        assert re.fullmatch(f"some/file: {os.strerror(number)}{room}", str(found))
    assert str(machine_error(OSError(number, os.strerror(number)))) == os.strerror(number)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), OSError("no number"), IsADirectoryError(21, "x")]
)
def test_other_os_errors_are_internal(error: OSError) -> None:
    assert machine_error(error) is None


@pytest.mark.parametrize(
    ("number", "step", "status", "word"),
    [(signal.SIGINT, 7, 130, "interrupted"), (signal.SIGTERM, 0, 143, "terminated")],
)
def test_a_signal_during_training_names_the_checkpoint_to_resume_from(
    workspace, tmp_path, monkeypatch, capsys, number, step, status, word
):
    in_training_step(monkeypatch, lambda: os.kill(os.getpid(), number), at_step=step)
    last, _ = ends_with(status, small_run(workspace, tmp_path, "val_check_interval=4"), capsys)
    assert last.startswith(word) and last.endswith(f"resume_from={folder_in(tmp_path) / 'last.ckpt'}")
    assert not (folder_in(tmp_path) / "error.txt").exists()


def test_ctrl_c_before_training_gives_one_word(
    workspace: Workspace, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    monkeypatch.setattr(families, "load_backbone", raising(KeyboardInterrupt()))
    assert ends_with(130, small_run(workspace, tmp_path), capsys)[0] == "interrupted"
