"""MSP, modality-specific prompts: a set for each modality that is there (arXiv 2312.15890)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.method import Memory, Method, MethodOptions, check_depth, prompts
from clip.modules.vision_transformer_memory import IMAGE_MISSING, TEXT_MISSING, ClipArchitecture, TowerMemory

ORTHOGONALITY_WEIGHT = 0.15


class ModalitySpecificPrompts(Method):
    """m prompts per modality, tower and block, for each of D blocks (METHOD.md section 8).

    A sample with one modality gets that modality's prompts, a complete one the sum of both sets. A loss on the cosine
    between the two sets keeps them apart. They replace those of the block before.
    """

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        depth = options.memory_depth
        check_depth(arch, depth, f"memory_depth={depth}")
        self.image_prompts = prompts(depth, 2, options.slots, arch.vision_width)
        self.text_prompts = prompts(depth, 2, options.slots, arch.text_width)

    def of_types(self, types: Sequence[int]) -> Memory:
        """Slots by type, and in training the loss on the two sets."""
        sets = (self.image_prompts, self.text_prompts)
        image, text = (TowerMemory(replaced_BmD=list(_by_type(prompts_D2mW, types))) for prompts_D2mW in sets)
        penalty = None
        if self.training:
            alike = [F.cosine_similarity(one[:, 0].flatten(1), one[:, 1].flatten(1), dim=-1).abs() for one in sets]
            penalty = ORTHOGONALITY_WEIGHT * torch.stack(alike).mean()
        return Memory(image, text, penalty)


def _by_type(prompts_D2mW: Tensor, types: Sequence[int]) -> Tensor:
    """(D, N, m, W) of (D, 2, m, W), whose sets are for samples that have an image and for those that have a text."""
    for_image, for_text = prompts_D2mW.unbind(1)
    of_type = {TEXT_MISSING: for_image, IMAGE_MISSING: for_text}
    return torch.stack([of_type.get(missing_type, for_image + for_text) for missing_type in types], dim=1)
