"""Files and folders stay intact whenever their writer is killed."""

import errno
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import DataError
from common.files import NEW, OLD, atomic_path, new_folder, restore_folder, whole_folder
from tests.conftest import Patch
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from vilt.utils import arrow_writer

FORK = multiprocessing.get_context("fork")
LENGTH = 50_000
KILLS = 15


def _bytes(target: Path, number: int) -> None:
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        for _ in range(10):
            file.write(bytes([number]) * (LENGTH // 10))


def _folder(target: Path, number: int) -> None:
    with whole_folder(target, "mark.json", "a test") as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(bytes([number]) * LENGTH)


def _number_in(target: Path) -> int:
    """The number in every byte of `target`'s files."""
    restore_folder(target)
    if target.is_dir():
        (number,) = {_number_in(target / name) for name in ("a", "b")}
        return number
    content = list(target.read_bytes())
    assert len(content) == LENGTH
    (number,) = set(content)
    return number


@pytest.mark.parametrize(("write", "name"), [(_bytes, "file"), (_folder, "folder")])
def test_a_killed_writer_leaves_the_old_or_the_new_version_intact(tmp_path, write, name):
    target, draw, start = tmp_path / name, random.Random(0), time.monotonic()
    write(target, 0)
    seconds = time.monotonic() - start

    def write_again_and_again() -> None:
        for number in range(1, 200):
            write(target, number)

    found = []
    for _ in range(KILLS):
        writer = FORK.Process(target=write_again_and_again)
        writer.start()
        time.sleep(draw.uniform(0, 5 * seconds + 0.02))
        writer.kill()
        writer.join()
        found.append(_number_in(target))
    assert any(found)  # at least one writer got to write before it was killed


def test_leftovers_of_a_killed_writer_are_removed_after_a_day_by_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "a[b.csv"
    old, new, others = (tmp_path / f".{name}.part" for name in ("a[b.csv.0123abcd", "a[b.csv.123abcde", "c.0123abcd"))
    for part in (old, new, others):
        part.write_text("half")
        os.utime(part, (time.time() - 90_000 * (part != new),) * 2)
    _bytes(target, 1)
    assert set(tmp_path.iterdir()) == {target, new, others}


def test_an_old_folder_without_a_replacement_is_restored(tmp_path: Path, monkeypatch: Patch) -> None:
    """As when the writer is killed or interrupted between its two renames."""
    target, part = tmp_path / "folder", tmp_path / ".folder.0123abcd.part"
    for restore in (restore_folder, lambda target: new_folder(target).__enter__()):
        (part / OLD).mkdir(parents=True)
        (part / OLD / "old").touch()
        restore(target)
        assert [path.name for path in target.iterdir()] == ["old"]
        target.rename(tmp_path / f"restored by {restore}")
        shutil.rmtree(part, ignore_errors=True)
    target.mkdir()
    (target / "old").touch()
    replace = Path.replace

    def interrupted(path: Path, to: Path) -> Path:
        if path.name == NEW:
            raise KeyboardInterrupt
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target) as fresh:
        (fresh / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]


def test_errors_name_the_target_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError) as raised, new_folder(tmp_path / "folder") as fresh:
        (fresh / "below" / "no folder").touch()
    assert raised.value.filename == str(tmp_path / "folder" / "below" / "no folder")
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()
    assert raised.value.filename == str(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_arrow_files_from_two_conversions_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """As when make_arrow.py is killed between renaming two of its files."""
    import make_arrow
    from demo.data import write_task

    class Killed(BaseException):
        pass

    @contextmanager
    def killed_at_the_second(target: Path) -> Iterator[Path]:
        with atomic_path(target) as temporary:
            yield temporary
            if target.name == "mmimdb_dev.arrow":
                raise Killed

    out, spec = tmp_path / "arrow", DATASETS["mmimdb"]
    write_task(tmp_path / "films", films=12, seed=0)
    command = ["--dataset", "mmimdb", "--root", str(tmp_path / "films"), "--target", str(out), "--workers", "0"]
    assert make_arrow.main(command) == 0
    names = {path.name for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(arrow_writer, "atomic_path", killed_at_the_second)
        with pytest.raises(Killed):
            make_arrow.main(command)
    with pytest.raises(DataError, match=r"arrow: its mmimdb files .* two conversions"):
        ArrowDataset(spec, out, "train", 32)
    assert make_arrow.main(command) == 0
    assert {path.name for path in out.iterdir()} == names
    assert len(ArrowDataset(spec, out, "train", 32)) > 0
