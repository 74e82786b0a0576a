"""Heads: from features to logits (docs/method.md sections 4 and 8).

Shape suffixes: B samples, P parts of what is classified, E width of a modality's features, C classes, T missing types.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clip.modules.method import MethodOptions

HEAD_STD = 0.02


class Head(nn.Module):
    """A head. A new one is a subclass and a line in `clip/modules/registry.py`.

    Args:
        parts: P; features are (B, PE).

    Raises:
        ValueError: it is not for this many parts, or its options do not fit.
    """

    trains_ends: ClassVar[bool] = False
    """Whether it trains what follows the last blocks of the backbone, whatever the method (see `train_ends`)."""
    logit_scale: ClassVar[float] = 1.0
    """Factor on its logits that makes them those of the probabilities that its training fits."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__()

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C) of features (B, PE); in training with labels (B, C) of 0 and 1, or (B,) class numbers."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Its own losses in training, weighted, by the names that they are logged under (`train/NAME`)."""
        return {}

    def trained_on(self, missing_type: str) -> None:
        """Called before a training with the missing type of its samples, as the option names it."""


class LinearHead(Head):
    """The published head: one linear layer of the joined features, blind to the missing type."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes, options)
        linear = nn.Linear(parts * embed_dim, n_classes)  # draws, as published, before the weights are drawn
        self.weight, self.bias = linear.weight, linear.bias
        nn.init.normal_(self.weight, std=HEAD_STD)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """PyTorch's own start values, see `Backbone.plain_head`."""
        linear = nn.Linear(self.weight.shape[1], len(self.bias))
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C)."""
        return nn.functional.linear(features, self.weight, self.bias)


class LinearByType(Head):
    """A linear layer for each missing type, as DPL's code without prompts has for comparison."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes, options)
        self.weight = nn.Parameter(HEAD_STD * torch.randn(2**parts - 1, n_classes, parts * embed_dim))
        self.bias = nn.Parameter(torch.zeros(2**parts - 1, n_classes))

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C)."""
        logits_BTC = torch.einsum("be,tce->btc", features, self.weight) + self.bias
        return logits_BTC[torch.arange(len(features), device=features.device), missing_type_B]
