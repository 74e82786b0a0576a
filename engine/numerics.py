"""Where numbers stopped being finite: the step, the layer, and how many such steps may be skipped."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NotFinite(NamedTuple):
    """A loss or a gradient that is not finite."""

    of_gradient: bool
    step: int
    what: str  # value of the loss, or the first parameter that the backward pass reached with such a gradient
    batch: int  # number in the epoch of the loss's batch, or of the step's last one
    samples: Tensor  # numbers of the samples of the batch, or of all the step's


class FiniteWatch:
    """Looks whether losses and gradients are finite, of many optimiser steps together: a look makes the host wait.

    Args:
        allowed: how many steps in a row may have gradients that are not finite. In 16 bits they are no fault: the
            scale of the loss is too large then, such steps are skipped, and the scale is lowered.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.skipped = 0  # steps with such gradients up to the last look, in all
        self.in_a_row = 0  # of the newest steps up to the last look
        self._batches: list[tuple[int, Tensor, Tensor]] = []
        """(number, numbers of samples, loss) of the step that is under way."""
        self._steps: list[tuple[int, list[tuple[int, Tensor, Tensor]], list[str], Tensor]] = []
        """(step, batches, names of the parameters with a gradient, losses and a number of each gradient that is finite
        if all of it is) since the last look."""

    def note_loss(self, batch: int, samples: Tensor, loss: Tensor) -> None:
        """Takes the loss of a batch."""
        self._batches.append((batch, samples, loss.detach()))

    def note_gradients(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> int:
        """Takes the gradients of a step, which ends the batches so far; the number of steps that wait for a look."""
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        if all(gradient.is_cpu for gradient in gradients.values()):
            told = [gradient.sum() for gradient in gradients.values()]  # a tenth of the time of the largest value
        else:
            told = list(torch._foreach_norm(list(gradients.values()), float("inf")))
        values = torch.stack([*(loss for *_, loss in self._batches), *told])
        self._steps.append((step, self._batches, list(gradients), values))
        self._batches = []
        return len(self._steps)

    def look(self) -> NotFinite | None:
        """The first loss that is not finite, or the gradient with which there are more in a row than allowed."""
        steps, self._steps = self._steps, []
        finite = iter(torch.cat([values for *_, values in steps]).isfinite().tolist() if steps else [])
        for step, batches, names, _ in steps:
            for batch, samples, loss in batches:
                if not next(finite):
                    return NotFinite(False, step, str(loss.item()), batch, samples)
            bad = [name for name in names if not next(finite)]
            self.skipped += bool(bad)
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row > self.allowed:
                return NotFinite(True, step, bad[-1], batches[-1][0], torch.cat([samples for _, samples, _ in batches]))
        return None


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """`, first in …`: the parameter of `model` that is not finite, or the module whose output first is not as `forward`
    calls it; empty where all are."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f", first in the parameter {name}"
    found: list[str] = []

    def look(name: str, _module: nn.Module, _input: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f", first in the output of {name}")

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return "".join(found)
