"""CoOp: a learned context in front of the input, the same for all samples (arXiv 2109.01134)."""

from collections.abc import Mapping

from torch import Tensor

from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions, prompts


class CoOp(Method):
    """m prompts before the first block of each tower, independent of the missing type (docs/method.md section 8).

    The source prompts the text tower of a zero-shot classifier; here both towers get prompts and a head classifies.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        for name, place in places.items():
            self.register_parameter(f"{name}_prompts", prompts(options.slots, place.width))

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The same slots for every sample."""
        slots = {name: self.get_parameter(f"{name}_prompts") for name in self.places}
        return {name: TowerSlots(inserted_BmD=[x.expand(len(batch.present_BM), -1, -1)]) for name, x in slots.items()}
