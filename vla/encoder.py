"""The encoders of MulT (Tsai et al., ACL 2019): docs/vla.md section 3.

Shape suffixes: B samples, n some of them, N samples × heads, T steps of a target, S steps of a source, R last steps of
a target, W last steps of a source, D width, H heads, h width of a head, m slots.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.modules.interfaces import NO_SLOTS, Tower, TowerSlots
from common.dropout import dropout, kept

EMBEDDING_DROPOUT, DROPOUT = 0.25, 0.1
LANES = 16
"""Floats that a CPU processes at once; a softmax over fewer takes ten times as long for each."""
BLOCK, BLOCKS = 32, 8
"""Minimum size and maximum number of blocks of queries on a CPU; each block attends only to steps that it can see."""


def share_kept(count_T: Tensor, rate: float, samples: int, device: torch.device) -> Tensor:
    """Draws (n, T), of mean 1: what dropout leaves of a sum of `count_T` equal parts; counts ascend, on the CPU."""
    chances_TC = _binomial(int(count_T[-1]), 1 - rate)[count_T].to(device)
    kept_Tn = torch.searchsorted(chances_TC, torch.rand(len(count_T), samples, device=device))
    return (kept_Tn / (count_T.to(device)[:, None] * (1 - rate))).T


@cache
def _binomial(most: int, chance: float) -> Tensor:
    """Table (most + 1, most + 1): the probability of at most k successes in n trials, and values above 1 if k ≥ n."""
    n, k = torch.arange(most + 1.0, dtype=torch.float64)[:, None], torch.arange(most + 1.0, dtype=torch.float64)
    logs = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
    exactly = (logs + k * math.log(chance) + (n - k) * math.log(1 - chance)).exp()
    return torch.where(k < n, exactly.cumsum(dim=1), 2.0).float()


class Attention(nn.Module):
    """Multi-head attention with dropout on its weights."""

    def __init__(self, width: int, heads: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        xavier(self.in_proj_weight, self.out_proj)

    def forward(
        self, query_BTD: Tensor, source_BSD: Tensor, bias_TS: Tensor | None = None, count_T: Tensor | None = None
    ) -> Tensor:
        """Attention output (B, T, D).

        Args:
            bias_TS: added to the scores.
            count_T: for each query, how many equal steps the first step of the source stands for; on the CPU.
        """
        B, T, D = query_BTD.shape
        if query_BTD is source_BSD:
            projected = F.linear(query_BTD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q_BTD = F.linear(query_BTD, self.in_proj_weight[:D], self.in_proj_bias[:D])
            kv_BS2D = F.linear(source_BSD, self.in_proj_weight[D:], self.in_proj_bias[D:])
            projected = (q_BTD, *kv_BS2D.chunk(2, dim=-1))
        rate = self.dropout if self.training else 0.0
        if query_BTD.is_cuda:
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_TS, dropout_p=rate)
            return self.out_proj(read.transpose(1, 2).flatten(2))
        # Steps come last: a head's matrices are narrow, and products with a wide result are several times as fast.
        q, k, v = (x.transpose(1, 2).reshape(B * self.heads, D // self.heads, -1) for x in projected)
        bias_TS = q.new_zeros(T, k.shape[-1]) if bias_TS is None else bias_TS.to(q.dtype)
        size, blocks = max(BLOCK, -(-T // BLOCKS // LANES) * LANES), []
        for start in range(0, T, size):
            rows = slice(start, start + size)
            S = int((bias_TS[rows][-1] > -math.inf).sum())
            scores = torch.baddbmm(
                bias_TS[rows, :S], q[..., rows].transpose(1, 2), k[..., :S], alpha=(D // self.heads) ** -0.5
            )
            weights = scores.softmax(dim=-1)
            if rate:
                kept_NTS = kept(weights, rate)
                if count_T is not None:
                    kept_NTS[..., 0] = share_kept(count_T[rows], rate, len(weights), weights.device)
                weights = weights * kept_NTS
            blocks.append(v[..., :S] @ weights.transpose(1, 2))
        return self.out_proj(torch.cat(blocks, dim=-1).view(B, D, T).transpose(1, 2))

    def of_constant(self, source_D: Tensor, samples: int, count_T: Tensor) -> Tensor:
        """Attention output (n, T, D), or (D,) without dropout, over a source whose steps are all equal.

        A query's attention weights are then equal and sum to 1. After dropout, their sum depends only on how many of
        the `count_T` steps that the query sees are kept, so that number is drawn instead of a mask.
        """
        D = len(source_D)
        value_D = F.linear(source_D, self.in_proj_weight[2 * D :], self.in_proj_bias[2 * D :])
        if not self.training or not self.dropout:
            return self.out_proj(value_D)
        weight_NT = share_kept(count_T, self.dropout, samples * self.heads, source_D.device)
        weight_nTH1 = weight_NT.unflatten(0, (samples, self.heads)).transpose(1, 2)[..., None]
        return self.out_proj((weight_nTH1 * value_D.unflatten(0, (self.heads, -1))).flatten(2))


class Layer(nn.Module):
    """A pre-norm layer: attention, then a feed-forward network of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        xavier(self.fc1, self.fc2)

    def forward(
        self,
        x_BTD: Tensor,
        source_BSD: Tensor | None,
        bias_TS: Tensor,
        count_T: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """The layer's output (B, T, D), or with `last` that of the last step alone (B, 1, D).

        Args:
            source_BSD: None for self-attention. Query and source share one norm.
            bias_TS, count_T: see `Attention`.
        """
        normed_BTD = self.layer_norms[0](x_BTD)
        normed_BSD = normed_BTD if source_BSD is None else self.layer_norms[0](source_BSD)
        if last:
            x_BTD, normed_BTD, bias_TS = x_BTD[:, -1:], normed_BTD[:, -1:], bias_TS[-1:]
        return self._feed_forward(x_BTD + self._drop(self.self_attn(normed_BTD, normed_BSD, bias_TS, count_T)))

    def of_zero_source(self, x_nTD: Tensor, count_T: Tensor) -> Tensor:
        """The output for a source of zeros. It normalises to the norm's bias, so none of its steps is computed."""
        bias_D = self.layer_norms[0].get_parameter("bias")
        read = self.self_attn.of_constant(bias_D, len(x_nTD), count_T)
        return self._feed_forward(x_nTD + self._drop(read.expand_as(x_nTD)))

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self._drop(F.relu(self.fc1(self.layer_norms[1](x_BTD))))
        return x_BTD + self._drop(self.fc2(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, DROPOUT, self.training)


class Encoder(Tower):
    """An embedding, layers and a final LayerNorm, used as a cross-modal encoder or as a modality's tower.

    A tower is causal and runs on the outputs of the cross-modal encoders, with a method's slots.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)
        self.checkpointing = False

    def embed(self, input_b: Tensor, offset: int = 0) -> Tensor:
        """See the function `embed`."""
        return embed(input_b, self.training, offset)

    def cross(self, target_BRD: Tensor, source_BWD: Tensor, steps: int, source_steps: int) -> Tensor:
        """Output (B, R, D) for a modality that attends to another one, both embedded.

        Args:
            target_BRD: the last R of `steps`.
            source_BWD: the last W of `source_steps`. Earlier steps are zeros; if there are any, the first of the W is
                zero too and stands for them. With W = 0, all source steps are zeros.
        """
        R, W = target_BRD.shape[1], source_BWD.shape[1]
        count_R, bias_TS = seen(steps, source_steps)[steps - R :], mask(steps, source_steps, target_BRD.device)
        arguments: tuple[Any, ...]
        if source_steps == W:
            arguments = source_BWD, bias_TS[steps - R :]
        elif W:
            count_R = count_R.clamp(max=source_steps - W + 1)
            bias_RW = bias_TS[steps - R :, source_steps - W :].clone()
            bias_RW[:, 0] = count_R.log()
            arguments = source_BWD, bias_RW, count_R
        else:
            arguments = (count_R,)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            target_BRD = self._run(layer if W else layer.of_zero_source, target_BRD, *arguments)
        return self.layer_norm(target_BRD)

    def cross_zeros(self, samples: int, count_T: Tensor) -> Tensor:
        """Output (n, T, D) for steps of zeros that each see `count_T` zeros; without dropout, all steps are equal."""
        T, bias_D = len(count_T), self.layer_norm.bias
        one = (1, 1) if not self.training else (samples, T)
        x_nTD = bias_D.new_zeros(*one, len(bias_D))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x_nTD = self._run(layer.of_zero_source, x_nTD, count_T)
        return self.layer_norm(x_nTD).expand(samples, T, -1)

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Output (B, D) at the last step of `[replaced | inserted | dynamic | tokens | appended]`, with a causal mask.

        Slots in front are not steps: they get no scaling, position or dropout. Appended slots are embedded as further
        steps.
        """
        replaced, appended = slots.replaced_BmD, slots.appended_BmD
        x_BTD = tokens_bLD
        if appended is not None:
            x_BTD = torch.cat([x_BTD, self.embed(appended, offset=x_BTD.shape[1])], dim=1)
        front = [*replaced[:1], *slots.inserted_BmD[:1], *([] if slots.dynamic_BmD is None else [slots.dynamic_BmD])]
        x_BTD = torch.cat([*front, x_BTD], dim=1)
        P = sum(each.shape[1] for each in (*replaced[:1], *slots.inserted_BmD[:1]))
        bias_TT = mask(x_BTD.shape[1], x_BTD.shape[1], x_BTD.device)
        outputs_BPD: list[Tensor] = []
        depth = len(replaced)
        for k, layer in enumerate(self.layers):
            if 0 < k < depth:
                x_BTD = torch.cat([replaced[k], x_BTD[:, replaced[k].shape[1] :]], dim=1)
            if depth <= k < depth + len(slots.replay):
                x_BTD = torch.cat([x_BTD[:, :P] + slots.replay[k - depth](outputs_BPD), x_BTD[:, P:]], dim=1)
            x_BTD = self._run(layer, x_BTD, None, bias_TT, None, k + 1 == len(self.layers))
            if slots.replay and k < depth:
                outputs_BPD.append(x_BTD[:, :P])
        return self.layer_norm(x_BTD[:, -1])

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            layer = partial(checkpoint, layer, use_reentrant=False)
        return layer(*arguments)


def embed(x_BTD: Tensor, training: bool, offset: int = 0) -> Tensor:
    """Embeds steps (B, T, D): scales them, adds sinusoidal positions from `offset` + 1 on, and applies dropout.

    As published, a step whose first channel is exactly 0 counts as padding and gets no position.
    """
    T, D = x_BTD.shape[1:]
    position_TD = positions(offset + T, D, x_BTD.device)[offset:].to(x_BTD.dtype)
    return dropout(math.sqrt(D) * x_BTD + position_TD * (x_BTD[..., :1] != 0), EMBEDDING_DROPOUT, training)


@cache
def positions(steps: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (T, D) of steps 1 … T: sines, then cosines, and a 0 if D is odd."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=device) * (-math.log(10000) / (half - 1)))
    angle = torch.arange(1, steps + 1, device=device)[:, None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2))


@cache
def mask(steps: int, source_steps: int, device: torch.device) -> Tensor:
    """Additive mask (T, S): 0 where step i may attend to source step j, that is, where j ≤ i + |S - T|, else -∞."""
    return torch.full((steps, source_steps), -math.inf, device=device).triu(abs(source_steps - steps) + 1)


def seen(steps: int, source_steps: int) -> Tensor:
    """Number of source steps (T,) that each step sees, on the CPU."""
    return (torch.arange(steps) + abs(source_steps - steps) + 1).clamp(max=source_steps)


def xavier(*weights: Tensor | nn.Linear) -> None:
    """Initialises weights as published."""
    for weight in weights:
        if isinstance(weight, nn.Linear):
            nn.init.zeros_(weight.bias)
            weight = weight.weight
        nn.init.xavier_uniform_(weight)
