"""Random CLIPs written in the formats that real weights come in."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.models import TINY


def random_hf_clip(folder: Path, activation: str = "quick_gelu", seed: int = 0) -> CLIPModel:
    """A random CLIP of TINY size, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = CLIPConfig(
        projection_dim=TINY.embed_dim,
        text_config={
            "hidden_size": TINY.text_width,
            "num_attention_heads": TINY.text_heads,
            "num_hidden_layers": TINY.text_layers,
            "intermediate_size": 4 * TINY.text_width,
            "vocab_size": TINY.vocab_size,
            "max_position_embeddings": 77,
            "hidden_act": activation,
            "bos_token_id": TINY.vocab_size - 2,
            "eos_token_id": TINY.vocab_size - 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": TINY.vision_width,
            "num_attention_heads": TINY.vision_heads,
            "num_hidden_layers": TINY.vision_layers,
            "intermediate_size": 4 * TINY.vision_width,
            "image_size": TINY.image_size,
            "patch_size": TINY.patch_size,
            "hidden_act": activation,
        },
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
