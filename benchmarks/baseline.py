"""The published algorithm, written plainly: what the benchmarks compare with.

It encodes both modalities of every sample and puts zeros in place of the missing ones afterwards, makes the memory once
per sample in a loop, takes all 77 positions of every text through all blocks, and decodes and tokenises every sample
whatever it lacks. Attention is `nn.MultiheadAttention`, as in OpenAI's CLIP. Parameters have our values.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.clip_dynamic_memory import RDN, START
from clip.modules.vision_transformer_memory import IMAGE_MEAN, IMAGE_STD, ClipArchitecture
from engine.published_checkpoint import model_name

DYNAMIC_QUERIES = ("memories_dynamic_complete", "memories_dynamic_image", "memories_dynamic_text")


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A block of OpenAI's CLIP, sequence first; the first block of a tower also reads the dynamic slots."""

    def __init__(self, width: int, heads: int, first: bool, slots: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)
        if first:
            self.attn_memory = nn.MultiheadAttention(width, 1)
            for name in DYNAMIC_QUERIES:
                self.register_buffer(name, torch.zeros(slots, 1, width))

    def forward(self, x_LBD: Tensor, mask_LL: Tensor | None) -> Tensor:
        normed = self.ln_1(x_LBD)
        x_LBD = x_LBD + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask_LL)[0]
        return x_LBD + self.mlp(self.ln_2(x_LBD))


class Blocks(nn.Module):
    """A tower's blocks with memory (docs/method.md section 3)."""

    def __init__(self, width: int, layers: int, heads: int, slots: int, causal: bool) -> None:
        super().__init__()
        self.slots, self.causal = slots, causal
        self.resblocks = nn.ModuleList(Block(width, heads, layer == 0, slots) for layer in range(layers))

    def forward(self, tokens_LBD: Tensor, memory: list[Tensor], missing_type_B: Tensor) -> Tensor:
        m, first = self.slots, self.resblocks[0]
        assert isinstance(first, Block)
        queries = torch.cat([first.get_buffer(DYNAMIC_QUERIES[int(missing)]) for missing in missing_type_B], dim=1)
        dynamic = first.attn_memory(queries, tokens_LBD, tokens_LBD, need_weights=False)[0]
        x_LBD = torch.cat([memory[0].transpose(0, 1), dynamic, tokens_LBD])
        L = len(x_LBD)
        mask = x_LBD.new_full((L, L), float("-inf")).triu(1) if self.causal else None
        for depth, block in enumerate(self.resblocks):
            if 0 < depth < len(memory):
                x_LBD = torch.cat([memory[depth].transpose(0, 1), x_LBD[m:]])
            x_LBD = block(x_LBD, mask)
        return x_LBD[3 * m :]


