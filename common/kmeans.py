"""K-means: k-means++ initialisation (without scikit-learn's greedy trials), Lloyd iterations, best of STARTS."""

import torch
from torch import Tensor

STARTS = 10
MOST_ROUNDS = 300


def kmeans(points_ND: Tensor, count: int, seed: int = 0) -> Tensor:
    """The cluster centres (count, D). If there are at most `count` points, the points themselves, repeated in turn."""
    if len(points_ND) <= count:
        return points_ND[torch.arange(count, device=points_ND.device) % len(points_ND)]
    generator = torch.Generator().manual_seed(seed)
    found = [_lloyd(points_ND, _start(points_ND, count, generator)) for _ in range(STARTS)]
    return min(found, key=lambda centres_and_cost: centres_and_cost[1])[0]


def _start(points_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centre is a point drawn in proportion to its squared distance from the nearest centre so far."""
    chosen = [int(torch.randint(len(points_ND), (), generator=generator))]
    nearest_N = torch.full((len(points_ND),), torch.inf, device=points_ND.device)
    while len(chosen) < count:
        nearest_N = torch.minimum(nearest_N, (points_ND - points_ND[chosen[-1]]).square().sum(dim=1))
        cumulative_N = nearest_N.double().cpu().cumsum(dim=0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulative_N[-1]
        chosen.append(min(int(torch.searchsorted(cumulative_N, drawn)), len(points_ND) - 1))
    return points_ND[chosen]


def _lloyd(points_ND: Tensor, centres_CD: Tensor) -> tuple[Tensor, float]:
    """The centres after alternating assignment and averaging, and the sum of squared distances to them."""
    previous_N = None
    for _ in range(MOST_ROUNDS):
        distance_N, nearest_N = torch.cdist(points_ND, centres_CD).min(dim=1)
        if previous_N is not None and torch.equal(nearest_N, previous_N):
            break
        previous_N = nearest_N
        sums_CD = torch.zeros_like(centres_CD).index_add_(0, nearest_N, points_ND)
        counts_C1 = torch.bincount(nearest_N, minlength=len(centres_CD))[:, None]
        centres_CD = torch.where(counts_C1 > 0, sums_CD / counts_C1.clamp_min(1), centres_CD)
    return centres_CD, float(distance_N.square().sum())
