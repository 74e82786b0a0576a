"""How a non-finite loss or gradient is reported, and how many steps may be skipped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clip.modules.method import MethodOptions
from engine.checkpoint import ModelSpec
from engine.numerics import FiniteWatch, first_not_finite
from engine.training import FinetuneModule
from run import command_line
from tests.models import TINY, model_input, tiny_batch, tiny_classifier

INF, NAN = float("inf"), float("nan")


def named(*gradients: list[float] | None) -> list[tuple[str, nn.Parameter]]:
    """Parameters named a, b, … with the given gradients."""
    parameters = []
    for name, gradient in zip("abcdef", gradients, strict=False):
        parameter = nn.Parameter(torch.zeros(len(gradient or [0])))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        parameters.append((name, parameter))
    return parameters


def note_step(watch: FiniteWatch, step: int, gradients: list[list[float] | None], *losses: float) -> int:
    """Notes a step with batches of two samples; step 6 has batches 60, 61, … with samples 600, 601, 610, …"""
    for batch, loss in enumerate(losses or (1.0,), 10 * step):
        watch.note_loss(batch, torch.tensor([10 * batch, 10 * batch + 1]), torch.tensor(loss))
    return watch.note_gradients(named(*gradients), step)


def test_the_first_bad_step_and_the_parameter_nearest_to_the_loss_are_named() -> None:
    watch = FiniteWatch(0)
    note_step(watch, 4, [[1.0, 3e38], None, [-3e38]], 3e38)  # large, and finite
    assert watch.look() is None and watch.skipped == 0
    note_step(watch, 5, [[1.0], [2.0], [3.0]])
    note_step(watch, 6, [[NAN], None, [-INF, 1.0], [1.0]], 1.0, 2.0)
    assert note_step(watch, 7, [[INF], [1.0]], NAN) == 3
    found = watch.look()
    assert found is not None and (found.of_gradient, found.step, found.what) == (True, 6, "c")
    assert found.samples.tolist() == [600, 601, 610, 611]
    assert watch.look() is None  # each step is examined once


@pytest.mark.parametrize("allowed", [0, 5])
def test_the_first_bad_loss_is_named_however_many_steps_may_be_skipped(allowed: int) -> None:
    watch = FiniteWatch(allowed)
    for step, losses in enumerate([(1.0, 2.0), (1.0, INF), (NAN, NAN)]):
        note_step(watch, step, [[1.0]], *losses)
    found = watch.look()
    assert found is not None and found[:4] == (False, 1, "inf", 11) and found.samples.tolist() == [110, 111]


def test_only_so_many_steps_in_a_row_may_be_skipped() -> None:
    watch = FiniteWatch(2)
    for step, value in enumerate([INF, INF, 1.0, NAN, NAN, NAN]):
        note_step(watch, step, [[value]])
        assert (watch.look() is not None) is (step == 5)
    assert (watch.skipped, watch.in_a_row) == (5, 3)


def module_of(**trainer: Any) -> FinetuneModule:
    spec = ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY)
    module = FinetuneModule(tiny_classifier(), spec, {}, skip_bad_steps=1)
    module._sample_names = lambda index_B: [f"film{number}" for number in index_B.tolist()]  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, **trainer)  # type: ignore[assignment]
    return module


def test_a_parameter_trained_before_gets_a_zero_gradient_instead_of_none() -> None:
    """As published, momentum and weight decay still move it; a parameter that never had a gradient keeps None."""
    module = module_of(global_step=1)
    once, never = (module.classifier.get_parameter(f"mmimdb_classifier.{name}") for name in ("weight", "bias"))
    optimizer = torch.optim.AdamW([once, never])
    once.grad = torch.ones_like(once)
    optimizer.step()
    optimizer.zero_grad()
    module._watch.note_loss(1, torch.tensor([0]), torch.tensor(1.0))
    module.on_before_optimizer_step(optimizer)
    assert once.grad is not None and not once.grad.any() and never.grad is None


def test_counts_of_skipped_steps_are_restored_from_the_checkpoint() -> None:
    one, other = module_of(), module_of()
    one._watch.skipped, one._watch.in_a_row = 7, 2
    checkpoint: dict[str, Any] = {}
    one.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert (other._watch.skipped, other._watch.in_a_row) == (7, 2)


@pytest.mark.parametrize("name", ["model.memory_learner.layernorm_text.1", "mmimdb_classifier"])
def test_the_first_module_with_a_non_finite_value_is_found(name: str) -> None:
    classifier = tiny_classifier()
    batch = model_input(*tiny_batch(4), [0, 0, 1, 2])
    assert first_not_finite(classifier, lambda: classifier(batch)) == ""
    module = classifier.get_submodule(name)
    overflow = module.register_forward_hook(lambda _, __, output: output * INF)
    assert first_not_finite(classifier, lambda: classifier(batch)) == f", first in the output of {name}"
    overflow.remove()
    with torch.no_grad():
        module.get_parameter("weight").view(-1)[3] = NAN
    assert first_not_finite(classifier, lambda: classifier(batch)) == f", first in the parameter {name}.weight"
    assert not any(module._forward_hooks for module in classifier.modules())


def test_a_non_finite_gradient_ends_the_run_before_the_step(workspace, monkeypatch, capsys):
    """The loss is finite and its gradient is not, as with a square root at 0."""
    training_step = FinetuneModule.training_step

    def spoil(self: FinetuneModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = training_step(self, batch, batch_idx)
        bias = self.classifier.get_parameter("mmimdb_classifier.bias")
        return loss + ((bias - bias.detach()).abs().sum().sqrt() if self.global_step == 2 else 0.0)

    monkeypatch.setattr(FinetuneModule, "training_step", spoil)
    assert command_line(workspace.command(f"vit={workspace.backbone}", "exp_name=gradient", "skip_bad_steps=5")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    start = "error: the gradient of mmimdb_classifier.bias is not finite at step 2 (epoch 0); samples: "
    assert error.startswith(start) and len(error.removeprefix(start).split(", ")) == 8
