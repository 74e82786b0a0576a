"""Builders of the real model for tests: from a state dict, from a golden file, or small and random."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip.backbone import architecture_of
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from engine.checkpoint import ModelSpec, build_classifier
from engine.published_checkpoint import PUBLISHED_NAMES, model_names

TINY = ClipArchitecture(32, 16, 128, 3, 2, 64, 2, 1, 77, 300, 64, "quick_gelu")
REAL = {
    "ViT-B/32": ClipArchitecture(224, 32, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "quick_gelu"),
    "ViT-B/16": ClipArchitecture(224, 16, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "quick_gelu"),
    "ViT-L/14": ClipArchitecture(224, 14, 1024, 24, 16, 768, 12, 12, 77, 49408, 768, "quick_gelu"),
    "ViT-L/14@336px": ClipArchitecture(336, 14, 1024, 24, 16, 768, 12, 12, 77, 49408, 768, "quick_gelu"),
}
"""Architectures of OpenAI's weights."""
ENDS = {
    "model.image_encoder.proj",
    *(f"model.image_encoder.ln_post.{part}" for part in ("weight", "bias")),
    *(f"model.text_encoder.ln_final.{part}" for part in ("weight", "bias")),
}
"""Tower parameters trained for Hateful Memes and by some methods."""


def batch_of(given: Mapping[str, Tensor], present_BM: Tensor) -> ModelInput:
    """A batch of samples, given all their inputs keyed by modality; missing ones are left out."""
    rows = {name: present_BM[:, m].nonzero().flatten() for m, name in enumerate(given)}
    code_B = (~present_BM).long() @ 2 ** torch.arange(len(rows)).flip(0)  # the last modality is the lowest digit
    inputs = {name: x[rows[name]] for name, x in given.items()}
    types = tuple(code_B.unique().tolist())
    return ModelInput(inputs, rows, present_BM, types, index_B=torch.arange(len(present_BM)))


def model_input(images: Tensor, tokens: Tensor, missing_types: list[int]) -> ModelInput:
    """A batch of samples with `missing_types`, given every image and text."""
    present_BM = torch.tensor([[t != 2, t != 1] for t in missing_types])
    batch = batch_of({"image": images, "text": tokens}, present_BM)
    texts = batch.inputs["text"]
    return batch._replace(lengths={"text": int(texts.argmax(-1).max()) + 1} if len(texts) else {})


def published_name(name: str) -> str:
    """Name of a model entry in published checkpoints, which the slow version uses."""
    for published, ours in PUBLISHED_NAMES.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def published_state(classifier: MissingModalityClassifier) -> dict[str, Tensor]:
    """Parameters and buffers keyed by published name, not detached: gradients reach them."""
    entries = [*classifier.named_buffers(), *classifier.named_parameters()]
    return {published_name(name): value for name, value in entries}


def classifier_of(state: dict[str, Tensor], task: str, options: MethodOptions) -> MissingModalityClassifier:
    """The real classifier with the values of `state`, keyed by published name; parameters frozen as for `task`."""
    towers = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    classifier = build_classifier(ModelSpec(task, options, architecture_of(towers, "quick_gelu")))
    classifier.load_state_dict(model_names(state), strict=True)
    return classifier


def tiny_classifier(
    task: str = "mmimdb",
    memory_length: int = 6,
    memory_depth: int = 2,
    seed: int = 0,
    head: str = "linear",
    arch: ClipArchitecture = TINY,
    **method_options: Any,
) -> MissingModalityClassifier:
    """A random classifier of TINY size, with biases and norms moved away from their initial 0 and 1."""
    torch.manual_seed(seed)
    options = MethodOptions(memory_length=memory_length, memory_depth=memory_depth, **method_options)
    classifier = build_classifier(ModelSpec(task, options, arch, head))
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if classifier.method.blanks is not None:
        classifier.method.get_buffer("text_marks").copy_(torch.tensor([arch.vocab_size - 2, arch.vocab_size - 1]))
    return classifier


def tiny_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(images (B, 3, 32, 32), tokens (B, 77)) for TINY; texts of 1 to 75 tokens, `<end>` is 299."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, TINY.image_size, TINY.image_size, generator=generator)
    tokens = torch.zeros(size, 77, dtype=torch.long)
    for row in range(size):
        length = int(torch.randint(1, 76, (), generator=generator)) if row else 75
        tokens[row, 0] = 298
        tokens[row, 1 : length + 1] = torch.randint(1, 298, (length,), generator=generator)
        tokens[row, length + 1] = 299
    return images, tokens
