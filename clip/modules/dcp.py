"""DCP, deep correlated prompting: the method that REP grew out of (METHOD.md section 8)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import BUFFER_OF_TYPE
from clip.modules.method import Memory, Method, MethodOptions, check_depth, prompts
from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory

BOTTLENECK = 16


class DeepCorrelatedPrompts(Method):
    """Private prompts that follow from those of the layer before, shared ones and dynamic ones.

    Parameter names are those of published checkpoints.
    """

    dynamic_names = ("attn_prompt", ("prompts_dynamic_complete", "prompts_dynamic_image", "prompts_dynamic_text"))
    trains_towers_on = frozenset({"mmimdb", "food101", "hatememes", "custom"})

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        m, depth = options.slots, options.memory_depth
        check_depth(arch, depth, f"memory_depth={depth}")
        d_v, d_t, E = arch.vision_width, arch.text_width, arch.embed_dim
        self.visual_prompt_complete, self.visual_prompt_missing = prompts(m, d_v), prompts(m, d_v)
        self.text_prompt_complete, self.text_prompt_missing = prompts(m, d_t), prompts(m, d_t)
        for available in ("complete", "image", "text"):
            self.register_parameter(f"common_prompt_{available}", prompts(m, E))
        self.compound_prompt_projections_text = nn.ModuleList(_bottleneck(d_v + d_t, d_t) for _ in range(depth))
        self.compound_prompt_projections_image = nn.ModuleList(_bottleneck(d_v + d_t, d_v) for _ in range(depth))
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.common_prompt_projection_image = _bottleneck(E, d_v)
        self.common_prompt_projection_text = _bottleneck(E, d_t)

    def of_types(self, types: Sequence[int]) -> Memory:
        """Private prompts of each layer and shared ones of the first, by type."""
        visual_NmD, text_NmD, common_NmE = (self._start(part, types) for part in ("visual", "text", "common"))
        image, text = [], []
        layers = zip(
            self.compound_prompt_projections_image,
            self.layernorm_image,
            self.compound_prompt_projections_text,
            self.layernorm_text,
            strict=True,
        )
        for project_image, norm_image, project_text, norm_text in layers:
            pair_NmV = torch.cat([visual_NmD, text_NmD], dim=-1)
            visual_NmD = project_image(norm_image(pair_NmV)).to(pair_NmV.dtype)
            text_NmD = project_text(norm_text(pair_NmV)).to(pair_NmV.dtype)
            image.append(visual_NmD)
            text.append(text_NmD)
        shared_image = self.common_prompt_projection_image(common_NmE).to(common_NmE.dtype)
        shared_text = self.common_prompt_projection_text(common_NmE).to(common_NmE.dtype)
        return Memory(TowerMemory(image, [shared_image]), TowerMemory(text, [shared_text]))

    def _start(self, part: str, types: Sequence[int]) -> Tensor:
        return torch.stack([self.get_parameter(f"{part}_prompt_{BUFFER_OF_TYPE[part][t]}") for t in types])


def _bottleneck(width_in: int, width_out: int) -> nn.Sequential:
    hidden = width_in // BOTTLENECK
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))
