"""REP's memory learner for text, audio and vision, as defined by this project (docs/vla.md section 4).

Neither code nor equations are published for it. The slots are those of REP on CLIP, for three towers.

Shape suffixes: B samples, R samples or missing types, m slots of one group, w width of a tower.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import (
    DYNAMIC_STD,
    RDN,
    RESIDUAL_ALPHA,
    LayerReplay,
    chained,
    decoupling_loss,
    replays,
    rows_to_compute,
)
from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import METHOD, UNUSED, Method, MethodOptions, check_depth, excluding
from vilt.missing_types import is_missing
from vla.backbone import LETTERS, POOLER
from vla.encoder import Attention

TYPES = 7
MODE_OF_TYPE = (6, 2, 1, 5, 0, 4, 3)
"""The number that published files and tables use for each missing type (see `vilt/missing_types.py`)."""


class VlaMemoryLearner(Method):
    """Private slots for each layer of the memory depth, and shared and dynamic slots for the first layer."""

    attribute = "memory_learner"
    identity_at_init = ("replay_", "dynamic_common_token_net.")

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, w, depth, steps = options.slots, embed_dim, options.memory_depth, options.replay_depth
        check_depth(places, depth, steps)
        rdn = options.rdn_hidden
        for letter in LETTERS.values():
            start = F.normalize(torch.randn(2, m, w), dim=-1)
            self.register_parameter(f"memory_start_{letter}", nn.Parameter(start))
            queries = DYNAMIC_STD * torch.randn(TYPES, m, w)
            self.register_parameter(f"dynamic_queries_{letter}", nn.Parameter(queries))
            self.add_module(f"attn_memory_{letter}", Attention(w, heads=1, dropout=0))
            projections = nn.ModuleList(RDN(3 * w, w, rdn) for _ in range(depth))
            self.add_module(f"compound_memory_projections_{letter}", projections)
            self.add_module(f"layernorm_{letter}", nn.ModuleList(nn.LayerNorm(3 * w) for _ in range(depth)))
            self.add_module(f"common_memory_projection_{letter}", RDN(w, w, rdn))
            if steps:
                self.add_module(f"replay_{letter}", LayerReplay(w, depth, steps))
        common = F.normalize(torch.randn(TYPES, m, w), dim=-1) + 0.2 * torch.randn(TYPES, m, w)
        self.common_memory = nn.Parameter(common)
        self.residual_alpha = nn.Parameter(torch.tensor(RESIDUAL_ALPHA))
        if options.dynamic_init:
            self.dynamic_common_token_net = RDN(3 * w, w, rdn)
            self.dynamic_common_token_net.start_at_zero()

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The slots of every sample; in evaluation, private ones are computed once for each missing type."""
        type_R, row_B = rows_to_compute(batch, self.training)
        mode_B = torch.tensor(MODE_OF_TYPE, device=type_R.device)[batch.missing_type_B]
        start = {}
        for name, letter in LETTERS.items():
            lacking = is_missing(LETTERS, name, type_R).long() if self.options.fmb else torch.zeros_like(type_R)
            start[letter] = self.get_parameter(f"memory_start_{letter}")[lacking]
        private = chained(self, start, self.residual_alpha if self.options.far else None)
        common_Bmw = self.common_memory[mode_B]
        if self.options.dynamic_init:
            has = zip(LETTERS, batch.present_BM.T, strict=True)
            mean = [tokens[name].mean(dim=1) * has_B[:, None] for name, has_B in has]
            common_Bmw = common_Bmw + self.dynamic_common_token_net(torch.cat(mean, dim=-1))[:, None]
        found = {}
        for name, letter in LETTERS.items():
            project = self.get_submodule(f"common_memory_projection_{letter}")
            queries_Bmw = self.get_parameter(f"dynamic_queries_{letter}")[mode_B]
            found[name] = TowerSlots(
                [slots_Rmw[row_B] for slots_Rmw in private[letter]],
                [project(common_Bmw)] if self.options.fmb else [],
                self.get_submodule(f"attn_memory_{letter}")(queries_Bmw, tokens[name]),
                replay=replays(self, f"replay_{letter}"),
            )
        return found

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss that decouples private from shared slots, over layers and towers."""
        return decoupling_loss(slots, self.options.decoupling_weight)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The learner, and the parameters that the options leave unused."""
        unused = [] if self.options.far else [self.residual_alpha]
        if not self.options.fmb:
            unused.append(self.common_memory)
            for letter in LETTERS.values():
                unused += self.get_submodule(f"common_memory_projection_{letter}").parameters()
        return {METHOD: excluding(self.parameters(), unused), UNUSED: unused}

    def trains(self, task: str) -> tuple[str, ...]:
        """The learner, and with `train_pooler` also the pooler."""
        return (METHOD, POOLER) if self.options.train_pooler else (METHOD,)
