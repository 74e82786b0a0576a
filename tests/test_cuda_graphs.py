"""Recorded steps give what steps give; on a GPU with real graphs, elsewhere with a stand-in that computes again."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from engine import cuda_graphs
from engine.cuda_graphs import GraphedSteps, Losses, recorded
from engine.tasks import TASKS
from tests.conftest import Patch
from tests.models import model_input, tiny_batch, tiny_classifier

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIXES = ([0, 1, 2, 0] * 3, [0, 1, 2, 1] * 3, [0, 1, 2, 0] * 3, [1] * 12, [0, 1, 2, 0] * 3)


def compute_again(run: Callable[[], Losses], pool: Any) -> tuple[Losses, Callable[[], None]]:
    """Stands in for `capture`: a replay computes and writes where the recording left its results."""
    with torch.random.fork_rng():
        outputs = run()

    def replay() -> None:
        loss, logits, own_losses = run()
        for old, new in zip((*outputs[:2], *outputs[2].values()), (loss, logits, *own_losses.values()), strict=True):
            old.copy_(new)

    return outputs, replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: Patch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "capture", compute_again)
    return torch.device(request.param)


def on(device: torch.device, batch: ModelInput) -> ModelInput:
    inputs, rows = ({name: x.to(device) for name, x in each.items()} for each in (batch.inputs, batch.rows))
    return batch._replace(inputs=inputs, rows=rows, present_BM=batch.present_BM.to(device))


def step_of(classifier: MissingModalityClassifier) -> cuda_graphs.Step:
    def step(batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        logits, own_losses = classifier.training_outputs(batch, labels)
        loss = TASKS["hatememes"].loss(logits[:counted].float(), labels[:counted])
        return loss + sum(own_losses.values()), logits, own_losses

    return step


@pytest.mark.parametrize("method", ["rep", "msp", "mora"])
def test_recorded_steps_give_the_same(device: torch.device, method: str) -> None:
    """Losses, logits and gradients, with dropout, accumulated over two batches, whose seeds alone decide the masks."""
    of_method: dict[str, Any] = {"prompt_type": method}
    found: list[list[Tensor | None]] = []
    for with_graphs in (False, True):
        classifier = tiny_classifier("hatememes", **of_method).to(device).train()
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        step = step_of(classifier)
        step = GraphedSteps(step, parameters) if with_graphs else step
        values: list[Tensor | None] = []
        for number, mix in enumerate(MIXES):
            images, tokens = tiny_batch(len(mix), seed=number)
            labels = torch.arange(len(mix), device=device) % 2
            batch = on(device, model_input(images, tokens, mix))
            torch.manual_seed(number)
            loss, logits, own_losses = step(batch if with_graphs else batch.rounded(), labels, len(mix) - number // 4)
            (loss * 0.5).backward()
            values += [loss.detach(), logits.detach(), *(value.detach() for value in own_losses.values())]
            values += [None if each.grad is None else each.grad.clone() for each in parameters]
            if number % 2:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
        found.append(values)
        if isinstance(step, GraphedSteps):
            assert step.refused is None and len(step._recorded) == 4, "one shape came twice"
    for plain, replayed in zip(*found, strict=True):
        assert (plain is None) == (replayed is None)
        assert plain is None or replayed is None or torch.allclose(plain, replayed, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    classifier = tiny_classifier("hatememes").train()
    step = GraphedSteps(step_of(classifier), [*classifier.parameters()])
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            loss, *_ = step(model_input(*tiny_batch(3), [0, 1, 2]), torch.arange(3) % 2, 3)
    assert loss.requires_grad
    assert [record.message for record in caplog.records] == [
        "cuda_graphs: the step cannot be recorded: called a synchronizing CUDA operation"
    ]


def test_only_so_many_shapes_are_recorded(monkeypatch: Patch) -> None:
    monkeypatch.setattr(cuda_graphs, "capture", compute_again)
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    classifier = tiny_classifier("hatememes", prompt_type="none").train()
    step = GraphedSteps(step_of(classifier), [each for each in classifier.parameters() if each.requires_grad])
    for mix in ([0], [0, 1], [0, 0, 1], [0], [0, 0, 2]):
        step(model_input(*tiny_batch(len(mix)), mix), torch.zeros(len(mix), dtype=torch.long), len(mix))
    assert len(step._recorded) == 2 and step.refused is not None and "2 graphs" in step.refused


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_gpus": 0}, "there is no GPU"),
        ({"processes": 2}, "several processes"),
        ({"precision": "16-mixed"}, "precision=16-mixed"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"text_windows": 2}, "text_windows=2"),
        ({"neighbours": 4}, "neighbours"),
        ({"cuda_graphs": False}, None),
        ({}, None),
    ],
)
def test_options_against_it_are_logged(changed, reason, caplog):
    given = {"cuda_graphs": True, "num_gpus": 1, "processes": 1, "precision": "bf16", "activation_checkpointing": False}
    options: Any = SimpleNamespace(**{**given, "text_windows": 1, "neighbours": 0, "teacher": None, **changed})
    classifier = tiny_classifier()
    step = step_of(classifier)
    with caplog.at_level(logging.INFO):
        found = recorded(step, classifier, options)
    assert isinstance(found, GraphedSteps) == (not changed) and (found is step) == bool(changed)
    assert [reason in record.message for record in caplog.records if reason] == [True] * bool(reason)
