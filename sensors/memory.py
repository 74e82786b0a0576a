"""REP's memory learner for the SW-Transformer.

Shape suffixes: B samples, b samples with a modality, R rows of a chain (samples, or patterns), L tokens, m slots of one
group, M modalities, C width of the first stage, P private and shared slots.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import (
    DYNAMIC_STD,
    RDN,
    RESIDUAL_ALPHA,
    chained,
    mean_tokens,
    read_dynamic,
    replays,
    rows_to_compute,
    unit_rows,
)
from clip.modules.interfaces import ModelInput, Place, TowerSlots, zero_of
from clip.modules.method import METHOD, UNUSED, Method, MethodOptions, by_missing_type, check_depth, excluding
from clip.modules.vision_transformer_memory import Attention
from vilt.missing_types import is_missing

PRIVATE_NOISE = COMMON_NOISE = 0.2


def patterns(modalities: Sequence[str]) -> tuple[str, ...]:
    """The present modalities, joined by `+`, for each of the missing types 0 to 2^M - 2."""
    return tuple(
        "+".join(name for name in modalities if not is_missing(modalities, name, code))
        for code in range(2 ** len(modalities) - 1)
    )


class StageReplay(nn.Module):
    """Replays the first blocks' outputs at private and shared slots into deeper blocks of a tower.

    Args:
        steps: stage and width of each block that they are replayed into.
    """

    def __init__(self, depth: int, steps: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layer_scores = nn.Parameter(torch.zeros(depth))
        self.norms = nn.ModuleDict({str(stage): nn.LayerNorm(width) for stage, width in dict(steps).items()})
        self.gates = nn.Parameter(torch.zeros(len(steps)))
        self.stages = [str(stage) for stage, _ in steps]

    def forward(self, step: int, outputs_BPD: Sequence[Tensor]) -> Tensor:
        """The addition (B, P, D) to the slots before the `step`-th deeper block."""
        summed_BPD = torch.einsum("k,kbpd->bpd", self.layer_scores.softmax(dim=0), torch.stack([*outputs_BPD]))
        added: Tensor = self.gates[step] * self.norms[self.stages[step]](summed_BPD)
        return added


class SensorMemoryLearner(Method):
    """Private slots for each block of the memory depth, chained over all modalities, and shared and dynamic slots.

    Without `far`, there is no bypass and no replay; without `fmb`, all patterns start from the same private slots and
    there are no shared ones. `replay_depth`, `dynamic_init` and `decoupling_weight` start as the identity.
    """

    attribute = "memory_learner"
    identity_at_init = ("replay.", "dynamic_common_token_net.")

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, depth, steps = options.slots, options.memory_depth, options.replay_depth
        if min(place.depth for place in places.values()) < 1:
            raise ValueError("prompt_type=rep: expected network.type=swt, found a network whose blocks take no slots")
        check_depth(places, depth, steps)
        self.modalities = tuple(places)
        self.patterns = patterns(self.modalities)
        first = next(iter(places.values()))
        C, joint = first.width, len(places) * first.width
        for state in ("complete", "missing"):
            slots = {name: PRIVATE_NOISE * unit_rows(m, C) for name in places}
            self.add_module(f"private_memory_{state}", nn.ParameterDict(slots))
        self.common_memory = nn.ParameterDict(
            {pattern: unit_rows(m, C) + COMMON_NOISE * torch.randn(m, C) for pattern in self.patterns}
        )
        self.residual_alpha = nn.Parameter(torch.tensor(RESIDUAL_ALPHA))
        self.layernorm = _by_modality(places, lambda: nn.ModuleList(nn.LayerNorm(joint) for _ in range(depth)))
        self.compound_memory_projections = _by_modality(
            places, lambda: nn.ModuleList(RDN(joint, C, hidden=C) for _ in range(depth))
        )
        self.common_memory_projection = _by_modality(places, lambda: RDN(C, C, hidden=C))
        self.attn_memory = _by_modality(places, lambda: Attention(C, heads=1))
        self.memories_dynamic = nn.ModuleDict()
        for name in places:
            own = [pattern for pattern in self.patterns if name in pattern.split("+")]
            self.memories_dynamic[name] = nn.ParameterDict(
                {pattern: DYNAMIC_STD * torch.randn(m, C) for pattern in own}
            )
        self.dynamic_common_token_net = RDN(joint, C, hidden=C) if options.dynamic_init else None
        if self.dynamic_common_token_net is not None:
            self.dynamic_common_token_net.start_at_zero()
        stages = list(dict.fromkeys(first.widths))
        replayed = [(stages.index(width), width) for width in first.widths[depth : depth + steps]]
        self.replay = _by_modality(places, lambda: StageReplay(depth, replayed)) if steps else None

    @torch.no_grad()
    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        """Adds the modality's silence (the token of a patch of zeros) to every private start slot."""
        for name, silence in embeddings.items():
            for state in ("complete", "missing"):
                self.get_parameter(f"private_memory_{state}.{name}").add_(silence)

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Private, shared and dynamic slots of every sample; in training, each sample has its own dropout masks."""
        type_R, row_B = rows_to_compute(batch, self.training)
        start = {name: self._start(name, batch)[type_R] for name in self.modalities}
        private = chained(self, start, self.residual_alpha if self.options.far else None, joint=".")
        common_TmC = by_missing_type([self.common_memory[pattern] for pattern in self.patterns], batch)
        common_BmC = common_TmC[batch.missing_type_B]
        if self.dynamic_common_token_net is not None:
            common_BmC = common_BmC + self.dynamic_common_token_net(mean_tokens(batch, tokens, self.places))[:, None]
        slots = {}
        for name in self.modalities:
            shared = [self.common_memory_projection[name](common_BmC)] if self.options.fmb else []
            attention = self.attn_memory[name]
            assert isinstance(attention, Attention)
            slots[name] = TowerSlots(
                [v_RmC[row_B] for v_RmC in private[name]],
                shared,
                read_dynamic(attention, self._queries(name, batch), batch, name, tokens),
                replay=replays(self, f"replay.{name}"),
            )
        return slots

    def _start(self, name: str, batch: ModelInput) -> Tensor:
        """The private slots (T, m, C) that a modality's chain starts from, for each missing type."""
        complete, missing = (self.get_parameter(f"private_memory_{state}.{name}") for state in ("complete", "missing"))
        lost = [self.options.fmb and is_missing(self.modalities, name, code) for code in range(len(self.patterns))]
        return by_missing_type([missing if each else complete for each in lost], batch)

    def _queries(self, name: str, batch: ModelInput) -> Tensor:
        """The dynamic queries (T, m, C) for each missing type, 0 where the modality is missing."""
        queries = dict(self.memories_dynamic[name].named_parameters())
        zero = torch.zeros_like(next(iter(queries.values())))
        return by_missing_type([queries.get(pattern, zero) for pattern in self.patterns], batch)

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The decoupling loss: mean squared cosine of private and shared slots, over layers and present modalities."""
        if not self.options.decoupling_weight:
            return {}
        total, present = zero_of([], logits_BC.device), zero_of([], logits_BC.device)
        for name, tower_slots in slots.items():
            present_B = features[name].detach().any(dim=-1).float()
            shared_BmC = F.normalize(tower_slots.inserted_BmD[0], dim=-1)
            private_BDmC = F.normalize(torch.stack([*tower_slots.replaced_BmD], dim=1), dim=-1)
            cosine = torch.einsum("bdmc,bnc->bdmn", private_BDmC, shared_BmC)
            total = total + (cosine.square().mean(dim=(1, 2, 3)) * present_B).sum()
            present = present + present_B.sum()
        return {"decoupling": self.options.decoupling_weight * total / present}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The learner, and the parameters that the options leave unused."""
        unused = [] if self.options.far else [self.residual_alpha]
        if not self.options.fmb:
            modules = ("private_memory_missing", "common_memory", "common_memory_projection")
            unused += [parameter for name in modules for parameter in self.get_submodule(name).parameters()]
        return {METHOD: excluding(self.parameters(), unused), UNUSED: unused}


def _by_modality(modalities: Mapping[str, Place], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({name: make() for name in modalities})
