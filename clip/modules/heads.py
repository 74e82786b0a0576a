"""Heads: from features to logits (docs/method.md sections 4 and 8).

Shape suffixes: B samples, M modalities, E width of a modality's features, C classes, T missing types.
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
    """The published head: one linear layer of the joined features, blind to the missing type."""

    def __init__(self, modalities: int, embed_dim: int, n_classes: int) -> None:
        super().__init__(modalities * embed_dim, n_classes)
        nn.init.normal_(self.weight, std=HEAD_STD)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C) of features (B, ME)."""
        return super().forward(features)


class PrototypeHead(nn.Module):
    """The head of DPL (arXiv 2505.08283): a prototype per missing type, modality and class.

    A modality's logits are scaled cosines between its feature and the prototypes, those of the modalities are added,
    and a missing modality adds nothing. In training the angle to the classes that a sample has is widened by a margin.
    """

    def __init__(self, modalities: int, embed_dim: int, n_classes: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.prototypes = nn.Parameter(HEAD_STD * torch.randn(2**modalities - 1, modalities, n_classes, embed_dim))

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C) of features (B, ME); with labels (B, C) of 0 and 1, or (B,) class numbers, those of training.

        In full precision: 16 bits round cosines near 1 to 1, where the sine of the margin has no slope.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.prototypes.dtype).unflatten(-1, (self.modalities, -1))
            features_BME = F.normalize(features, dim=-1)
            prototypes_BMCE = F.normalize(self.prototypes, dim=-1)[missing_type_B]
            cosine_BMC = torch.einsum("bme,bmce->bmc", features_BME, prototypes_BMCE)
            if labels is not None:
                cosine_BMC = _with_margin(cosine_BMC, labels, available_BM1=features_BME.any(dim=-1, keepdim=True))
            return SCALE * cosine_BMC.sum(dim=1)


def _with_margin(cosine_BMC: Tensor, labels: Tensor, available_BM1: Tensor) -> Tensor:
    """cos(angle + margin) for the right classes of the available modalities, the cosine for the others."""
    C = cosine_BMC.shape[-1]
    right_BC = F.one_hot(labels, C).bool() if labels.ndim == 1 else labels.bool()
    cosine = cosine_BMC.clamp(-1 + 1e-6, 1 - 1e-6)  # where the sine has a slope
    widened_BMC = cosine * math.cos(MARGIN) - (1 - cosine.square()).sqrt() * math.sin(MARGIN)
    return torch.where(right_BC[:, None] & available_BM1, widened_BMC, cosine_BMC)
