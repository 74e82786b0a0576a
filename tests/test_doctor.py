"""`run.py doctor`: a whole dataset is ok, and every planted fault has its line, whatever else is wrong."""

import importlib.metadata
import json
import math
import shutil
from collections import namedtuple
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

import doctor
from config import DEFAULTS, Options
from doctor import StepCost, run_seconds
from run import command_line
from runs.check_options import resolve
from tests.conftest import Workspace
from tests.custom_files import convert, write_labelled
from vilt import checkup
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, draw_missing_table, load_missing_table

SUBJECTS = [
    *("python", "packages", "options", "device", "backbone", "tokenizer"),
    *(
        f"{split} {what}"
        for split in ("train", "val", "test")
        for what in ("file", "rows", "labels", "images", "texts")
    ),
    *(f"{split} missing table" for split in ("train", "val", "test")),
    *("training step", "length of the run", "log_dir", "data_root", "shared memory", "memory"),
]


@pytest.fixture
def arrow(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of the dataset, to be damaged."""
    return Path(shutil.copytree(workspace.arrow, tmp_path / "arrow", ignore=shutil.ignore_patterns("*.npy")))


class Examination:
    """What doctor printed, by subject."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.lines = out.splitlines()
        self.error = err.splitlines()[-1] if err else ""
        parts = [(line[:5].strip(), *line[5:].split(": ", 1)) for line in self.lines]
        self.found = {subject: (level, text) for level, subject, text in parts}

    def failed(self) -> set[str]:
        return {subject for subject, (level, _) in self.found.items() if level == "FAIL"}


@pytest.fixture
def examine(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs doctor on a dataset, with a log_dir and missing tables of the test's own."""

    def examine(*options: str, data_root: Path | None = None, task: str = "mmimdb") -> Examination:
        own = (f"log_dir={tmp_path / 'result'}", f"missing_table_root={tmp_path / 'tables'}")
        command = workspace.command(f"vit={workspace.backbone}", *own, *options, task=task, data_root=data_root)
        capsys.readouterr()
        status = command_line(["run.py", "doctor", *command[1:]])
        return Examination(status, *capsys.readouterr())

    return examine


def rewrite(path: Path, **columns: pa.Array | None) -> None:
    """Replaces columns of an arrow file; None removes one."""
    table = pa.ipc.open_file(path).read_all()
    for name, column in columns.items():
        place = table.column_names.index(name)
        table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    write(path, table)


def write(path: Path, table: pa.Table) -> None:
    whole = table.combine_chunks()
    with pa.ipc.new_file(path, whole.schema) as writer:
        writer.write_table(whole)


def column(path: Path, name: str) -> list[Any]:
    return pa.ipc.open_file(path).read_all()[name].to_pylist()


def test_a_whole_dataset_is_ok(examine: Any, arrow: Path, tmp_path: Path) -> None:
    found = examine(
        data_root=arrow,
    )
    assert found.status == 0 and found.error == ""
    assert set(found.found) == set(SUBJECTS) and len(found.lines) == len(SUBJECTS)
    assert {level for level, _ in found.found.values()} <= {"ok", "warn"}
    files = {split: arrow / DATASETS["mmimdb"].file_name(split) for split in ("train", "val", "test")}
    for split, path in files.items():
        rows, texts = len(column(path, "label")), sum(map(len, column(path, "plots")))
        assert found.found[f"{split} rows"][1].startswith(f"{rows} rows, {texts} samples (one per text); the published")
        assert found.found[f"{split} images"][1].startswith(f"{rows} of {rows} looked at; ")
    counts = np.array(column(files["train"], "label")).sum(axis=0)
    names = DATASETS["mmimdb"].class_names
    assert names is not None
    assert f"most often {names[counts.argmax()]} ({counts.max()})" in found.found["train labels"][1]
    assert found.found["training step"][1].startswith("4 samples: loss 0.")
    assert found.found["length of the run"][1].endswith(
        f": 2 epochs of {math.ceil(texts_of(files['train']) / 4)} batches"
    )
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written - {path.name for path in files.values()} == {path.name for path in arrow.glob("*_tokens_*.npy")}


def texts_of(path: Path) -> int:
    return sum(map(len, column(path, "plots")))


@pytest.mark.parametrize("task", ["food101", "hatememes"])
def test_files_of_the_published_converters_are_ok(examine: Any, golden_arrow: Path, task: str) -> None:
    found = examine("batch_size=2", "per_gpu_batchsize=2", data_root=golden_arrow, task=task)
    assert (found.status, found.failed()) == (0, set()), found.lines
    assert ("classes go by number" in found.found["train file"][1]) == (task == "food101")


def test_counts_as_published(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "train", 32)
    monkeypatch.setitem(dataset.spec.published_rows, "train", (40,))
    (finding,) = checkup.check_rows(dataset)
    assert finding.level == "ok" and finding.text.endswith("as published")
    monkeypatch.setitem(dataset.spec.published_rows, "train", (15552, 40000))
    (finding,) = checkup.check_rows(dataset)
    assert finding.level == "warn" and finding.text.endswith("the published split lists 15,552 or 40,000")


def test_data_of_ones_own_has_no_published_counts(examine: Any, tmp_path: Path) -> None:
    write_labelled(tmp_path / "raw", {"train": 8, "val": 5, "test": 6}, ["cat", "dog"], name="pets")
    assert convert(tmp_path / "raw", tmp_path / "own") == 0
    found = examine(data_root=tmp_path / "own", task="custom")
    assert (found.status, found.failed()) == (0, set()), found.lines
    for split, rows in {"train": 8, "val": 5, "test": 6}.items():
        assert found.found[f"{split} rows"] == ("ok", f"{rows} rows, {rows} samples (one per text)")


def test_missing_files_say_how_to_make_them_and_the_rest_is_looked_at(examine: Any, arrow: Path) -> None:
    (arrow / "mmimdb_train.arrow").unlink()
    found = examine(data_root=arrow)
    assert found.status == 2 and found.failed() == {"train file"}
    assert found.found["train file"][1] == (
        f"{arrow / 'mmimdb_train.arrow'}: no such file; "
        f"make it with `python make_arrow.py --dataset mmimdb --root RAW --target {arrow}`"
    )
    assert found.found["test images"][0] == "ok" and found.found["training step"][0] == "ok"
    assert found.found["length of the run"][0] == "warn"
    assert found.error == f"error: 1 of {len(found.lines)} checks failed"


def test_a_truncated_file(examine: Any, arrow: Path) -> None:
    path = arrow / "mmimdb_dev.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    found = examine(data_root=arrow)
    assert found.status == 2 and found.failed() == {"val file"}
    assert found.found["val file"][1].startswith(f"{path}: not readable as an arrow file: ")


def test_a_wrong_schema(examine: Any, arrow: Path) -> None:
    rewrite(arrow / "mmimdb_train.arrow", plots=None)
    path = arrow / "mmimdb_dev.arrow"
    rewrite(path, image=pa.array(["x"] * len(column(path, "label"))))
    rewrite(arrow / "mmimdb_test.arrow", genres=None)
    found = examine(data_root=arrow)
    assert found.status == 2
    assert "expected the columns image, label, plots; found " in found.found["train file"][1]
    assert found.found["val file"] == ("FAIL", f"{path}: column image: expected the bytes of image files, found string")
    assert found.found["test file"][0] == "ok" and found.found["test file"][1].endswith("without the column genres")
    assert {"train file", "val file"} <= found.failed()


def test_files_that_were_exchanged(examine: Any, arrow: Path) -> None:
    (arrow / "mmimdb_dev.arrow").replace(arrow / "x")
    (arrow / "mmimdb_test.arrow").replace(arrow / "mmimdb_dev.arrow")
    (arrow / "x").replace(arrow / "mmimdb_test.arrow")
    found = examine(data_root=arrow)
    assert found.failed() == {"val file", "test file"}
    assert found.found["val file"][1].endswith("column split: expected 'dev' in every row, found 'test'")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "expected 23 names (Drama, Comedy, Romance, …), found 2 (a, b, …)"),
        ([str(number) for number in range(23)], "expected 23 names (Drama, Comedy, Romance, …), found 23 (0, 1, 2, …)"),
        ({"Drama": 0}, "expected a JSON list of texts, found "),
    ],
)
def test_class_names_of_another_dataset(examine: Any, arrow: Path, names: Any, message: str) -> None:
    path = arrow / "mmimdb_train.arrow"
    table = pa.ipc.open_file(path).read_all()
    write(path, table.replace_schema_metadata({"class_names": json.dumps(names)}))
    found = examine(data_root=arrow)
    assert found.failed() == {"train file"}
    assert f"{path}: metadata class_names: {message}" in found.found["train file"][1]


