"""CLIP's two towers with places for memory slots (METHOD.md section 3).

Shape suffixes: B batch, L sequence, D width, H heads, m slots of one group, E joint embedding width.

A tower without memory is OpenAI's CLIP, parameter names included. With memory, its sequence is
`[private, shared, dynamic, input tokens]`; the private slots are replaced before each of the first `depth` blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPLETE, TEXT_MISSING, IMAGE_MISSING = 0, 1, 2
DYNAMIC_QUERIES = ("memories_dynamic_complete", "memories_dynamic_image", "memories_dynamic_text")
"""Buffer of dynamic queries by missing type; the published names say which modality is left."""


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


class TowerMemory(NamedTuple):
    """What the memory learner gives one tower, for the samples in the order the tower sees them."""

    private_BmD: list[Tensor]
    """One tensor per layer of the memory depth."""
    shared_BmD: Tensor

    def rows(self, index: Tensor) -> "TowerMemory":
        """The memory of the samples `index`, in that order."""
        return TowerMemory([private[index] for private in self.private_BmD], self.shared_BmD[index])


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU, x·sigmoid(1.702x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


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

    def forward(self, query_BND: Tensor, context_BLD: Tensor, causal: bool = False) -> Tensor:
        """Attends from each query position to the context, (B, N, D); `causal` needs N = L."""
        D = query_BND.shape[-1]
        if query_BND is context_BLD:
            q, k, v = F.linear(query_BND, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q = F.linear(query_BND, self.in_proj_weight[:D], self.in_proj_bias[:D])
            k, v = F.linear(context_BLD, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, dim=-1)
        q_BHND, k_BHLD, v_BHLD = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHLD, v_BHLD, is_causal=causal)
        return self.out_proj(out_BHND.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.activation = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x_BLD)))


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_BLD: Tensor, causal: bool) -> Tensor:
        normed_BLD = self.ln_1(x_BLD)
        x_BLD = x_BLD + self.attn(normed_BLD, normed_BLD, causal)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class DynamicMemoryBlock(ResidualAttentionBlock):
    """The first block of a tower: it also reads the dynamic slots from the input tokens.

    The queries are buffers, never trained. The published code kept them as plain tensors, so that its checkpoints
    do not hold them (METHOD.md section 6, point 2).
    """

    def __init__(self, width: int, heads: int, activation: str, slots: int) -> None:
        super().__init__(width, heads, activation)
        self.attn_memory = Attention(width, heads=1)
        with torch.no_grad():
            # Where the task leaves this attention frozen at its random start, a checkpoint has to carry it:
            # values that bfloat16 holds exactly take half the space there (see clip/checkpoint.py).
            for parameter in self.attn_memory.parameters():
                parameter.copy_(parameter.bfloat16())
        for name in DYNAMIC_QUERIES:
            self.register_buffer(name, torch.randn(slots, 1, width) * 0.02)

    def dynamic_slots(self, tokens_BLD: Tensor, missing_type_B: Tensor) -> Tensor:
        """Slots read from all input tokens by the queries of each sample's missing type, (B, m, D)."""
        queries_3mD = torch.stack([self.get_buffer(name).squeeze(1) for name in DYNAMIC_QUERIES])
        return self.attn_memory(queries_3mD[missing_type_B].to(tokens_BLD.dtype), tokens_BLD)


class Transformer(nn.Module):
    """The blocks of a tower, and the memory slots on their way through them."""

    def __init__(self, width: int, layers: int, heads: int, activation: str, slots: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.slots = slots
        first = DynamicMemoryBlock(width, heads, activation, slots)
        rest = [ResidualAttentionBlock(width, heads, activation) for _ in range(layers - 1)]
        self.resblocks = nn.ModuleList([first, *rest])

    def forward(self, tokens_BLD: Tensor, memory: TowerMemory | None, missing_type_B: Tensor | None) -> Tensor:
        """Output tokens of the last block, (B, L, D), without the memory slots."""
        if memory is None or missing_type_B is None:
            for block in self.resblocks:
                tokens_BLD = block(tokens_BLD, self.causal)
            return tokens_BLD
        first = self.resblocks[0]
        assert isinstance(first, DynamicMemoryBlock)
        dynamic_BmD = first.dynamic_slots(tokens_BLD, missing_type_B)
        head = [memory.private_BmD[0], memory.shared_BmD, dynamic_BmD]
        x_BLD = torch.cat([slot.to(tokens_BLD.dtype) for slot in head] + [tokens_BLD], dim=1)
        for depth, block in enumerate(self.resblocks):
            if 0 < depth < len(memory.private_BmD):
                private_BmD = memory.private_BmD[depth].to(x_BLD.dtype)
                x_BLD = torch.cat([private_BmD, x_BLD[:, self.slots :]], dim=1)
            x_BLD = block(x_BLD, self.causal)
        return x_BLD[:, 3 * self.slots :]


class VisionTransformerMemory(nn.Module):
    """The image tower."""

    def __init__(self, arch: ClipArchitecture, slots: int) -> None:
        super().__init__()
        width = arch.vision_width
        grid = arch.image_size // arch.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=arch.patch_size, stride=arch.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, arch.vision_layers, arch.vision_heads, arch.activation, slots, causal=False
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def forward(
        self, image_B3RR: Tensor, memory: TowerMemory | None = None, missing_type_B: Tensor | None = None
    ) -> Tensor:
        """Features of normalised images (B, 3, R, R), before any masking: (B, E)."""
        patches_BLD = self.conv1(image_B3RR).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(patches_BLD.dtype).expand(len(patches_BLD), 1, -1)
        tokens_BLD = torch.cat([class_B1D, patches_BLD], dim=1) + self.positional_embedding
        x_BLD = self.transformer(self.ln_pre(tokens_BLD), memory, missing_type_B)
        return self.ln_post(x_BLD[:, 0]) @ self.proj


class TextTransformerMemory(nn.Module):
    """The text tower. Its mask is causal over the whole sequence, memory slots first."""

    def __init__(self, arch: ClipArchitecture, slots: int) -> None:
        super().__init__()
        width = arch.text_width
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(arch.context_length, width) * 0.01)
        self.transformer = Transformer(width, arch.text_layers, arch.text_heads, arch.activation, slots, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def forward(
        self, tokens_BL: Tensor, memory: TowerMemory | None = None, missing_type_B: Tensor | None = None
    ) -> Tensor:
        """Features of token ids (B, 77), before any masking: (B, E). The highest id, `<end>`, is the read-out."""
        embedded_BLD = self.token_embedding(tokens_BL) + self.positional_embedding
        x_BLD = self.transformer(embedded_BLD, memory, missing_type_B)
        end_B = tokens_BL.argmax(dim=-1)  # the first one: argmax returns the first of equal values
        x_BD = x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), end_B]
        return self.ln_final(x_BD) @ self.text_projection


def is_added(name: str) -> bool:
    """True for tower entries that CLIP does not have: the dynamic attention and its queries."""
    return ".attn_memory." in name or ".memories_dynamic_" in name
