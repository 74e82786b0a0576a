"""All that writes files, as a table: its old state, what writes the new one, in a process of its own, what reads it."""

import csv
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from common import files
from common.errors import DataError, UserError, machine_error
from common.files import restore_folder
from common.strict_json import read_json, write_json
from demo.data import write_task
from engine.checkpoint_file import check_intact, write_checkpoint
from engine.ending import DONE, end_with_user_error
from engine.metrics_log import MetricsLogger
from engine.robustness import RESULTS
from run import command_line
from runs.report.results import read_robustness
from runs.run_reader import read_curves, read_run
from tests.conftest import Workspace
from tests.custom_files import convert, write_labelled
from tests.data_files import LOGIT_COLUMNS
from tests.report_files import write_run
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.image_cache import missing_bytes
from vilt.missing_tables import MissingPattern, load_missing_table
from vilt.utils.mapped_array import MappedArray

GOLDEN_RAW = Path(__file__).parent / "data" / "golden" / "raw"
PAUSE_S = 0.01
"""Before and after each sync and rename, so that there is time to be killed."""
REFUSED = "refused"
"""State of arrow files whose conversion was killed among the renames."""
TRAINED = "written_seed0/version_0"
"""Folder of a run among the results of a workspace, whose checkpoint some writers need."""
SPEC = DATASETS["mmimdb"]
PATTERN = MissingPattern("both", 0.7, 0.5, 0)
ROWS = 20_000
SIZE = 32


@dataclass(frozen=True)
class Writer:
    """One row of the table."""

    prepare: Callable[[Path, Workspace], object]
    """Makes the old state in an empty folder."""
    write: Callable[[Path, Workspace], int]
    """Writes the new state; returns the exit status of the command."""
    read: Callable[[Path], Any]
    """What a reader of ours finds in the folder; raises whatever where that is not whole."""
    full: str | None
    """What the line about a full disk names; None where another test looks at that."""
    status: int = 2
    """Exit status on a full disk."""
    between: tuple[Any, ...] = ()
    """What a reader may find besides the old and the new; None of a folder that is just being replaced."""


def run_writer(
    name: str,
    folder: Path,
    workspace: Workspace,
    said: Connection,
    signals: Connection,
    room: int | None,
) -> None:
    """Runs a writer to its end, slowly; to be called in a process of its own.

    Args:
        said: gets its words.
        signals: get one when it begins to write, and one when all is written.
        room: bytes that no file may exceed, as on a full disk.
    """
    for descriptor, name_of_stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(said.fileno(), descriptor)
        setattr(sys, name_of_stream, os.fdopen(descriptor, "w", closefd=False))  # those of a pipe cannot seek
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    parts = files._parts

    def begin(target: Path) -> list[Path]:
        files._parts = parts
        signals.send("begins")
        return parts(target)

    files._parts = begin
    files.ABANDONED_S = 0
    for owner, function in ((os, "fsync"), (os, "replace")):
        setattr(owner, function, _slowly(getattr(owner, function)))
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    status = WRITERS[name].write(folder, workspace)
    signals.send("ends")
    sys.exit(status)


def _slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(PAUSE_S)
        result = function(*arguments)
        time.sleep(PAUSE_S)
        return result

    return slow


def _status(write: Callable[[], Any]) -> int:
    """Calls `write`; how a command ends after that."""
    try:
        write()
    except UserError as error:
        return end_with_user_error(error, None)
    except OSError as error:
        return end_with_user_error(error, None, str(machine_error(error)))
    return DONE


