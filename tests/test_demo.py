"""The demo: its made-up films and tiny CLIP are reproducible, and its steps run, small and in this process."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from demo import __main__ as demo
from demo import data
from run import command_line
from runs.sweep import launchers
from runs.sweep.jobs import Job, Outcome, Outcomes
from tests.conftest import Patch, Workspace, read_json

transformers = pytest.importorskip("transformers", reason="the tiny CLIP is a transformers model")
from demo import backbone  # noqa: E402

SIZES = backbone.TinyClip(image_width=64, image_layers=1, text_layers=1, embed=32, batch=8)


def labels_of(folder: Path) -> dict[str, dict]:
    return {path.stem: read_json(path) for path in sorted((folder / "labels").glob("*.json"))}


def fingerprint(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("films")
    data.write_task(out / "raw", 60, seed=3)
    data.write_pretrain(out / "pretrain", 40, seed=3)
    return out


@pytest.fixture(scope="module")
def tiny_clip(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "backbone"
    backbone.make_backbone(films / "pretrain", out, steps=2, seed=0, sizes=SIZES)
    return out


def test_the_seed_determines_the_bytes(films, tmp_path):
    data.write_task(tmp_path / "raw", 60, seed=3)
    data.write_pretrain(tmp_path / "pretrain", 40, seed=3)
    for part in ("raw", "pretrain"):
        assert fingerprint(tmp_path / part) == fingerprint(films / part)
    # A rerun replaces the demo's own files.
    data.write_task(tmp_path / "raw", 60, seed=4)
    other, first = fingerprint(tmp_path / "raw"), fingerprint(films / "raw")
    assert other.keys() == first.keys()
    assert sum(other[name] == first[name] for name in first) == 1, "only the marker is the same"


def test_a_users_folder_is_not_replaced(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "thesis.txt").write_text("mine")
    assert demo.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (tmp_path / "raw" / "thesis.txt").read_text() == "mine"


def test_pretraining_is_repeatable(films, tiny_clip, tmp_path):
    again = tmp_path / "backbone"
    backbone.make_backbone(films / "pretrain", again, steps=2, seed=0, sizes=SIZES)
    assert fingerprint(again) == fingerprint(tiny_clip)


@pytest.fixture
def steps(workspace: Workspace, tmp_path: Path, monkeypatch: Patch) -> list[tuple[str, ...]]:
    """Commands that the demo runs, here in this process, on existing films and CLIP and with hardly any training."""
    for name in ("raw", "pretrain", "arrow", "backbone"):
        (tmp_path / name).symlink_to(workspace.root / name)
    small = {"max_epoch": "1", "memory_length": "6", "memory_depth": "2", "num_workers": "0"}
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | small)
    monkeypatch.setattr(demo, "EVALUATION", demo.EVALUATION | {"num_workers": "0"})
    monkeypatch.setattr(demo, "SWEEP_TYPES", ("both", "text"))
    monkeypatch.setattr(demo, "SWEEP_SEEDS", 1)
    commands = []

    def run(title: str, *command: str) -> None:
        commands.append(command)
        assert command_line(list(command)) == 0, title

    def run_here(jobs: Sequence[Job], **_: Any) -> Outcomes:
        for job in jobs:
            assert command_line(["run.py", *job.command()[2:]]) == 0
            yield job, Outcome(None, 0.0)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(launchers, "run_here", run_here)
    return commands


def test_the_demo_from_training_to_its_report(steps, workspace, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path)]) == 0
    page = tmp_path / "report" / "index.html"
    printed = capsys.readouterr().out
    assert f"\n  {page}\n" in printed
    for label, _, _, test_type, ratio in demo.PATTERNS:
        result = tmp_path / "result" / f"rep_test_{test_type}_{ratio}" / "version_0" / "test_results.json"
        tested = read_json(result)
        assert re.search(rf"{label} .* {tested['metrics']['f1_macro']:.3f} ", printed)
    assert [command[1] for command in steps] == [*["with"] * 5, "sweep", "robustness", "report"]
    runs = [path.parent.name for path in sorted((tmp_path / "result" / "sweep").glob("*/version_0"))]
    assert runs == ["sweep_both_0.7_seed0", "sweep_text_0.7_seed0"]
    for name in ("curves_mmimdb.png", "per_class_mmimdb.png"):
        assert (page.parent / "figures" / name).is_file()

    # Existing results are reused.
    steps.clear()
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert steps == []
    # A missing result is recomputed, and so is everything that depends on it.
    (tmp_path / "result" / "sweep" / runs[1] / "version_0" / "robustness" / "robustness.json").unlink()
    before = page.stat().st_mtime_ns
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert [command[1] for command in steps] == ["robustness", "report"]
    assert page.stat().st_mtime_ns > before
