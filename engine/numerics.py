"""Detecting losses and gradients that are not finite: at which step and layer, and how many steps may be skipped."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NotFinite(NamedTuple):
    """A loss or a gradient that is not finite."""

    of_gradient: bool
    step: int
    what: str  # value of the loss, or the first parameter in the backward pass whose gradient is not finite
    batch: int  # index in the epoch of the loss's batch, or of the step's last batch
    samples: Tensor  # indices of the samples in that batch, or in the whole step


class FiniteWatch:
    """Checks that losses and gradients are finite, for many optimiser steps at once, since a check makes the host wait.

    Args:
        allowed: how many steps in a row may have gradients that are not finite. In 16-bit precision this is normal: the
            loss scale was too large, the step is skipped, and the scale is lowered.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.skipped = 0  # steps whose gradients were not finite, in total up to the last check
        self.in_a_row = 0  # how many of them were the newest steps before the last check
        self._batches: list[tuple[int, Tensor, Tensor]] = []
        """(index, indices of samples, loss) of each batch in the current step."""
        self._steps: list[tuple[int, list[tuple[int, Tensor, Tensor]], list[str], Tensor]] = []
        """(step, batches, names of the parameters with a gradient, values) of each step since the last check; the
        values are the losses, and for each gradient a number that is finite if the whole gradient is."""

    def note_loss(self, batch: int, samples: Tensor, loss: Tensor) -> None:
        """Records the loss of a batch."""
        self._batches.append((batch, samples, loss.detach()))

    def note_gradients(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> int:
        """Records the gradients of a step, which completes it; returns the number of steps not checked yet."""
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        if all(gradient.is_cpu for gradient in gradients.values()):
            reduced = [gradient.sum() for gradient in gradients.values()]  # takes a tenth of the maximum's time
        else:
            reduced = list(torch._foreach_norm(list(gradients.values()), float("inf")))
        values = torch.stack([*(loss for *_, loss in self._batches), *reduced])
        self._steps.append((step, self._batches, list(gradients), values))
        self._batches = []
        return len(self._steps)

    def look(self) -> NotFinite | None:
        """Checks the recorded steps: the first loss that is not finite, or the gradient that exceeds `allowed`."""
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
    """Where a value first is not finite, as `, first in …`: a parameter of `model`, or a module's output in `forward`.

    Empty if all are finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f", first in the parameter {name}"
    found: list[str] = []

    def check(name: str, _module: nn.Module, _input: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f", first in the output of {name}")

    hooks = [module.register_forward_hook(partial(check, name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return "".join(found)