class ImageTower(nn.Module):
    """The image tower."""

    def __init__(self, arch: ClipArchitecture, slots: int) -> None:
        super().__init__()
        width = arch.vision_width
        self.conv1 = nn.Conv2d(3, width, arch.patch_size, arch.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((arch.image_size // arch.patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(width, arch.vision_layers, arch.vision_heads, slots, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, arch.embed_dim))

    def forward(self, image_B3RR: Tensor, memory: list[Tensor], missing_type_B: Tensor) -> Tensor:
        patches_BLD = self.conv1(image_B3RR).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(patches_BLD.dtype).expand(len(patches_BLD), 1, -1)
        x_BLD = self.ln_pre(torch.cat([class_B1D, patches_BLD], dim=1) + self.positional_embedding)
        x_LBD = self.transformer(x_BLD.transpose(0, 1), memory, missing_type_B)
        return self.ln_post(x_LBD[0]) @ self.proj


class TextTower(nn.Module):
    """The text tower."""

    def __init__(self, arch: ClipArchitecture, slots: int) -> None:
        super().__init__()
        width = arch.text_width
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(arch.context_length, width))
        self.transformer = Blocks(width, arch.text_layers, arch.text_heads, slots, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, arch.embed_dim))

    def forward(self, tokens_BL: Tensor, memory: list[Tensor], missing_type_B: Tensor) -> Tensor:
        x_BLD = self.token_embedding(tokens_BL) + self.positional_embedding
        x_BLD = self.transformer(x_BLD.transpose(0, 1), memory, missing_type_B).transpose(0, 1)
        x_BLD = self.ln_final(x_BLD)
        return x_BLD[torch.arange(len(x_BLD)), tokens_BL.argmax(-1)] @ self.text_projection


class Learner(nn.Module):
    """The memory learner, one sample after another (docs/method.md section 2)."""

    def __init__(self, arch: ClipArchitecture, slots: int, depth: int) -> None:
        super().__init__()
        d_v, d_t, E = arch.vision_width, arch.text_width, arch.embed_dim
        for name in ("text_memory_complete", "text_memory_missing"):
            self.register_parameter(name, nn.Parameter(torch.zeros(slots, d_t)))
        for name in ("visual_memory_complete", "visual_memory_missing"):
            self.register_parameter(name, nn.Parameter(torch.zeros(slots, d_v)))
        for name in ("common_memory_complete", "common_memory_image", "common_memory_text"):
            self.register_parameter(name, nn.Parameter(torch.zeros(slots, E)))
        self.residual_alpha = nn.Parameter(torch.tensor(0.5))
        self.dynamic_common_token_net = RDN(d_v + d_t, E)
        self.compound_memory_projections_text = nn.ModuleList(RDN(d_v + d_t, d_t) for _ in range(depth))
        self.compound_memory_projections_image = nn.ModuleList(RDN(d_v + d_t, d_v) for _ in range(depth))
        self.common_memory_projection_image = RDN(E, d_v)
        self.common_memory_projection_text = RDN(E, d_t)
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(depth))

    def forward(self, missing_type_B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(image memory, text memory): per layer (B, m, D), the first (B, 2m, D) with the shared slots."""
        samples = [self._of_sample(int(missing)) for missing in missing_type_B]
        depth = len(self.layernorm_text)
        image, text = (
            [torch.stack([sample[tower][k] for sample in samples]) for k in range(depth)] for tower in (0, 1)
        )
        return image, text

    def _of_sample(self, missing: int) -> tuple[list[Tensor], list[Tensor]]:
        visual, text, common = (
            self.get_parameter(f"{part}_memory_{of_type[missing]}") for part, of_type in START.items()
        )
        image_layers: list[Tensor] = []
        text_layers: list[Tensor] = []
        for k in range(len(self.layernorm_text)):
            pair = torch.cat([visual, text], dim=-1)
            new_visual = self.compound_memory_projections_image[k](self.layernorm_image[k](pair))
            new_text = self.compound_memory_projections_text[k](self.layernorm_text[k](pair))
            if k:
                new_visual = self.residual_alpha * new_visual + (1 - self.residual_alpha) * visual
                new_text = self.residual_alpha * new_text + (1 - self.residual_alpha) * text
            visual, text = new_visual, new_text
            image_layers.append(visual)
            text_layers.append(text)
        image_layers[0] = torch.cat([image_layers[0], self.common_memory_projection_image(common)])
        text_layers[0] = torch.cat([text_layers[0], self.common_memory_projection_text(common)])
        return image_layers, text_layers


class Model(nn.Module):
    """The towers and the learner."""

    def __init__(self, arch: ClipArchitecture, memory_length: int, memory_depth: int) -> None:
        super().__init__()
        slots = memory_length // 3
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.memory_learner = Learner(arch, slots, memory_depth)
        self.image_encoder = ImageTower(arch, slots)
        self.text_encoder = TextTower(arch, slots)


class PublishedAlgorithm(nn.Module):
    """The classifier, with the values and frozen parameters of `ours`."""

    def __init__(
        self, ours: MissingModalityClassifier, arch: ClipArchitecture, memory_length: int, memory_depth: int
    ) -> None:
        super().__init__()
        self.model = Model(arch, memory_length, memory_depth)
        self.head_name = ours.head_name
        n_classes, width = ours.head.get_parameter("weight").shape
        self.add_module(ours.head_name, nn.Linear(width, n_classes))
        state, parameters = ours.state_dict(), dict(ours.named_parameters())
        self.load_state_dict({name: state[model_name(name)] for name in self.state_dict()})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameters[model_name(name)].requires_grad)

    def forward(self, image_B3RR: Tensor, tokens_BL: Tensor, missing_type_B: Tensor) -> Tensor:
        """Logits (B, C) of normalised images and token ids of all samples, missing or not."""
        image_memory, text_memory = self.model.memory_learner(missing_type_B)
        image_BE = self.model.image_encoder(image_B3RR, image_memory, missing_type_B)
        text_BE = self.model.text_encoder(tokens_BL, text_memory, missing_type_B)
        keep_image, keep_text = (missing_type_B != 2)[:, None], (missing_type_B != 1)[:, None]
        features = torch.cat([image_BE * keep_image, text_BE * keep_text], dim=-1)
        return self.get_submodule(self.head_name)(features)


def load_image(data: bytes, size: int) -> Tensor:
    """CLIP's transform as torchvision composes it, to a normalised float image (3, size, size)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    scale = size / min(width, height)
    new_size = (size, int(height * scale)) if width <= height else (int(width * scale), size)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
    scaled = pixels.permute(2, 0, 1).float().div(255)
    return (scaled - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
