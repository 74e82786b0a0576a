"""CLIP's two towers with places for slots (METHOD.md sections 3 and 8).

Shape suffixes: B batch, L sequence, D width, H heads, m slots of one group, P positions ahead, E joint embedding width.

A tower without slots is OpenAI's CLIP, parameter names included. Which slots enter which block is what a method says
(`TowerMemory`); the sequence of a block is `[replaced slots, inserted slots, dynamic slots, input tokens]`. REP's
private slots are replaced ones, its shared slots are inserted before the first block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

COMPLETE, TEXT_MISSING, IMAGE_MISSING = 0, 1, 2
RECOMPILE_LIMIT = 64
"""Variants of a function that torch.compile makes before it gives up on compiling it."""


@dataclass(frozen=True)
class ClipArchitecture:
    """Sizes of a CLIP with two transformer towers; nothing else in the code knows them."""

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int
    vocab_size: int
    embed_dim: int
    activation: str
    """`quick_gelu` (OpenAI) or `gelu` (most open_clip weights)."""


class DynamicSlots(NamedTuple):
    """Slots that the first block reads from the tower's input tokens, and the names of what reads them."""

    slots: int
    attention: str
    queries: tuple[str, str, str]
    """Buffers by missing type; the published names say which modality is left."""


class Replay(Protocol):
    """What slots get back, before deeper blocks, of what earlier blocks made of them."""

    steps: int
    """Blocks, after those that replace slots, before which something is added."""

    def __call__(self, outputs_BPD: Sequence[Tensor], step: int) -> Tensor:
        """(B, P, D) to add to the replaced and inserted slots, of what each replacing block made of them."""


class TowerMemory(NamedTuple):
    """What a method gives one tower: a row for each sample or each missing type. Lists go by block, from the first."""

    replaced_BmD: Sequence[Tensor] = ()
    """Slots in place of those of the block before; the last ones go on through the later blocks."""
    inserted_BmD: Sequence[Tensor] = ()
    """Slots that come in before a block, in front of what is there, and go on."""
    prefixed_BP2D: Sequence[Tensor] = ()
    """Keys and values that all positions of a block see, without positions of their own."""
    replay: Replay | None = None

    def rows(self, index: Tensor) -> "TowerMemory":
        """The memory of the rows `index`, in that order."""
        replaced, inserted, prefixed = ([slots[index] for slots in group] for group in self.groups)
        return TowerMemory(replaced, inserted, prefixed, self.replay)

    @property
    def groups(self) -> tuple[Sequence[Tensor], ...]:
        """All tensors, by what they are for."""
        return self.replaced_BmD, self.inserted_BmD, self.prefixed_BP2D


class MemoryPrefix(NamedTuple):
    """The slots of a causal tower on their way through it, as keys and values for what follows.

    They come first, so that nothing that a sample brings can change them: in evaluation they are the same for all
    samples of a missing type.
    """

    keys_values_BP2D: Sequence[Tensor | None]
    """One tensor per block of the tower; None where it sees no slots."""

    def rows(self, index: Tensor) -> "MemoryPrefix":
        """The prefix of the rows `index`, in that order."""
        return MemoryPrefix([None if slots is None else slots[index] for slots in self.keys_values_BP2D])


NO_MEMORY = TowerMemory()


