"""Locks: who holds one, who is refused, and that the dead hold none; what killed writers leave, and who removes it."""

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from clip.resume import alone
from common import files
from common.errors import BusyError, ConfigError
from common.files import MACHINE, NEW, OLD, atomic_path, new_folder, whole_lines
from common.locks import in_use, is_abandoned, locked

FORK = multiprocessing.get_context("fork")
WHO = f"process {os.getpid()} on {socket.gethostname()}"
CONFIG = {"learning_rate": 0.1, "num_workers": 2, "missing_ratio": {"train": 0.7, "test": 0.7}}


@contextmanager
def waiting_within(begin: Callable[[], None]) -> Iterator[int]:
    """A process that calls `begin`, which ends with `reached()`, and stays there until it is killed; its id."""
    process = FORK.Process(target=begin)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


# Lock files


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    for _ in range(2):
        with locked(path, "never said"):
            assert path.read_text() == f"{WHO}\n"
            with pytest.raises(BusyError) as refusal, locked(path, "somebody is at it"):
                pass
            assert str(refusal.value) == f"somebody is at it ({WHO})"
        assert list(path.parent.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path, reached = tmp_path / ".lock", FORK.Event()

    def hold() -> None:
        with locked(path, "never said"):
            reached.set()
            signal.pause()

    with waiting_within(hold) as pid:
        assert reached.wait(60)
        with pytest.raises(BusyError, match=rf"^busy \(process {pid} on "), locked(path, "busy"):
            pass
    assert path.exists()
    with locked(path, "never said"):
        assert path.read_text() == f"{WHO}\n"


def test_a_forked_child_does_not_hold_on_to_a_lock(tmp_path: Path) -> None:
    """A started program does, if it is given the descriptor."""
    path, reached = tmp_path / ".lock", FORK.Event()

    def wait() -> None:
        reached.set()
        signal.pause()

    with locked(path, "never said"):
        process = FORK.Process(target=wait)
        process.start()
        assert reached.wait(60)
    with locked(path, "never said"):
        pass
    assert process.is_alive()
    process.kill()
    process.join()
    with locked(path, "never said") as descriptor:
        program = Popen([sys.executable, "-c", "input()"], pass_fds=[descriptor], stdin=-1)
        path.rename(tmp_path / "kept")  # as if this process were killed, which then does not remove it
    with pytest.raises(BusyError), locked(tmp_path / "kept", "busy"):
        pass
    program.communicate(b"\n")
    with locked(tmp_path / "kept", "never said"):
        pass


def test_where_no_lock_is_to_be_had_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch)
    with locked(tmp_path / ".lock", "never said"), caplog.at_level(logging.WARNING, "rep"):
        pass
    with locked(tmp_path / ".lock", "never said"):
        assert (
            caplog.messages[-1] == f"{tmp_path}: no lock is to be had there (No locks available): start nothing twice"
        )
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^log_dir: cannot write to .*file: "), locked(tmp_path / "file" / "x", ""):
        pass


def test_trainings_with_other_options_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone(tmp_path, CONFIG, 8):
        for other, samples in (({"learning_rate": 0.2}, 8), ({}, 16), ({"missing_ratio": {"train": 0.1}}, 8)):
            with alone(tmp_path, {**CONFIG, **other}, samples):
                pass
        for same in ({}, {"num_workers": 8}, {"missing_ratio": {"train": 0.7, "test": 0.1}}):
            with pytest.raises(BusyError) as refusal, alone(tmp_path, {**CONFIG, **same}, 8):
                pass
            message = f"resume_from=auto: another process is at this training in {tmp_path} ({WHO})"
            assert str(refusal.value) == message
        monkeypatch.setattr(rank_zero_only, "rank", 1)  # another process of the same run
        with alone(tmp_path, CONFIG, 8):
            pass
    assert list(tmp_path.iterdir()) == []


# What killed writers leave


def write(target: Path, text: str = "new") -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(text)


