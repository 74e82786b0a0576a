"""MAP, missing-aware prompts: a set of prompts for each missing type (arXiv 2303.03369)."""

from collections.abc import Sequence

from clip.modules.method import Memory, Method, MethodOptions, check_depth, prompts
from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory


class MissingAwarePrompts(Method):
    """m prompts per missing type, tower and block, for each of D blocks (METHOD.md section 8).

    The source has one transformer over both modalities; here each tower has prompts of its own.
    """

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        depth = options.memory_depth
        check_depth(arch, depth, f"memory_depth={depth}")
        self.image_prompts = prompts(depth, 3, options.slots, arch.vision_width)
        self.text_prompts = prompts(depth, 3, options.slots, arch.text_width)


class MapInput(MissingAwarePrompts):
    """Input level: the prompts of a block come in front of what is there and stay, so that the sequence grows."""

    def of_types(self, types: Sequence[int]) -> Memory:
        """Slots by type, to insert before each of D blocks."""
        image, text = self.image_prompts[:, list(types)], self.text_prompts[:, list(types)]
        return Memory(TowerMemory(inserted_BmD=list(image)), TowerMemory(inserted_BmD=list(text)))


class MapAttention(MissingAwarePrompts):
    """Attention level: half of the prompts are keys, the other half values, which all positions of a block see.

    Raises:
        ValueError: the number of prompts is odd.
    """

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        if options.slots % 2:
            raise ValueError(
                f"map_attention splits its {options.slots} prompts into keys and values: "
                f"memory_length must be a multiple of 6, found {options.memory_length}"
            )
        super().__init__(arch, options)

    def of_types(self, types: Sequence[int]) -> Memory:
        """Keys and values by type, ahead of each of D blocks."""
        image, text = (
            # (D, 3, m, width) to D tensors (N, m / 2, 2 width)
            list(slots[:, list(types)].unflatten(2, (2, -1)).transpose(2, 3).flatten(3))
            for slots in (self.image_prompts, self.text_prompts)
        )
        return Memory(TowerMemory(prefixed_BP2D=image), TowerMemory(prefixed_BP2D=text))
