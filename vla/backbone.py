"""MulT (Tsai et al., ACL 2019), as the backbone of MPLMM (arXiv 2407.05374): docs/vla.md sections 2 and 3.

Each modality is projected to one width; six cross-modal encoders let each modality read each other one; a causal
encoder per modality, its tower, runs on what it has read, and its last step is the modality's feature.

Shape suffixes: B samples, n some of them, T steps of a target, S steps of a source, D width of an encoder, d width of
the backbone, m slots.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.modules.interfaces import NO_SLOTS, Backbone, ModelInput, Place, Tower, TowerSlots

LETTERS = {"text": "l", "audio": "a", "vision": "v"}
"""By modality, in the order of all joins: what published parameter names call it."""
EMBEDDING_DROPOUT, DROPOUT = 0.25, 0.1
START_STD = 0.02
FRONTENDS, POOLER, ENCODERS = "projections", "pooler", "encoders"
LEAST_TOWER_LAYERS = 3


@dataclass(frozen=True)
class VlaArchitecture:
    """The sizes."""

    text_steps: int
    audio_steps: int
    vision_steps: int
    text_dim: int
    audio_dim: int
    vision_dim: int
    width: int = 30
    heads: int = 5
    layers: int = 5
    """Of the cross-modal encoders; the towers have as many, but three at least."""
    project_all: bool = True
    """False, for stage 1: a modality that has the width already is not projected, as published."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(T, D) of each modality's features."""
        return {name: (getattr(self, f"{name}_steps"), getattr(self, f"{name}_dim")) for name in LETTERS}


class Attention(nn.Module):
    """Multi-head attention with dropout on its weights."""

    def __init__(self, width: int, heads: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        _xavier(self.in_proj_weight, self.out_proj)

    def forward(self, query_BTD: Tensor, source_BSD: Tensor, mask_TS: Tensor | None = None) -> Tensor:
        """(B, T, D); `mask_TS` is True where a step may look."""
        D = query_BTD.shape[-1]
        q_BTD = F.linear(query_BTD, self.in_proj_weight[:D], self.in_proj_bias[:D])
        kv_BS2D = F.linear(source_BSD, self.in_proj_weight[D:], self.in_proj_bias[D:])
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_BTD, *kv_BS2D.chunk(2, dim=-1)))
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, dropout_p=dropout)
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def of_constant(self, source_D: Tensor, samples: int, visible_T: Tensor) -> Tensor:
        """(n, T, D), or (D,) without dropout: what is read from a source whose steps are all alike.

        The weights of a step sum to 1, whatever they are. With dropout on them they are still equal, so that their sum
        follows from how many of the `visible_T` steps are kept, which is drawn instead of each step.
        """
        D = len(source_D)
        value_D = F.linear(source_D, self.in_proj_weight[2 * D :], self.in_proj_bias[2 * D :])
        if not self.training or not self.dropout:
            return self.out_proj(value_D)
        n_nTH1 = visible_T[None, :, None, None].expand(samples, -1, self.heads, 1).to(value_D.dtype)
        kept_nTH1 = torch.binomial(n_nTH1, torch.full_like(n_nTH1, 1 - self.dropout))
        weight_nTH1 = kept_nTH1 / (n_nTH1 * (1 - self.dropout))
        return self.out_proj((weight_nTH1 * value_D.unflatten(0, (self.heads, -1))).flatten(2))


