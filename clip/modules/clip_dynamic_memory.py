"""REP's memory learner (docs/method.md sections 2, 3 and 7).

Shape suffixes: B samples, b samples with a modality, R samples or missing types, T missing types, L sequence, m slots
of one group, D width of a tower, V widths of all towers, E joint embedding width, P private and shared slots.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import ModelInput, Place, TowerSlots, zero_of
from clip.modules.method import METHOD, UNUSED, Method, MethodOptions, check_depth, excluding, select_by_missing_type
from clip.modules.vision_transformer_memory import FINAL, Attention

RDN_HIDDEN = 256
RDN_DROPOUT = 0.1
RESIDUAL_ALPHA = 0.5
DYNAMIC_STD = 0.02
DYNAMIC_ATTENTION = "dynamic attention"
AVAILABLE = ("complete", "image", "text")
"""The modalities available, indexed by missing type (0 complete, 1 text missing, 2 image missing)."""
START = {
    "visual": ("complete", "complete", "missing"),
    "text": ("complete", "missing", "complete"),
    "common": AVAILABLE,
}
"""Start slots, indexed by missing type: those of the two private chains, and the common ones that both towers share."""


class RDN(nn.Module):
    """Residual bottleneck: fc2(dropout(gelu(layernorm(fc1(x))))) + skip(x)."""

    def __init__(self, width_in: int, width_out: int, hidden: int = RDN_HIDDEN) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)
        self.layernorm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(RDN_DROPOUT)
        self.skip = nn.Linear(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, i) to (…, o), in the dtype of x even where autocast computes in 16 bits."""
        hidden = self.dropout(F.gelu(self.layernorm(self.fc1(x))))
        return (self.fc2(hidden) + self.skip(x)).to(x.dtype)

    def start_at_zero(self) -> None:
        """Zeroes the output layers, which makes the output zero."""
        for parameter in (*self.fc2.parameters(), *self.skip.parameters()):
            nn.init.zeros_(parameter)


class DynamicSlots(nn.Module):
    """Slots read from a tower's input tokens by attention, with a fixed set of queries for each missing type.

    The queries are buffers and never trained. In the published code they are plain tensors, which its checkpoints lack
    (docs/method.md section 6, point 2).
    """

    def __init__(self, place: Place, slots: int) -> None:
        super().__init__()
        self.attention = Attention(place.width, heads=1)
        for available in AVAILABLE:
            self.register_buffer(f"queries_{available}", DYNAMIC_STD * torch.randn(slots, 1, place.width))

    def forward(self, batch: ModelInput, modality: str, tokens: Mapping[str, Tensor]) -> Tensor:
        """See `read_dynamic`."""
        queries_TmD = torch.stack([self.get_buffer(f"queries_{available}").squeeze(1) for available in AVAILABLE])
        return read_dynamic(self.attention, queries_TmD, batch, modality, tokens)


