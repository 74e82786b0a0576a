"""Heads, which map features to logits (docs/method.md sections 4 and 8).

Shape suffixes: B samples, P parts of the features, E width of a part, C classes, T missing types.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clip.modules.method import MethodOptions

HEAD_STD = 0.02


class Head(nn.Module):
    """Base class of heads. To add one, write a subclass and a line in `clip/modules/registry.py`.

    Args:
        parts: number of parts P; features are (B, PE).

    Raises:
        ValueError: the head does not support this number of parts, or its options do not fit.
    """

    trains_ends: ClassVar[bool] = False
    """Whether the backbone's layers after the last blocks are trained, whatever the method (see `train_ends`)."""
    logit_scale: ClassVar[float] = 1.0
    """Factor that turns the head's logits into those of the probabilities that its training fits."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__()

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C) for features (B, PE). Labels, 0 and 1 (B, C) or class indices (B,), are given in training."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """The head's own weighted losses in training, keyed by the name they are logged under (`train/NAME`)."""
        return {}

    def trained_on(self, missing_type: str) -> None:
        """Called before training with its `missing_type` option."""


class LinearHead(Head):
    """The published head: one linear layer on the joined features, independent of the missing type."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes, options)
        linear = nn.Linear(parts * embed_dim, n_classes)  # draws from the generator first, as published
        self.weight, self.bias = linear.weight, linear.bias
        nn.init.normal_(self.weight, std=HEAD_STD)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Resets to PyTorch's default initialisation, see `Backbone.plain_head`."""
        linear = nn.Linear(self.weight.shape[1], len(self.bias))
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C)."""
        return nn.functional.linear(features, self.weight, self.bias)


class LinearByType(Head):
    """One linear layer for each missing type, the comparison without prompts in DPL's code."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes, options)
        self.weight = nn.Parameter(HEAD_STD * torch.randn(2**parts - 1, n_classes, parts * embed_dim))
        self.bias = nn.Parameter(torch.zeros(2**parts - 1, n_classes))

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C)."""
        logits_BTC = torch.einsum("be,tce->btc", features, self.weight) + self.bias
        return logits_BTC[torch.arange(len(features), device=features.device), missing_type_B]
