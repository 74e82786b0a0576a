"""The backbones: a tower for each modality, under the names of published checkpoints, and the fusion of features.

Shape suffixes: B samples, M modalities, E width of features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip.modules.interfaces import Backbone, Tower
from sensors.deepsense import DeepSenseTower
from sensors.sizes import SWT, SensorSizes
from sensors.swt import DROPOUT, SwtTower

SLOTS = (".private_memory_", ".common_memory.", ".memories_dynamic.")
PATCHES = "patch embedding"
TOWERS = "towers"
FUSION = "fusion"
UNUSED_EMBEDDING = "position embedding, unused"


class Fusion(nn.Module):
    """Attention over the present modalities' features, with their mean as the query."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mha = nn.MultiheadAttention(width, heads, DROPOUT, batch_first=True)

    def forward(self, features_BME: Tensor, present_BM: Tensor) -> Tensor:
        """The fused feature (B, E)."""
        x_BME = self.norm1(features_BME)
        present_BM1 = present_BM[..., None].to(x_BME.dtype)
        query_B1E = (x_BME * present_BM1).sum(dim=1, keepdim=True) / present_BM1.sum(dim=1, keepdim=True)
        fused_B1E, _ = self.mha(query_B1E, x_BME, x_BME, key_padding_mask=~present_BM, need_weights=False)
        fused: Tensor = fused_B1E[:, 0]
        return fused


class SensorBackbone(Backbone):
    """Towers for one location, which are not run where their modality is missing."""

    plain_head = True

    def __init__(self, sizes: SensorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self._towers: dict[str, SwtTower | DeepSenseTower] = {}
        """Not submodules: their parts are, grouped by kind as in published checkpoints."""

    @property
    def towers(self) -> dict[str, Tower]:
        return dict(self._towers)

    def train(self, mode: bool = True) -> "SensorBackbone":
        """Keeps frozen parts in evaluation mode, without dropout and with fixed statistics."""
        super().train(mode)
        for part in self.children():
            for module in part.modules() if mode else ():
                own = list(module.parameters())
                if own and not any(parameter.requires_grad for parameter in own):
                    module.eval()
        return self

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        for tower in self._towers.values():
            tower.dtype, tower.checkpointing = dtype, checkpointing

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: not to biases, norms, slots and scalars."""
        return parameter.ndim > 1 and not any(slots in name for slots in SLOTS)

    def _by_name(self, parts: Mapping[str, nn.Module | nn.Parameter]) -> nn.Module:
        """Parts keyed by modality, under the names that checkpoints have: `location.modality`."""
        inner: nn.Module
        if all(isinstance(part, nn.Parameter) for part in parts.values()):
            inner = nn.ParameterDict(parts)
        else:
            inner = nn.ModuleDict(parts)  # type: ignore[arg-type]
        return nn.ModuleDict({self.sizes.location: inner})


class SwtBackbone(SensorBackbone):
    """SW-Transformers, with features joined by attention."""

    always_trained = (FUSION,)

    def __init__(self, sizes: SensorSizes) -> None:
        super().__init__(sizes)
        towers = {modality: SwtTower(sizes, modality) for modality in sizes.modalities}
        self._towers.update(towers)
        self.places = {modality: tower.place for modality, tower in towers.items()}
        self.embed_dim = sizes.feature_width
        self.patch_embed = self._by_name({name: tower.patch_embed for name, tower in towers.items()})
        self.absolute_pos_embed = self._by_name({name: tower.absolute_pos_embed for name, tower in towers.items()})
        self.freq_interval_layers = self._by_name({name: tower.stages for name, tower in towers.items()})
        self.mod_in_layers = self._by_name({name: tower.in_layer for name, tower in towers.items()})
        self.mod_fusion_layers = Fusion(sizes.feature_width, sizes.heads)

    @property
    def fused_parts(self) -> int:
        return 1

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        """The fused feature (B, E), the only part of the head's input."""
        fused: Tensor = self.mod_fusion_layers(torch.stack([features[name] for name in self.places], 1), present_BM)
        return fused

    def parts(self) -> dict[str, list[nn.Parameter]]:
        towers = [*self.freq_interval_layers.parameters(), *self.mod_in_layers.parameters()]
        patches = [*self.patch_embed.parameters()]
        trained, frozen = (patches, []) if self.sizes.train_patch_embed else ([], patches)
        return {
            PATCHES: frozen,
            TOWERS: [*trained, *towers],
            UNUSED_EMBEDDING: [*self.absolute_pos_embed.parameters()],
            FUSION: [*self.mod_fusion_layers.parameters()],
        }


class DeepSenseBackbone(SensorBackbone):
    """DeepSense, with features concatenated, zeros for missing ones."""

    def __init__(self, sizes: SensorSizes) -> None:
        super().__init__(sizes)
        towers = {modality: DeepSenseTower(sizes, modality) for modality in sizes.modalities}
        self._towers.update(towers)
        self.places = {modality: tower.place for modality, tower in towers.items()}
        self.embed_dim = 2 * sizes.recurrent_width
        self.loc_mod_extractors = self._by_name({name: tower.extractor for name, tower in towers.items()})
        self.recurrent_layers = nn.ModuleDict({name: tower.recurrence for name, tower in towers.items()})

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {TOWERS: [*self.loc_mod_extractors.parameters(), *self.recurrent_layers.parameters()]}


def build(sizes: SensorSizes) -> SensorBackbone:
    """A backbone with random weights. Raises ValueError if the sizes do not fit each other."""
    return SwtBackbone(sizes) if sizes.network == SWT else DeepSenseBackbone(sizes)


def is_unused_entry(name: str) -> bool:
    """Whether an entry of a published checkpoint is derived from sizes, only for several locations, or never read."""
    endings = (".num_batches_tracked", ".relative_position_index", ".attn_mask")
    return name.endswith(endings) or name.startswith("mod_extractors.")
