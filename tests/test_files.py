"""Files and folders are whole at every moment, whenever their writer is killed."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clip.run_folder import write_csv, write_json
from common import files
from common.errors import DataError
from common.files import atomic_path, whole_folder
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


def _json(target: Path, number: int) -> None:
    write_json(target, [number] * LENGTH)


def _csv(target: Path, number: int) -> None:
    write_csv(target, ["number"], ([number] for _ in range(LENGTH)))


def _folder(target: Path, number: int) -> None:
    with whole_folder(target, "mark.json", "a test") as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(bytes([number]) * LENGTH)


def _number_in(target: Path) -> int:
    """The number that `target` was written with, in each of its files."""
    if target.is_dir():
        (number,) = {_number_in(target / name) for name in ("a", "b")}
        return number
    if target.suffix == ".json":
        content = json.loads(target.read_text())
    elif target.suffix == ".csv":
        content = [int(line) for line in target.read_text().splitlines()[1:]]
    else:
        content = list(target.read_bytes())
    assert len(content) == LENGTH
    (number,) = set(content)
    return number


@pytest.mark.parametrize(
    ("write", "name"), [(_bytes, "file"), (_json, "file.json"), (_csv, "file.csv"), (_folder, "folder")]
)
def test_a_killed_writer_leaves_the_old_or_the_new(
    tmp_path: Path, write: Callable[[Path, int], None], name: str
) -> None:
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
    assert any(found)  # not all were killed before they wrote anything


def test_without_an_exchange_of_names_a_folder_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for number in (1, 2):
        _folder(tmp_path / "folder", number)
        assert _number_in(tmp_path / "folder") == number
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_arrow_files_of_two_conversions_are_refused(
    workspace_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """make_arrow.py is killed between two of the renames."""
    import make_arrow

    class Killed(BaseException):
        pass

    @contextmanager
    def killed_at_the_second(target: Path) -> Iterator[Path]:
        with atomic_path(target) as temporary:
            yield temporary
            if target.name == "mmimdb_dev.arrow":
                raise Killed

    out, spec = tmp_path / "arrow", DATASETS["mmimdb"]
    command = ["--dataset", "mmimdb", "--root", str(workspace_raw), "--target", str(out), "--workers", "0"]
    assert make_arrow.main(command) == 0
    names = {path.name for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(arrow_writer, "atomic_path", killed_at_the_second)
        with pytest.raises(Killed):
            make_arrow.main(command)
    with pytest.raises(DataError, match=r"arrow: its mmimdb files are being replaced, or were when .* two conversions"):
        ArrowDataset(spec, out, "train", 32)
    assert make_arrow.main(command) == 0
    assert {path.name for path in out.iterdir()} == names
    assert len(ArrowDataset(spec, out, "train", 32)) > 0


@pytest.fixture(scope="module")
def workspace_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw dataset of a few made-up films."""
    from demo.data import write_task

    root = tmp_path_factory.mktemp("raw")
    write_task(root / "films", films=12, seed=0)
    return root / "films"
