"""What the benchmarks compare is the same thing: the baseline has our numbers; and what they record."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import heads, loading, loop, sensors, shapes, sides, vla, vla_baseline
from benchmarks.__main__ import main
from benchmarks.baseline import PublishedAlgorithm
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from engine.tasks import TASKS
from tests import golden
from tests.models import TINY, model_input, published_name, tiny_batch, tiny_classifier
from tests.vla_models import TINY as TINY_VLA

TYPES = [0, 1, 2, 0]


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_the_baseline_computes_the_same_numbers(task: str) -> None:
    ours = tiny_classifier(task).double().eval()
    theirs = PublishedAlgorithm(ours, TINY, 6, 2).double().eval()
    images, tokens = tiny_batch(4)
    images = images.double()
    logits = ours(model_input(images, tokens, TYPES))
    their_logits = theirs(images, tokens, torch.tensor(TYPES))
    assert golden.relative_error(logits, their_logits) < 1e-9
    labels = torch.zeros(4, 23, dtype=torch.double) if task == "mmimdb" else torch.zeros(4, dtype=torch.long)
    for output in (logits, their_logits):
        TASKS[task].loss(output, labels).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_grad = expected[published_name(name)].grad
        assert (parameter.grad is None) == (theirs_grad is None), name
        if parameter.grad is not None and theirs_grad is not None:
            assert golden.relative_error(parameter.grad, theirs_grad) < 1e-8, name


@pytest.mark.parametrize("method", ["rep", "mplmm", "none"])
def test_the_baseline_of_text_audio_and_vision_computes_the_same_numbers(method: str) -> None:
    classifier, types = vla.classifier_of(method, TINY_VLA).double().eval(), [*range(7), 0]
    features = {name: x.double() for name, x in next(vla.drawn(TINY_VLA, lambda _: types)).features.items()}
    batch, found = vla.without_missing(features, types), []
    for logits in (classifier(batch), vla_baseline.logits(classifier, features, batch)):
        classifier.zero_grad()
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
        found.append((logits, gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert golden.relative_error(ours, theirs) < 1e-7  # the weight of padding is float32
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert golden.relative_error(gradient, their_gradients[name]) < 1e-6, name


def test_every_comparison_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line, on a tiny model and a few films."""
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
    assert len(padded) == 8 and all(int(few) <= int(as_they_are) for as_they_are, few, _, _ in padded)
    assert all(0 <= float(added) < int(most) for *_, added, most in padded)
    of_sensors = path.read_text().partition("<!-- sensors on cpu -->")[2]
    assert re.search(r"`rep`, 70 % both \| [\d.]+ s, [\d.]+ × `none`", of_sensors)
    assert len(re.findall(r"Hateful Memes, linear.* \| [\d.]+ s \| \d+ min \| \d+ \| ≥ 100", path.read_text())) == 2