class Layer(nn.Module):
    """A pre-norm layer: attention, then a feed-forward half of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        _xavier(self.fc1, self.fc2)

    def forward(self, x_BTD: Tensor, source_BSD: Tensor | None, mask_TS: Tensor | None, last: bool = False) -> Tensor:
        """(B, T, D), or with `last` (B, 1, D) of the last step alone.

        Args:
            source_BSD: None for self-attention. One norm serves query and source.
        """
        normed_BTD = self.layer_norms[0](x_BTD)
        normed_BSD = normed_BTD if source_BSD is None else self.layer_norms[0](source_BSD)
        if last:
            x_BTD, normed_BTD, mask_TS = x_BTD[:, -1:], normed_BTD[:, -1:], None
        return self._feed_forward(x_BTD + self._drop(self.self_attn(normed_BTD, normed_BSD, mask_TS)))

    def of_zero_source(self, x_nTD: Tensor, visible_T: Tensor) -> Tensor:
        """The same for a source of zeros, whose norm is the bias; no step of it is computed."""
        bias_D = self.layer_norms[0].get_parameter("bias")
        read = self.self_attn.of_constant(bias_D, len(x_nTD), visible_T)
        return self._feed_forward(x_nTD + self._drop(read.expand_as(x_nTD)))

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self._drop(F.relu(self.fc1(self.layer_norms[1](x_BTD))))
        return x_BTD + self._drop(self.fc2(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, DROPOUT, self.training)


class Encoder(Tower):
    """Layers behind an embedding, and a LayerNorm; cross-modal if it is given a source, else causal.

    As a modality's tower it runs on what the cross-modal encoders have brought, with a method's slots.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)
        self.checkpointing = False

    def embed(self, input_b: Tensor, offset: int = 0) -> Tensor:
        """(B, T, D): scaled, with sinusoidal positions from `offset` + 1 on, and dropout.

        A step whose first channel is exactly 0 gets no position, as published: padding is zeros.
        """
        T, D = input_b.shape[1:]
        position_TD = positions(offset + T, D, input_b.device)[offset:].to(input_b.dtype)
        embedded = math.sqrt(D) * input_b + position_TD * (input_b[..., :1] != 0)
        return F.dropout(embedded, EMBEDDING_DROPOUT, self.training)

    def cross(self, target_BTD: Tensor, source_BSD: Tensor) -> Tensor:
        """(B, T, D): what a modality reads from another one, both embedded."""
        T, S = target_BTD.shape[1], source_BSD.shape[1]
        mask_TS = mask(T, S, target_BTD.device)
        for layer in self.layers:
            target_BTD = self._run(layer, target_BTD, source_BSD, mask_TS)
        return self.layer_norm(target_BTD)

    def cross_zeros(self, target_nTD: Tensor, source_steps: int) -> Tensor:
        """`cross` where the source is missing, that is all zeros."""
        visible_T = mask(target_nTD.shape[1], source_steps, target_nTD.device).sum(dim=1)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            target_nTD = self._run(layer.of_zero_source, target_nTD, visible_T)
        return self.layer_norm(target_nTD)

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """(B, D): the last step behind `[replaced | inserted | dynamic | tokens | appended]`, causal from the front.

        Slots are no steps: they get neither scale, position nor dropout; appended ones are steps after the others.
        """
        replaced, appended = slots.replaced_BmD, slots.appended_BmD
        x_BTD = tokens_bLD
        if appended is not None:
            x_BTD = torch.cat([x_BTD, self.embed(appended, offset=x_BTD.shape[1])], dim=1)
        front = [*replaced[:1], *slots.inserted_BmD[:1], *([] if slots.dynamic_BmD is None else [slots.dynamic_BmD])]
        x_BTD = torch.cat([*front, x_BTD], dim=1)
        P = sum(each.shape[1] for each in (*replaced[:1], *slots.inserted_BmD[:1]))
        mask_TT = mask(x_BTD.shape[1], x_BTD.shape[1], x_BTD.device)
        outputs_BPD: list[Tensor] = []
        depth = len(replaced)
        for k, layer in enumerate(self.layers):
            if 0 < k < depth:
                x_BTD = torch.cat([replaced[k], x_BTD[:, replaced[k].shape[1] :]], dim=1)
            if depth <= k < depth + len(slots.replay):
                x_BTD = torch.cat([x_BTD[:, :P] + slots.replay[k - depth](outputs_BPD), x_BTD[:, P:]], dim=1)
            x_BTD = self._run(layer, x_BTD, None, mask_TT, k + 1 == len(self.layers))
            if slots.replay and k < depth:
                outputs_BPD.append(x_BTD[:, :P])
        return self.layer_norm(x_BTD[:, -1])

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            layer = partial(checkpoint, layer, use_reentrant=False)
        return layer(*arguments)