def _digest(content: Any) -> str:
    """Short, for messages of failed tests."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _files(folder: Path) -> str | None:
    if not folder.exists():
        return None
    return _digest({str(path.relative_to(folder)): path.read_bytes() for path in _below(folder) if path.is_file()})


def _below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _rows(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header and all(len(row) == len(header) for row in rows)
    return _digest((header, rows))


# Data


def _convert(folder: Path, _: Workspace) -> int:
    return convert(folder / "raw", folder / "arrow")


def _prepare_conversion(folder: Path, workspace: Workspace) -> None:
    """All images are others in the new state."""
    write_labelled(folder / "raw", {"train": 6, "val": 3, "test": 3}, ["one", "other"])
    assert _convert(folder, workspace) == DONE
    for path in (folder / "raw").rglob("*.png"):
        Image.new("RGB", (40, 40), "red").save(path)


def _read_conversion(folder: Path) -> str:
    try:
        spec = open_spec("custom", folder / "arrow", SPLITS)
        datasets = [ArrowDataset(spec, folder / "arrow", split, SIZE) for split in SPLITS]
    except DataError as error:
        if "two conversions" in str(error):
            return REFUSED
        raise
    return _digest([one.table.to_pylist() for one in datasets])


def _write_missing_table(folder: Path, _: Workspace) -> int:
    return _status(lambda: load_missing_table(folder / "tables", "mmimdb", "train", PATTERN, ROWS))


def _read_missing_table(folder: Path) -> str | None:
    if not list((folder / "tables").glob("*.txt")):
        return None
    return _digest(load_missing_table(folder / "tables", "mmimdb", "train", PATTERN, ROWS, keep=False).tolist())


def _take_films(folder: Path, workspace: Workspace) -> None:
    shutil.copy2(workspace.arrow / "mmimdb_train.arrow", folder)


def _films(folder: Path) -> ArrowDataset:
    return ArrowDataset(SPEC, folder, "train", SIZE)


def _write_tokens(folder: Path, _: Workspace) -> int:
    return _status(
        lambda: _films(folder).tokenize(lambda texts: np.array([[len(text)] * 77 for text in texts]), "lengths")
    )


def _read_tokens(folder: Path) -> list[str]:
    return [_digest(MappedArray(path).values.tolist()) for path in folder.glob("*_tokens_*.npy")]


def _prepare_images(folder: Path, workspace: Workspace) -> None:
    """A cache of another state of the arrow file."""
    shutil.copy2(workspace.arrow / "mmimdb_dev.arrow", folder / "mmimdb_train.arrow")
    _films(folder).cache_images(0)
    _take_films(folder, workspace)


def _write_images(folder: Path, _: Workspace) -> int:
    return _status(lambda: _films(folder).cache_images(0))


def _read_images(folder: Path) -> str | None:
    """What the newest cache holds; None where they are not made. The old one goes after the new one is there."""
    if missing_bytes(folder / "mmimdb_train.arrow", _films(folder).n_rows, SIZE):
        return None
    newest = max(folder.glob("*_images*.npy"), key=lambda path: path.stat().st_mtime_ns)
    return _digest(MappedArray(newest).values.tobytes())


# A run


def _checkpoint(value: float) -> dict[str, Any]:
    return {"state_dict": {"weights": torch.full((100_000,), value)}}


def _read_checkpoint(folder: Path) -> list[float]:
    check_intact(folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]["weights"].unique().tolist()


def _log(folder: Path) -> MetricsLogger:
    logger = MetricsLogger(folder, "", "")
    for step in range(500):
        logger.log_metrics({"train/loss": step / 3}, step)
    logger.finalize("")
    return logger


def _write_log(folder: Path, _: Workspace) -> int:
    """With a new column, for which all lines are written again."""
    logger = _log(folder)
    logger.log_metrics({"val/loss": 0.25}, 500)
    logger.finalize("")
    return DONE


def _take_run(folder: Path, workspace: Workspace) -> None:
    """Of the results, the new ones lack neither logits nor missing tables."""
    shutil.copytree(workspace.results / TRAINED, folder / "run")
    for seeds in ("[2,3]", "[0,1]"):
        assert _measure(folder, seeds) == DONE


def _measure(folder: Path, seeds: str) -> int:
    options = (f"load_path={folder / 'run' / 'best.ckpt'}", f"missing_table_root={folder / 'tables'}", "precision=32")
    figures = ("robustness_ratios=[0,0.5]", f"robustness_seeds={seeds}", "bootstrap=10")
    return command_line(["run.py", "robustness", "with", *options, *figures, "num_workers=0", "per_gpu_batchsize=8"])


def _take_run_with_parts(folder: Path, workspace: Workspace) -> None:
    """All is encoded, and no results are there."""
    _take_run(folder, workspace)
    robustness = folder / "run" / "robustness"
    table = pa.ipc.open_file(pa.BufferReader((robustness / "logits.arrow").read_bytes())).read_all()
    for name in LOGIT_COLUMNS:
        part = table.drop_columns([other for other in LOGIT_COLUMNS if other != name])
        with pa.ipc.new_file(str(robustness / f"{name}.part.arrow"), part.schema) as writer:
            writer.write_table(part)
    for path in robustness.iterdir():
        if not path.name.endswith(".part.arrow"):
            path.unlink()


def _read_robustness(folder: Path) -> Any:
    """The results; before there are any, whether nothing is encoded anew for them."""
    robustness = folder / "run" / "robustness"
    restore_folder(robustness)  # as the next `run.py robustness` does
    names = {path.name for path in robustness.iterdir() if not path.name.startswith(".")}
    tables = [_rows(robustness / name) for name in sorted(names) if name.endswith("csv")]
    assert all(tables)
    found = read_robustness(read_run(folder / "run"))
    if found is None:
        assert "logits.arrow" in names or names == {f"{name}.part.arrow" for name in LOGIT_COLUMNS}
        return None
    assert found.logits is not None and names >= {"logits.arrow", *RESULTS} - {"confusions.csv", "roc.csv"}
    seeds = json.loads((robustness / "robustness.json").read_text())["table_seeds"]  # figures may be the same
    return _digest((found.cells.to_csv(), found.by_type.to_csv(), seeds))


def _prepare_predictions(folder: Path, workspace: Workspace) -> None:
    for texts in (["A ghost story."], ["Two friends rob a train.", "A war.", "A song."] * 4):
        (folder / "films.csv").write_text("\n".join(["text", *texts]) + "\n")
        if len(texts) == 1:
            assert _predict(folder, workspace) == DONE


def _predict(folder: Path, workspace: Workspace) -> int:
    options = (f"load_path={workspace.results / TRAINED / 'best.ckpt'}", "precision=32", "num_workers=0")
    places = (f"input={folder / 'films.csv'}", f"output={folder / 'predictions.csv'}")
    return command_line(["run.py", "predict", "with", *options, *places, "per_gpu_batchsize=4"])


# Several runs


def _prepare_runs(command: Callable[[Path, Workspace], int]) -> Callable[[Path, Workspace], None]:
    """What `command` writes about a run, which a second one has joined since."""

    def prepare(folder: Path, workspace: Workspace) -> None:
        for name, score in (("first", 0.5), ("second", 0.6)):
            run = write_run(folder / "result" / f"{name}_seed0" / "version_0", exp_name=name, tested=score)
            (run / "best.ckpt").unlink()  # in which `run.py runs` would find no score
            if name == "first":
                assert command(folder, workspace) == DONE

    return prepare


def _write_runs(folder: Path, _: Workspace) -> int:
    return command_line(["run.py", "runs", "with", f"log_dir={folder / 'result'}"])


def _write_report(folder: Path, _: Workspace) -> int:
    return command_line(["run.py", "report", "with", f"runs={folder / 'result'}", f"out={folder / 'report'}"])


def _sweep(folder: Path, workspace: Workspace, *options: str) -> int:
    grid = ("sweep_name=s", "sweep_types=[text]", "sweep_ratios=[0.5]", "max_epoch=1", f"log_dir={folder}")
    return command_line(["run.py", "sweep", *workspace.command(*grid, *options)[1:]])


def _set_cells(folder: Path, score: float) -> None:
    for seed in (0, 1):
        cell = folder / "s" / f"s_text_0.5_seed{seed}" / "version_0"
        cell.mkdir(parents=True, exist_ok=True)
        write_json(cell / "test_results.json", {"metrics": {"f1_macro": score + seed / 10}})


def _prepare_table(folder: Path, workspace: Workspace) -> None:
    _set_cells(folder, 0.25)
    assert _write_table(folder, workspace) == DONE
    _set_cells(folder, 0.5)


def _write_table(folder: Path, workspace: Workspace) -> int:
    return _sweep(folder, workspace, "sweep_seeds=[0,1]")


def _read_table(folder: Path) -> str:
    read_json(folder / "s" / "sweep.json")  # written first, and readable at any moment
    return _rows(folder / "s" / "table.csv")


WRITERS: dict[str, Writer] = {
    "conversion": Writer(_prepare_conversion, _convert, _read_conversion, "custom_train.arrow", between=(REFUSED,)),
    "missing table": Writer(
        lambda folder, _: (folder / "tables").mkdir(), _write_missing_table, _read_missing_table, "_of_20000.txt"
    ),
    "tokens": Writer(_take_films, _write_tokens, _read_tokens, "", status=DONE),  # a run does without keeping them
    "images": Writer(_prepare_images, _write_images, _read_images, None),
    "checkpoint": Writer(
        lambda folder, _: write_checkpoint(_checkpoint(1), folder / "last.ckpt"),
        lambda folder, _: _status(lambda: write_checkpoint(_checkpoint(2), folder / "last.ckpt")),
        _read_checkpoint,
        None,
    ),
    "metrics.csv": Writer(
        lambda folder, _: _log(folder), _write_log, lambda folder: _digest(read_curves(folder / "metrics.csv")), None
    ),
    "robustness": Writer(
        _take_run, lambda folder, _: _measure(folder, "[2,3]"), _read_robustness, "run/robustness/robustness.json"
    ),
    "first robustness": Writer(
        _take_run_with_parts, lambda folder, _: _measure(folder, "[2,3]"), _read_robustness, "run/robustness/"
    ),
    "predictions": Writer(
        _prepare_predictions, _predict, lambda folder: _rows(folder / "predictions.csv"), "predictions.csv"
    ),
    "runs.csv": Writer(
        _prepare_runs(_write_runs), _write_runs, lambda folder: _rows(folder / "result" / "runs.csv"), "runs.csv"
    ),
    "report": Writer(
        _prepare_runs(_write_report), _write_report, lambda folder: _files(folder / "report"), "report", between=(None,)
    ),
    "sweep table": Writer(_prepare_table, _write_table, _read_table, "s/sweep.json"),
    "demo films": Writer(
        lambda folder, _: write_task(folder / "films", films=3, seed=0),
        lambda folder, _: _status(lambda: write_task(folder / "films", films=3, seed=1)),
        lambda folder: _files(folder / "films"),
        "films",
        between=(None,),
    ),
}