def test_a_label_out_of_range(examine: Any, arrow: Path, golden_arrow: Path) -> None:
    path = arrow / "mmimdb_train.arrow"
    labels = column(path, "label")
    labels[7][2] = 3
    rewrite(path, label=pa.array(labels))
    found = examine(data_root=arrow)
    assert found.failed() == {"train file"}
    assert found.found["train file"][1] == f"{path}: row 7: column label: expected lists of 23 zeros and ones, found 3"
    path = golden_arrow / "food101_val.arrow"
    rewrite(path, label=pa.array([101, *column(path, "label")[1:]]))
    found = examine("batch_size=2", "per_gpu_batchsize=2", data_root=golden_arrow, task="food101")
    assert found.found["val file"] == ("FAIL", f"{path}: row 0: label 101 is outside 0 to 100 (1 such rows)")


def test_broken_images_are_counted_and_the_first_is_named(examine: Any, arrow: Path) -> None:
    path = arrow / "mmimdb_test.arrow"
    images = column(path, "image")
    images[3], images[9] = images[3][:200], b"no image"
    rewrite(path, image=pa.array(images, pa.binary()))
    found = examine(data_root=arrow)
    assert found.failed() == {"test images"}
    said = found.found["test images"][1]
    assert said.startswith(f"2 of {len(images)} looked at cannot be decoded; the first: {path}: row 3: ")


