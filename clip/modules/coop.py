"""CoOp: learned context in front of the input, the same for all samples (arXiv 2109.01134)."""

from collections.abc import Sequence

from clip.modules.method import Memory, Method, MethodOptions, prompts
from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory


class CoOp(Method):
    """m prompts in front of the first block of each tower, blind to the missing type (METHOD.md section 8).

    The source prompts the text tower of a zero-shot classifier; here both towers get prompts, and a head classifies.
    """

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        self.image_prompts = prompts(options.slots, arch.vision_width)
        self.text_prompts = prompts(options.slots, arch.text_width)

    def of_types(self, types: Sequence[int]) -> Memory:
        """The same slots for every type."""
        image_NmD, text_NmD = (slots.expand(len(types), -1, -1) for slots in (self.image_prompts, self.text_prompts))
        return Memory(TowerMemory(inserted_BmD=[image_NmD]), TowerMemory(inserted_BmD=[text_NmD]))
