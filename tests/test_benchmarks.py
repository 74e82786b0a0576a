"""What the benchmarks compare is the same thing: the baseline has our numbers; and what they record."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loading, sides
from benchmarks.__main__ import main, record
from benchmarks.baseline import PublishedAlgorithm
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from engine.tasks import TASKS
from tests import golden
from tests.models import TINY, model_input, published_name, tiny_batch, tiny_classifier

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


def test_every_comparison_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line, on a tiny model and a few films."""
    arch = ClipArchitecture(32, 16, 64, 2, 1, 64, 2, 1, 77, 49408, 64, "quick_gelu")
    monkeypatch.setattr(sides, "VIT_B16", arch)
    monkeypatch.setattr(sides, "SPEC", replace(sides.SPEC, architecture=arch, method=MethodOptions("rep", 6, 2)))
    monkeypatch.setattr(loading, "FILMS", loading.BATCH)
    path = tmp_path / "RESULTS.md"
    path.write_text("<!-- measured on cpu -->\n<!-- end of cpu -->\n")
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["benchmarks", "--pairs", "1", "--threads", threads, "--record", str(path)])
    main()
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ") and " s | " in line]
    assert len(rows) == 10 + 1
    assert all(float(ratio) > 0 for *_, ratio, _, _ in rows)


RESULTS = """# Results

<!-- measured on cpu -->

`python -m benchmarks` on a day

What took long.

| a |
|---|
| 1 |

What was large.

| b |
|---|
| 2 |
<!-- end of cpu -->

The rest.
"""


def test_a_record_of_all_replaces_a_section(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(RESULTS)
    record(path, "cpu", "`today`", {"What took long.": "| a |"}, whole=True)
    section = "<!-- measured on cpu -->\n\n`today`\n\nWhat took long.\n\n| a |\n<!-- end of cpu -->\n"
    assert path.read_text() == f"# Results\n\n{section}\nThe rest.\n"


def test_a_record_of_some_parts_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(RESULTS)
    added = {"What took long.": "| a |\n|---|\n| 3 |", "What is new.": "| c |"}
    record(path, "cpu", "`--only` on another day", added, whole=False)
    once = (
        RESULTS.replace("What took long.\n", "What took long.\n\n`--only` on another day\n")
        .replace("| 1 |", "| 3 |")
        .replace("| 2 |\n", "| 2 |\n\nWhat is new.\n\n`--only` on another day\n\n| c |\n")
    )
    assert path.read_text() == once
    record(path, "cpu", "`--only` on another day", added, whole=False)
    assert path.read_text() == once


def test_a_record_needs_its_place(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(RESULTS)
    with pytest.raises(SystemExit, match="expected the lines <!-- measured on cuda -->"):
        record(path, "cuda", "`today`", {}, whole=True)
    assert path.read_text() == RESULTS