def leave(target: Path, *, machine: str = MACHINE, mark: str = "0123abcd") -> Path:
    """What a killed writer of `target` leaves."""
    part = target.with_name(f".{target.name}.{machine}.{mark}.part")
    part.write_text("half")
    return part


def test_what_a_killed_writer_left_goes_with_the_next_writing_of_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "a+b.csv"
    mine, others = leave(target), {leave(tmp_path / "aab.csv"), leave(target, machine="0" * 8), leave(tmp_path / "c")}
    with caplog.at_level(logging.INFO):
        write(target)
    assert set(tmp_path.iterdir()) == {target, *others}
    assert caplog.messages == [f"{mine}: left by a run that was killed; removed"]


def test_what_a_living_writer_is_at_stays(tmp_path: Path) -> None:
    target, reached = tmp_path / "file", FORK.Event()

    def begin() -> None:
        with atomic_path(target) as temporary, new_folder(tmp_path / "folder") as fresh:
            temporary.write_text("half")
            (fresh / "file").write_text("half")
            reached.set()
            signal.pause()

    with waiting_within(begin):
        assert reached.wait(60)
        parts = set(tmp_path.iterdir())
        for _ in range(2):
            write(target)
            with new_folder(tmp_path / "folder"):
                pass
            assert set(tmp_path.iterdir()) == parts | {target, tmp_path / "folder"}
            assert not any(is_abandoned(part) for part in parts)
    assert all(is_abandoned(part) for part in parts)
    write(target)
    with new_folder(tmp_path / "folder"):
        pass
    assert set(tmp_path.iterdir()) == {target, tmp_path / "folder"}


def test_where_no_lock_is_to_be_had_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = leave(tmp_path / "file")
    refuse_locks(monkeypatch)
    write(tmp_path / "file")
    assert set(tmp_path.iterdir()) == {part, tmp_path / "file"}


def test_a_file_that_is_removed_before_its_writer_has_locked_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer has met it, and taken it for abandoned."""
    made = []

    @contextmanager
    def late(part: Path) -> Iterator[bool]:
        made.append(part)
        if len(made) == 1:
            part.unlink()
        with in_use(part) as there:
            yield there

    monkeypatch.setattr(files, "in_use", late)
    write(tmp_path / "file")
    assert len(set(made)) == 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_an_old_folder_without_a_successor_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system cannot exchange two names, and the writer is killed, or told to stop, between the two steps."""
    target, part = tmp_path / "folder", tmp_path / f".folder.{MACHINE}.0123abcd.part"

    def read() -> list[str]:
        return [path.name for path in target.iterdir()]

    (part / OLD).mkdir(parents=True)
    (part / OLD / "old").touch()
    (part / NEW).mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(target):
        assert read() == ["old"]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [target] and read() == ["old"]

    replace = Path.replace

    def stopped(path: Path, to: Path) -> Path:
        if path.name == NEW:
            raise KeyboardInterrupt
        return replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *_: False)
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt), new_folder(target) as fresh:
            (fresh / "new").touch()
    assert list(tmp_path.iterdir()) == [target] and read() == ["old"]
    with new_folder(target) as fresh:
        (fresh / "new").touch()
    assert list(tmp_path.iterdir()) == [target] and read() == ["new"]


def test_errors_name_the_target(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError) as raised, new_folder(tmp_path / "folder") as fresh:
        (fresh / "below").mkdir()
        (fresh / "below" / "file" / "no folder").touch()
    assert raised.value.filename == str(tmp_path / "folder" / "below" / "file" / "no folder")
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()
    assert raised.value.filename == str(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "lines"), [("a\r\nb\r\n", 2), ("a\nb", 1), ("a\nb\r", 1), ("a", 0), ("", 0)])
def test_a_last_line_that_is_cut_is_left_out(tmp_path: Path, text: str, lines: int) -> None:
    (tmp_path / "log").write_bytes(text.encode())
    with (tmp_path / "log").open(newline="") as file:
        assert [line.strip() for line in whole_lines(file)] == ["a", "b"][:lines]
