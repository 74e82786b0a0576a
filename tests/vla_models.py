"""Small models of text, audio and vision for tests, and batches for them."""

import numpy as np
import torch
from torch import Tensor

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.registry import method_class
from clip.trainable import freeze
from tests.models import batch_of
from vla.backbone import VlaArchitecture, VlaBackbone
from vla.memory_learner import MODE_OF_TYPE

TYPE_OF_MODE = [MODE_OF_TYPE.index(mode) for mode in range(7)]
TINY = VlaArchitecture(5, 6, 4, text_dim=7, audio_dim=3, vision_dim=4, width=8, heads=2, layers=2)


def vla_batch(features: dict[str, Tensor], types: list[int]) -> ModelInput:
    """A batch of samples with missing `types`, given all their features (B, T, D) keyed by modality."""
    return batch_of(features, torch.tensor([[not code & bit for bit in (4, 2, 1)] for code in types]))


def random_features(arch: VlaArchitecture, samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Features (B, T, D) keyed by modality, left-padded with zeros by up to all but one step."""
    draw = np.random.default_rng(seed)
    features = {}
    for name, (steps, width) in arch.shapes.items():
        x = draw.normal(size=(samples, steps, width)).astype(np.float32)
        for row in range(samples):
            x[row, : draw.integers(steps)] = 0
        features[name] = torch.from_numpy(x)
    return features


def vla_classifier(
    arch: VlaArchitecture = TINY, options: MethodOptions | None = None, outputs: int = 1, seed: int = 0
) -> MissingModalityClassifier:
    """A random classifier, with parameters frozen as its method requires."""
    torch.manual_seed(seed)
    options = options or MethodOptions("rep", 6, 2)
    backbone = VlaBackbone(arch)
    method = method_class(options.prompt_type, "vla")(backbone.places, backbone.embed_dim, options)
    head = LinearHead(3, backbone.embed_dim, outputs)
    head.reset_parameters()
    classifier = MissingModalityClassifier(backbone, method, "mosi_classifier", head)
    freeze(classifier, "mosi")
    return classifier


def published_name(name: str) -> str:
    """Name of a classifier parameter in published files."""
    for ours, theirs in (("model.prompt_learner.", ""), ("model.", ""), ("mosi_classifier.", "out_layer.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
