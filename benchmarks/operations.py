"""The floating-point operations of a step, counted by hand (METHOD.md sections 2 and 3).

A product of matrices (a×b)·(b×c) is 2abc operations. Element-wise work (norms, activations, softmax) is not counted.
What a causal mask hides is not counted, nor what flash attention computes a second time for its gradient. Towers of
missing modalities, text after `<end>` and the last block's positions that nobody reads do not count.
"""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from clip.modules.clip_dynamic_memory import RDN_HIDDEN
from clip.modules.interfaces import IMAGE_MISSING, TEXT_MISSING
from clip.modules.vision_transformer_memory import ClipArchitecture


def needed_operations(
    arch: ClipArchitecture,
    memory_length: int,
    memory_depth: int,
    samples: Sequence[tuple[int, int]],
    training: bool,
) -> float:
    """Operations of a step on samples (missing type, tokens up to `<end>`); in evaluation, of the forward pass alone.

    Gradients are those of MM-IMDb and Food-101: no frozen parameter has one.
    """
    m = memory_length // 3
    patches = (arch.image_size // arch.patch_size) ** 2
    image = 2 * patches * 3 * arch.patch_size**2 * arch.vision_width + _dynamic_slots(arch.vision_width, m, patches + 1)
    text = _dynamic_slots(arch.text_width, m, arch.context_length)
    total = 0.0
    for missing_type, length in samples:
        if missing_type != IMAGE_MISSING:
            keys = 3 * m + patches + 1
            total += image + _blocks(arch.vision_width, arch.vision_layers, keys, training, causal=False)
        if missing_type != TEXT_MISSING:
            total += text + _blocks(arch.text_width, arch.text_layers, 3 * m + length, training, causal=True)
    # With gradients of inputs and weights.
    return total + (3 if training else 1) * len(samples) * _learner(arch, m, memory_depth)


def _dynamic_slots(D: int, m: int, tokens: int) -> float:
    """One-head attention of m queries over all tokens; nothing of it is trained."""
    return 2 * tokens * 2 * D * D + 2 * m * 2 * D * D + 2 * 2 * m * tokens * D


def _blocks(D: int, layers: int, keys: int, training: bool, causal: bool) -> float:
    """A tower's blocks for one sample; their weights are frozen, so that inputs alone have gradients."""
    total = 0.0
    for block in range(layers):
        outputs = 1 if block + 1 == layers else keys
        products = 2 * keys * 2 * D * D + 2 * outputs * D * D + 2 * outputs * 9 * D * D
        seen = sum(range(keys - outputs + 1, keys + 1)) if causal else outputs * keys
        attention = 2 * 2 * seen * D
        total += products * (2 if training else 1) + attention * (3 if training else 1)
    return total


def _learner(arch: ClipArchitecture, m: int, depth: int) -> float:
    """The forward pass for one sample."""
    d_v, d_t, E = arch.vision_width, arch.text_width, arch.embed_dim

    def rdn(width_in: int, width_out: int) -> int:
        skip = width_in * width_out if width_in != width_out else 0
        return 2 * m * (width_in * RDN_HIDDEN + RDN_HIDDEN * width_out + skip)

    return sum(depth * rdn(d_v + d_t, width) + rdn(E, width) for width in (d_v, d_t))


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
