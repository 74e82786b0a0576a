"""REP's memory learner (METHOD.md sections 2 and 7).

Shape suffixes: B batch, N rows of the learner, L sequence, D width, V widths of both towers together, m slots of one
group, P slots of two groups, E joint embedding width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.method import Memory, Method, MethodOptions, check_depth, row_of_type
from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory

RDN_HIDDEN = 256
RDN_DROPOUT = 0.1
RESIDUAL_ALPHA = 0.5
DYNAMIC_QUERIES = ("memories_dynamic_complete", "memories_dynamic_image", "memories_dynamic_text")
BUFFER_OF_TYPE = {
    "visual": ("complete", "complete", "missing"),
    "text": ("complete", "missing", "complete"),
    "common": ("complete", "image", "text"),
}
"""By missing type (0 complete, 1 text missing, 2 image missing): the slots that the private chains start from and the
slots that both towers share."""


class RDN(nn.Module):
    """Residual bottleneck: fc2(dropout(gelu(layernorm(fc1(x))))) + skip(x)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, RDN_HIDDEN)
        self.fc2 = nn.Linear(RDN_HIDDEN, width_out)
        self.layernorm = nn.LayerNorm(RDN_HIDDEN)
        self.dropout = nn.Dropout(RDN_DROPOUT)
        self.skip = nn.Linear(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x_NmD: Tensor, row_B: Tensor | None = None) -> Tensor:
        """Of the rows as they are, or of the rows `row_B`, each with a dropout mask of its own."""
        hidden, skipped = F.gelu(self.layernorm(self.fc1(x_NmD))), self.skip(x_NmD)
        if row_B is not None:
            hidden, skipped = hidden.index_select(0, row_B), skipped.index_select(0, row_B)
        return self.fc2(self.dropout(hidden)) + skipped


