"""DCP, deep correlated prompting, the method that REP builds on (docs/method.md section 8)."""

from collections.abc import Mapping

from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import AVAILABLE, DYNAMIC_ATTENTION, START, DynamicSlots, chained
from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import METHOD, Method, MethodOptions, check_depth, excluding, prompts, select_by_missing_type
from clip.modules.vision_transformer_memory import FINAL

BOTTLENECK = 16


class DeepCorrelatedPrompts(Method):
    """Private prompts computed from those of the layer before, and shared and dynamic prompts.

    Parameter names are those of published checkpoints.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, depth = options.slots, options.memory_depth
        check_depth(places, depth)
        d_v, d_t, E = places["image"].width, places["text"].width, embed_dim
        self.visual_prompt_complete, self.visual_prompt_missing = prompts(m, d_v), prompts(m, d_v)
        self.text_prompt_complete, self.text_prompt_missing = prompts(m, d_t), prompts(m, d_t)
        for available in AVAILABLE:
            self.register_parameter(f"common_prompt_{available}", prompts(m, E))
        self.compound_prompt_projections_text = nn.ModuleList(_bottleneck(d_v + d_t, d_t) for _ in range(depth))
        self.compound_prompt_projections_image = nn.ModuleList(_bottleneck(d_v + d_t, d_v) for _ in range(depth))
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.common_prompt_projection_image = _bottleneck(E, d_v)
        self.common_prompt_projection_text = _bottleneck(E, d_t)
        self.dynamic = nn.ModuleDict({modality: DynamicSlots(place, m) for modality, place in places.items()})

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Private prompts for each layer, and shared and dynamic ones for the first."""
        visual_BmD, text_BmD, common_BmE = (
            select_by_missing_type([self.get_parameter(f"{part}_prompt_{name}") for name in names], batch)
            for part, names in START.items()
        )
        start = {"image": visual_BmD, "text": text_BmD}
        private = chained(self, start, kind="prompt")
        slots = {}
        for tower, read in self.dynamic.items():
            project = self.get_submodule(f"common_prompt_projection_{tower}")
            slots[tower] = TowerSlots(private[tower], [project(common_BmE)], read(batch, tower, tokens))
        return slots

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The prompts, and the attention of the dynamic prompts."""
        dynamic = [*self.dynamic.parameters()]
        return {METHOD: excluding(self.parameters(), dynamic), DYNAMIC_ATTENTION: dynamic}

    def trains(self, task: str) -> tuple[str, ...]:
        """All of the method and the towers' ends, on every task."""
        return (METHOD, DYNAMIC_ATTENTION, FINAL)


def _bottleneck(width_in: int, width_out: int) -> nn.Sequential:
    hidden = width_in // BOTTLENECK
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))
