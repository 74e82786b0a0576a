"""The floating-point operations that the exact result takes, counted by hand (METHOD.md sections 2 and 3).

A product of matrices (a×b)·(b×c) is 2abc operations. Element-wise work (norms, activations, softmax) is not counted.
What a causal mask hides is not counted, nor what flash attention computes a second time for its gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from clip.modules.clip_dynamic_memory import RDN_HIDDEN
from clip.modules.vision_transformer_memory import IMAGE_MISSING, TEXT_MISSING, ClipArchitecture


@dataclass(frozen=True)
class Operations:
    """Of one pass."""

    forward: float
    backward: float

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.forward + other.forward, self.backward + other.backward)


def needed_operations(
    arch: ClipArchitecture,
    memory_length: int,
    memory_depth: int,
    samples: Sequence[tuple[int, int]],
    training: bool,
) -> float:
    """Operations of a step on samples (missing type, tokens up to `<end>`); in evaluation, of the forward pass alone.

    In evaluation the learner's and the prefix' share is left out, which is paid once for all batches. Gradients are
    those of MM-IMDb and Food-101: no frozen parameter has one.
    """
    m = memory_length // 3
    patches = (arch.image_size // arch.patch_size) ** 2
    total = Operations(0, 0)
    for missing_type, length in samples:
        if missing_type != IMAGE_MISSING:
            patch_values = 3 * arch.patch_size**2
            total += Operations(2 * patches * patch_values * arch.vision_width, 0)
            total += _tower(arch.vision_width, arch.vision_layers, patches + 1, m, memory_depth, patches + 1, False, 0)
        if missing_type != TEXT_MISSING:
            prefix = 0 if training else 2 * m
            context = arch.context_length
            total += _tower(arch.text_width, arch.text_layers, length, m, memory_depth, context, True, prefix)
    if not training:
        return total.forward
    learner = _learner(arch, m, memory_depth, len(samples), len({missing_type for missing_type, _ in samples}))
    return total.forward + total.backward + learner


def _tower(
    width: int, layers: int, tokens: int, m: int, depth: int, read_by_dynamic: int, causal: bool, prefix: int
) -> Operations:
    """A tower's blocks for one sample; `prefix` slots come as keys and values that are there already."""
    D = width
    total = Operations(2 * 2 * m * read_by_dynamic * D, 0)
    keys = 3 * m + tokens
    for block in range(layers):
        silent = prefix or (m if block + 1 < depth else 0)  # looked at, but with no output
        outputs = 1 if block + 1 == layers else keys - silent
        computed = keys - prefix  # positions whose keys and values are computed here
        keys_values = 2 * computed * 2 * D * D
        queries = 2 * outputs * D * D
        seen = sum(range(keys - outputs + 1, keys + 1)) if causal and outputs > 1 else outputs * keys
        attention = 2 * 2 * seen * D
        rest = 2 * outputs * (D * D + 8 * D * D)
        # The first block's input is frozen: only its private and shared slots want a gradient.
        share = 2 * m / keys if block == 0 else 1
        total += Operations(
            keys_values + queries + attention + rest, (keys_values + queries) * share + 2 * attention + rest
        )
    return total


def _learner(arch: ClipArchitecture, m: int, depth: int, samples: int, types: int) -> float:
    """Forward and, for inputs and weights, backward; what precedes the first dropout is shared by a missing type."""
    d_v, d_t, E, hidden = arch.vision_width, arch.text_width, arch.embed_dim, RDN_HIDDEN
    total = 0
    for width in (d_v, d_t):
        inner, outer = (d_v + d_t) * (hidden + width), hidden * width
        total += 2 * m * (types * inner + samples * outer)  # depth 0
        total += 2 * m * samples * (depth - 1) * (inner + outer)
        skip = E * width if width != E else 0
        total += 2 * m * (types * (E * hidden + skip) + samples * outer)  # the shared slots
    return 3 * total


def counted_operations(work: Callable[[], object]) -> int:
    """Operations of products as `work` runs them on a CPU; attention is counted whole, also what a mask hides."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counted = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        work()
    return counter.get_total_flops()