class VlaBackbone(Backbone):
    """The model of stage 1, without its output layer, which is the head; parameter names are the published ones."""

    mixes = True
    always_trained = (FRONTENDS,)

    def __init__(self, arch: VlaArchitecture) -> None:
        super().__init__()
        d, w = arch.width, 2 * arch.width
        if d % arch.heads or arch.width < 4:
            raise ValueError(f"width: expected a multiple of heads={arch.heads}, 4 or more, found {arch.width}")
        self.arch = arch
        tower_layers = max(arch.layers, LEAST_TOWER_LAYERS)
        self.places = {name: Place(w, tower_layers, input_shape=shape) for name, shape in arch.shapes.items()}
        self.embed_dim = w
        for name, letter in LETTERS.items():
            self.add_module(f"proj_{letter}", nn.Conv1d(arch.shapes[name][1], d, kernel_size=1, bias=False))
        for target, source in permutations(LETTERS, 2):
            self.add_module(_cross_name(target, source), Encoder(d, arch.heads, arch.layers))
        for name in LETTERS:
            self.add_module(_tower_name(name), Encoder(w, arch.heads, tower_layers))
        self.proj1, self.proj2 = nn.Linear(3 * w, 3 * w), nn.Linear(3 * w, 3 * w)
        # At a bias of 0 padding enters the towers as exact zeros, where a LayerNorm is 300 times as steep.
        for encoder in self._cross_encoders():
            nn.init.normal_(encoder.layer_norm.bias, std=START_STD)

    @property
    def towers(self) -> dict[str, Tower]:
        return {name: self._encoder(_tower_name(name)) for name in LETTERS}

    def _encoder(self, name: str) -> Encoder:
        encoder = self.get_submodule(name)
        assert isinstance(encoder, Encoder)
        return encoder

    def _cross_encoders(self) -> Iterator[Encoder]:
        return (self._encoder(_cross_name(target, source)) for target, source in permutations(LETTERS, 2))

    def start_head(self, head: nn.Module) -> None:
        """PyTorch's own start values."""
        if isinstance(head, nn.Linear):
            head.reset_parameters()

    def prepare(self, batch: ModelInput) -> ModelInput:
        """Dropout on the features of texts; what reads them later reads the same."""
        text = F.dropout(batch.inputs["text"], EMBEDDING_DROPOUT, self.training)
        return batch._replace(inputs={**batch.inputs, "text": text})

    def embed(self, batch: ModelInput) -> dict[str, Tensor]:
        """(b, T, d), projected, of the modalities that any sample has."""
        projected = {}
        for name, x_bTD in batch.inputs.items():
            if len(x_bTD):
                weight = self.get_parameter(f"proj_{LETTERS[name]}.weight")
                skip = not self.arch.project_all and x_bTD.shape[-1] == self.arch.width
                projected[name] = x_bTD if skip else F.linear(x_bTD, weight[..., 0])
        return projected

    def mix(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B, T, 2d): the embedded input of each tower, for samples without the modality too.

        Args:
            tokens: (b, T, d) of the samples that have a modality, those of the others being zeros, or (B, T, d).
        """
        B, shapes = len(batch.present_BM), self.arch.shapes
        rows = {name: batch.rows[name] for name in tokens if len(tokens[name]) < B}
        complete = {}
        for name, (T, _) in shapes.items():
            x_bTd = tokens.get(name)
            if x_bTd is None:
                like = next(iter(tokens.values()))
                rows[name], complete[name] = batch.rows[name], like.new_zeros(B, T, self.arch.width)
            else:
                complete[name] = batch.to_all_samples(name, x_bTd) if name in rows else x_bTd
        mixed = {}
        for target, tower in self.towers.items():
            streams = []
            for source in shapes:
                if source != target:
                    encoder = self._encoder(_cross_name(target, source))
                    streams.append(_cross(encoder, complete[target], complete[source], rows.get(source)))
            mixed[target] = tower.embed(torch.cat(streams, dim=-1))
        return mixed

    def encode(
        self, batch: ModelInput, tokens: Mapping[str, Tensor], slots: Mapping[str, TowerSlots]
    ) -> dict[str, Tensor]:
        """Features (B, 2d) of every modality; that of a missing one holds what the others brought."""
        return {name: tower.encode(tokens[name], tokens[name], slots[name]) for name, tower in self.towers.items()}

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        """(B, 6d): the features side by side, behind the residual pooler."""
        z = super().fuse(features, present_BM)
        return self.proj2(F.dropout(F.relu(self.proj1(z)), DROPOUT, self.training)) + z

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Projections of the features, pooler, and encoders."""
        projections = [self.get_parameter(f"proj_{letter}.weight") for letter in LETTERS.values()]
        pooler = [*self.proj1.parameters(), *self.proj2.parameters()]
        encoders = [p for encoder in (*self._cross_encoders(), *self.towers.values()) for p in encoder.parameters()]
        return {FRONTENDS: projections, POOLER: pooler, ENCODERS: encoders}

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """See `Backbone.compute`. 16 bits are left to autocast: the weights are few."""
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpointing = checkpointing


def _cross(encoder: Encoder, target_BTd: Tensor, source_BSd: Tensor, has_source_b: Tensor | None) -> Tensor:
    """What all samples read from a source, which only the samples `has_source_b` have, or all if that is None."""
    target_BTd = encoder.embed(target_BTd)
    if has_source_b is None:
        return encoder.cross(target_BTd, encoder.embed(source_BSd))
    B, S = source_BSd.shape[:2]
    lacks = torch.ones(B, dtype=torch.bool, device=source_BSd.device).index_fill(0, has_source_b, False)
    without = lacks.nonzero().flatten()
    read = target_BTd.new_empty(target_BTd.shape).index_copy(0, without, encoder.cross_zeros(target_BTd[without], S))
    if not len(has_source_b):
        return read
    source_bSd = encoder.embed(source_BSd[has_source_b])
    return read.index_copy(0, has_source_b, encoder.cross(target_BTd[has_source_b], source_bSd))


def _cross_name(target: str, source: str) -> str:
    return f"trans_{LETTERS[target]}_with_{LETTERS[source]}"


def _tower_name(modality: str) -> str:
    return f"trans_{LETTERS[modality]}_mem"


@cache
def positions(steps: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids (T, D) of the steps 1 … T: sines, then cosines, and a 0 where D is odd."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=device) * (-math.log(10000) / (half - 1)))
    angle = torch.arange(1, steps + 1, device=device)[:, None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2))


@cache
def mask(steps: int, source_steps: int, device: torch.device) -> Tensor:
    """(T, S), True where step i may see source step j: j ≤ i + |S - T|."""
    allowed = torch.ones(steps, source_steps, dtype=torch.bool, device=device)
    return allowed.tril(abs(source_steps - steps))


def _xavier(*weights: Tensor | nn.Linear) -> None:
    for weight in weights:
        if isinstance(weight, nn.Linear):
            nn.init.zeros_(weight.bias)
            weight = weight.weight
        nn.init.xavier_uniform_(weight)
