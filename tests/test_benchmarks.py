"""The benchmarks compare like with like (the baselines compute our numbers) and record their results."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import baseline, gpu, heads, loading, loop, sensors, shapes, sides, vla, vla_baseline
from benchmarks.__main__ import main
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from engine.tasks import TASKS
from tests import golden
from tests.conftest import Captured, Patch
from tests.models import model_input, tiny_batch, tiny_classifier
from tests.vla_models import TINY as TINY_VLA

TYPES = [0, 1, 2, 0]


def assert_same(found: list[Tensor], losses: list[Tensor], classifier: nn.Module, tolerance: float) -> None:
    """Both outputs agree, and so do the gradients of both losses."""
    assert golden.relative_error(*found) < tolerance
    gradients = []
    for loss in losses:
        classifier.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert golden.relative_error(gradient, theirs[name]) < 10 * tolerance, name


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_the_baseline_matches_our_outputs_and_gradients(task: str) -> None:
    classifier = tiny_classifier(task).double().eval()
    images, tokens = tiny_batch(4)
    theirs = baseline.logits(classifier, images.double(), tokens, torch.tensor(TYPES))
    found = [classifier(model_input(images.double(), tokens, TYPES)), theirs]
    labels = torch.zeros(4, 23, dtype=torch.double) if task == "mmimdb" else torch.zeros(4, dtype=torch.long)
    assert_same(found, [TASKS[task].loss(logits, labels) for logits in found], classifier, 1e-9)


@pytest.mark.parametrize("method", ["rep", "mplmm", "none"])
def test_the_vla_baseline_matches_our_outputs_and_gradients(method: str) -> None:
    classifier, types = vla.classifier_of(method, TINY_VLA).double().eval(), [*range(7), 0]
    features = {name: x.double() for name, x in next(vla.drawn(TINY_VLA, lambda _: types)).features.items()}
    batch = vla.without_missing(features, types)
    found = [classifier(batch), vla_baseline.logits(classifier, features, batch)]
    assert_same(found, [logits.square().sum() for logits in found], classifier, 1e-7)  # the padding's weight is float32


def test_every_comparison_runs(monkeypatch: Patch, tmp_path: Path) -> None:
    """Runs the command line on a tiny model and a few films."""
    arch = ClipArchitecture(32, 16, 64, 2, 1, 64, 2, 1, 77, 49408, 64, "quick_gelu")
    monkeypatch.setattr(sides, "VIT_B16", arch)
    monkeypatch.setattr(sides, "SPEC", replace(sides.SPEC, architecture=arch, method=MethodOptions("rep", 6, 2)))
    monkeypatch.setattr(loading, "FILMS", loading.BATCH)
    path = tmp_path / "RESULTS.md"
    parts = ("steps", "robustness", "training", "shapes", "sensors", "heads", "vla")
    monkeypatch.setattr(vla, "SIZES", {"aligned": TINY_VLA})
    monkeypatch.setattr(vla, "BATCH", 3)
    monkeypatch.setattr(sensors, "BATCH", 4)
    monkeypatch.setattr(heads, "ROWS", {"hatememes": {"train": 64, "val": 32, "test": 32}})
    monkeypatch.setattr(shapes, "FILMS", 1024)
    path.write_text("".join(f"<!-- {part} on cpu -->\n<!-- end of {part} -->\n" for part in parts))
    monkeypatch.setattr(loop, "FILMS", 24)
    monkeypatch.setattr(loop, "BATCH", 8)
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["benchmarks", "--pairs", "1", "--threads", threads, "--record", str(path)])
    main()
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ") and " to " in line]
    rows = [cells for cells in rows if "ratio" not in cells and "share" not in cells]
    assert len(rows) == 10 + 1 + 1 + 4
    assert all(float(ratio) > 0 for *_, ratio, _, _ in rows)
    padded = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) % \| < (\d) %", path.read_text())
    assert len(padded) == 8 and all(int(few) <= int(unchanged) for unchanged, few, _, _ in padded)
    assert all(0 <= float(added) < int(most) for *_, added, most in padded)
    sensor_part = path.read_text().partition("<!-- sensors on cpu -->")[2]
    assert re.search(r"`rep`, 70 % both \| [\d.]+ s, [\d.]+ × `none`", sensor_part)
    assert len(re.findall(r"Hateful Memes, linear.* \| [\d.]+ s \| \d+ min \| \d+ \| ≥ 100", path.read_text())) == 2


def test_the_gpu_script_prints_its_table(monkeypatch: Patch, capsys: Captured) -> None:
    for name in ("VIT_B16", "SPEC"):  # the script changes them
        monkeypatch.setattr(sides, name, getattr(sides, name))
    asked: list[dict[str, Any]] = []

    def rates(folder: Path, device: Any, epochs: int, **more: Any) -> list[tuple[float, float]]:
        assert (folder / "arrow" / "mmimdb_train.arrow").exists() and (folder / "backbone" / "config.json").exists()
        asked.append(more)
        return [(200.0, 190.0)]

    commands: list[list[str]] = []
    monkeypatch.setattr(loop, "rates", rates)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    monkeypatch.setattr("sys.argv", ["gpu", "--small", "--parts", "steps", "loop", "cells"])
    gpu.main()
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert rows["run.py, 4, epoch 2, cuda_graphs=False"] == "190 samples/s, bare step 200: 95% (≥ 90 %)"
    step_rows = {"training, 8, few shapes, new shapes", "training, 4, exact shapes", "evaluation, 8, few shapes"}
    assert step_rows <= rows.keys()
    assert [more["per_gpu_batchsize"] for more in asked][:2] == [4, 8]
    assert [words[1:3] for words in commands] == [["run.py", "with"], ["run.py", "sweep"], ["run.py", "sweep"]]
    assert rows["a whole cell, including the decoding of its images"] == "0 s (< 300 s)"
