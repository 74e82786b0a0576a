"""Locks: who holds one, who is refused, and that dead processes hold none."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import BusyError, ConfigError
from common.locks import locked
from runs import resume
from tests.conftest import Patch

FORK = multiprocessing.get_context("fork")
WHO = f"process {os.getpid()} on {socket.gethostname()}"
CONFIG = {"learning_rate": 0.1, "num_workers": 2, "missing_ratio": {"train": 0.7, "test": 0.7}}


def training_lock(parent: Path, config: dict[str, Any], samples_per_batch: int) -> AbstractContextManager[None]:
    machine = {"num_nodes": 1, "num_gpus": 0, "cpu_processes": 1, "per_gpu_batchsize": samples_per_batch}
    return resume.training_lock(parent, config | machine)


@contextmanager
def waiting_within(begin: Callable[[], None]) -> Iterator[int]:
    """Runs `begin`, which never returns, in a process that is killed at the end; yields its id."""
    process = FORK.Process(target=begin)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def test_a_lock_names_its_holder_and_is_removed_on_release(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    for _ in range(2):
        with locked(path, "never said"):
            with pytest.raises(BusyError) as refusal, locked(path, "another process is at it"):
                pass
            assert str(refusal.value) == f"another process is at it ({WHO})"
        assert list(path.parent.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path, reached = tmp_path / ".lock", FORK.Event()

    def hold() -> None:
        with locked(path, "never said"):
            reached.set()
            signal.pause()

    with waiting_within(hold) as pid:
        assert reached.wait(60)
        with pytest.raises(BusyError, match=rf"busy .*process {pid} on {socket.gethostname()}"), locked(path, "busy"):
            pass
    assert path.exists()
    with locked(path, "never said"):
        assert WHO in path.read_text()


def test_a_forked_child_does_not_hold_a_lock(tmp_path: Path) -> None:
    path, reached = tmp_path / ".lock", FORK.Event()

    def wait() -> None:
        reached.set()
        signal.pause()

    with locked(path, "never said"):
        child = FORK.Process(target=wait)
        child.start()
        assert reached.wait(60)
    with locked(path, "never said"):
        assert child.is_alive()
    child.kill()
    child.join()


def test_unsupported_locks_give_a_warning_and_an_unusable_folder_an_error(tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING, "rep"), locked(tmp_path / ".lock", "never said"):
        assert str(tmp_path) in caplog.text and "No locks available" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^log_dir: .*file: "), locked(tmp_path / "file" / "x", ""):
        pass


def test_only_trainings_with_equal_options_exclude_each_other(tmp_path: Path, monkeypatch: Patch) -> None:
    with training_lock(tmp_path, CONFIG, samples_per_batch=8):
        for other, samples in (({"learning_rate": 0.2}, 8), ({}, 16), ({"missing_ratio": {"train": 0.1}}, 8)):
            with training_lock(tmp_path, {**CONFIG, **other}, samples_per_batch=samples):
                pass
        for same in ({}, {"num_workers": 8}, {"missing_ratio": {"train": 0.7, "test": 0.1}}):
            with pytest.raises(BusyError) as refusal, training_lock(tmp_path, {**CONFIG, **same}, samples_per_batch=8):
                pass
            assert all(fact in str(refusal.value) for fact in ("resume_from=auto", str(tmp_path), WHO))
        monkeypatch.setattr(rank_zero_only, "rank", 1)  # another process of the same run
        with training_lock(tmp_path, CONFIG, samples_per_batch=8):
            pass
    assert list(tmp_path.iterdir()) == []
