"""The baseline of the benchmarks: a plain version of the published algorithm with the parameters of our classifier.

It encodes both modalities of every sample and replaces the features of missing ones by zeros afterwards, computes the
memory sample by sample in a loop, passes all 77 positions of every text through all blocks, and decodes and tokenises
every sample whatever it lacks. Attention is that of `nn.MultiheadAttention`, sequence first, as in OpenAI's CLIP.
"""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.clip_dynamic_memory import AVAILABLE, START
from clip.modules.vision_transformer_memory import IMAGE_MEAN, IMAGE_STD


def logits(ours: MissingModalityClassifier, image_B3RR: Tensor, tokens_BL: Tensor, missing_type_B: Tensor) -> Tensor:
    """Logits (B, C) for normalised images and token ids of all samples, missing or not."""
    model: Any = ours.model
    image, text = model.image_encoder, model.text_encoder
    image_memory, text_memory = memory(ours.method, missing_type_B)

    patches_BLD = image.conv1(image_B3RR).flatten(2).transpose(1, 2)
    class_B1D = image.class_embedding.to(patches_BLD.dtype).expand(len(patches_BLD), 1, -1)
    x_BLD = image.ln_pre(torch.cat([class_B1D, patches_BLD], dim=1) + image.positional_embedding)
    x_LBD = _blocks(ours, "image", x_BLD.transpose(0, 1), image_memory, missing_type_B)
    image_BE = image.ln_post(x_LBD[0]) @ image.proj

    x_BLD = text.token_embedding(tokens_BL) + text.positional_embedding
    x_LBD = _blocks(ours, "text", x_BLD.transpose(0, 1), text_memory, missing_type_B)
    x_BLD = text.ln_final(x_LBD.transpose(0, 1))
    text_BE = x_BLD[torch.arange(len(x_BLD)), tokens_BL.argmax(-1)] @ text.text_projection

    keep_image, keep_text = (missing_type_B != 2)[:, None], (missing_type_B != 1)[:, None]
    return ours.head(torch.cat([image_BE * keep_image, text_BE * keep_text], dim=-1), missing_type_B)


def memory(learner: nn.Module, missing_type_B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Image and text memory: a tensor (B, m, D) per layer, the first (B, 2m, D) with the shared slots."""
    samples = [_of_sample(learner, int(missing)) for missing in missing_type_B]
    image, text = ([torch.stack(of_layer) for of_layer in zip(*of, strict=True)] for of in zip(*samples, strict=True))
    return image, text


def _of_sample(learner: Any, missing: int) -> tuple[list[Tensor], list[Tensor]]:
    visual, text, common = (
        learner.get_parameter(f"{part}_memory_{of_type[missing]}") for part, of_type in START.items()
    )
    alpha, layers = learner.residual_alpha, (list[Tensor](), list[Tensor]())
    for k in range(len(learner.layernorm_text)):
        pair = torch.cat([visual, text], dim=-1)
        new_visual = learner.compound_memory_projections_image[k](learner.layernorm_image[k](pair))
        new_text = learner.compound_memory_projections_text[k](learner.layernorm_text[k](pair))
        if k:
            new_visual, new_text = alpha * new_visual + (1 - alpha) * visual, alpha * new_text + (1 - alpha) * text
        visual, text = new_visual, new_text
        layers[0].append(visual)
        layers[1].append(text)
    layers[0][0] = torch.cat([layers[0][0], learner.common_memory_projection_image(common)])
    layers[1][0] = torch.cat([layers[1][0], learner.common_memory_projection_text(common)])
    return layers


def _blocks(ours: Any, name: str, tokens_LBD: Tensor, slots: list[Tensor], missing_type_B: Tensor) -> Tensor:
    """Runs a tower's blocks with memory (docs/method.md section 3); returns the input tokens after the last block."""
    dynamic, m = ours.method.dynamic[name], slots[-1].shape[1]
    queries = torch.cat([dynamic.get_buffer(f"queries_{AVAILABLE[int(type_)]}") for type_ in missing_type_B], dim=1)
    x_LBD = torch.cat([slots[0].transpose(0, 1), _attend(dynamic.attention, queries, tokens_LBD), tokens_LBD])
    L = len(x_LBD)
    mask = x_LBD.new_full((L, L), float("-inf")).triu(1) if name == "text" else None
    for depth, block in enumerate(ours.model.towers[name].transformer.resblocks):
        if 0 < depth < len(slots):
            x_LBD = torch.cat([slots[depth].transpose(0, 1), x_LBD[m:]])
        normed = block.ln_1(x_LBD)
        x_LBD = x_LBD + _attend(block.attn, normed, normed, mask)
        hidden = block.mlp.c_fc(block.ln_2(x_LBD))
        x_LBD = x_LBD + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return x_LBD[-len(tokens_LBD) :]


def _attend(attention: Any, query: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    inputs = attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0
    outputs = attention.out_proj.weight, attention.out_proj.bias
    of_heads = query.shape[-1], attention.heads
    arguments = (query, source, source, *of_heads, *inputs, *outputs)
    return F.multi_head_attention_forward(*arguments, need_weights=False, attn_mask=mask)[0]


def load_image(data: bytes, size: int) -> Tensor:
    """Applies CLIP's transform as composed in torchvision; returns a normalised float image (3, size, size)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    scale = size / min(width, height)
    new_size = (size, int(height * scale)) if width <= height else (int(width * scale), size)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
    scaled = pixels.permute(2, 0, 1).float().div(255)
    return (scaled - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
