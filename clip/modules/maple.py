"""MaPLe: text prompts in several blocks, and image prompts that follow from them (arXiv 2210.03117)."""

from collections.abc import Sequence

from torch import nn

from clip.modules.method import Memory, Method, MethodOptions, check_depth, prompts
from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory


class MaPLe(Method):
    """m text prompts for each of D blocks; the image prompts are a linear map of them (METHOD.md section 8).

    Both replace those of the block before, and are blind to the missing type. In the source the text prompts stand
    behind the start token; here they come first.
    """

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        depth = options.memory_depth
        check_depth(arch, depth, f"memory_depth={depth}")
        self.text_prompts = prompts(depth, options.slots, arch.text_width)
        self.image_projections = nn.ModuleList(nn.Linear(arch.text_width, arch.vision_width) for _ in range(depth))

    def of_types(self, types: Sequence[int]) -> Memory:
        """The same slots for every type."""
        text, image = [], []
        for prompts_mD, project in zip(self.text_prompts, self.image_projections, strict=True):
            text.append(prompts_mD.expand(len(types), -1, -1))
            image.append(project(prompts_mD).to(prompts_mD.dtype).expand(len(types), -1, -1))
        return Memory(TowerMemory(replaced_BmD=image), TowerMemory(replaced_BmD=text))
