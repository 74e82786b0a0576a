"""The classifier: a frozen backbone with a method's slots, and a head (docs/method.md sections 3, 4 and 8).

Shape suffixes: B samples, b samples with a modality, L sequence, D width of a tower, E width of a modality's features,
C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip.modules.heads import Head
from clip.modules.interfaces import Backbone, ModelInput, TowerSlots
from clip.modules.method import Method
from clip.modules.neighbours import Neighbours


def pooled(features: Mapping[str, Tensor], windows_BW: Tensor | None) -> dict[str, Tensor]:
    """Pools features per window into features per sample: mean and maximum (B, 2E) for texts; others (B, E) are kept.

    Args:
        windows_BW: see `ModelInput`; None if each sample has one window.
    """
    found = {}
    for name, feature_VE in features.items():
        rows_BW = torch.arange(len(feature_VE), device=feature_VE.device)[:, None] if windows_BW is None else windows_BW
        if name != "text":
            found[name] = feature_VE[rows_BW[:, 0]]
            continue
        exists_BW1, feature_BWE = (rows_BW >= 0)[..., None], feature_VE[rows_BW.clamp(min=0)]
        mean_BE = feature_BWE.where(exists_BW1, 0).sum(dim=1) / exists_BW1.sum(dim=1)
        found[name] = torch.cat([mean_BE, feature_BWE.where(exists_BW1, -torch.inf).amax(dim=1)], dim=-1)
    return found


class MissingModalityClassifier(nn.Module):
    """Computes, in this order, tokens, slots, features of each modality, and logits.

    State names are those of published checkpoints except for the dynamic slots (see `engine/checkpoint.py`): `model.…`
    is the backbone, `model.memory_learner.…` REP's learner inside it, `mmimdb_classifier.…` the head.

    Args:
        head_name: attribute of the head, for example `mmimdb_classifier`.
        head: maps features and missing types (in training also labels) to logits.
        neighbours: adds to features and logits what the nearest training samples contribute.
    """

    def __init__(
        self, backbone: Backbone, method: Method, head_name: str, head: Head, neighbours: Neighbours | None = None
    ) -> None:
        super().__init__()
        self.model = backbone
        self.model.add_module(method.attribute, method)
        self.add_module(head_name, head)
        self.neighbours = neighbours
        self._method_name, self.head_name = method.attribute, head_name

    @property
    def method(self) -> Method:
        """The method, which provides the slots."""
        method = self.model.get_submodule(self._method_name)
        assert isinstance(method, Method)
        return method

    @property
    def head(self) -> Head:
        """The head, which classifies."""
        head = self.get_submodule(self.head_name)
        assert isinstance(head, Head)
        return head

    def forward(self, batch: ModelInput) -> Tensor:
        """Logits (B, C) in full precision."""
        features, _ = self.features(batch)
        return self._logits(features, batch.joined())

    def training_outputs(self, batch: ModelInput, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) for the task's loss, and the losses that method and head add, keyed by name.

        Args:
            labels: 0 and 1 (B, C), or class indices (B,); some heads lower the logits of the right classes by a margin.
        """
        features, slots = self.features(batch)
        logits_BC = self._logits(features, batch.joined(), labels)
        return logits_BC, {**self.method.losses(slots, features, logits_BC, labels), **self.head.losses()}

    def _logits(self, features: dict[str, Tensor], batch: ModelInput, labels: Tensor | None = None) -> Tensor:
        fused, votes_BC = self.fused(features, batch)
        with torch.autocast(fused.device.type, enabled=False):  # 16-bit logits would tie: they round to 0.4 %
            fused = fused.to(torch.promote_types(fused.dtype, torch.float32))
            logits_BC: Tensor = self.head(fused, batch.missing_type_B, labels)
        return logits_BC + votes_BC

    def fused(self, features: dict[str, Tensor], batch: ModelInput) -> tuple[Tensor, Tensor | float]:
        """The head's input, and what neighbours add to its logits."""
        votes_BC: Tensor | float = 0
        if self.neighbours is not None:
            features, votes_BC = self.neighbours(features, batch)
        return self.model.fuse(features, batch.present_BM), votes_BC

    def features(self, batch: ModelInput) -> tuple[dict[str, Tensor], dict[str, TowerSlots]]:
        """Features (B, E) and slots, both keyed by modality."""
        if self.method.per_sample or self.model.mixes:
            batch = batch.with_own_inputs()
        if (blanks := self.method.blanks) is not None:
            batch = self.model.complete(batch, blanks, once=not self.training and not self.method.per_sample)
        batch = self.model.prepare(batch)
        adapted = self.method.adapt(batch, self.model.embed(batch))
        tokens = self.model.mix(batch, adapted, padded=not self.method.generates_missing)
        slots = self.method(batch, tokens)
        features = self.method.encode(self.model, batch, tokens, slots)
        if self.method.options.mask_readout:
            has = zip(features.items(), batch.present_BM.unbind(dim=1), strict=True)
            features = {name: feature_BE * has_B[:, None] for (name, feature_BE), has_B in has}
        if self.method.options.text_windows > 1:
            features = pooled(features, batch.windows_BW)
        return features, slots

    def pretraining_losses(self, batch: ModelInput) -> dict[str, Tensor]:
        """Losses of a method in PRETRAINING, keyed by name."""
        return self.method.pretraining_losses(self.model, batch)

    def decays(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether weight decay applies to a trained parameter; None: the published rule, by name, decides."""
        return True if self.method.decays_all else self.model.decays(name, parameter)

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """Sets how the backbone computes, see `Backbone.compute`."""
        self.model.compute(dtype, checkpointing=checkpointing)
