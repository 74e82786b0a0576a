"""Reproduces the dynamic queries that published checkpoints lack (docs/method.md section 6, point 2).

The published code draws them in its model's constructor, right after seeding torch, and never saves them. Training and
test with the same seed therefore have the same queries, and repeating the draws reproduces them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clip.modules.clip_dynamic_memory import AVAILABLE, DYNAMIC_STD
from clip.modules.vision_transformer_memory import ClipArchitecture


def published_queries(architecture: ClipArchitecture, slots: int, seed: int) -> dict[str, Tensor]:
    """The queries (slots, 1, width) of both towers, bit for bit, under their names in a learner's `dynamic`.

    Args:
        slots: number of slots m for each missing type.
        seed: seed of the published run, which is 0 by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(_construct(architecture, slots))


def _construct(arch: ClipArchitecture, slots: int) -> Iterator[tuple[str, Tensor]]:
    """Repeats the constructor's draws in order and yields the queries among them; norms draw nothing."""
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