def test_a_large_split_is_looked_at_evenly(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first row to the last."""
    monkeypatch.setattr(checkup, "IMAGES_LOOKED_AT", 3)
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "train", 32)
    looked_at: list[int] = []

    def look(row: int) -> torch.Tensor:
        looked_at.append(row)
        return torch.zeros(3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(dataset, "_image", look)
    list(checkup.check_images(dataset))
    rows = dataset.row_of_sample
    assert looked_at == [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]


def test_empty_texts_and_full_ones(examine: Any, arrow: Path) -> None:
    path = arrow / "mmimdb_dev.arrow"
    plots = [[" "], ["word " * 200], *[["a plot"] for _ in column(path, "plots")[2:]]]
    rewrite(path, plots=pa.array(plots))
    level, said = examine(data_root=arrow).found["val texts"]
    assert level == "warn"
    assert said.endswith(f"; {1 / len(plots):.0%} fill or pass the 75 there is room for; 1 are empty")


def test_missing_tables_kept_made_and_damaged(examine: Any, workspace: Workspace, tmp_path: Path) -> None:
    rows = len(column(workspace.arrow / "mmimdb_train.arrow", "label"))
    pattern = MissingPattern("both", 0.7, 0.5, 0)
    load_missing_table(tmp_path / "tables", "mmimdb", "train", pattern, rows)
    (kept,) = (tmp_path / "tables").iterdir()
    found = examine()
    counts = np.bincount(draw_missing_table("mmimdb", "train", pattern, rows), minlength=3)
    said = f"{counts[0]} complete, {counts[1]} text missing, {counts[2]} image missing"
    assert found.found["train missing table"] == ("ok", f"kept and fitting in {tmp_path / 'tables'}: {said}")
    assert found.found["val missing table"][1].startswith("will be made in ")
    assert examine("missing_ratio=0").found["train missing table"][1].startswith("not needed in ")
    kept.write_text(kept.read_text().replace("1", "7"))
    found = examine()
    assert found.failed() == {"train missing table"} and str(kept) in found.found["train missing table"][1]
    (tmp_path / "file").write_text("")
    assert examine(f"missing_table_root={tmp_path / 'file' / 'tables'}").failed() == {
        f"{split} missing table" for split in ("train", "val", "test")
    }


def test_nan_in_the_backbone(examine: Any, workspace: Workspace, tmp_path: Path) -> None:
    """The dataset is looked at all the same."""
    folder = shutil.copytree(workspace.backbone, tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = math.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = examine(f"vit={folder}")
    assert found.status == 2 and found.failed() == {"backbone"}
    assert found.found["backbone"][1] == f"vit={folder}: image_encoder.proj holds values that are not finite"
    assert found.found["train images"][0] == "ok" and found.found["training step"][0] == "warn"


def test_weights_tokenizer_and_data_that_are_not_there(examine: Any, tmp_path: Path) -> None:
    found = examine("vit=ViT-L/14", "tokenizer=nowhere", data_root=tmp_path / "nowhere")
    assert found.failed() == {"backbone", "tokenizer", "train file", "val file", "test file"}
    assert "hf download openai/clip-vit-large-patch14" in found.found["backbone"][1]


def test_options_that_contradict_each_other_or_the_backbone(examine: Any) -> None:
    found = examine("end_lr=1", "image_size=48", "memory_depth=3")
    assert {"options", "backbone"} <= found.failed()
    assert found.found["options"][1].startswith("end_lr: expected less than learning_rate")
    assert found.found["backbone"][1] == "image_size: expected 32, which is the backbone's, found 48"
    found = examine("memory_depth=3")
    assert found.failed() == {"training step"}
    assert "memory_depth=3 is more than the backbone has blocks" in found.found["training step"][1]
    found = examine("load_path=no.ckpt")
    assert found.found["options"] == ("FAIL", "load_path: expected a checkpoint file, found nothing at no.ckpt")


def test_an_option_that_cannot_be_read_ends_the_examination(examine: Any) -> None:
    found = examine("learning_rate=fast")
    assert found.status == 2 and found.failed() == {"options"}
    assert found.found["all else"][0] == "warn" and "backbone" not in found.found


def test_without_a_task(capsys: pytest.CaptureFixture[str], workspace: Workspace) -> None:
    assert command_line(["run.py", "doctor", "with", f"vit={workspace.backbone}", "num_workers=0"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL options: no task: ") for line in lines)
    assert any(line.startswith("FAIL data: not looked at: task is not given") for line in lines)


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Any) -> Iterable[Any]:
        raise LookupError("two\nlines")

    monkeypatch.setitem(doctor.CHECKS, "device", breaks)
    found = examine()
    assert found.failed() == {"device"} and found.found["device"][1] == "LookupError: two lines"
    assert set(found.found) == set(SUBJECTS)


def test_other_versions_and_absent_packages(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "ftfy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "regex" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = [line for line in examine().lines if " packages: " in line]
    assert lines[0] == "FAIL packages: not installed: ftfy; pip install -r requirements.txt"
    assert lines[1].startswith("warn packages: other versions than requirements.txt has: ") and "regex 1.0" in lines[1]


def test_a_full_disk_and_little_shared_memory(
    examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrow: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    rows = sum(len(column(path, "label")) for path in arrow.glob("*.arrow"))
    cache = rows * 3 * 32 * 32
    batches = 2 * 1 * 1 * doctor.BATCHES_AHEAD * 4 * 3 * 32 * 32
    free = {tmp_path: 10**4, arrow: cache, doctor.SHARED_MEMORY: 2 * batches}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, free[path]))
    found = examine("image_cache=True", "num_workers=1", data_root=arrow)
    levels = {subject: found.found[subject][0] for subject in ("log_dir", "data_root", "shared memory")}
    assert levels == {"log_dir": "FAIL", "data_root": "warn", "shared memory": "ok"}
    free |= {tmp_path: 10**12, arrow: cache - 1, doctor.SHARED_MEMORY: batches - 1}
    found = examine("image_cache=True", "num_workers=1", data_root=arrow)
    assert found.failed() == {"data_root", "shared memory"}


def test_a_log_dir_that_cannot_be_made(examine: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = examine(f"log_dir={tmp_path / 'file' / 'result'}")
    assert found.failed() == {"log_dir"}


def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CONTROL_GROUP", tmp_path)
    of_machine = doctor._free_memory()
    assert of_machine > 10**6
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert doctor._free_memory() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._free_memory() > 10**6


def options_with(workspace: Workspace, *changes: tuple[str, Any]) -> Options:
    config = {**DEFAULTS, "task": "mmimdb", "data_root": str(workspace.arrow), "num_gpus": 0}
    sizes = {"per_gpu_batchsize": 10, "batch_size": 40, "max_epoch": 3}
    return resolve({**config, **sizes, **dict(changes)})


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # 100 batches of 2 s; 5 validations of 20 batches of 1 s; once 30 batches for the test
        ([("num_workers", 0)], 3 * (100 * (2 + 4) + 5 * 20 * (1 + 4)) + 30 * (1 + 4)),
        ([("num_workers", 1)], 3 * (100 * 4 + 5 * 20 * 4) + 30 * 4),
        ([("num_workers", 1), ("max_steps", 50)], 2 * (100 * 4 + 5 * 20 * 4) + 30 * 4),
        ([("num_workers", 1), ("max_steps", 500)], 3 * (100 * 4 + 5 * 20 * 4) + 30 * 4),
        ([("num_workers", 0), ("val_check_interval", 50)], 3 * (100 * (2 + 4) + 2 * 20 * (1 + 4)) + 30 * (1 + 4)),
        ([("num_workers", 0), ("cpu_processes", 2)], 3 * (50 * (2 + 4) + 5 * 10 * (1 + 4)) + 15 * (1 + 4)),
    ],
)
def test_the_length_of_a_run(workspace: Workspace, changes: Sequence[tuple[str, Any]], seconds: float) -> None:
    options = options_with(workspace, *changes)
    cost = StepCost(loading=4, training=2, evaluation=1)
    assert run_seconds(options, cost, {"train": 1000, "val": 196, "test": 300}) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("seconds", "said"), [(12.4, "12 s"), (60, "1 min"), (3600, "1 h"), (3660, "1 h 1 min"), (90000, "1 d 1 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert doctor._duration(seconds) == said
