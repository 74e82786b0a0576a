"""MAP, missing-aware prompts: a set of prompts for each missing type (arXiv 2303.03369)."""

from collections.abc import Mapping

from torch import Tensor

from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions, check_depth, prompts


class MissingAwarePrompts(Method):
    """m prompts for each missing type, in each tower and each of D blocks (docs/method.md section 8).

    The source has one transformer for both modalities; here each tower has prompts of its own.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        depth, types = options.memory_depth, 2 ** len(places) - 1
        check_depth(places, depth)
        for name, place in places.items():
            self.register_parameter(f"{name}_prompts", prompts(depth, types, options.slots, place.width))

    def prompts_of(self, batch: ModelInput) -> dict[str, Tensor]:
        """The prompts (D, B, m, width) for each sample's missing type, keyed by modality."""
        return {name: self.get_parameter(f"{name}_prompts")[:, batch.missing_type_B] for name in self.places}


class MapInput(MissingAwarePrompts):
    """Input level: the prompts of a block are put in front of its input and stay there, so the sequence grows."""

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Slots to insert before each of D blocks."""
        return {name: TowerSlots(inserted_BmD=list(slots)) for name, slots in self.prompts_of(batch).items()}


class MapAttention(MissingAwarePrompts):
    """Attention level: half of the prompts are keys and half are values, which all positions of a block attend to.

    Raises:
        ValueError: the number of prompts is odd.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        if options.slots % 2:
            raise ValueError(
                f"map_attention splits its {options.slots} prompts into keys and values: "
                f"memory_length must be a multiple of 6, found {options.memory_length}"
            )
        super().__init__(places, embed_dim, options)

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """A prefix of keys and values for each of D blocks: D tensors (B, m / 2, 2 width)."""
        return {
            name: TowerSlots(prefix_BP2D=list(slots.unflatten(2, (2, -1)).transpose(2, 3).flatten(3)))
            for name, slots in self.prompts_of(batch).items()
        }
