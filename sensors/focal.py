"""FOCAL's losses (arXiv 2310.20071) on two views of subsequences: shared, private, orthogonal and temporal.

Shape suffixes: A subsequences, L samples of each, d width of projected features, half of them shared and half private.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("shared", "private", "orthogonal", "temporal")
View = Mapping[str, Tensor]
"""Projected features (A, L, d), keyed by modality."""


@dataclass(frozen=True)
class FocalSettings:
    """Settings of the losses."""

    temperature: float = 0.07
    weights: tuple[float, ...] = (1, 1, 3, 5)
    """Weights of PARTS."""
    margin: float = 1
    """Margin of the temporal part."""
    no_private: bool = False
    """Ablation: the shared part compares whole features instead of their shared halves."""


def projector(width_in: int, width: int) -> nn.Sequential:
    """Projects a modality's features for the comparison."""
    return nn.Sequential(nn.Linear(width_in, width), nn.ReLU(), nn.Linear(width, width))


def focal_parts(views: Sequence[View], settings: FocalSettings) -> dict[str, Tensor]:
    """The four unweighted parts of the loss, for two views."""
    modalities = list(views[0])
    whole = [[view[name] for name in modalities] for view in views]
    shared, private = ([[x.chunk(2, dim=-1)[half] for x in view] for view in whole] for half in (0, 1))
    compared = whole if settings.no_private else shared
    temperature = settings.temperature
    zero = whole[0][0].new_zeros(())
    return {
        "shared": sum((nt_xent(a, b, temperature) for view in compared for a, b in combinations(view, 2)), zero),
        "private": sum((nt_xent(a, b, temperature) for a, b in zip(*private, strict=True)), zero),
        "orthogonal": sum(
            (
                sum((_overlap(s, p) for s, p in zip(view_shared, view_private, strict=True)), zero)
                + sum((_overlap(p, q) for p, q in combinations(view_private, 2)), zero)
                for view_shared, view_private in zip(shared, private, strict=True)
            ),
            zero,
        ),
        "temporal": sum((_temporal(x, settings.margin) for view in whole for x in view), zero),
    }


def focal_losses(views: Sequence[View], settings: FocalSettings) -> dict[str, Tensor]:
    """The weighted parts; the loss is their sum."""
    parts = focal_parts(views, settings)
    return {name: weight * parts[name] for name, weight in zip(PARTS, settings.weights, strict=True)}


def nt_xent(a_ALd: Tensor, b_ALd: Tensor, temperature: float) -> Tensor:
    """NT-Xent over cosine similarities: cross-entropy of finding the partner, averaged over all samples."""
    A = a_ALd.shape[0]
    both = F.normalize(torch.cat([a_ALd, b_ALd]).transpose(0, 1), dim=-1)  # (L, 2A, d)
    similarity = both @ both.transpose(1, 2) / temperature
    similarity = similarity.masked_fill(torch.eye(2 * A, dtype=torch.bool, device=both.device), float("-inf"))
    partner = torch.arange(2 * A, device=both.device).roll(A).expand(len(both), -1)
    return F.cross_entropy(similarity.flatten(0, 1), partner.flatten())


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1).clamp(min=0).mean()


def _temporal(x_ALd: Tensor, margin: float) -> Tensor:
    """Hinge loss: samples of a subsequence should be nearer to each other than to those of others, by a margin."""
    A, L, _ = x_ALd.shape
    flat = x_ALd.flatten(0, 1)
    squared = (flat[:, None] - flat).square().sum(dim=-1)
    same = squared == 0  # a sample and itself or a copy, where the square root has no finite gradient
    distance = squared.masked_fill(same, 1).sqrt().masked_fill(same, 0)
    summed = distance.view(A, L, A, L).sum(dim=(1, 3))
    within = summed.diagonal() / (L * L - L)
    between = summed / L**2
    hinge = (within[:, None] - between + margin).clamp(min=0)
    return hinge[~torch.eye(A, dtype=torch.bool, device=flat.device)].mean()