class Attention(nn.Module):
    """Multi-head attention with the parameter names and initial values of `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def queries_keys_values(self, x_BLD: Tensor) -> Tensor:
        """(B, L, 3D)."""
        return F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)

    def keys_values(self, x_BLD: Tensor) -> Tensor:
        """(B, L, 2D)."""
        D = x_BLD.shape[-1]
        return F.linear(x_BLD, self.in_proj_weight[D:], self.in_proj_bias[D:])

    def queries(self, x_BND: Tensor) -> Tensor:
        """(B, N, D)."""
        D = x_BND.shape[-1]
        return F.linear(x_BND, self.in_proj_weight[:D], self.in_proj_bias[:D])

    def attend(
        self, query_BND: Tensor, keys_values_BL2D: Tensor, *, causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """What the heads see, (B, N, D), for `out_proj`; `causal` needs N = L, `mask` is True where one may look."""
        key_BLD, value_BLD = keys_values_BL2D.chunk(2, dim=-1)
        q_BHND, k_BHLD, v_BHLD = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query_BND, key_BLD, value_BLD)
        )
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHLD, v_BHLD, attn_mask=mask, is_causal=causal)
        return out_BHND.transpose(1, 2).flatten(2)


class SlotAttention(Attention):
    """One-head attention of a few fixed queries over many tokens, without keys and values of the tokens.

    With few queries it is cheaper to carry each query into the space of the tokens, and the mean of the tokens out of
    it: q·(W_k x + b_k) = (W_k^T q)·x + a constant that the softmax takes away, and Σ a_i (W_v x_i + b_v) =
    W_v Σ a_i x_i + b_v.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, heads=1)

    def forward(self, queries_TmD: Tensor, tokens_BLD: Tensor, row_B: Tensor) -> Tensor:
        """What the queries of row `row_B` of each sample read from its tokens, (B, m, D)."""
        D = tokens_BLD.shape[-1]
        weight_k_DD, weight_v_DD = self.in_proj_weight[D : 2 * D], self.in_proj_weight[2 * D :]
        carried_TmD = self.queries(queries_TmD) @ weight_k_DD * D**-0.5
        score_BmL = carried_TmD[row_B] @ tokens_BLD.transpose(1, 2)
        mean_BmD = score_BmL.softmax(dim=-1) @ tokens_BLD
        return self.out_proj(F.linear(mean_BmD, weight_v_DD, self.in_proj_bias[2 * D :]))


