"""Each piece of work that is left out, put back alone: what it would cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.classifier import PromptedCLIP
from clip.modules.clip_dynamic_memory import RDN
from clip.modules.method import ALL_TYPES
from clip.modules.vision_transformer_memory import (
    MLP,
    DynamicMemoryBlock,
    MemoryPrefix,
    Passage,
    ResidualAttentionBlock,
    SlotAttention,
    TowerMemory,
)


def whole_last_block(
    self: ResidualAttentionBlock, parts: Sequence[Tensor], ahead: Tensor | None, at_B: Tensor, causal: bool
) -> Tensor:
    """Computes all positions of the last block."""
    x_BLD = self(parts, ahead, causal)
    return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), at_B]


def replaced_slots_computed(
    self: Passage, block: ResidualAttentionBlock, depth: int, parts: Sequence[Tensor]
) -> tuple[list[Tensor], None]:
    """Computes the output of private slots although they are replaced right after."""
    replaced, inserted, _ = self._memory.groups
    if depth >= len(replaced):
        return list(parts), None
    m = replaced[depth].shape[1]
    return [replaced[depth], *([parts[0][:, m:]] if depth else [*inserted, *parts])], None


def input_with_gradient(
    self: DynamicMemoryBlock, parts: Sequence[Tensor], ahead: Tensor | None, causal: bool
) -> Tensor:
    """Computes gradients of the first block's frozen input."""
    return ResidualAttentionBlock.forward(self, [torch.cat(list(parts), dim=1)], ahead, causal)


def three_pass_quick_gelu(self: MLP, x: Tensor) -> Tensor:
    """x·sigmoid(1.702x) as it is written."""
    hidden = F.linear(x, self.c_fc.weight, self.c_fc.bias)
    return F.linear(hidden * torch.sigmoid(1.702 * hidden), self.c_proj.weight, self.c_proj.bias)


def keys_of_all_tokens(self: SlotAttention, queries_TmD: Tensor, tokens_BLD: Tensor, row_B: Tensor) -> Tensor:
    """Keys and values of all tokens for the dynamic slots."""
    return self.out_proj(self.attend(self.queries(queries_TmD)[row_B], self.keys_values(tokens_BLD)))


def learner_per_sample(self: RDN, x: Tensor, row_B: Tensor | None = None) -> Tensor:
    """Computes what precedes the first dropout for every sample."""
    x = x if row_B is None else x[row_B]
    return self.fc2(self.dropout(F.gelu(self.layernorm(self.fc1(x))))) + self.skip(x)


def memory_anew(self: PromptedCLIP) -> tuple[TowerMemory, MemoryPrefix]:
    """The learner and the prefix anew for every evaluation batch."""
    self._kept = None
    return _MEMORY_OF_TYPES(self)


def slots_per_sample(self: PromptedCLIP) -> tuple[TowerMemory, TowerMemory]:
    """Carries the text tower's private and shared slots through it for every sample."""
    memory = self.method.of_types(ALL_TYPES)
    return memory.image, memory.text


_MEMORY_OF_TYPES = PromptedCLIP._memory_of_types

PATCHES: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "read-out alone in the last block": (ResidualAttentionBlock, "read_out", whole_last_block),
    "slots that are replaced have no output": (Passage, "before", replaced_slots_computed),
    "no gradient for the first block's frozen input": (DynamicMemoryBlock, "forward", input_with_gradient),
    "QuickGELU as silu, its factors in the products": (MLP, "forward", three_pass_quick_gelu),
    "dynamic slots without keys and values of the tokens": (SlotAttention, "forward", keys_of_all_tokens),
    "learner: one row per type up to the first dropout": (RDN, "forward", learner_per_sample),
    "learner and prefix kept between evaluation batches": (PromptedCLIP, "_memory_of_types", memory_anew),
    "text prefix once per type": (PromptedCLIP, "_memory_of_types", slots_per_sample),
}
"""What is left out, and what puts it back."""


@contextmanager
def put_back(name: str) -> Iterator[None]:
    """Runs the block with the work of `name` put back."""
    owner, attribute, replacement = PATCHES[name]
    with patch.object(owner, attribute, replacement):
        yield