class MemoryLearner(Method):
    """Private and shared slots for each layer of the memory depth.

    Options of METHOD.md section 7, which start as the identity: `replay_depth`, `dynamic_init`, and the loss of
    `decoupling_weight`. For ablations: without `far` a layer's private slots are the projection alone; without `fmb`
    all missing types start from the same private slots, and there are no shared ones.

    Raises:
        ValueError: the sizes do not fit each other or the backbone, or an option needs another one.
    """

    attribute = "memory_learner"
    dynamic_names = ("attn_memory", DYNAMIC_QUERIES)
    trains_towers_on = frozenset({"hatememes"})
    start_as_nothing = ("replay_image.", "replay_text.", "dynamic_common_token_net.")

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__(arch, options)
        m, depth = options.slots, options.memory_depth
        if depth < 1:
            raise ValueError(f"memory_depth must be at least 1, found {depth}")
        check_depth(arch, depth, f"memory_depth={depth}")
        steps = options.replay_depth
        check_depth(arch, depth + steps, f"memory_depth={depth} with replay_depth={steps}")
        self.options = options
        self.reads_input = options.dynamic_init
        d_v, d_t, E = arch.vision_width, arch.text_width, arch.embed_dim
        for name in ("text_memory_complete", "text_memory_missing"):
            self.register_parameter(name, nn.Parameter(0.2 * _unit_rows(m, d_t)))
        for name in ("visual_memory_complete", "visual_memory_missing"):
            self.register_parameter(name, nn.Parameter(0.2 * _unit_rows(m, d_v)))
        for name in ("common_memory_complete", "common_memory_image", "common_memory_text"):
            self.register_parameter(name, nn.Parameter(_unit_rows(m, E) + 0.2 * torch.randn(m, E)))
        self.residual_alpha = nn.Parameter(torch.tensor(RESIDUAL_ALPHA))
        # Part of published checkpoints; the released model never calls it.
        self.dynamic_common_token_net = RDN(d_v + d_t, E)
        self.compound_memory_projections_text = nn.ModuleList(RDN(d_v + d_t, d_t) for _ in range(depth))
        self.compound_memory_projections_image = nn.ModuleList(RDN(d_v + d_t, d_v) for _ in range(depth))
        self.common_memory_projection_image = RDN(E, d_v)
        self.common_memory_projection_text = RDN(E, d_t)
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        if options.dynamic_init:
            for last in (self.dynamic_common_token_net.fc2, self.dynamic_common_token_net.skip):
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        self.replay_image = LayerReplay(d_v, depth, steps) if steps else None
        self.replay_text = LayerReplay(d_t, depth, steps) if steps else None

    @property
    def frozen(self) -> tuple[str, ...]:
        """What the options leave unused."""
        unused = [] if self.options.dynamic_init else ["dynamic_common_token_net."]
        if not self.options.far:
            unused.append("residual_alpha")
        if not self.options.fmb:
            unused += ["text_memory_missing", "visual_memory_missing", "common_memory_"]
        return tuple(unused)

    @torch.no_grad()
    def start_from(self, class_embedding_D: Tensor, end_embedding_D: Tensor) -> None:
        """Adds the backbone's class embedding and its embedding of `<end>` to every private start slot."""
        for name in ("text_memory_complete", "text_memory_missing"):
            self.get_parameter(name).add_(end_embedding_D)
        for name in ("visual_memory_complete", "visual_memory_missing"):
            self.get_parameter(name).add_(class_embedding_D)

    def of_types(self, types: Sequence[int]) -> Memory:
        """Slots of missing types, in evaluation: a row for each."""
        assert not self.training and not self.reads_input
        return self._memory(self._private(types, None), self._shared(types, None))

    def forward(self, missing_type_B: Tensor, types: tuple[int, ...], input_BV: Tensor | None = None) -> Memory:
        """Slots of every sample of a batch.

        In training each sample has its own dropout masks, so that samples of a type part at the first of them; in
        evaluation all samples of a type share one row. Start slots of types that do not occur get no gradient, as
        published.
        """
        row_B = row_of_type(missing_type_B, types)
        drawn_B = row_B if self.training else None
        private = self._private(types, drawn_B)
        if not self.training:
            private = [[slots[row_B] for slots in tower] for tower in private]
        if input_BV is not None:
            shared = self._shared(types, row_B, self.dynamic_common_token_net(input_BV).to(input_BV.dtype))
        else:
            shared = self._shared(types, drawn_B)
            if not self.training:
                shared = [[slots[row_B] for slots in tower] for tower in shared]
        return self._memory(private, shared)

    def _memory(self, private: list[list[Tensor]], shared: list[list[Tensor]]) -> Memory:
        towers = zip(private, shared, (self.replay_image, self.replay_text), strict=True)
        image, text = (TowerMemory(own, common, replay=replay) for own, common, replay in towers)
        penalty = None
        if self.training and self.options.decoupling_weight:
            penalty = self.options.decoupling_weight * _likeness(image, text)
        return Memory(image, text, penalty)

    def _private(self, types: Sequence[int], row_B: Tensor | None) -> list[list[Tensor]]:
        """The private chain with its residual bypass, image then text: for `types`, or for samples.

        The slots stay in the type of the parameters, also where the projections are computed in 16 bits.
        """
        visual_NmD, text_NmD = self._start("visual", types), self._start("text", types)
        dtype = visual_NmD.dtype
        image_layers: list[Tensor] = []
        text_layers: list[Tensor] = []
        layers = zip(
            self.compound_memory_projections_image,
            self.layernorm_image,
            self.compound_memory_projections_text,
            self.layernorm_text,
            strict=True,
        )
        for depth, (project_image, norm_image, project_text, norm_text) in enumerate(layers):
            pair_NmV = torch.cat([visual_NmD, text_NmD], dim=-1)
            first_row_B = row_B if depth == 0 else None
            projected_visual = project_image(norm_image(pair_NmV), first_row_B).to(dtype)
            projected_text = project_text(norm_text(pair_NmV), first_row_B).to(dtype)
            if depth == 0 or not self.options.far:
                visual_NmD, text_NmD = projected_visual, projected_text
            else:
                visual_NmD = torch.lerp(visual_NmD, projected_visual, self.residual_alpha)
                text_NmD = torch.lerp(text_NmD, projected_text, self.residual_alpha)
            image_layers.append(visual_NmD)
            text_layers.append(text_NmD)
        return [image_layers, text_layers]

    def _shared(
        self, types: Sequence[int], row_B: Tensor | None, dynamic_BE: Tensor | None = None
    ) -> list[list[Tensor]]:
        """The shared slots of the first block, image then text: for `types`, or for samples."""
        if not self.options.fmb:
            return [[], []]
        common_NmE = self._start("common", types)
        dtype = common_NmE.dtype
        if dynamic_BE is not None:
            common_NmE, row_B = common_NmE[row_B] + dynamic_BE[:, None], None
        projections = (self.common_memory_projection_image, self.common_memory_projection_text)
        return [[project(common_NmE, row_B).to(dtype)] for project in projections]

    def _start(self, part: str, types: Sequence[int]) -> Tensor:
        of_type = BUFFER_OF_TYPE[part] if self.options.fmb else ("complete",) * 3
        return torch.stack([self.get_parameter(f"{part}_memory_{of_type[missing_type]}") for missing_type in types])


class LayerReplay(nn.Module):
    """Carries what the first blocks made of private and shared slots to deeper blocks (METHOD.md section 7).

    The outputs of the `depth` first blocks are summed with learned softmax weights and normalised; a gate for each
    deeper block, 0 at the start, says how much of the sum is added before it.
    """

    def __init__(self, width: int, depth: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layer_scores = nn.Parameter(torch.zeros(depth))
        self.norm = nn.LayerNorm(width)
        self.gates = nn.Parameter(torch.zeros(steps))

    def forward(self, outputs_BPD: Sequence[Tensor], step: int) -> Tensor:
        """(B, P, D): what the `step`-th deeper block gets."""
        weights = self.layer_scores.softmax(dim=0)
        summed_BPD = torch.stack([weight * x for weight, x in zip(weights, outputs_BPD, strict=True)]).sum(dim=0)
        return self.gates[step] * self.norm(summed_BPD)


def _likeness(image: TowerMemory, text: TowerMemory) -> Tensor:
    """Mean squared cosine between private and shared slots, over layers and towers."""
    squared = []
    for tower in (image, text):
        [shared_BmD] = tower.inserted_BmD
        shared_BmD = F.normalize(shared_BmD, dim=-1)
        for private_BmD in tower.replaced_BmD:
            squared.append((F.normalize(private_BmD, dim=-1) @ shared_BmD.transpose(1, 2)).square().mean())
    return torch.stack(squared).mean()


def _unit_rows(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)
