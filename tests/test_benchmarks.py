"""What the benchmarks compare is the same thing: the baseline's numbers, the counts, what is put back, the matrices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import record
from benchmarks.baseline import PublishedAlgorithm
from benchmarks.matrix import CELLS, SAMPLED_CELLS, Matrix
from benchmarks.operations import counted_operations, needed_operations
from benchmarks.sides import VIT_B16
from benchmarks.undone import PATCHES, put_back
from clip.checkpoint import ModelSpec, build_classifier
from clip.modules.method import MethodOptions
from clip.tasks import TASKS
from tests import golden
from tests.models import TINY, model_input, tiny_batch, tiny_classifier
from vilt.missing_tables import draw_missing_table

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
        assert (parameter.grad is None) == (expected[name].grad is None), name
        theirs_grad = expected[name].grad
        if parameter.grad is not None and theirs_grad is not None:
            assert golden.relative_error(parameter.grad, theirs_grad) < 1e-8, name


@pytest.mark.parametrize("name", PATCHES)
def test_putting_work_back_changes_no_number(name: str) -> None:
    classifier = tiny_classifier(memory_depth=1).double()
    batch = model_input(tiny_batch(4)[0].double(), tiny_batch(4)[1], TYPES)

    def numbers() -> list[torch.Tensor]:
        torch.manual_seed(0)
        classifier.zero_grad()
        classifier.train()(batch).sum().backward()
        gradients = [p.grad.clone() for p in classifier.parameters() if p.grad is not None]
        with torch.no_grad():
            return [classifier.eval()(batch), *gradients]

    without = numbers()
    with put_back(name):
        back = numbers()
    assert len(without) == len(back)
    for one, other in zip(without, back, strict=True):
        assert golden.relative_error(one, other) < 1e-9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("missing_type", [1, 2])
def test_the_needed_operations_are_those_that_run(missing_type: int, training: bool) -> None:
    """At full width. What runs besides is small: what a mask hides, and the products of the fixed queries."""
    arch = replace(VIT_B16, vision_layers=3, text_layers=3, vocab_size=300)
    classifier = build_classifier(ModelSpec("mmimdb", MethodOptions("rep", 36, 2), arch)).train(training)
    tokens = torch.ones(16, 77, dtype=torch.long)
    tokens[:, 40] = 299
    batch = model_input(torch.zeros(16, 3, 224, 224), tokens, [missing_type] * 16)

    def step() -> None:
        with torch.set_grad_enabled(training):
            logits = classifier(batch)
            if training:
                logits.sum().backward()

    step()  # makes what evaluation keeps between batches
    needed = needed_operations(arch, 36, 2, [(missing_type, 41)] * 16, training)
    assert 1.0 <= counted_operations(step) / needed < 1.03


def test_both_ways_to_a_matrix_are_of_the_same_numbers(tmp_path: Path) -> None:
    arch = replace(TINY, vocab_size=2000)
    spec = ModelSpec("mmimdb", MethodOptions("rep", 6, 2), arch)
    torch.manual_seed(0)
    matrix = Matrix(tmp_path, build_classifier(spec).eval(), spec, torch.device("cpu"), films=8, batch=4)
    logits = matrix.encodings()
    sampled = matrix.sampled_cells()
    assert [cell for cell, _, _ in sampled] == [cell for cell in SAMPLED_CELLS for _ in range(2)]
    for cell, rows, theirs in sampled:
        table = draw_missing_table("mmimdb", "test", cell, 8)
        assert golden.relative_error(logits.at(table)[list(rows)], theirs) < 1e-4
    found = matrix.whole()
    assert len(found["cells"]) == len(CELLS) == 33
    assert matrix.share_sampled == 3 * 2 * 4 / (33 * 8)
    encodings, evaluation = counted_operations(matrix.encodings), counted_operations(matrix.evaluation)
    assert encodings / evaluation == pytest.approx(2, rel=0.05)
    assert counted_operations(matrix.sampled_cells) / matrix.share_sampled / encodings > 15
    metrics = matrix.evaluation()
    assert {name: metrics[name] for name in found["metrics"]} == found["by_type"]["complete"]


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
