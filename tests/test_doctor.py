"""`run.py doctor`: an intact dataset passes, and every planted fault has its own line, whatever else is wrong."""

import importlib.metadata
import json
import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich import filesize
from safetensors.torch import load_file, save_file

from run import command_line
from runs import doctor
from tests.conftest import Captured, Patch, Workspace, call
from tests.custom_files import convert, write_labelled
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import ImageKind
from vilt.datasets.specs import DATASETS

SPLITS = ("train data", "val data", "test data")
SUBJECTS = ["packages", "options", "device", "backbone", "tokenizer", *SPLITS, "training step", "storage"]


@pytest.fixture
def arrow(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of the dataset, free to be damaged."""
    return Path(shutil.copytree(workspace.arrow, tmp_path / "arrow", ignore=shutil.ignore_patterns("*.npy")))


class Examination:
    """Doctor's output, parsed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.error = err.splitlines()[-1] if err else ""
        parts = [(line[:5].strip(), *line[5:].split(": ", 1)) for line in out.splitlines()]
        self.level = {subject: level for level, subject, _ in parts}
        self.text = {subject: text for _, subject, text in parts}

    def failed(self) -> set[str]:
        return {subject for subject, level in self.level.items() if level == "FAIL"}


Examine = Callable[..., Examination]


@pytest.fixture
def examine(workspace: Workspace, tmp_path: Path, capsys: Captured) -> Examine:
    """Runs doctor on a dataset, with the test's own log_dir and missing tables."""

    def examine(*options: str, data_root: Path | None = None, task: str = "mmimdb") -> Examination:
        own = (f"log_dir={tmp_path / 'result'}", f"missing_table_root={tmp_path / 'tables'}")
        given = (f"vit={workspace.backbone}", *own, *options)
        capsys.readouterr()
        status = command_line(workspace.command(*given, name="doctor", task=task, data_root=data_root))
        return Examination(status, *capsys.readouterr())

    return examine


def rewrite(path: Path, metadata: dict[str, str] | None = None, **columns: pa.Array | None) -> None:
    """Replaces columns of an arrow file; None removes one."""
    table = pa.ipc.open_file(path).read_all()
    for name, column in columns.items():
        place = table.column_names.index(name)
        table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    table = table.replace_schema_metadata(metadata if metadata is not None else table.schema.metadata).combine_chunks()
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def column(path: Path, name: str) -> list[Any]:
    return pa.ipc.open_file(path).read_all()[name].to_pylist()


def test_an_intact_dataset_passes(examine: Examine, arrow: Path, tmp_path: Path) -> None:
    found = examine(data_root=arrow)
    assert found.status == 0 and found.error == "" and found.failed() == set()
    assert list(found.level) == SUBJECTS
    for split in ("train", "val", "test"):
        path = arrow / DATASETS["mmimdb"].file_name(split)
        rows, texts = len(column(path, "label")), sum(map(len, column(path, "plots")))
        said = found.text[f"{split} data"]
        assert said.startswith(f"{rows} rows, {texts} samples") and "classes do not occur" in said
        assert str(f"{DATASETS['mmimdb'].published_rows[split][0]:,}") in said
        missing = int(rows * 0.7)
        assert f"{rows - missing} complete, {missing - missing // 2} text missing, {missing // 2} image missing" in said
    assert 0.4 < float(found.text["training step"].split()[1].rstrip(";")) < 1
    written = {path.parent.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".arrow"}
    assert written == {"arrow", "tables"}  # token ids and missing tables


@pytest.mark.parametrize("task", ["food101", "hatememes"])
def test_files_of_the_published_converters_pass(examine: Examine, golden_arrow: Path, task: str) -> None:
    found = examine("batch_size=2", "per_gpu_batchsize=2", data_root=golden_arrow, task=task)
    assert (found.status, found.failed()) == (0, set()), found.text


def test_only_an_unpublished_dataset_size_is_remarked_on(examine, monkeypatch, arrow, tmp_path):
    write_labelled(tmp_path / "raw", {"train": 8, "val": 5, "test": 6}, ["cat", "dog"], name="pets")
    assert convert(tmp_path / "raw", tmp_path / "own") == 0
    found = examine(data_root=tmp_path / "own", task="custom")
    assert (found.status, found.failed()) == (0, set()), found.text
    assert "published" not in found.text["train data"] and found.level["train data"] == "ok"
    monkeypatch.setitem(DATASETS["mmimdb"].published_rows, "train", (15552, 40))
    assert "published" not in examine(data_root=arrow).text["train data"]


def test_a_split_with_fewer_samples_than_processes_fails(examine: Examine) -> None:
    """Although the training step runs in one process."""
    found = examine("cpu_processes=10")
    assert found.failed() == {"val data"}
    assert "one sample for each of the 10 processes" in found.text["val data"]


def test_a_validation_split_of_one_class_is_remarked_on(examine: Examine, tmp_path: Path) -> None:
    write_labelled(tmp_path / "raw", {"train": 8, "val": 1, "test": 6}, ["cat", "dog"], metric="accuracy")
    assert convert(tmp_path / "raw", tmp_path / "own") == 0
    found = examine(data_root=tmp_path / "own", task="custom")
    remark = "all samples are of class 'cat', so the best model by val/accuracy is the one that predicts it most often"
    assert found.status == 0 and found.level["val data"] == "warn" and found.text["val data"].endswith(remark)
    assert "best model" not in found.text["test data"]


def damage_label(path: Path) -> None:
    labels = column(path, "label")
    labels[7][2] = 3
    rewrite(path, label=pa.array(labels))


def damage_image(path: Path) -> None:
    images = column(path, "image")
    images[3] = images[3][:200]
    rewrite(path, image=pa.array(images, pa.binary()))


def name_classes(names: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, {"class_names": json.dumps(names)})


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (Path.unlink, ["mmimdb_train.arrow", "make_arrow.py --dataset mmimdb"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), ["not readable as an arrow file"]),
        (lambda path: rewrite(path, plots=None), ["image, label, plots"]),
        (lambda path: shutil.copy(path.with_name("mmimdb_test.arrow"), path), ["column split", "'train'", "'test'"]),
        (name_classes(["a", "b"]), ["class_names", "'Drama', 'Comedy'", "['a', 'b']"]),
        (name_classes({"Drama": 0}), ["class_names", "{'Drama': 0}"]),
        (lambda path: rewrite(path, {"class_names": "["}), ["JSONDecodeError"]),
        (damage_label, ["row 7", "column label"]),
        (damage_image, ["row 3", "cannot be decoded"]),
    ],
)
def test_a_damaged_file_fails_only_its_own_check(examine, arrow, damage, facts):
    damage(arrow / "mmimdb_train.arrow")
    found = examine(data_root=arrow)
    assert found.status == 2 and found.failed() == {"train data"}
    assert all(fact in found.text["train data"] for fact in facts), found.text["train data"]
    assert found.level["training step"] == "warn"
    assert "1 of" in found.error


