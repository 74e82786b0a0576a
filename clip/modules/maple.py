"""MaPLe: text prompts in several blocks, and image prompts computed from them (arXiv 2210.03117)."""

from collections.abc import Mapping

from torch import Tensor, nn

from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions, check_depth, prompts


class MaPLe(Method):
    """m text prompts for each of D blocks; the image prompts are a linear map of them (docs/method.md section 8).

    Both replace those of the block before and are independent of the missing type. In the source the text prompts come
    after the start token; here they come first.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        depth, d_v, d_t = options.memory_depth, places["image"].width, places["text"].width
        check_depth(places, depth)
        self.text_prompts = prompts(depth, options.slots, d_t)
        self.image_projections = nn.ModuleList(nn.Linear(d_t, d_v) for _ in range(depth))

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The same slots for every sample."""
        B = len(batch.present_BM)
        text = [prompts_mD.expand(B, -1, -1) for prompts_mD in self.text_prompts]
        image = [
            project(prompts_mD).expand(B, -1, -1)
            for project, prompts_mD in zip(self.image_projections, self.text_prompts, strict=True)
        ]
        return {"image": TowerSlots(image), "text": TowerSlots(text)}
