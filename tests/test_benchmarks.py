"""What the benchmarks compare is the same thing: the baseline's numbers, the counts, and what is put back."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baseline import PublishedAlgorithm
from benchmarks.operations import counted_operations, needed_operations
from benchmarks.sides import VIT_B16
from benchmarks.undone import PATCHES, put_back
from clip.checkpoint import ModelSpec, build_classifier
from clip.modules.method import MethodOptions
from clip.tasks import TASKS
from tests import golden
from tests.models import TINY, model_input, tiny_batch, tiny_classifier

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
