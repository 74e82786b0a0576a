"""The dynamic queries of published checkpoints, which do not hold them (METHOD.md section 6, point 2).

The published code draws them in the constructor of its model, right after it has seeded torch, and never saves them.
Training and test with the same seed have the same ones, and so has whoever repeats the draws.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import ClipArchitecture

STD = 0.02


def published_queries(architecture: ClipArchitecture, slots: int, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """The queries of both towers, (slots, 1, width) each, by their names in a checkpoint, bit for bit.

    Args:
        slots: m, for each missing type.
        names: those of the queries in a block, in the order complete, image, text.
        seed: that of the published run; its default is 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {f"model.{tower}.{name}": query for tower, name, query in _construct(architecture, slots, names)}


def _construct(arch: ClipArchitecture, slots: int, names: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Draws what the constructor draws, in its order. Nothing but the queries is used; norms draw nothing."""
    d, patch = arch.vision_width, arch.patch_size
    nn.Conv2d(3, d, patch, patch, bias=False)
    torch.randn(d)
    torch.randn((arch.image_size // patch) ** 2 + 1, d)
    yield from _blocks("image_encoder", d, arch.vision_heads, arch.vision_layers, slots, names)
    torch.randn(d, arch.embed_dim)
    yield from _blocks("text_encoder", arch.text_width, arch.text_heads, arch.text_layers, slots, names)


def _blocks(
    tower: str, width: int, heads: int, layers: int, slots: int, names: Sequence[str]
) -> Iterator[tuple[str, str, Tensor]]:
    for block in range(layers):
        nn.MultiheadAttention(width, heads)
        nn.Linear(width, 4 * width)
        nn.Linear(4 * width, width)
        if block == 0:
            nn.MultiheadAttention(width, 1)
            for name in names:
                yield tower, f"transformer.resblocks.0.{name}", nn.init.normal_(torch.empty(slots, 1, width), std=STD)
