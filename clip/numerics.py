"""Where numbers stopped being finite: the step, the layer, and how many such steps may be skipped."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class BadStep(NamedTuple):
    """An optimiser step whose gradient is not finite."""

    step: int
    samples: Tensor
    """Numbers of its samples."""
    parameter: str
    """The first one that the backward pass reached with such a gradient."""


class GradientWatch:
    """Looks whether gradients are finite, at many optimiser steps together: each look makes the host wait for the GPU.

    Args:
        allowed: how many steps in a row may have gradients that are not finite. In 16 bits they are no fault: the
            scale of the loss is too large then, such steps are skipped, and the scale is lowered.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.skipped = 0
        """Such steps up to the last look, in all."""
        self.in_a_row = 0
        """Of the newest steps up to the last look."""
        self._unchecked: list[tuple[int, Sequence[Tensor], list[str], Tensor]] = []
        """(step, numbers of samples, names of the parameters with a gradient, largest absolute value in each)."""

    def note(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int, samples: Sequence[Tensor]) -> int:
        """Takes the gradients of a step, for the next look; the number of steps that wait for it."""
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        largest = torch.stack(torch._foreach_norm(list(gradients.values()), float("inf")))
        self._unchecked.append((step, samples, list(gradients), largest))
        return len(self._unchecked)

    def look(self) -> BadStep | None:
        """The step with which there are more in a row than allowed; None if there is none."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return None
        finite = torch.cat([largest for *_, largest in unchecked]).isfinite().cpu()
        for (step, samples, names, _), of_step in zip(
            unchecked, finite.split([len(names) for _, _, names, _ in unchecked]), strict=True
        ):
            bad = [name for name, is_finite in zip(names, of_step.tolist(), strict=True) if not is_finite]
            self.skipped += bool(bad)
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row > self.allowed:
                return BadStep(step, torch.cat(list(samples)), bad[-1])
        return None


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The parameter of `model` that is not finite, or the module whose output first is not when `forward` calls it."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def look_at(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    hooks = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return f"output of {found[0]}" if found else None
