"""All files are written atomically (tests/test_files.py kills writers to try it); a full disk is a one-line error."""

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workspace, call
from tests.custom_files import convert, write_labelled
from tests.interrupted import files_up_to
from tests.report_files import write_run

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "vilt", "clip", "engine", "runs", "sensors", "vla")
ATOMIC = {"atomic_path", "new_folder", "whole_folder"}
WRITES = {"write_text", "write_bytes", "touch", "save", "save_file", "savefig", "to_csv", "new_file", "OSFile", "dump"}
EXEMPT = {
    "common/files.py atomic_path": "implements atomic writing",
    "common/locks.py locked": "a lock file is not data",
    "engine/training.py on_train_epoch_end": "calls the logger",
    "runs/sweep/jobs.py __init__": "appends to a log",
    "vilt/utils/arrow_writer.py _write_rows": "convert passes a temporary file",
    **dict.fromkeys(("vilt/convert.py _image", "runs/report/samples.py _thumbnail"), "writes to memory"),
    **dict.fromkeys(
        (f"runs/report/{place}" for place in ("figures.py figure", "figures.py _svg", "table.py csv")),
        "writes to memory",
    ),
}
"""Functions that may write otherwise, with the reason."""


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def writes(call: ast.Call) -> bool:
    values = [each for each in (*call.args, *(word.value for word in call.keywords)) if isinstance(each, ast.Constant)]
    modes = [str(each.value) for each in values if re.fullmatch(r"[wax]b?\+?|rb?\+b?", str(each.value))]
    return name_of(call) in WRITES or (name_of(call) in ("open", "open_memmap") and bool(modes))


def test_every_function_writes_its_files_atomically() -> None:
    found = set()
    for path in [each for package in PACKAGES for each in (ROOT / package).rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            calls = [each for each in ast.walk(function) if isinstance(each, ast.Call)]
            if isinstance(function, ast.FunctionDef) and any(map(writes, calls)):
                found.add(f"{path.relative_to(ROOT)} {function.name}" if not ATOMIC & set(map(name_of, calls)) else "")
    assert "" in found and found - {""} <= EXEMPT.keys()


Prepare = Callable[[Path, Workspace, Path], Callable[[], int]]
"""Prepares a folder with the inputs of a command; returns a function that runs the command."""


def run(command: str, *options: str) -> Callable[[], int]:
    return lambda: call(command, *options)


def conversion(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
    write_labelled(folder / "raw", {"train": 6, "val": 3, "test": 3}, ["one", "other"])
    return lambda: convert(folder / "raw", folder / "arrow")


def robustness(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
    shutil.copy(best, folder)
    figures = ("robustness_ratios=[0,0.5]", "robustness_seeds=[0]", "bootstrap=0", f"data_root={workspace.arrow}")
    places = (f"load_path={folder / 'best.ckpt'}", f"missing_table_root={folder}", "precision=32", "num_workers=0")
    return run("robustness", *places, *figures)


def prediction(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
    (folder / "in.csv").write_text("text\nA ghost story.\n")
    places = (f"load_path={best}", f"input={folder / 'in.csv'}", f"output={folder / 'out.csv'}")
    return run("predict", *places, "precision=32", "num_workers=0")


def about_runs(command: str, *options: str) -> Prepare:
    def prepare(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
        write_run(folder / "result" / "first_seed0" / "version_0")
        return run(command, *(option.format(folder) for option in options))

    return prepare


def sweep(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
    grid = ("sweep_name=s", "sweep_types=[text]", "sweep_ratios=[0.5]", "sweep_seeds=[0]", "sweep_launcher=commands")
    return run("sweep", *workspace.command(*grid, f"log_dir={folder}")[2:])


def export(folder: Path, workspace: Workspace, best: Path) -> Callable[[], int]:
    return run("export", f"load_path={best}", f"out={folder / 'out'}")


COMMANDS: dict[str, tuple[Prepare, int]] = {
    "arrow/custom_train.arrow": (conversion, 500),
    "robustness": (robustness, 1000),
    "out.csv": (prediction, 100),
    "result/runs.csv": (about_runs("runs", "log_dir={}/result"), 100),
    "report": (about_runs("report", "runs={}/result", "out={}/report"), 1000),
    "s/": (sweep, 100),
    "out": (export, 1000),
}
"""(preparation, bytes that fit) of each command, keyed by the path in its error about a full disk."""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("named", "before"),
    [(named, before) for named in COMMANDS for before in (False, True) if (named, before) != ("out", True)],
)
def test_a_full_disk_is_one_line_and_leaves_existing_files(workspace, fitted, tmp_path, capsys, named, before):
    prepare, room = COMMANDS[named]
    command = prepare(tmp_path, workspace, fitted / "best.ckpt")
    if before:
        assert command() == 0
    existing = contents(tmp_path)
    with files_up_to(room):
        assert command() == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert re.fullmatch(r"error: .*: File too large; [\d,]+ bytes free.*", last) and named in last, said
    assert "Traceback" not in said and not re.search(r"[0-9a-f]{8}\.part", last)
    assert contents(tmp_path) == existing
