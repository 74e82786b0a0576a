"""SyP, synergistic prompts (arXiv 2507.07802; docs/method.md section 8). No code is published; this is our definition.

Shape suffixes: B samples, T missing types, m prompts, D width of a tower, E joint width, V widths of both towers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import mean_tokens
from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions, check_depth, prompts

BOTTLENECK = 16


class SynergisticPrompts(Method):
    """Prompts for each missing type, scaled per channel by the sample, plus static prompts that both towers share.

    Deeper blocks' prompts are computed from those of both towers in the block before. In each of D blocks,
    `memory_length` prompts replace those of the block before.
    """

    per_sample = True

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, D, types = options.memory_length, options.memory_depth, 2 ** len(places) - 1
        check_depth(places, D)
        V = sum(place.width for place in places.values())
        self.static_prompts = prompts(m, embed_dim)
        self.scale = nn.Sequential(nn.Linear(V, V // BOTTLENECK), nn.ReLU(), nn.Linear(V // BOTTLENECK, V))
        self.static, self.deeper = nn.ModuleDict(), nn.ModuleDict()
        for name, place in places.items():
            self.register_parameter(f"{name}_prompts", prompts(types, m, place.width))
            self.static[name] = nn.Linear(embed_dim, place.width)
            self.deeper[name] = nn.ModuleList(_deeper(V, place.width) for _ in range(D - 1))

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Each sample's prompts for every block, which replace those of the block before."""
        scale_BV = self.scale(mean_tokens(batch, tokens, self.places)).sigmoid()
        scales = scale_BV.split([place.width for place in self.places.values()], dim=1)
        slots_BmD = {
            name: self.get_parameter(f"{name}_prompts")[batch.missing_type_B] * scale_BD[:, None]
            + self.static[name](self.static_prompts)
            for name, scale_BD in zip(self.places, scales, strict=True)
        }
        per_block = {name: [x_BmD] for name, x_BmD in slots_BmD.items()}
        for k in range(self.options.memory_depth - 1):
            pair_BmV = torch.cat([*slots_BmD.values()], dim=-1)
            slots_BmD = {name: self.get_submodule(f"deeper.{name}.{k}")(pair_BmV) for name in self.places}
            for name, x_BmD in slots_BmD.items():
                per_block[name].append(x_BmD)
        return {name: TowerSlots(slots) for name, slots in per_block.items()}


def _deeper(width_in: int, width_out: int) -> nn.Sequential:
    hidden = width_in // BOTTLENECK
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out), nn.LayerNorm(width_out))
