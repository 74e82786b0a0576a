"""The dynamic queries of published checkpoints, which do not hold them (docs/method.md section 6, point 2).

The published code draws them in the constructor of its model, right after it has seeded torch, and never saves them.
Training and test with the same seed have the same ones, and so has whoever repeats the draws.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import AVAILABLE, DYNAMIC_STD
from clip.modules.vision_transformer_memory import ClipArchitecture


def published_queries(architecture: ClipArchitecture, slots: int, seed: int) -> dict[str, Tensor]:
    """The queries of both towers, (slots, 1, width) each, bit for bit; names as in a learner's `dynamic`.

    Args:
        slots: m, for each missing type.
        seed: that of the published run; its default is 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(_construct(architecture, slots))


def _construct(arch: ClipArchitecture, slots: int) -> Iterator[tuple[str, Tensor]]:
    """Draws what the constructor draws, in its order. Nothing but the queries is used; norms draw nothing."""
    d, patch = arch.vision_width, arch.patch_size
    nn.Conv2d(3, d, patch, patch, bias=False)
    torch.randn(d)
    torch.randn((arch.image_size // patch) ** 2 + 1, d)
    yield from _blocks("image", d, arch.vision_heads, arch.vision_layers, slots)
    torch.randn(d, arch.embed_dim)
    yield from _blocks("text", arch.text_width, arch.text_heads, arch.text_layers, slots)


def _blocks(tower: str, width: int, heads: int, layers: int, slots: int) -> Iterator[tuple[str, Tensor]]:
    for block in range(layers):
        nn.MultiheadAttention(width, heads)
        nn.Linear(width, 4 * width)
        nn.Linear(4 * width, width)
        if block == 0:
            nn.MultiheadAttention(width, 1)
            for available in AVAILABLE:
                query = nn.init.normal_(torch.empty(slots, 1, width), std=DYNAMIC_STD)
                yield f"{tower}.queries_{available}", query
