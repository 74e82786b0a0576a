"""What a training step does with gradients: parameter groups, optimiser and learning rate (docs/method.md, 5)."""

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
PATIENCE, PLATEAU_THRESHOLD = 10, 1e-4
"""As torch's ReduceLROnPlateau has them."""
NOT_DECAYED = ("bias", "norm.weight")
"""Endings of the names of parameters without weight decay. Of the norms these are the ones within RDNs, not `ln_post`,
`ln_final` and `layernorm_text.K`: the published test of names."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimiser and schedule."""

    optim_type: str  # one of OPTIMIZERS
    learning_rate: float
    lr_mult: float  # factor on the learning rate of the head
    weight_decay: float
    warmup_steps: float  # optimiser steps, or a share of all steps if below 1
    end_lr: float
    decay_power: float | str
    """Power of the polynomial decay to `end_lr`, `cosine` to it, or `plateau`, see Plateau."""
    max_steps: int | None = None  # all steps, where that is less than the epochs have


class AdamW(Optimizer):
    """AdamW as transformers 4.2.1 computed it, which the published numbers come from.

    It differs from `torch.optim.AdamW` in two places: `eps` is added to the square root of the second moment before
    the bias correction, and the weight decay follows the update.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a parameter that has never had a gradient stays as it is, and its count has not begun."""
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
        """The state of a parameter, this step counted. The count is on the host, where its powers are computed."""
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
"""By the option `optim_type`, each as the published code sets it."""
Decays = Callable[[str, nn.Parameter], bool | None]


def make_optimizer(
    module: nn.Module,
    head_name: str,
    settings: OptimizerSettings,
    decays: Decays = lambda *_: None,
    betas: tuple[float, float] = ADAM_BETAS,
) -> Optimizer:
    """The optimiser of the trained parameters, in groups with and without weight decay, those of the head last.

    Args:
        decays: says of a parameter whether it has weight decay; None: see NOT_DECAYED.
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
    """Optimiser steps that the schedule spans.

    Each epoch ends with a step of its own, however few batches are left for it. The published code counts those of all
    batches, rounded down, so that there may be some steps more than that, which have the final rate.
    """
    steps = max(1, batches * epochs // accumulation) if as_published else -(-batches // accumulation) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def weight_in_step(
    batch: int, size: int, accumulation: int, samples: int, rank: int, processes: int
) -> tuple[int, float]:
    """How many samples of a batch count, and the factor on their mean loss that makes an optimiser step's loss the mean
    over its samples.

    Lightning divides each batch's loss by `accumulation` and averages the gradients of all processes, as if all batches
    were of one size; the last ones of an epoch are not. The published code weights those of its tasks in that way.

    Args:
        batch: its number in the epoch.
        size: of batches, but for the last one.
        samples: of the epoch; a process whose share would have one less ends with a repeated one, which does not count.
    """
    share = -(-samples // processes)
    own = len(range(rank, samples, processes))
    first, last = batch * size, min(share, (batch + 1) * size)
    counted = max(0, min(own, last) - first)
    step = batch // accumulation * accumulation * size
    in_step = min(samples, (step + accumulation * size) * processes) - step * processes
    return counted or last - first, counted * accumulation * processes / in_step


def warmup_steps(settings: OptimizerSettings, total_steps: int) -> int:
    """Optimiser steps of the warm-up in a training of `total_steps`."""
    warmup = settings.warmup_steps
    return part_of(total_steps, warmup) if warmup < 1 else int(warmup)


class Plateau:
    """A factor on the learning rate: a tenth after more than PATIENCE validations in a row without a lower loss."""

    def __init__(self) -> None:
        self.factor, self.lowest, self.without = 1.0, math.inf, 0

    def __call__(self, step: int) -> float:
        return self.factor

    def see(self, loss: float, scheduler: LambdaLR) -> None:
        """Takes the loss of a validation into account, from the next step on."""
        if loss < self.lowest * (1 - PLATEAU_THRESHOLD):
            self.lowest, self.without = loss, 0
            return
        self.without += 1
        if self.without > PATIENCE:
            self.factor, self.without = self.factor / 10, 0
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = rate * self.factor


def plateau_of(scheduler: object) -> Plateau | None:
    """The one behind a schedule; None behind others."""
    factors = getattr(scheduler, "lr_lambdas", None)
    return factors[0] if factors and isinstance(factors[0], Plateau) else None


def make_schedule(optimizer: Optimizer, settings: OptimizerSettings, total_steps: int) -> LambdaLR:
    """Linear warm-up, then decay to `end_lr` at `total_steps`, from where on it stays.

    Each factor as transformers 4.2.1 rounds it. Its cosine rises again behind the last step.
    """
    start, end, power = settings.learning_rate, settings.end_lr, settings.decay_power
    if power == "plateau":
        plateau = Plateau()
        return LambdaLR(optimizer, [plateau] * len(optimizer.param_groups))
    warmup = warmup_steps(settings, total_steps)

    def share_of_rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        left = 1 - (1.0 if step >= total_steps else (step - warmup) / (total_steps - warmup))
        left = (1 - math.cos(math.pi * left)) / 2 if power == "cosine" else left ** float(power)
        return ((start - end) * left + end) / start

    return LambdaLR(optimizer, share_of_rate)