def test_a_large_split_is_checked_at_rows_spread_from_first_to_last(examine, workspace, monkeypatch):
    decoded: list[int] = []
    monkeypatch.setattr(doctor, "IMAGES_DECODED", 3)
    monkeypatch.setattr(ImageKind, "_decoded", lambda _, row: decoded.append(row))
    examine("memory_depth=3")  # too deep, so that doctor runs no training step
    rows = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "train", 32).row_of_sample
    assert decoded[:3] == [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]


def test_damaged_or_unwritable_missing_tables_fail(examine: Examine, tmp_path: Path) -> None:
    examine()
    kept = next((tmp_path / "tables").glob("mmimdb_train*"))
    kept.write_text(kept.read_text().replace("1", "7"))
    found = examine()
    assert found.failed() == {"train data"} and str(kept) in found.text["train data"]
    (tmp_path / "file").write_text("")
    assert examine(f"missing_table_root={tmp_path / 'file' / 'tables'}").failed() == set(SPLITS)


def test_nan_in_the_backbone_fails(examine: Examine, workspace: Workspace, tmp_path: Path) -> None:
    """The dataset is still checked."""
    folder = shutil.copytree(workspace.backbone, tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = math.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = examine(f"vit={folder}")
    assert found.status == 2 and found.failed() == {"backbone"}
    assert str(folder) in found.text["backbone"] and "image_encoder.proj" in found.text["backbone"]
    assert found.level["train data"] == found.level["training step"] == "warn"


def test_absent_weights_tokenizer_and_data_fail(examine: Examine, tmp_path: Path) -> None:
    found = examine("vit=ViT-L/14", "tokenizer=nowhere", data_root=tmp_path / "nowhere")
    assert found.failed() == {"backbone", "tokenizer", *SPLITS}
    assert "hf download openai/clip-vit-large-patch14" in found.text["backbone"]


@pytest.mark.parametrize(
    ("option", "subject", "fact"),
    [
        ("end_lr=1", "options", "end_lr"),
        ("load_path=no.ckpt", "options", "no.ckpt"),
        ("image_size=48", "training step", "expected 32"),
        ("memory_depth=3", "training step", "memory_depth=3"),
    ],
)
def test_contradictory_options_fail(examine, option, subject, fact):
    found = examine(option)
    assert found.status == 2 and subject in found.failed() and fact in found.text[subject]
    assert (found.level["training step"] == "warn") == (subject == "options"), "options that disagree are not tried"


def test_a_missing_task_or_an_invalid_option_fails(examine, capsys, workspace):
    found = examine("learning_rate=fast")
    assert found.status == 2 and found.level == {} and "learning_rate" in found.error
    status = call("doctor", f"vit={workspace.backbone}", "num_workers=0")
    found = Examination(status, *capsys.readouterr())
    assert found.status == 2 and found.failed() == {"options", *SPLITS}
    assert "task_finetune_mmimdb" in found.text["options"]


def test_a_check_that_crashes_fails_alone(examine: Examine, monkeypatch: Patch) -> None:
    def breaks(_: Any) -> Any:
        raise LookupError("two\nlines")

    monkeypatch.setattr(doctor.Doctor, "check_device", breaks)
    found = examine()
    assert found.failed() == {"device"} and found.text["device"] == "LookupError: two lines"
    assert list(found.level) == SUBJECTS


def test_untested_package_versions_give_a_warning(monkeypatch: Patch) -> None:
    level, text = doctor.check_packages()
    assert level == "ok" and f"torch {importlib.metadata.version('torch')}" in text
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "regex" else real(name))
    level, text = doctor.check_packages()
    assert level == "warn" and "regex 1.0 (tested: regex==" in text


def test_too_little_space_and_unwritable_folders_fail(examine: Examine, monkeypatch: Patch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    batches = 2 * 2 * 4 * 3 * 32 * 32  # two training and two validation batches
    fits: dict[Path | None, int] = {tmp_path: 10**9, doctor.SHARED_MEMORY: batches}
    short: Path | None
    for short, free in ((None, 0), (tmp_path, 10**4), (doctor.SHARED_MEMORY, batches - 1)):
        space = {**fits, short: free}
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, space=space: usage(0, 0, space[path]))
        found = examine("num_workers=1")
        assert found.failed() == (set() if short is None else {"storage"}), found.text
        at, said = short or tmp_path, found.text["storage"]
        assert str(at) in said and filesize.decimal(space[at]) in said
    (tmp_path / "file").write_text("")
    assert examine(f"log_dir={tmp_path / 'file' / 'result'}").failed() == {"storage"}