class MLP(nn.Module):
    """The feed-forward half of a block, with OpenAI's QuickGELU x·sigmoid(1.702x) or GELU.

    QuickGELU is silu(1.702x) / 1.702, one pass over memory instead of three; the two factors ride along in the matrix
    products.
    """

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.activate, self.factor = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        x_ND = x.flatten(end_dim=-2)
        factor = self.factor
        hidden_N4D = torch.addmm(self.c_fc.bias, x_ND, self.c_fc.weight.T, beta=factor, alpha=factor)
        out_ND = torch.addmm(self.c_proj.bias, self.activate(hidden_N4D), self.c_proj.weight.T, alpha=1 / factor)
        return out_ND.view(x.shape)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())  # without gradients nobody needs x any more


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "quick_gelu": (_silu, 1.702),
    "gelu": (F.gelu, 1.0),
}
"""(f, s) by name: the activation of x is f(s·x) / s."""


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block.

    Its sequence comes in parts, so that nothing is joined, differentiated or computed in vain: first, maybe, `ahead`,
    keys and values of positions whose output nobody needs, then the tensors `parts`. Whatever the type of the residual
    stream, the matrix products are done in the type that the weights are held in.
    """

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def keys_values(self, x_BPD: Tensor) -> Tensor:
        """What positions that are only looked at bring, (B, P, 2D): the `ahead` of `forward`."""
        return self.attn.keys_values(self._normed(self.ln_1, x_BPD))

    def forward(self, parts_BLD: Sequence[Tensor], ahead_BP2D: Tensor | None, causal: bool) -> Tensor:
        """Output of all positions of the parts, joined: (B, L, D)."""
        x_BLD = _join(parts_BLD)
        L, D = x_BLD.shape[1:]
        query_BLD, keys_values = _join([self._project(part) for part in parts_BLD]).split((D, 2 * D), dim=-1)
        mask = None
        if ahead_BP2D is not None:
            keys_values = torch.cat([ahead_BP2D, keys_values], dim=1)
            if causal:
                P = ahead_BP2D.shape[1]
                mask = torch.ones(L, P + L, dtype=torch.bool, device=x_BLD.device).tril(P)
        seen_BLD = self.attn.attend(query_BLD, keys_values, causal=causal and mask is None, mask=mask)
        return self._finish(x_BLD, seen_BLD)

    def read_out(self, parts_BLD: Sequence[Tensor], ahead_BP2D: Tensor | None, at_B: Tensor, causal: bool) -> Tensor:
        """Output of the one position `at_B` (counted over the joined parts) of each sample, (B, D)."""
        x_BLD = _join(parts_BLD)
        row_B = torch.arange(len(x_BLD), device=x_BLD.device)
        normed_BLD = self._normed(self.ln_1, x_BLD)
        keys_values = self.attn.keys_values(normed_BLD)
        mask = None
        if causal:
            mask = torch.arange(x_BLD.shape[1], device=x_BLD.device) <= at_B[:, None, None, None]
        if ahead_BP2D is not None:
            keys_values = torch.cat([ahead_BP2D, keys_values], dim=1)
            if mask is not None:
                mask = F.pad(mask, (ahead_BP2D.shape[1], 0), value=True)
        query_B1D = self.attn.queries(normed_BLD[row_B, at_B][:, None])
        return self._finish(x_BLD[row_B, at_B], self.attn.attend(query_B1D, keys_values, mask=mask)[:, 0])

    def compile_parts(self) -> None:
        """Compiles what is around the attention, which fuses its passes over memory."""
        # Compiled code is kept by function: for each tower, with and without gradients, in training and evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        self._project = torch.compile(self._project, dynamic=True)  # type: ignore[method-assign]
        self._finish = torch.compile(self._finish, dynamic=True)  # type: ignore[method-assign]

    def _project(self, x_BLD: Tensor) -> Tensor:
        return self.attn.queries_keys_values(self._normed(self.ln_1, x_BLD))

    def _finish(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attn.out_proj(seen)
        return x + self.mlp(self._normed(self.ln_2, x))

    def _normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return norm(x).to(self.attn.in_proj_weight.dtype)


class DynamicMemoryBlock(ResidualAttentionBlock):
    """The first block of a tower: it also reads the dynamic slots from the input tokens.

    The queries are buffers, never trained. The published code kept them as plain tensors, so that its checkpoints
    do not hold them (METHOD.md section 6, point 2).
    """

    def __init__(self, width: int, heads: int, activation: str, dynamic: DynamicSlots) -> None:
        super().__init__(width, heads, activation)
        self.dynamic = dynamic
        attention = SlotAttention(width)
        with torch.no_grad():
            # Where the task leaves this attention frozen at its random start, a checkpoint has to carry it:
            # values that bfloat16 holds exactly take half the space there (see clip/checkpoint.py).
            for parameter in attention.parameters():
                parameter.copy_(parameter.bfloat16())
        self.add_module(dynamic.attention, attention)
        for name in dynamic.queries:
            self.register_buffer(name, torch.randn(dynamic.slots, 1, width) * 0.02)

    def added_names(self) -> list[str]:
        """Names of its entries that a block of CLIP does not have."""
        beginnings = (f"{self.dynamic.attention}.", *self.dynamic.queries)
        return [name for name in self.state_dict() if name.startswith(beginnings)]

    def dynamic_slots(self, tokens_BLD: Tensor, missing_type_B: Tensor) -> Tensor:
        """Slots read from all input tokens by the queries of each sample's missing type, (B, m, D)."""
        queries_3mD = torch.stack([self.get_buffer(name).squeeze(1) for name in self.dynamic.queries])
        slots: Tensor = self.get_submodule(self.dynamic.attention)(queries_3mD, tokens_BLD, missing_type_B)
        return slots


