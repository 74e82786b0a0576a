"""Augmentations of signals, drawn from torch's generator once per modality for the whole batch.

Shape suffixes: B samples, c channels, I intervals, S values of each, T = I·S.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY = 0.5
"""Probability that a modality is augmented."""
CUTMIX_PROBABILITY = 0.75
SCALING_STD = 0.2
MAG_KNOTS, MAG_STD = 4, 0.05
TIME_KNOTS, TIME_STD = 6, 0.2


def mag_warp(x: Tensor) -> Tensor:
    """Multiplies the signals by a smooth curve around 1."""
    curve = smooth_curve(x[0, 0].numel(), draw_knots(MAG_KNOTS, MAG_STD))
    return x * torch.from_numpy(curve).to(x).view(x.shape[2:])


def time_warp(x: Tensor) -> Tensor:
    """Resamples the signals at times that run smoothly faster and slower."""
    return warped(x, time_positions(smooth_curve(x[0, 0].numel(), draw_knots(TIME_KNOTS, TIME_STD))))


def draw_knots(knots: int, std: float) -> np.ndarray:
    """Draws 3(k - 1) + 1 values around 1, for k knots."""
    drawn: np.ndarray = torch.normal(1.0, std, (3 * (knots - 1) + 1,), dtype=torch.float64).numpy()
    return drawn


def smooth_curve(length: int, values: np.ndarray) -> np.ndarray:
    """Middle third (T,) of the cubic spline (not-a-knot) through `values`, spread over three times the length."""
    places = np.floor(np.linspace(-length, 2 * length - 1, len(values)))
    gaps, last = np.diff(places), len(values) - 1
    equations, right = np.zeros((last + 1, last + 1)), np.zeros(last + 1)
    for i in range(1, last):  # the unknowns are the second derivatives
        equations[i, i - 1 : i + 2] = gaps[i - 1], 2 * (gaps[i - 1] + gaps[i]), gaps[i]
        right[i] = 6 * ((values[i + 1] - values[i]) / gaps[i] - (values[i] - values[i - 1]) / gaps[i - 1])
    for row, i in ((0, 0), (last, last - 2)):  # third derivatives agree across the first and last inner knots
        equations[row, i : i + 3] = -1 / gaps[i], 1 / gaps[i] + 1 / gaps[i + 1], -1 / gaps[i + 1]
    second = np.linalg.solve(equations, right)
    at = np.arange(length)
    k = np.clip(np.searchsorted(places, at, side="right") - 1, 0, last - 1)
    u = (at - places[k]) / gaps[k]
    bend = gaps[k] ** 2 / 6 * (((1 - u) ** 3 - (1 - u)) * second[k] + (u**3 - u) * second[k + 1])
    curve: np.ndarray = (1 - u) * values[k] + u * values[k + 1] + bend
    return curve


def time_positions(curve_T: np.ndarray) -> np.ndarray:
    """Positions (T,) from 0 to 1, in steps proportional to the curve."""
    total = np.cumsum(curve_T)
    positions: np.ndarray = np.clip((total - total[0]) / (total[-1] - total[0]), 0, 1)
    return positions


def warped(x: Tensor, positions_T: np.ndarray) -> Tensor:
    """Resamples (B, c, I, S): each channel's spline (not-a-knot) over all its values, evaluated at `positions_T`."""
    y = x.flatten(2).flatten(0, 1).double()
    length = y.shape[-1]
    second = _second_derivatives(y)
    at = torch.from_numpy(positions_T * (length - 1)).to(y)
    i = at.long().clamp(max=length - 2)
    u = at - i
    bend = (((1 - u) ** 3 - (1 - u)) * second[:, i] + (u**3 - u) * second[:, i + 1]) / 6
    return ((1 - u) * y[:, i] + u * y[:, i + 1] + bend).to(x.dtype).view(x.shape)


def _second_derivatives(y: Tensor) -> Tensor:
    """Second derivatives of the splines through the rows of `y`, at steps of 1.

    They solve m[i-1] + 4 m[i] + m[i+1] = 6 (y[i-1] - 2 y[i] + y[i+1]); by not-a-knot, the second and the second to last
    equal the second differences of `y`. The inverse of (1, 4, 1) decays like powers of √3 - 2, so a short convolution
    computes it, and two solutions of the homogeneous equation correct the ends.
    """
    root, reach = math.sqrt(3) - 2, 32
    difference = y.diff(n=2)
    n = difference.shape[1]
    powers = root ** torch.arange(max(n, reach + 1), dtype=y.dtype, device=y.device)
    kernel = torch.cat([powers[1 : reach + 1].flip(0), powers[: reach + 1]]) * 6 / (4 + 2 * root)
    inner = F.conv1d(difference[:, None], kernel[None, None], padding=reach)[:, 0]
    ends = (difference - inner)[:, [0, -1]]
    far = powers[n - 1]
    first, last = ((ends[:, [j]] - far * ends[:, [1 - j]]) / (1 - far**2) for j in (0, 1))
    inner = inner + first * powers[:n] + last * powers[:n].flip(0)
    return torch.cat([2 * inner[:, :1] - inner[:, 1:2], inner, 2 * inner[:, -1:] - inner[:, -2:-1]], dim=1)


def with_phase(x: Tensor, angle: float) -> Tensor:
    """Signals whose spectrum is that of `x` times e^{i·angle}. They are complex, since no real signal has it."""
    return x * complex(math.cos(angle), math.sin(angle))


def flipped(x: Tensor) -> Tensor:
    """Reverses time."""
    return x.flip(2, 3)


def random_phase(x: Tensor) -> Tensor:
    """Shifts the phase by a random angle."""
    return with_phase(x, float(torch.empty(()).uniform_(-math.pi, math.pi)))


VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:, :, torch.randperm(x.shape[2])],
    lambda x: -x,
    flipped,
    lambda x: x * float(torch.normal(1.0, SCALING_STD, ())),
    mag_warp,
    time_warp,
    random_phase,
)
"""The augmentations that FOCAL's views are drawn from: permuting intervals, negation, flip, scaling, warps, phase."""


def draw_view(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A view of a batch: one augmentation, the same for all modalities, applied to each with probability 0.5."""
    return drawn(VIEWS[int(torch.randint(len(VIEWS), ()))], signals)


def drawn(augment: Callable[[Tensor], Tensor], signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Applies the augmentation to each modality with probability 0.5."""
    return {name: augment(x) if float(torch.rand(())) < PROBABILITY else x for name, x in signals.items()}


def cut_box(share: float, centre: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Row bounds and column bounds of the box that comes from the other sample; `share` is λ."""
    bounds = []
    for middle, most in zip(centre, size, strict=True):
        half = int(most * math.sqrt(1 - share)) // 2
        bounds += [max(0, middle - half), min(most, middle + half)]
    return bounds[0], bounds[1], bounds[2], bounds[3]


def pasted(x: Tensor, other: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """`x` with the box of the intervals × values plane taken from `other`."""
    mixed = x.clone()
    top, bottom, left, right = box
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return mixed
