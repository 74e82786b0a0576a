"""The demo's made-up films and its tiny CLIP: their layout, what they promise, and that a rerun gives the same. Then
its steps, small and in this process."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import DataError
from demo import __main__ as demo
from demo import data
from demo.posters import HEIGHT, WIDTH
from run import command_line
from runs.sweep import launchers
from runs.sweep.jobs import Job, Outcome
from tests.conftest import Workspace
from vilt.datasets.specs import MMIMDB_GENRES

transformers = pytest.importorskip("transformers", reason="the tiny CLIP is a transformers model")
from demo import backbone  # noqa: E402

SIZES = backbone.TinyClip(image_width=64, image_layers=1, text_layers=1, embed=32, batch=8)


def labels_of(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "labels").glob("*.json"))}


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


def test_task_has_the_mmimdb_layout(films):
    raw = films / "raw"
    labels = labels_of(raw)
    split = json.loads((raw / "split.json").read_text())
    assert {name: len(ids) for name, ids in split.items()} == {"train": 60, "dev": 10, "test": 20}
    in_splits = [film_id for ids in split.values() for film_id in ids]
    assert sorted(in_splits) == sorted(labels), "each film is in exactly one split"
    for film_id, label in labels.items():
        assert set(label) == {"title", "plot", "genres", "year"}
        assert 1 <= len(label["genres"]) <= 3
        assert set(label["genres"]) <= set(MMIMDB_GENRES)
        assert 1 <= len(label["plot"]) <= 2
        assert all(plot and "{" not in plot for plot in label["plot"])
        with Image.open(raw / "images" / f"{film_id}.jpeg") as poster:
            assert (poster.format, poster.mode, poster.size) == ("JPEG", "RGB", (WIDTH, HEIGHT))


def test_same_seed_same_bytes_and_another_seed_others(films, tmp_path):
    data.write_task(tmp_path / "raw", 60, seed=3)
    data.write_pretrain(tmp_path / "pretrain", 40, seed=3)
    for part in ("raw", "pretrain"):
        assert fingerprint(tmp_path / part) == fingerprint(films / part)
    # A rerun replaces what the demo wrote.
    data.write_task(tmp_path / "raw", 60, seed=4)
    other, first = fingerprint(tmp_path / "raw"), fingerprint(films / "raw")
    assert other.keys() == first.keys()
    assert sum(other[name] == first[name] for name in first) == 1, "only the marker is the same"


def test_a_folder_of_the_users_is_not_replaced(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "thesis.txt").write_text("mine")
    assert demo.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (tmp_path / "raw" / "thesis.txt").read_text() == "mine"


def test_transformers_opens_the_backbone(tiny_clip):
    model = transformers.CLIPModel.from_pretrained(tiny_clip)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    text = model.config.text_config
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end == max(tokenizer.get_vocab().values()) == text.eos_token_id == text.vocab_size - 1
    assert tokenizer.convert_tokens_to_ids("<|startoftext|>") == end - 1 == text.bos_token_id
    assert (text.max_position_embeddings, text.hidden_act, text.pad_token_id) == (77, "quick_gelu", 0)
    assert text.hidden_size == 64 * text.num_attention_heads
    ids = tokenizer("A tall CACTUS, below a   golden sky!")["input_ids"]
    assert (ids[0], ids[-1]) == (end - 1, end)
    assert tokenizer.decode(ids[1:-1]).replace(" ,", ",").startswith("a tall cactus, below a golden sky")
    ids_BL = backbone.encode(tokenizer, ["short", "long " * 200])
    with torch.no_grad():
        out = model(pixel_values=torch.zeros(2, 3, 64, 64), input_ids=ids_BL)
    assert out.logits_per_image.isfinite().all()


def test_pretraining_is_repeatable(films, tiny_clip, tmp_path):
    again = tmp_path / "backbone"
    backbone.make_backbone(films / "pretrain", again, steps=2, seed=0, sizes=SIZES)
    assert fingerprint(again) == fingerprint(tiny_clip)


def test_backbone_names_the_film_without_a_poster(tmp_path):
    data.write_pretrain(tmp_path / "films", 4, seed=0)
    (tmp_path / "films" / "images" / "9000002.jpeg").unlink()
    with pytest.raises(DataError, match="9000002"):
        backbone.read_films(tmp_path / "films", 64)


@pytest.fixture
def steps(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that the demo runs: in this process, on films and a CLIP that are there, hardly training."""
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

    def run_job(job: Job) -> Outcome:
        assert command_line(["run.py", *job.command()[2:]]) == 0
        return Outcome(None, 0.0)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(launchers, "run_job", run_job)
    return commands


def test_the_demo_from_training_to_its_report(steps, workspace, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path)]) == 0
    page = tmp_path / "report" / "index.html"
    printed = capsys.readouterr().out
    assert f"\n  {page}\n" in printed
    for label, _, _, test_type, ratio in demo.PATTERNS:
        result = tmp_path / "result" / f"rep_test_{test_type}_{ratio}" / "version_0" / "test_results.json"
        tested = json.loads(result.read_text())
        assert re.search(rf"{label} .* {tested['metrics']['f1_macro']:.3f} ", printed)
    assert [command[1] for command in steps] == [*["with"] * 5, "sweep", "robustness", "report"]
    runs = [path.parent.name for path in sorted((tmp_path / "result" / "sweep").glob("*/version_0"))]
    assert runs == ["sweep_both_0.7_seed0", "sweep_text_0.7_seed0"]
    for name in ("curves_mmimdb.png", "per_class_mmimdb.png"):
        assert (page.parent / "figures" / name).is_file()

    # What is there is used again.
    steps.clear()
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert steps == []
    # What is not is made again, with what follows from it.
    (tmp_path / "result" / "sweep" / runs[1] / "version_0" / "robustness" / "robustness.json").unlink()
    before = page.stat().st_mtime_ns
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert [command[1] for command in steps] == ["robustness", "report"]
    assert page.stat().st_mtime_ns > before