class Passage:
    """The slots of one pass through the blocks of a tower.

    What a block makes of slots that are replaced right after it nobody reads, so those are keys and values only, unless
    they are replayed later.
    """

    def __init__(self, memory: TowerMemory) -> None:
        self._memory = memory
        self._n_inserted = 0
        self._outputs_BPD: list[Tensor] = []

    def before(
        self, block: ResidualAttentionBlock, depth: int, parts_BLD: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """The parts of the sequence of block `depth`, given what the one before left, and what is ahead of them."""
        replaced, inserted, prefixed = self._memory.groups
        dtype = block.attn.in_proj_weight.dtype
        parts, ahead = list(parts_BLD), [keys_values.to(dtype) for keys_values in prefixed[depth : depth + 1]]
        if depth < len(inserted):
            parts.insert(0, inserted[depth])
            self._n_inserted += inserted[depth].shape[1]
        if depth < len(replaced):
            if depth + 1 < len(replaced) and self._memory.replay is None:
                ahead.append(block.keys_values(replaced[depth]))
            else:
                parts.insert(0, replaced[depth])
        elif self._outputs_BPD and depth - len(replaced) < self._memory.replay.steps:  # type: ignore[union-attr]
            [x_BLD] = parts
            again_BPD = self._memory.replay(self._outputs_BPD, depth - len(replaced))  # type: ignore[misc]
            P = again_BPD.shape[1]
            parts = [x_BLD[:, :P] + again_BPD, x_BLD[:, P:]]
        return parts, _join(ahead) if ahead else None

    def after(self, depth: int, x_BLD: Tensor) -> Tensor:
        """What goes on to the next block, of what block `depth` gave."""
        replaced = self._memory.replaced_BmD
        if self._memory.replay is None or depth >= len(replaced):
            return x_BLD
        m = replaced[depth].shape[1]
        self._outputs_BPD.append(x_BLD[:, : m + self._n_inserted])
        return x_BLD[:, m:] if depth + 1 < len(replaced) else x_BLD


class PrefixPassage(Passage):
    """A pass of samples whose slots went through the tower before."""

    def __init__(self, prefix: MemoryPrefix) -> None:
        super().__init__(TowerMemory())
        self._prefix = prefix

    def before(
        self, block: ResidualAttentionBlock, depth: int, parts_BLD: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """The parts as they are, and the prefix ahead of them."""
        return list(parts_BLD), self._prefix.keys_values_BP2D[depth]


class Transformer(nn.Module):
    """The blocks of a tower, and the slots on their way through them. Of the last block only one position is read."""

    def __init__(
        self, width: int, layers: int, heads: int, activation: str, dynamic: DynamicSlots | None, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.checkpointing = False
        """Activations of a block are computed again for its gradient instead of kept."""
        first = (
            ResidualAttentionBlock(width, heads, activation)
            if dynamic is None
            else DynamicMemoryBlock(width, heads, activation, dynamic)
        )
        rest = [ResidualAttentionBlock(width, heads, activation) for _ in range(layers - 1)]
        self.resblocks = nn.ModuleList([first, *rest])

    def dynamic_slots(self, tokens_BLD: Tensor, missing_type_B: Tensor | None) -> list[Tensor]:
        """Slots that the first block reads from the tower's input tokens: one tensor (B, m, D), or none."""
        first = self.resblocks[0]
        if missing_type_B is None or not isinstance(first, DynamicMemoryBlock):
            return []
        return [first.dynamic_slots(tokens_BLD, missing_type_B)]

    def forward(
        self,
        parts_BLD: Sequence[Tensor],
        at_B: Tensor,
        memory: TowerMemory | MemoryPrefix,
    ) -> Tensor:
        """What the last block gives, (B, D), for the positions `at_B` of the last of the parts."""
        passage = PrefixPassage(memory) if isinstance(memory, MemoryPrefix) else Passage(memory)
        L = parts_BLD[-1].shape[1]
        *blocks, last = self._blocks()
        for depth, block in enumerate(blocks):
            parts, ahead_BP2D = passage.before(block, depth, parts_BLD)
            parts_BLD = [passage.after(depth, self._run(block, parts, ahead_BP2D))]
        parts, ahead_BP2D = passage.before(last, len(blocks), parts_BLD)
        before_tokens = sum(part.shape[1] for part in parts) - L
        return last.read_out(parts, ahead_BP2D, before_tokens + at_B, self.causal)

    def prefix(self, memory: TowerMemory) -> MemoryPrefix:
        """The slots alone, through all blocks of a causal tower."""
        assert self.causal
        passage, prefix = Passage(memory), []
        parts: list[Tensor] = []
        for depth, block in enumerate(self._blocks()):
            parts, ahead_BP2D = passage.before(block, depth, parts)
            seen = [*([] if ahead_BP2D is None else [ahead_BP2D]), *map(block.keys_values, parts)]
            prefix.append(_join(seen) if seen else None)
            if parts and depth + 1 < len(self.resblocks):
                parts = [passage.after(depth, block(parts, ahead_BP2D, self.causal))]
        return MemoryPrefix(prefix)

    def _blocks(self) -> list[ResidualAttentionBlock]:
        return cast(list[ResidualAttentionBlock], list(self.resblocks))

    def _run(self, block: ResidualAttentionBlock, parts: list[Tensor], ahead_BP2D: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # Blocks draw nothing at random.
            return checkpoint(block, parts, ahead_BP2D, self.causal, use_reentrant=False, preserve_rng_state=False)
        return block(parts, ahead_BP2D, self.causal)


class VisionTransformerMemory(nn.Module):
    """The image tower."""

    def __init__(self, arch: ClipArchitecture, dynamic: DynamicSlots | None = None) -> None:
        super().__init__()
        width = arch.vision_width
        grid = arch.image_size // arch.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=arch.patch_size, stride=arch.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, arch.vision_layers, arch.vision_heads, arch.activation, dynamic, causal=False
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def embed(self, image_B3RR: Tensor) -> Tensor:
        """Input tokens of normalised images (B, 3, R, R), the class token first: (B, L, D)."""
        patches_BLD = self.conv1(image_B3RR.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(patches_BLD), 1, -1)
        tokens_BLD = torch.cat([class_B1D, patches_BLD.to(class_B1D.dtype)], dim=1) + self.positional_embedding
        return self.ln_pre(tokens_BLD)

    def forward(
        self,
        image_B3RR: Tensor,
        memory: TowerMemory | MemoryPrefix = NO_MEMORY,
        missing_type_B: Tensor | None = None,
    ) -> Tensor:
        """Features of normalised images (B, 3, R, R), before any masking: (B, E)."""
        return self.encode(self.embed(image_B3RR), memory, missing_type_B)

    def encode(self, tokens_BLD: Tensor, memory: TowerMemory | MemoryPrefix, missing_type_B: Tensor | None) -> Tensor:
        """Features of input tokens (B, L, D): (B, E)."""
        parts_BLD = [*self.transformer.dynamic_slots(tokens_BLD, missing_type_B), tokens_BLD]
        class_token_B = torch.zeros(len(tokens_BLD), dtype=torch.long, device=tokens_BLD.device)
        return self.ln_post(self.transformer(parts_BLD, class_token_B, memory)) @ self.proj


class TextTransformerMemory(nn.Module):
    """The text tower. Its mask is causal over the whole sequence, slots first."""

    def __init__(self, arch: ClipArchitecture, dynamic: DynamicSlots | None = None) -> None:
        super().__init__()
        width = arch.text_width
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(arch.context_length, width) * 0.01)
        self.transformer = Transformer(width, arch.text_layers, arch.text_heads, arch.activation, dynamic, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Input tokens of token ids (B, 77), padding too: (B, 77, D)."""
        return self.token_embedding(ids_BL) + self.positional_embedding

    def forward(
        self,
        ids_BL: Tensor,
        memory: TowerMemory | MemoryPrefix = NO_MEMORY,
        missing_type_B: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Features of token ids (B, 77), before any masking: (B, E). The highest id, `<end>`, is the read-out."""
        return self.encode(self.embed(ids_BL), memory, missing_type_B, end_positions(ids_BL), length)

    def encode(
        self,
        tokens_BLD: Tensor,
        memory: TowerMemory | MemoryPrefix,
        missing_type_B: Tensor | None,
        end_B: Tensor,
        length: int | None,
    ) -> Tensor:
        """Features of input tokens (B, 77, D) read out at `end_B`: (B, E).

        Args:
            length: positions up to the last `<end>` of the batch, for who knows it without asking the device; the mask
                is causal, so that what comes after cannot matter. The dynamic slots read all 77 positions all the same.
        """
        parts_BLD = [*self.transformer.dynamic_slots(tokens_BLD, missing_type_B), tokens_BLD[:, :length]]
        return self.ln_final(self.transformer(parts_BLD, end_B, memory)) @ self.text_projection


def end_positions(ids_BL: Tensor) -> Tensor:
    """Positions (B,) of `<end>`, the highest token id; the first one where there are several."""
    return ids_BL.argmax(dim=-1)  # argmax returns the first of equal values


def _join(parts_BLD: Sequence[Tensor]) -> Tensor:
    return parts_BLD[0] if len(parts_BLD) == 1 else torch.cat(list(parts_BLD), dim=1)
