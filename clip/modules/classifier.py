"""The classifier: a frozen backbone, a method's slots in it, and a head (docs/method.md sections 3, 4 and 8).

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
    """Features by sample of those by window: of texts mean and maximum (B, 2E), of other inputs (B, E) as they are.

    Args:
        windows_BW: see `ModelInput`; None where each sample has one window.
    """
    found = {}
    for name, feature_VE in features.items():
        rows_BW = torch.arange(len(feature_VE), device=feature_VE.device)[:, None] if windows_BW is None else windows_BW
        if name != "text":
            found[name] = feature_VE[rows_BW[:, 0]]
            continue
        there_BW1, feature_BWE = (rows_BW >= 0)[..., None], feature_VE[rows_BW.clamp(min=0)]
        mean_BE = feature_BWE.where(there_BW1, 0).sum(dim=1) / there_BW1.sum(dim=1)
        found[name] = torch.cat([mean_BE, feature_BWE.where(there_BW1, -torch.inf).amax(dim=1)], dim=-1)
    return found


class MissingModalityClassifier(nn.Module):
    """Tokens, slots, features by modality, logits, in this order.

    State names are those of published checkpoints, but for the dynamic slots (see `engine/checkpoint.py`): `model.…`
    the backbone, `model.memory_learner.…` REP's learner in it, `mmimdb_classifier.…` the head.

    Args:
        head_name: attribute of the head, for example `mmimdb_classifier`.
        head: from features and missing types, in training labels too, to logits.
        neighbours: what the nearest training samples add to features and logits.
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
        """What gives the slots."""
        method = self.model.get_submodule(self._method_name)
        assert isinstance(method, Method)
        return method

    @property
    def head(self) -> Head:
        """What classifies."""
        head = self.get_submodule(self.head_name)
        assert isinstance(head, Head)
        return head

    def forward(self, batch: ModelInput) -> Tensor:
        """Logits (B, C), in full precision."""
        features, _ = self.features(batch)
        return self._logits(features, batch.joined())

    def training_outputs(self, batch: ModelInput, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) for the loss of the task, and the own losses of method and head by name.

        Args:
            labels: (B, C) of 0 and 1 or (B,) class numbers; some heads ask more of the right classes.
        """
        features, slots = self.features(batch)
        logits_BC = self._logits(features, batch.joined(), labels)
        return logits_BC, {**self.method.losses(slots, features, logits_BC, labels), **self.head.losses()}

    def _logits(self, features: dict[str, Tensor], batch: ModelInput, labels: Tensor | None = None) -> Tensor:
        fused, votes_BC = self.fused(features, batch)
        with torch.autocast(fused.device.type, enabled=False):  # logits in 16 bits are tied, and rounded to 0.4 %
            fused = fused.to(torch.promote_types(fused.dtype, torch.float32))
            logits_BC: Tensor = self.head(fused, batch.missing_type_B, labels)
        return logits_BC + votes_BC

    def fused(self, features: dict[str, Tensor], batch: ModelInput) -> tuple[Tensor, Tensor | float]:
        """What the head classifies, and what neighbours add to its logits."""
        votes_BC: Tensor | float = 0
        if self.neighbours is not None:
            features, votes_BC = self.neighbours(features, batch)
        return self.model.fuse(features, batch.present_BM), votes_BC

    def features(self, batch: ModelInput) -> tuple[dict[str, Tensor], dict[str, TowerSlots]]:
        """Features (B, E) by modality, and the slots by place."""
        if self.method.per_sample or self.model.mixes:
            batch = batch.with_own_inputs()
        if (blanks := self.method.blanks) is not None:
            batch = self.model.complete(batch, blanks, once=not self.training and not self.method.per_sample)
        batch = self.model.prepare(batch)
        adapted = self.method.adapt(batch, self.model.embed(batch))
        tokens = self.model.mix(batch, adapted, padded=not self.method.fills)
        slots = self.method(batch, tokens)
        features = self.method.encode(self.model, batch, tokens, slots)
        if self.method.options.mask_readout:
            has = zip(features.items(), batch.present_BM.unbind(dim=1), strict=True)
            features = {name: feature_BE * has_B[:, None] for (name, feature_BE), has_B in has}
        if self.method.options.text_windows > 1:
            features = pooled(features, batch.windows_BW)
        return features, slots

    def pretraining_losses(self, batch: ModelInput) -> dict[str, Tensor]:
        """What a method in PRETRAINING minimises, by name."""
        return self.method.pretraining_losses(self.model, batch)

    def decays(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether weight decay is for a trained parameter; None: as the published rule of names says."""
        return True if self.method.decays_all else self.model.decays(name, parameter)

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """Sets how the backbone computes, see `Backbone.compute`."""
        self.model.compute(dtype, checkpointing=checkpointing)
