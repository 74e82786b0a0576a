"""CLIP's two towers, which slots can enter (docs/method.md sections 3 and 8).

Shape suffixes: B samples, L sequence, N queries, D width of a tower, P prefix keys, R image side, m slots of one group,
E joint embedding width.

A tower without slots is OpenAI's CLIP, parameter names included.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.modules.fused import PLAIN, BlockOps
from clip.modules.interfaces import Adapter, Backbone, Blanks, ModelInput, Place, Tower, TowerSlots

FINAL = "final norms, image projection"
TEXT_PROJECTION = "text projection"
FROZEN = "CLIP"
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipArchitecture:
    """Sizes of a CLIP with two transformer towers; nothing else in the code fixes any of them."""

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
    image_mean: tuple[float, ...] = IMAGE_MEAN
    """Mean of red, green and blue, on a scale from 0 to 1, which is subtracted from images."""
    image_std: tuple[float, ...] = IMAGE_STD
    """Standard deviation that images are then divided by."""

    @property
    def places(self) -> dict[str, Place]:
        """The towers that slots can enter, keyed by modality."""
        return {
            "image": Place(self.vision_width, self.vision_layers),
            "text": Place(self.text_width, self.text_layers),
        }


ACTIVATIONS = ("quick_gelu", "gelu")


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

    def forward(
        self,
        query_BND: Tensor,
        source_BLD: Tensor,
        prefix_BP2D: Tensor | None = None,
        mask: Tensor | None = None,
        adapter: Adapter | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention output (B, N, D) of the queries over the source, preceded by the prefix's keys and values.

        Args:
            mask: True where a query may attend, over prefix and source.
            causal: whether each query attends only to its own position of the source and those before it.
        """
        D = source_BLD.shape[-1]
        if adapter is None:
            q_BND = F.linear(query_BND, self.in_proj_weight[:D], self.in_proj_bias[:D])
            kv_BL2D = F.linear(source_BLD, self.in_proj_weight[D:], self.in_proj_bias[D:])
        else:
            inputs = enumerate((query_BND, source_BLD, source_BLD))
            frozen = list(zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))
            q_BND, *kv = (adapter(matrix, x_BLD, *frozen[matrix]) for matrix, x_BLD in inputs)
            kv_BL2D = torch.cat(kv, dim=-1)
        if prefix_BP2D is not None:
            kv_BL2D = torch.cat([prefix_BP2D.to(kv_BL2D.dtype), kv_BL2D], dim=1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_BND, *kv_BL2D.chunk(2, dim=-1)))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(read.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.activate: Callable[[Tensor], Tensor] = PLAIN.quick_gelu if activation == "quick_gelu" else F.gelu

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return self.c_proj(self.activate(self.c_fc(x_BLD)))


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block. Matrix products use the dtype of the weights; the residual stream keeps its own."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.ops = PLAIN
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self,
        x_BLD: Tensor,
        prefix_BP2D: Tensor | None = None,
        mask: Tensor | None = None,
        read_B: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """The block's output (B, L, D), or (B, 1, D) at the single position `read_B` of each sample.

        Args:
            prefix_BP2D: keys and values that all positions attend to.
            mask: (…, L, L), True where a position may attend; None: everywhere, or up to itself in a causal block.
        """
        dtype, causal = self.attn.in_proj_weight.dtype, self.causal and mask is None
        normed_BLD = self.ops.normed(x_BLD, self.ln_1, dtype)
        query_BND = normed_BLD
        if causal and (prefix_BP2D is not None or read_B is not None):
            P = 0 if prefix_BP2D is None else prefix_BP2D.shape[1]
            mask, causal = causal_mask(x_BLD.shape[1], x_BLD.device, P), False
        if read_B is not None:
            read_B11 = read_B[:, None, None]
            x_BLD, query_BND = (each.take_along_dim(read_B11, dim=1) for each in (x_BLD, normed_BLD))
            mask = None if mask is None else mask[read_B][:, None, None]
        read_BND = self.attn(query_BND, normed_BLD, prefix_BP2D, mask, adapter, causal)
        x_BND, normed_BND = self.ops.added_and_normed(x_BLD, read_BND, self.ln_2, dtype)
        return x_BND + self.mlp(normed_BND)

    def use_ops(self, ops: BlockOps) -> None:
        """Sets the implementation of norms, residual sums and activation."""
        self.ops = ops
        if self.mlp.activate is not F.gelu:  # already a single pass over memory
            self.mlp.activate = ops.quick_gelu


class Transformer(nn.Module):
    """The blocks of a tower, which a method's slots pass through along with the tokens."""

    def __init__(self, width: int, layers: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.checkpointing = False
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation, causal) for _ in range(layers))

    def forward(self, tokens_BLD: Tensor, read_B: Tensor, slots: TowerSlots) -> Tensor:
        """The last block's output (B, D) at input token `read_B` of each sample, the only one that it computes."""
        replaced, inserted, dynamic_BmD, _, prefix, replay, adapters = slots
        depth, L = len(replaced), tokens_BLD.shape[1]
        # [replaced | inserted | dynamic | tokens]
        front = [*replaced[:1], *inserted[:1], *([] if dynamic_BmD is None else [dynamic_BmD])]
        x_BLD = torch.cat([*front, tokens_BLD], dim=1) if front else tokens_BLD
        outputs_BPD: list[Tensor] = []  # at the replaced and inserted slots, for the replay
        for k in range(len(self.resblocks)):
            if 0 < k < depth:
                x_BLD[:, : replaced[k].shape[1]] = replaced[k]
            if 0 < k < len(inserted):
                x_BLD = torch.cat([inserted[k], x_BLD], dim=1)
            if depth <= k < depth + len(replay):
                added_BPD = replay[k - depth](outputs_BPD)
                x_BLD[:, : added_BPD.shape[1]].add_(added_BPD)

            last = k + 1 == len(self.resblocks)
            read = x_BLD.shape[1] - L + read_B if last else None
            x_BLD = self.run(k, x_BLD, prefix[k] if k < len(prefix) else None, None, read, adapters.get(k))
            if replay and k < depth:
                P = replaced[k].shape[1] + sum(each.shape[1] for each in inserted)
                outputs_BPD.append(x_BLD[:, :P].clone())
        return x_BLD[:, 0]

    def run(
        self,
        k: int,
        x_BLD: Tensor,
        prefix_BP2D: Tensor | None = None,
        mask: Tensor | None = None,
        read_B: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Runs block `k`, see `ResidualAttentionBlock`."""
        block: Callable[..., Tensor] = self.resblocks[k]
        if self.checkpointing and torch.is_grad_enabled():  # only adapters draw random numbers
            block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=adapter is not None)
        return block(x_BLD, prefix_BP2D, mask, read_B, adapter)


def causal_mask(length: int, device: torch.device, prefix: int = 0) -> Tensor:
    """Mask (L, P + L): each position sees the prefix, the positions before it and itself."""
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)


def normalise(image_u8: Tensor, mean: tuple[float, ...] = IMAGE_MEAN, std: tuple[float, ...] = IMAGE_STD) -> Tensor:
    """Scales uint8 images (…, 3, R, R) to [0, 1], subtracts the mean and divides by the standard deviation."""
    return (image_u8.float() / 255 - _per_channel(mean, image_u8.device)) / _per_channel(std, image_u8.device)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as (3, 1, 1) on `device`; cached because each copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


class ImageTower(Tower):
    """CLIP's vision transformer."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.statistics = arch.image_mean, arch.image_std
        width = arch.vision_width
        grid = arch.image_size // arch.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=arch.patch_size, stride=arch.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, arch.vision_layers, arch.vision_heads, arch.activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def embed(self, image_B3RR: Tensor) -> Tensor:
        """Tokens (B, L, D) of images, which are uint8 or normalised; the class token comes first."""
        if image_B3RR.dtype == torch.uint8:
            image_B3RR = normalise(image_B3RR, *self.statistics)
        [side, _] = self.conv1.kernel_size
        rows = image_B3RR.to(self.conv1.weight.dtype).unflatten(2, (-1, side)).unflatten(4, (-1, side))
        patches_BLK = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # pixels in a kernel's order
        patches_BLD = F.linear(patches_BLK, self.conv1.weight.flatten(1))
        class_B1D = self.class_embedding.expand(len(patches_BLD), 1, -1)
        return self.ln_pre(torch.cat([class_B1D, patches_BLD], dim=1) + self.positional_embedding)

    def body(self, tokens_BLD: Tensor, image_B3RR: Tensor, slots: TowerSlots) -> Tensor:
        """The last block's output (B, D) at the class token."""
        class_token_B = torch.zeros(len(tokens_BLD), dtype=torch.long, device=tokens_BLD.device)
        return self.transformer(tokens_BLD, class_token_B, slots)

    def end(self, x_BD: Tensor) -> Tensor:
        """Features (B, E), after the final norm and projection."""
        return self.ln_post(x_BD) @ self.proj


class TextTower(Tower):
    """CLIP's text transformer. Its causal mask covers the whole sequence, in which slots come first."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        width = arch.text_width
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(arch.context_length, width) * 0.01)
        self.transformer = Transformer(width, arch.text_layers, arch.text_heads, arch.activation, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, arch.embed_dim) * width**-0.5)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Tokens (B, 77, D) of token ids, padding included."""
        return self.token_embedding(ids_BL) + self.positional_embedding

    def body(self, tokens_BLD: Tensor, ids_BL: Tensor, slots: TowerSlots) -> Tensor:
        """The last block's output (B, D) at `<end>`, the highest token id; the causal mask hides padding from it."""
        end_B = ids_BL.argmax(dim=-1)  # the first `<end>`, if there are several
        return self.transformer(tokens_BLD, end_B, slots)

    def end(self, x_BD: Tensor) -> Tensor:
        """Features (B, E), after the final norm and projection."""
        return self.ln_final(x_BD) @ self.text_projection


class ClipBackbone(Backbone):
    """Both towers; parameter names are those of published checkpoints."""

    ends = (FINAL,)

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.arch = arch
        self.places = arch.places
        self.embed_dim = arch.embed_dim
        self.logit_scale = nn.Parameter(torch.tensor(0.0))  # unused, but in every CLIP checkpoint
        self.image_encoder = ImageTower(arch)
        self.text_encoder = TextTower(arch)

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers, keyed by modality."""
        return {"image": self.image_encoder, "text": self.text_encoder}

    def prepare(self, batch: ModelInput) -> ModelInput:
        """On a GPU, pads the batch to one of a few shapes; on a CPU, padding would only cost time."""
        return batch.rounded() if batch.present_BM.is_cuda else batch

    def complete(self, batch: ModelInput, blanks: Blanks, *, once: bool) -> ModelInput:
        """See `Backbone.complete`."""
        inputs, rows, sources = dict(batch.inputs), dict(batch.rows), dict(batch.source_of_B)
        for column, modality in enumerate(self.places):
            if not any(2 ** (len(self.places) - 1 - column) & missing_type for missing_type in batch.types):
                continue
            present_B, blank = batch.present_BM[:, column], self._blank(modality, inputs[modality], blanks)
            own_B, any_present = torch.arange(len(present_B), device=blank.device), len(rows[modality]) > 0
            if once:
                missing = (~present_B).int().argmax()[None]  # the first one, without waiting for a GPU
                inputs[modality] = torch.cat([inputs[modality], blank[None]]) if any_present else blank[None]
                rows[modality] = torch.cat([rows[modality], missing])
                sources[modality] = torch.where(present_B, sources.get(modality, own_B), missing)
            else:  # the shape is the same whatever is missing
                filled = blank.expand(len(own_B) + 1, *blank.shape)
                filled = filled.index_copy(0, rows[modality], inputs[modality]) if any_present else filled
                inputs[modality], rows[modality] = filled[:-1], own_B
        return batch._replace(inputs=inputs, rows=rows, source_of_B=sources)

    def _blank(self, modality: str, like: Tensor, blanks: Blanks) -> Tensor:
        """A placeholder input on the device of `like`; an image has its dtype too."""
        if modality == "text":
            ids_L = like.new_zeros(self.arch.context_length, dtype=torch.long)
            ids_L[:2] = blanks.text_marks
            return ids_L
        shape_3RR = (3, self.arch.image_size, self.arch.image_size)
        image_u8 = torch.full(shape_3RR, round(255 * blanks.grey), dtype=torch.uint8, device=like.device)
        if like.dtype == torch.uint8:
            return image_u8
        return normalise(image_u8, *self.image_encoder.statistics).to(like.dtype)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The layers after the last blocks, and the rest. The text projection is separate: only AOEPT trains it."""
        final = [*self.image_encoder.ln_post.parameters(), self.image_encoder.proj]
        final += self.text_encoder.ln_final.parameters()
        parts = {FINAL: final, TEXT_PROJECTION: [self.text_encoder.text_projection]}
        ends = {id(parameter) for part in parts.values() for parameter in part}
        everything = [*self.image_encoder.parameters(), *self.text_encoder.parameters(), self.logit_scale]
        return {**parts, FROZEN: [parameter for parameter in everything if id(parameter) not in ends]}

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """See `Backbone.compute`."""
        self.image_encoder.conv1.to(dtype)
        for transformer in (self.image_encoder.transformer, self.text_encoder.transformer):
            transformer.checkpointing = checkpointing
            for block in transformer.resblocks:
                block.get_submodule("attn").to(dtype)
                block.get_submodule("mlp").to(dtype)
