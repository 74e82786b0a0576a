"""What is said of a loss or a gradient that is not finite, and how many may be skipped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clip.checkpoint import ModelSpec
from clip.modules.method import MethodOptions
from clip.numerics import BadStep, GradientWatch, first_not_finite
from clip.training import FinetuneModule
from common.errors import NonFiniteLossError
from run import command_line
from tests.conftest import Workspace
from tests.models import TINY, model_input, tiny_batch, tiny_classifier

INF, NAN = float("inf"), float("nan")


def named(*gradients: list[float] | None) -> list[tuple[str, nn.Parameter]]:
    """Parameters a, b, … with these gradients."""
    parameters = []
    for name, gradient in zip("abcdef", gradients, strict=False):
        parameter = nn.Parameter(torch.zeros(len(gradient or [0])))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        parameters.append((name, parameter))
    return parameters


def test_the_first_bad_step_and_the_parameter_nearest_to_the_loss_are_named() -> None:
    watch = GradientWatch(0)
    watch.note(named([1.0, 3e38], None, [-3e38]), 4, [torch.tensor([1])])  # large, and finite
    assert watch.look() is None and watch.skipped == 0
    watch.note(named([1.0], [2.0], [3.0]), 5, [torch.tensor([1])])
    watch.note(named([NAN], None, [-INF, 1.0], [1.0]), 6, [torch.tensor([2, 3]), torch.tensor([4])])
    assert watch.note(named([INF], [1.0]), 7, [torch.tensor([5])]) == 3
    found = watch.look()
    assert found is not None and (found.step, found.samples.tolist(), found.parameter) == (6, [2, 3, 4], "c")
    assert watch.look() is None  # nothing is looked at twice


def test_so_many_in_a_row_may_be_skipped() -> None:
    watch = GradientWatch(2)
    seen: list[tuple[int, int, BadStep | None]] = []
    for step, value in enumerate([INF, INF, 1.0, NAN, NAN, NAN]):
        watch.note(named([value]), step, [torch.tensor([step])])
        seen.append((watch.skipped, watch.in_a_row, found := watch.look()))
        assert (found is not None) is (step == 5)
    assert (watch.skipped, watch.in_a_row) == (5, 3)


def test_counts_go_into_the_checkpoint_and_back() -> None:
    backbone = ("tiny", "0" * 64)
    one, other = (
        FinetuneModule(tiny_classifier(), ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY), backbone)
        for _ in range(2)
    )
    for module in (one, other):
        module._trainer = SimpleNamespace(world_size=1, global_rank=0)  # type: ignore[assignment]
    one._gradients.skipped, one._gradients.in_a_row = 7, 2
    checkpoint: dict[str, Any] = {}
    one.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert (other._gradients.skipped, other._gradients.in_a_row) == (7, 2)


@pytest.mark.parametrize("name", ["model.memory_learner.layernorm_text.1", "mmimdb_classifier"])
def test_the_module_that_first_is_not_finite_is_found(name: str) -> None:
    classifier = tiny_classifier()
    images, tokens = tiny_batch(4)
    batch = model_input(images, tokens, [0, 0, 1, 2])
    assert first_not_finite(classifier, lambda: classifier(batch)) is None
    module = classifier.get_submodule(name)
    overflow = module.register_forward_hook(lambda _, __, output: output * INF)
    assert first_not_finite(classifier, lambda: classifier(batch)) == f"output of {name}"
    overflow.remove()
    with torch.no_grad():
        module.get_parameter("weight").view(-1)[3] = NAN
    assert first_not_finite(classifier, lambda: classifier(batch)) == f"parameter {name}.weight"
    assert not any(module._forward_hooks for module in classifier.modules())


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is finite, its gradient is not: as of a square root at 0."""
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


def test_too_many_skipped_steps_end_the_run() -> None:
    module = FinetuneModule(tiny_classifier(), ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY), skip_bad_steps=1)
    module._sample_names = lambda index_B: [f"film{number}" for number in index_B.tolist()]  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(current_epoch=3, global_step=40, world_size=1)  # type: ignore[assignment]
    optimizer: Any = None
    for parameter in module.classifier.parameters():
        parameter.grad = torch.full_like(parameter, INF)
    module._step_samples = [torch.tensor([4])]
    module.on_before_optimizer_step(optimizer)
    module._step_samples = [torch.tensor([5]), torch.tensor([6])]
    with pytest.raises(
        NonFiniteLossError, match=r"at step 40 \(epoch 3\); so were 1 before it .*samples: film5, film6"
    ):
        module.on_before_optimizer_step(optimizer)
