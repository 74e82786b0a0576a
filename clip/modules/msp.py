"""MSP, modality-specific prompts: a set for each available modality (arXiv 2312.15890)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions, check_depth, prompts

ORTHOGONALITY_WEIGHT = 0.15


class ModalitySpecificPrompts(Method):
    """m prompts for each modality in each tower and each of D blocks (docs/method.md section 8).

    A sample gets the sum of its modalities' prompts, which replaces the prompts of the block before. A loss on the
    cosine between the two sets keeps them apart.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        depth = options.memory_depth
        check_depth(places, depth)
        for name, place in places.items():  # (D, M, m, width): a set for each modality in each tower
            self.register_parameter(f"{name}_prompts", prompts(depth, len(places), options.slots, place.width))

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The sum of the prompts for the modalities that each sample has."""
        slots = {}
        for name in self.places:
            prompts_DMmW = self.get_parameter(f"{name}_prompts")
            slots_DBmW = torch.einsum("bk,dkmw->dbmw", batch.present_BM.to(prompts_DMmW.dtype), prompts_DMmW)
            slots[name] = TowerSlots(list(slots_DBmW))
        return slots

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The mean absolute cosine between the two sets, over towers and blocks."""
        cosines = []
        for name in self.places:
            first_DmW, second_DmW = self.get_parameter(f"{name}_prompts").unbind(1)
            cosines.append(F.cosine_similarity(first_DmW.flatten(1), second_DmW.flatten(1), dim=-1).abs())
        return {"orthogonality": ORTHOGONALITY_WEIGHT * torch.stack(cosines).mean()}
