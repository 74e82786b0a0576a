"""Heads: from joint features to logits (METHOD.md sections 4 and 8).

Shape suffixes: B batch, M the two modalities, E joint embedding width, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_STD = 0.02
SCALE = 32.0
MARGIN = 0.1
"""In radians, between a sample and the prototype of a class that it has."""


class LinearHead(nn.Linear):
    """The published head: one linear layer, which does not look at what is missing."""

    def __init__(self, embed_dim: int, n_classes: int) -> None:
        super().__init__(2 * embed_dim, n_classes)
        nn.init.normal_(self.weight, std=HEAD_STD)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, features_B2E: Tensor, missing_type_B: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C)."""
        return super().forward(features_B2E)


class PrototypeHead(nn.Module):
    """The head of DPL (arXiv 2505.08283): a prototype per missing type, modality and class.

    A modality's logits are scaled cosines between its feature and the prototypes, those of the modalities are added,
    and a missing modality adds nothing. In training the angle to the classes that a sample has is widened by a margin.
    """

    def __init__(self, embed_dim: int, n_classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(HEAD_STD * torch.randn(3, 2, n_classes, embed_dim))

    def forward(self, features_B2E: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C); with labels (B, C) of 0 and 1, or (B,) class numbers, those of training."""
        features_BME = F.normalize(features_B2E.unflatten(-1, (2, -1)), dim=-1)
        prototypes_BMCE = F.normalize(self.prototypes, dim=-1)[missing_type_B]
        cosine_BMC = torch.einsum("bme,bmce->bmc", features_BME, prototypes_BMCE.to(features_BME.dtype))
        if labels is not None:
            cosine_BMC = _with_margin(cosine_BMC, labels, there_BM1=features_BME.any(dim=-1, keepdim=True))
        return SCALE * cosine_BMC.sum(dim=1)


def _with_margin(cosine_BMC: Tensor, labels: Tensor, there_BM1: Tensor) -> Tensor:
    """cos(angle + margin) for the right classes of the modalities that are there, the cosine for the others."""
    C = cosine_BMC.shape[-1]
    right_BC = F.one_hot(labels, C).bool() if labels.ndim == 1 else labels.bool()
    cosine = cosine_BMC.clamp(-1 + 1e-6, 1 - 1e-6)  # where the sine has a slope
    widened_BMC = cosine * math.cos(MARGIN) - (1 - cosine.square()).sqrt() * math.sin(MARGIN)
    return torch.where(right_BC[:, None] & there_BM1, widened_BMC, cosine_BMC)


HEADS: dict[str, type[LinearHead] | type[PrototypeHead]] = {"linear": LinearHead, "prototype": PrototypeHead}
