"""Random CLIPs saved in the formats that real weights come in."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clip.modules.vision_transformer_memory import ClipArchitecture
from tests.models import TINY


def hf_config(arch: ClipArchitecture) -> CLIPConfig:
    """The architecture as a transformers configuration."""
    return CLIPConfig(
        projection_dim=arch.embed_dim,
        text_config={
            "hidden_size": arch.text_width,
            "num_attention_heads": arch.text_heads,
            "num_hidden_layers": arch.text_layers,
            "intermediate_size": 4 * arch.text_width,
            "vocab_size": arch.vocab_size,
            "max_position_embeddings": 77,
            "hidden_act": arch.activation,
            "bos_token_id": arch.vocab_size - 2,
            "eos_token_id": arch.vocab_size - 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": arch.vision_width,
            "num_attention_heads": arch.vision_heads,
            "num_hidden_layers": arch.vision_layers,
            "intermediate_size": 4 * arch.vision_width,
            "image_size": arch.image_size,
            "patch_size": arch.patch_size,
            "hidden_act": arch.activation,
        },
    )


def random_hf_clip(folder: Path, activation: str = "quick_gelu", seed: int = 0) -> CLIPModel:
    """A random CLIP of TINY size, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    model = CLIPModel(hf_config(replace(TINY, activation=activation))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def openai_state(model: CLIPModel) -> dict[str, Tensor]:
    """A Hugging Face CLIP as OpenAI's state dict, mapped entry by entry."""
    image, text = model.vision_model, model.text_model
    state = {
        "logit_scale": model.logit_scale,
        "text_projection": model.text_projection.weight.T,
        "visual.proj": model.visual_projection.weight.T,
        "visual.class_embedding": image.embeddings.class_embedding,
        "visual.positional_embedding": image.embeddings.position_embedding.weight,
        "visual.conv1.weight": image.embeddings.patch_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
    }
    modules = {
        "visual.ln_pre": image.pre_layrnorm,
        "visual.ln_post": image.post_layernorm,
        "ln_final": text.final_layer_norm,
    }
    for prefix, tower in (("visual.", image), ("", text)):
        for index, layer in enumerate(tower.encoder.layers):
            block = f"{prefix}transformer.resblocks.{index}"
            modules |= {
                f"{block}.ln_1": layer.layer_norm1,
                f"{block}.ln_2": layer.layer_norm2,
                f"{block}.mlp.c_fc": layer.mlp.fc1,
                f"{block}.mlp.c_proj": layer.mlp.fc2,
                f"{block}.attn.out_proj": layer.self_attn.out_proj,
            }
            qkv = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
            state[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight for part in qkv])
            state[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias for part in qkv])
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
