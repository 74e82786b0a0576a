"""Optimisation: parameter groups, optimisers and learning-rate schedules (docs/method.md section 5)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.shares import part_of

ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-8
SGD_MOMENTUM = 0.9
STEP, STEPS = 0.2, 5
"""The decay of FOCAL's supervised DeepSense: the factor, and the number of equal parts of the training."""
PATIENCE, PLATEAU_THRESHOLD = 10, 1e-4
"""The defaults of torch's ReduceLROnPlateau."""
NOT_DECAYED = ("bias", "norm.weight")
"""Suffixes of the names of parameters without weight decay, as published. Among norms, this matches those within RDNs
but not `ln_post`, `ln_final` and `layernorm_text.K`."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of optimiser and schedule."""

    optim_type: str  # one of OPTIMIZERS
    learning_rate: float
    lr_mult: float  # factor on the head's learning rate
    weight_decay: float
    warmup_steps: float  # optimiser steps, or a share of all steps if below 1
    end_lr: float
    decay_power: float | str
    """Power of the polynomial decay to `end_lr`; or `cosine` for cosine decay to it, `step` (a factor of STEP after
    each fifth of the training), or `plateau` (see Plateau)."""
    max_steps: int | None = None  # limit on all steps, if the epochs have more


class AdamW(Optimizer):
    """AdamW as implemented in transformers 4.2.1, with which the published results were obtained.

    It differs from `torch.optim.AdamW` in two ways: `eps` is added to the square root of the second moment before the
    bias correction, and weight decay is applied after the update.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; a parameter without a gradient is not changed, and its steps are not counted."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            states = [self._counted(parameter) for parameter in parameters]
            means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            rates = [
                -group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"]) for state in states
            ]
            torch._foreach_addcdiv_(parameters, means, roots, rates)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        return loss

    def _counted(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter, this step counted. The count is kept on the host, where its powers are computed."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        return state


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, tuple[float, float]], Optimizer]] = {
    "adamw": lambda groups, lr, betas: AdamW(groups, lr, betas, ADAM_EPS),
    "adam": lambda groups, lr, _: Adam(groups, lr),
    "sgd": lambda groups, lr, _: SGD(groups, lr, momentum=SGD_MOMENTUM),
}
"""Optimisers keyed by the option `optim_type`, each configured as in the published code."""
Decays = Callable[[str, nn.Parameter], bool | None]


def make_optimizer(
    module: nn.Module,
    head_name: str,
    settings: OptimizerSettings,
    decays: Decays = lambda *_: None,
    betas: tuple[float, float] = ADAM_BETAS,
) -> Optimizer:
    """The optimiser of the trained parameters, in groups with and without weight decay; the head's groups come last.

    Args:
        decays: decides whether a parameter has weight decay; where it returns None, NOT_DECAYED decides.
    """
    by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = decays(name, parameter)
            not_decayed = name.endswith(NOT_DECAYED) if decayed is None else not decayed
            by_kind.setdefault((name.startswith(f"{head_name}."), not_decayed), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": settings.learning_rate * (settings.lr_mult if of_head else 1.0),
            "weight_decay": 0.0 if not_decayed else settings.weight_decay,
        }
        for (of_head, not_decayed), parameters in sorted(by_kind.items(), key=lambda item: item[0])
    ]
    return OPTIMIZERS[settings.optim_type](groups, settings.learning_rate, betas)


def schedule_steps(batches: int, epochs: int, accumulation: int, max_steps: int | None, *, as_published: bool) -> int:
    """Number of optimiser steps that the schedule spans.

    Each epoch ends with an optimiser step, however few batches are left for it. The published code instead divides the
    total number of batches by `accumulation`, rounding down; the steps beyond that use the final rate.
    """
    steps = max(1, batches * epochs // accumulation) if as_published else -(-batches // accumulation) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def weight_in_step(
    batch: int, size: int, accumulation: int, samples: int, rank: int, processes: int
) -> tuple[int, float]:
    """The number of samples in a batch that count, and the weight of their mean loss.

    With these weights, the loss of an optimiser step is the mean over its samples. Lightning divides each batch's loss
    by `accumulation` and averages gradients over processes, as if all batches had the same size, but the last ones of
    an epoch are smaller. The published code leaves it at that.

    Args:
        batch: index of the batch in the epoch.
        size: batch size, except for the last batch.
        samples: number in the epoch; a process whose share is one short repeats a sample, which does not count.
    """
    share = -(-samples // processes)
    own = len(range(rank, samples, processes))
    first, last = batch * size, min(share, (batch + 1) * size)
    counted = max(0, min(own, last) - first)
    step = batch // accumulation * accumulation * size
    in_step = min(samples, (step + accumulation * size) * processes) - step * processes
    return counted or last - first, counted * accumulation * processes / in_step


def warmup_steps(settings: OptimizerSettings, total_steps: int) -> int:
    """Number of warm-up steps in a training of `total_steps` optimiser steps."""
    warmup = settings.warmup_steps
    return part_of(total_steps, warmup) if warmup < 1 else int(warmup)


class Plateau:
    """A learning-rate factor, divided by 10 after more than PATIENCE validations in a row without a lower loss."""

    def __init__(self) -> None:
        self.factor, self.lowest, self.stale = 1.0, math.inf, 0

    def __call__(self, step: int) -> float:
        return self.factor

    def see(self, loss: float, scheduler: LambdaLR) -> None:
        """Updates the factor with the loss of a validation; it applies from the next step on."""
        if loss < self.lowest * (1 - PLATEAU_THRESHOLD):
            self.lowest, self.stale = loss, 0
            return
        self.stale += 1
        if self.stale > PATIENCE:
            self.factor, self.stale = self.factor / 10, 0
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = rate * self.factor


def plateau_of(scheduler: object) -> Plateau | None:
    """The Plateau that a scheduler uses; None for other schedules."""
    factors = getattr(scheduler, "lr_lambdas", None)
    return factors[0] if factors and isinstance(factors[0], Plateau) else None


def make_schedule(optimizer: Optimizer, settings: OptimizerSettings, total_steps: int) -> LambdaLR:
    """Linear warm-up, then decay to `end_lr` at `total_steps` (`step`: not below it); the rate stays there afterwards.

    Factors are rounded as in transformers 4.2.1, whose cosine schedule rises again after the last step.
    """
    start, end, power = settings.learning_rate, settings.end_lr, settings.decay_power
    if power == "plateau":
        plateau = Plateau()
        return LambdaLR(optimizer, [plateau] * len(optimizer.param_groups))
    warmup = warmup_steps(settings, total_steps)

    def share_of_rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        if power == "step":
            return max(STEP ** min(STEPS - 1, STEPS * step // total_steps), end / start)
        left = 1 - (1.0 if step >= total_steps else (step - warmup) / (total_steps - warmup))
        left = (1 - math.cos(math.pi * left)) / 2 if power == "cosine" else left ** float(power)
        return ((start - end) * left + end) / start

    return LambdaLR(optimizer, share_of_rate)