def read_dynamic(
    attention: Attention, queries_TmD: Tensor, batch: ModelInput, modality: str, tokens: Mapping[str, Tensor]
) -> Tensor:
    """Attention of the queries for each sample's missing type over its tokens (B, m, D), zero without the modality.

    The result is that of one-head `attention`, but its key and value matrices are applied to the few queries instead
    of the many tokens: a score is q·(K x + k) = (Kᵀq)·x + q·k, and the softmax cancels the last term; the weights add
    up to 1, so the mean of V x + v is V times the mean of x, plus v.
    """
    if modality not in tokens:
        zero = zero_of(attention.parameters(), queries_TmD.device)
        return zero.expand(len(batch.present_BM), *queries_TmD.shape[1:])
    type_b, tokens_bLD = batch.missing_type_B[batch.samples_of(modality)], tokens[modality]
    with torch.autocast(queries_TmD.device.type, enabled=False):
        (Q, K, V), (q, _, v) = (attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
        reading_TmD = F.linear(queries_TmD, Q, q) @ K / K.shape[1] ** 0.5
        weight_bmL = (reading_TmD.index_select(0, type_b) @ tokens_bLD.mT).softmax(dim=-1)
        read_bmD = attention.out_proj(F.linear(weight_bmL @ tokens_bLD, V, v))
        return batch.to_all_samples(modality, read_bmD)


def chained(
    method: Method, start: Mapping[str, Tensor], bypass: Tensor | None = None, kind: str = "memory", joint: str = "_"
) -> dict[str, list[Tensor]]:
    """Slots (R, m, D) of each block of the memory depth, keyed by tower; a block's slots are computed from those of all
    towers one block before.

    Args:
        start: the slots that the first block's are computed from, keyed by tower.
        bypass: from the second block on, the weight of the new slots when averaged with the slots of the block before;
            None: no average, the new slots alone.
        kind, joint: parts of the names of norms and projections.
    """
    before, found = start, {tower: list[Tensor]() for tower in start}
    for k in range(method.options.memory_depth):
        joined_RmV = torch.cat([*before.values()], dim=-1)
        for tower, slots in found.items():
            norm = method.get_submodule(f"layernorm{joint}{tower}.{k}")
            new_RmD = method.get_submodule(f"compound_{kind}_projections{joint}{tower}.{k}")(norm(joined_RmV))
            slots.append(new_RmD if k == 0 or bypass is None else torch.lerp(before[tower], new_RmD, bypass))
        before = {tower: slots[-1] for tower, slots in found.items()}
    return found


class LayerReplay(nn.Module):
    """Replays the first blocks' outputs at private and shared slots into deeper blocks (docs/method.md section 7).

    The outputs of the first `depth` blocks are summed with learned softmax weights and normalised. The sum is added
    before each deeper block, scaled by that block's own gate, which starts at 0.
    """

    def __init__(self, width: int, depth: int, steps: int) -> None:
        super().__init__()
        self.layer_scores = nn.Parameter(torch.zeros(depth))
        self.norm = nn.LayerNorm(width)
        self.gates = nn.Parameter(torch.zeros(steps))

    def forward(self, step: int, outputs_BPD: Sequence[Tensor]) -> Tensor:
        """The addition (B, P, D) to the slots before the `step`-th deeper block."""
        weights = self.layer_scores.softmax(dim=0)
        summed_BPD = torch.stack([weight * x for weight, x in zip(weights, outputs_BPD, strict=True)]).sum(dim=0)
        return self.gates[step] * self.norm(summed_BPD)


def replays(method: Method, name: str) -> list[Callable[[Sequence[Tensor]], Tensor]]:
    """The replay functions of the deeper blocks, from the `LayerReplay` called `name`."""
    return [partial(method.get_submodule(name), step) for step in range(method.options.replay_depth)]


class MemoryLearner(Method):
    """Private slots for each layer of the memory depth, and shared and dynamic slots for the first layer.

    The options of docs/method.md section 7, `replay_depth`, `dynamic_init` and `decoupling_weight`, start as the
    identity. For ablations: without `far`, a layer's private slots are the projection alone; without `fmb`, all missing
    types start from the same private slots and there are no shared ones.
    """

    attribute = "memory_learner"
    identity_at_init = ("replay_image.", "replay_text.", "dynamic_common_token_net.")

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, depth, steps = options.slots, options.memory_depth, options.replay_depth
        check_depth(places, depth, steps)
        self.per_sample = options.dynamic_init
        d_v, d_t, E = places["image"].width, places["text"].width, embed_dim
        for state in ("complete", "missing"):
            self.register_parameter(f"text_memory_{state}", nn.Parameter(0.2 * unit_rows(m, d_t)))
        for state in ("complete", "missing"):
            self.register_parameter(f"visual_memory_{state}", nn.Parameter(0.2 * unit_rows(m, d_v)))
        for available in AVAILABLE:
            common_mE = unit_rows(m, E) + 0.2 * torch.randn(m, E)
            self.register_parameter(f"common_memory_{available}", nn.Parameter(common_mE))
        self.residual_alpha = nn.Parameter(torch.tensor(RESIDUAL_ALPHA))
        # In published checkpoints, although the released model never calls it.
        self.dynamic_common_token_net = RDN(d_v + d_t, E)
        self.compound_memory_projections_text = nn.ModuleList(RDN(d_v + d_t, d_t) for _ in range(depth))
        self.compound_memory_projections_image = nn.ModuleList(RDN(d_v + d_t, d_v) for _ in range(depth))
        self.common_memory_projection_image = RDN(E, d_v)
        self.common_memory_projection_text = RDN(E, d_t)
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        if options.dynamic_init:
            self.dynamic_common_token_net.start_at_zero()
        self.replay_image = LayerReplay(d_v, depth, steps) if steps else None
        self.replay_text = LayerReplay(d_t, depth, steps) if steps else None
        self.dynamic = nn.ModuleDict({modality: DynamicSlots(place, m) for modality, place in places.items()})

    @torch.no_grad()
    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        """Adds the backbone's class embedding to the visual start slots, and its `<end>` embedding to the text ones."""
        for state in ("complete", "missing"):
            self.get_parameter(f"visual_memory_{state}").add_(embeddings["image"])
            self.get_parameter(f"text_memory_{state}").add_(embeddings["text"])

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Private, shared and dynamic slots of every sample; in training, each sample has its own dropout masks."""
        start = {"image": self._start("visual", batch), "text": self._start("text", batch)}
        private = chained(self, start, self.residual_alpha if self.options.far else None)
        common_BmE = self._start("common", batch) if self.options.fmb else None
        if common_BmE is not None and self.options.dynamic_init:
            common_BmE = common_BmE + self.dynamic_common_token_net(mean_tokens(batch, tokens, self.places))[:, None]
        slots = {}
        for tower, read in self.dynamic.items():
            project = self.get_submodule(f"common_memory_projection_{tower}")
            slots[tower] = TowerSlots(
                private[tower],
                [project(common_BmE)] if common_BmE is not None else [],
                read(batch, tower, tokens),
                replay=replays(self, f"replay_{tower}"),
            )
        return slots

    def _start(self, part: str, batch: ModelInput) -> Tensor:
        names = START[part] if self.options.fmb else ("complete",) * 3
        return select_by_missing_type([self.get_parameter(f"{part}_memory_{name}") for name in names], batch)

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss that decouples private from shared slots."""
        return decoupling_loss(slots, self.options.decoupling_weight)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The learner, the parameters that the options leave unused, and the attention of the dynamic slots."""
        unused = [] if self.options.dynamic_init else [*self.dynamic_common_token_net.parameters()]
        if not self.options.far:
            unused.append(self.residual_alpha)
        if not self.options.fmb:
            unused += [self.get_parameter(f"{part}_memory_missing") for part in ("text", "visual")]
            unused += [self.get_parameter(f"common_memory_{available}") for available in AVAILABLE]
            unused += [*self.common_memory_projection_image.parameters()]
            unused += [*self.common_memory_projection_text.parameters()]
        dynamic = [*self.dynamic.parameters()]
        return {METHOD: excluding(self.parameters(), unused, dynamic), UNUSED: unused, DYNAMIC_ATTENTION: dynamic}

    def trains(self, task: str) -> tuple[str, ...]:
        """The learner; on Hateful Memes also the dynamic attention and the towers' ends (docs/method.md section 5)."""
        return (METHOD, DYNAMIC_ATTENTION, FINAL) if task == "hatememes" else (METHOD,)


def rows_to_compute(batch: ModelInput, training: bool) -> tuple[Tensor, Tensor]:
    """Missing types (R,) to compute slots for, and the row among them that each sample uses (B,).

    In training every sample has its own row, for its own dropout masks; in evaluation there is one row for each missing
    type that occurs.
    """
    type_B = batch.missing_type_B
    if training:
        return type_B, torch.arange(len(type_B), device=type_B.device)
    type_R = torch.tensor(batch.types, device=type_B.device)
    return type_R, torch.searchsorted(type_R, type_B)


def decoupling_loss(slots: Mapping[str, TowerSlots], weight: float) -> dict[str, Tensor]:
    """Mean squared cosine between private and shared slots, over layers and towers, times `weight`; no loss if 0."""
    if not weight:
        return {}
    squared = []
    for tower_slots in slots.values():
        shared_BmD = F.normalize(tower_slots.inserted_BmD[0], dim=-1)
        for private_BmD in tower_slots.replaced_BmD:
            cosine_Bmm = F.normalize(private_BmD, dim=-1) @ shared_BmD.transpose(1, 2)
            squared.append(cosine_Bmm.square().mean())
    return {"decoupling": weight * torch.stack(squared).mean()}


def mean_tokens(batch: ModelInput, tokens: Mapping[str, Tensor], places: Mapping[str, Place]) -> Tensor:
    """Each sample's mean input token (B, V), concatenated over modalities; zeros for a missing one."""
    means = []
    for modality, place in places.items():
        if modality in tokens:
            means.append(batch.to_all_samples(modality, tokens[modality].mean(dim=1)))
        else:
            means.append(torch.zeros(len(batch.present_BM), place.width, device=batch.present_BM.device))
    return torch.cat(means, dim=-1)


def unit_rows(rows: int, width: int) -> Tensor:
    """Gaussian rows of length 1."""
    return F.normalize(torch.randn(rows, width), dim=-1)
