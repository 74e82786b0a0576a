"""REP's memory learner for the SW-Transformer.

Shape suffixes: B samples, b samples with a modality, R rows of a chain (samples, or patterns), L tokens, m slots of one
group, M modalities, C width of the first stage, P private and shared slots.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import DYNAMIC_STD, RDN, RESIDUAL_ALPHA, mean_tokens, unit_rows
from clip.modules.interfaces import ModelInput, Place, TowerSlots, zero_of
from clip.modules.method import METHOD, UNUSED, Method, MethodOptions, check_depth, without
from vilt.missing_types import is_missing

PRIVATE_NOISE = COMMON_NOISE = 0.2


def patterns(modalities: Sequence[str]) -> tuple[str, ...]:
    """What the missing types 0 to 2^M - 2 leave: the present modalities, joined by `+`."""
    return tuple(
        "+".join(name for name in modalities if not is_missing(modalities, name, code))
        for code in range(2 ** len(modalities) - 1)
    )


class StageReplay(nn.Module):
    """Gives deeper blocks of a tower back the outputs of the first blocks at private and shared slots.

    Args:
        steps: the stage of each block that gets them, and its width.
    """

    def __init__(self, depth: int, steps: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layer_scores = nn.Parameter(torch.zeros(depth))
        self.norms = nn.ModuleDict({str(stage): nn.LayerNorm(width) for stage, width in dict(steps).items()})
        self.gates = nn.Parameter(torch.zeros(len(steps)))
        self.stages = [str(stage) for stage, _ in steps]

    def of_each_block(self) -> list[Callable[[Sequence[Tensor]], Tensor]]:
        """A function for each deeper block, from the outputs, of its width, to what is added before it."""
        return [partial(self, step) for step in range(len(self.stages))]

    def forward(self, step: int, outputs_BPD: Sequence[Tensor]) -> Tensor:
        """(B, P, D): what is added before the `step`-th deeper block."""
        summed_BPD = torch.einsum("k,kbpd->bpd", self.layer_scores.softmax(dim=0), torch.stack([*outputs_BPD]))
        added: Tensor = self.gates[step] * self.norms[self.stages[step]](summed_BPD)
        return added


class SensorMemoryLearner(Method):
    """Private slots of each block of the memory depth, chained over all modalities; shared and dynamic slots.

    Options: `far` off, no bypass and no replay; `fmb` off, all patterns start from the same private slots, and there
    are no shared ones; `replay_depth`, `dynamic_init` and the loss of `decoupling_weight` start as the identity.
    """

    attribute = "memory_learner"
    identity_at_init = ("replay.", "dynamic_common_token_net.")

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        m, depth, steps = options.slots, options.memory_depth, options.replay_depth
        if min(place.depth for place in places.values()) < 1:
            raise ValueError("prompt_type=rep: expected network=swt, found a network without blocks that slots enter")
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
        self.attn_memory = _by_modality(places, lambda: nn.MultiheadAttention(C, 1, batch_first=True))
        self.memories_dynamic = nn.ModuleDict(
            {
                name: nn.ParameterDict(
                    {
                        pattern: DYNAMIC_STD * torch.randn(m, C)
                        for pattern in self.patterns
                        if name in pattern.split("+")
                    }
                )
                for name in places
            }
        )
        self.dynamic_common_token_net = RDN(joint, C, hidden=C) if options.dynamic_init else None
        if self.dynamic_common_token_net is not None:
            self.dynamic_common_token_net.start_at_zero()
        stages = list(dict.fromkeys(first.widths))
        replayed = [(stages.index(width), width) for width in first.widths[depth : depth + steps]]
        self.replay = _by_modality(places, lambda: StageReplay(depth, replayed)) if steps else None

    @torch.no_grad()
    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        """Adds the silence of its modality to every private start slot."""
        for name, silence in embeddings.items():
            for state in ("complete", "missing"):
                self.get_parameter(f"private_memory_{state}.{name}").add_(silence)

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """Private, shared and dynamic slots of every sample, in training each with dropout masks of its own."""
        type_B = batch.missing_type_B
        if self.training:
            type_R, row_B = type_B, torch.arange(len(type_B), device=type_B.device)
        else:  # private and shared slots follow from the pattern
            type_R = torch.tensor(batch.types, device=type_B.device)
            row_B = torch.searchsorted(type_R, type_B)
        chain = self._chain(batch, type_R)
        slots = {}
        common_BmC = self._common(batch, tokens, type_R, row_B)
        for name in self.modalities:
            private = [v_RmC[row_B] for v_RmC in chain[name]]
            shared = [] if common_BmC is None else [self.common_memory_projection[name](common_BmC)]
            replay = self.replay[name] if self.replay is not None else None
            slots[name] = TowerSlots(
                private,
                shared,
                self._dynamic(batch, name, tokens),
                replay=replay.of_each_block() if isinstance(replay, StageReplay) else (),
            )
        return slots

    def _chain(self, batch: ModelInput, type_R: Tensor) -> dict[str, list[Tensor]]:
        """v_0 to v_{D-1} of each modality, (R, m, C), from those of all."""
        v = {name: self._start(name, batch, type_R) for name in self.modalities}
        found: dict[str, list[Tensor]] = {name: [] for name in self.modalities}
        for k in range(self.options.memory_depth):
            joint = torch.cat([v[name] for name in self.modalities], dim=-1)
            for name, of_modality in found.items():
                norm, project = self.layernorm[name], self.compound_memory_projections[name]
                new = project[k](norm[k](joint))  # type: ignore[index]
                if k > 0 and self.options.far:
                    new = torch.lerp(v[name], new, self.residual_alpha)
                of_modality.append(new)
            v = {name: of_modality[-1] for name, of_modality in found.items()}
        return found

    def _start(self, name: str, batch: ModelInput, type_R: Tensor) -> Tensor:
        """(R, m, C): the private slots of what has the modality, and what lacks it; of neither a gradient if unused."""
        complete, missing = (self.get_parameter(f"private_memory_{state}.{name}") for state in ("complete", "missing"))
        if not self.options.fmb:
            return complete.expand(len(type_R), -1, -1)
        lost = [bool(is_missing(self.modalities, name, code)) for code in batch.types]
        both = torch.stack([complete.detach() if all(lost) else complete, missing if any(lost) else missing.detach()])
        return both[is_missing(self.modalities, name, type_R).long()]

    def _common(self, batch: ModelInput, tokens: Mapping[str, Tensor], type_R: Tensor, row_B: Tensor) -> Tensor | None:
        """(B, m, C): the common memory of each sample's pattern."""
        if not self.options.fmb:
            return None
        common_RmC = self._of_pattern(self.common_memory, batch)[type_R]
        common_BmC = common_RmC[row_B]
        if self.dynamic_common_token_net is not None:
            mean_BX = mean_tokens(batch, tokens, self.places)
            common_BmC = common_BmC + self.dynamic_common_token_net(mean_BX)[:, None]
        return common_BmC

    def _dynamic(self, batch: ModelInput, name: str, tokens: Mapping[str, Tensor]) -> Tensor:
        """(B, m, C), read from the tokens; zero for samples without the modality."""
        queries, attention = self.memories_dynamic[name], self.attn_memory[name]
        assert isinstance(attention, nn.MultiheadAttention)
        queries_TmC = self._of_pattern(queries, batch)
        if name not in tokens:
            zero = zero_of(attention.parameters(), queries_TmC.device)
            return zero.expand(len(batch.present_BM), *queries_TmC.shape[1:])
        with torch.autocast(queries_TmC.device.type, enabled=False):
            query_bmC = queries_TmC[batch.missing_type_B[batch.rows[name]]]
            read_bmC = _read(attention, query_bmC, tokens[name])
        return batch.to_all_samples(name, read_bmC)

    def _of_pattern(self, slots: nn.Module, batch: ModelInput) -> Tensor:
        """(T, m, C) by missing type; without gradient for those that do not occur, 0 where a modality has none."""
        of_pattern = dict(slots.named_parameters())
        zero = torch.zeros_like(next(iter(of_pattern.values())))
        found = [of_pattern.get(pattern, zero) for pattern in self.patterns]
        return torch.stack([x if code in batch.types else x.detach() for code, x in enumerate(found)])

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The decoupling: mean squared cosine of private and shared slots, over layers and present modalities."""
        if not self.options.decoupling_weight:
            return {}
        total, present = zero_of([], logits_BC.device), zero_of([], logits_BC.device)
        for name, of_tower in slots.items():
            present_B = features[name].detach().any(dim=-1).float()
            shared_BmC = F.normalize(of_tower.inserted_BmD[0], dim=-1)
            private_BDmC = F.normalize(torch.stack([*of_tower.replaced_BmD], dim=1), dim=-1)
            cosine = torch.einsum("bdmc,bnc->bdmn", private_BDmC, shared_BmC)
            total = total + (cosine.square().mean(dim=(1, 2, 3)) * present_B).sum()
            present = present + present_B.sum()
        return {"decoupling": self.options.decoupling_weight * total / present}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The learner, and what the options leave unused."""
        unused = [] if self.options.far else [self.residual_alpha]
        if not self.options.fmb:
            modules = ("private_memory_missing", "common_memory", "common_memory_projection")
            unused += [parameter for name in modules for parameter in self.get_submodule(name).parameters()]
        return {METHOD: without(self.parameters(), unused), UNUSED: unused}


def _read(attention: nn.MultiheadAttention, query_bmC: Tensor, tokens_bLC: Tensor) -> Tensor:
    """What an attention of one head gives for few queries: these and what is read are projected, not all tokens.

    The bias of the keys adds the same to all products of a query, and is left out.
    """
    of_query, of_key, of_value = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    key_bmC = F.linear(query_bmC, of_query, query_bias) @ of_key * query_bmC.shape[-1] ** -0.5
    weights_bmL = (key_bmC @ tokens_bLC.transpose(1, 2)).softmax(dim=-1)
    read_bmC: Tensor = attention.out_proj(F.linear(weights_bmL @ tokens_bLC, of_value, value_bias))
    return read_bmC


def _by_modality(modalities: Mapping[str, Place], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({name: make() for name in modalities})
