"""Fixtures and helpers shared by the test files: a made-up dataset, a tiny CLIP with its tokenizer, a run on them."""

import csv
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from clip.backbone import FrozenWeights

os.environ["HF_HUB_OFFLINE"] = "1"  # tests must neither use the network nor wait for it
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, which would wrap tables
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, on models too small for several threads

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
SLOW = {
    *("agreement", "backbone", "benchmarks", "contents", "damage", "datamodules", "demo", "ending", "golden_training"),
    *("interruption", "cached_features", "label_ratio", "methods", "package", "processes", "published"),
    *("quickstart", "report_page", "report_search", "resume", "robustness", "run", "run_custom", "run_methods"),
    *("run_sensors", "run_vla", "sweep", "undefined", "writers"),
}
"""Test files that train or start processes; `pytest -m "not slow"` skips them."""
LONG = pytest.mark.skipif(not os.environ.get("TEST_LONG"), reason="long: TEST_LONG=1")
"""Marks tests of `make test-long`."""
GOLDEN_ARROW = Path(__file__).parent / "data" / "golden" / "arrow"


@dataclass(frozen=True)
class Workspace:
    """A folder with everything a run needs."""

    root: Path

    @property
    def arrow(self) -> Path:
        """Arrow files of made-up films: 40 for training, 6 for validation, 13 for testing."""
        return self.root / "arrow"

    @property
    def backbone(self) -> Path:
        """Hugging Face folder of a tiny, barely pretrained CLIP."""
        return self.root / "backbone"

    @property
    def results(self) -> Path:
        """log_dir of the runs."""
        return self.root / "result"

    def command(self, *options: str, name: str = "", task: str = "mmimdb", data_root: Path | None = None) -> list[str]:
        """Arguments of `run.py`, or of its command `name`, for a small float32 run; later options override."""
        places = (f"data_root={data_root or self.arrow}", f"log_dir={self.results}")
        small = ("precision=32", "num_workers=0", "memory_length=6", "memory_depth=2", "max_epoch=2")
        batches = ("batch_size=8", "per_gpu_batchsize=4", f"missing_table_root={self.root / 'missing_tables'}")
        words = ["run.py", *([name] if name else []), "with", f"task_finetune_{task}"]
        return [*words, *places, *small, *batches, *options]

    def train(self, name: str, *options: str, log_dir: Path | None = None, **source: Any) -> Path:
        """Trains on the tiny CLIP, which must succeed; returns the run folder."""
        from run import command_line

        places = (f"vit={self.backbone}", f"exp_name={name}", f"log_dir={log_dir or self.results}")
        assert command_line(self.command(*places, *options, **source)) == 0
        return (log_dir or self.results) / f"{name}_seed0" / "version_0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


def _make_backbone(root: Path) -> None:
    from demo.backbone import TinyClip, make_backbone
    from demo.data import write_pretrain

    sizes = TinyClip(image_size=32, image_width=128, image_layers=2, text_width=64, text_layers=2, embed=64, batch=8)
    write_pretrain(root / "pretrain", films=16, seed=0)
    make_backbone(root / "pretrain", root / "backbone", steps=2, seed=0, sizes=sizes)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Dataset and backbone, created once per test session."""
    import make_arrow
    from demo.data import write_task

    root = tmp_path_factory.mktemp("workspace")
    write_task(root / "raw", films=40, seed=0)
    _make_backbone(root)
    status = make_arrow.main(
        ["--dataset", "mmimdb", "--root", str(root / "raw"), "--target", str(root / "arrow"), "--workers", "0"]
    )
    assert status == 0
    return Workspace(root)


@pytest.fixture(scope="session")
def fitted(workspace: Workspace) -> Path:
    """Folder of a run trained for two epochs and tested. Shared by all tests: write only to a copy."""
    return workspace.train("fitted")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> "FrozenWeights":
    """A random CLIP of TINY size."""
    from clip.backbone import load_backbone
    from tests.backbones import random_hf_clip

    folder = tmp_path_factory.mktemp("backbone")
    random_hf_clip(folder)
    return load_backbone(str(folder))


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up runs for reports. Shared by all tests: write only to a copy."""
    from tests.report_files import write_runs

    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def report_results(report_runs: Path) -> list[dict[str, Any]]:
    """Robustness results of the two training seeds among these runs."""
    folders = [report_runs / "mmimdb" / f"rep_seed{seed}" / "version_0" for seed in (0, 1)]
    return [read_json(folder / "robustness" / "robustness.json") for folder in folders]


@pytest.fixture(autouse=True)
def _plain_logging() -> None:
    """Undoes the logging set-up of earlier tests and fixtures, since run.py configures the whole process."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)
    for handler in root.handlers[:]:
        if type(handler).__module__ in ("logging", "common.logs"):  # pytest's handlers have classes of their own
            root.removeHandler(handler)


@pytest.fixture
def golden_arrow(tmp_path: Path) -> Path:
    """A copy of the published converters' arrow files, so that no test writes next to the originals."""
    return Path(shutil.copytree(GOLDEN_ARROW, tmp_path / "golden_arrow"))


def call(command: str, *options: str) -> int:
    """Exit status of `run.py COMMAND with OPTIONS`."""
    from run import command_line

    return command_line(["run.py", command, "with", *options])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def error_line(capsys: Captured) -> str:
    """The single error line that a command printed."""
    said = capsys.readouterr().err
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return line


def refusal(command: list[str], capsys: Captured) -> str:
    """The error line of a command that must end with status 2."""
    from run import command_line

    capsys.readouterr()
    assert command_line(command) == 2
    return error_line(capsys)
