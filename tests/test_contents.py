"""A run's input files are identified by their content: replacing one matters, moving it does not."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from common.hashing import file_sha256
from engine.contents import CONTENTS_FILE, contents_of_files
from run import command_line
from tests.conftest import Captured, Workspace, read_json

PUBLISHED_TABLE = "mmimdb_train_missing_both_07.pt"


def command(workspace: Workspace, root: Path, *options: str) -> list[str]:
    """Command line of a training that reads only files below `root`."""
    own = (f"vit={root / 'backbone'}", f"log_dir={root / 'result'}", f"missing_table_root={root / 'tables'}")
    return workspace.command(
        *own, "exp_name=rep", "max_epoch=1", "val_check_interval=1.0", *options, data_root=root / "arrow"
    )


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path) -> Path:
    for name in ("arrow", "backbone"):
        shutil.copytree(workspace.root / name, tmp_path / name)
    return tmp_path


def relabel(path: Path) -> None:
    """Reverses the labels in a file but keeps its size, name and times."""
    state, table = path.stat(), pa.ipc.open_file(path.read_bytes()).read_all()
    labels = pa.array(table["label"].to_pylist()[::-1], table["label"].type)
    table = table.set_column(table.column_names.index("label"), table.schema.field("label"), labels)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    ("replace", "named"),
    [
        (lambda root: relabel(root / "arrow" / "mmimdb_dev.arrow"), "data of val"),
        (lambda root: torch.save(torch.zeros(40), root / "tables" / PUBLISHED_TABLE), "missing table of train"),
    ],
)
def test_a_run_on_replaced_files_is_not_resumed_but_one_on_moved_files_is(workspace, place, capsys, replace, named):
    auto = command(workspace, place, "resume_from=auto")
    assert command_line(auto) == 0
    folder = place / "result" / "rep_seed0" / "version_0"
    contents = read_json(folder / CONTENTS_FILE)
    assert contents["data of val"] == file_sha256(place / "arrow" / "mmimdb_dev.arrow")
    moved = place / "moved"
    shutil.copytree(place / "arrow", moved / "arrow")
    assert command_line([word.replace(f"{place}/arrow", f"{moved}/arrow") for word in auto]) == 0
    assert f"{folder} is finished" in capsys.readouterr().err

    replace(place)
    assert command_line(auto) == 0
    said = capsys.readouterr().err
    assert f"{folder}: a run with these options on other files: {named} (there sha256 " in said
    assert (folder.with_name("version_1") / "test_results.json").is_file()
    assert command_line(command(workspace, place, "max_epoch=2", f"resume_from={folder / 'last.ckpt'}")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: resume_from={folder / 'last.ckpt'}: ") and named in error


def test_a_replaced_test_set_is_tested_again_and_reported(workspace: Workspace, place: Path, capsys: Captured) -> None:
    auto = command(workspace, place, "resume_from=auto")
    assert command_line(auto) == 0
    relabel(place / "arrow" / "mmimdb_test.arrow")
    capsys.readouterr()
    assert command_line(auto) == 0
    said = capsys.readouterr().err
    assert "resumes from" in said and "step 6" not in said
    folder = place / "result" / "rep_seed0"
    first, second = (read_json(folder / f"version_{n}" / "test_results.json") for n in (0, 1))
    assert first["metrics"] != second["metrics"]
    evaluation = command(workspace, place, "test_only=True", f"load_path={folder / 'version_0' / 'best.ckpt'}")
    assert command_line(evaluation) == 0
    assert "the test set differs from its run's: data of test (there " in capsys.readouterr().err


def test_a_sweep_notices_replaced_data(workspace: Workspace, place: Path, capsys: Captured) -> None:
    sweep = command(workspace, place, "sweep_types=text", "sweep_ratios=0.5", "sweep_seeds=0")
    sweep = ["run.py", "sweep", *(word for word in sweep[1:] if word != "exp_name=rep"), "sweep_launcher=commands"]
    assert [command_line(sweep), command_line(sweep)] == [0, 0]
    relabel(place / "arrow" / "mmimdb_train.arrow")
    assert command_line(sweep) == 2
    assert "data_root/mmimdb_train.arrow (there " in capsys.readouterr().err.splitlines()[-1]


def test_a_weights_folder_is_identified_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    paths = {name: tmp_path / name for name in ("a", "b", "absent")}
    before = contents_of_files(paths)
    assert before.keys() == {"a", "b"} and before["a"] == before["b"]
    (tmp_path / "b" / "config.json").write_text("{}")
    after = contents_of_files(paths)
    assert after["a"] == before["a"] and after["b"] != before["b"]
