"""The part `vla`: training and evaluation for text, audio and vision, compared with the published algorithm."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import sides, vla_baseline
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.registry import method_class
from clip.trainable import freeze
from vla.backbone import VlaArchitecture, VlaBackbone

BATCH, MISSING, TYPES = 64, 0.7, 7
SIZES = {
    "aligned": VlaArchitecture(50, 50, 50, 300, 5, 20),
    "unaligned": VlaArchitecture(50, 375, 500, 300, 5, 20),
}
"""MOSI's sizes."""
GOALS = {
    **{("aligned", True): "≥ 4", ("unaligned", True): "≥ 2"},
    **{(size, False): "≥ 5" for size in SIZES},
}
"""Required ratios, keyed by the name of the sizes and whether it is a training step."""
WORDS, SPREAD = 10, 0.62
"""Median length of MOSI's segments, and standard deviation of its log; padding fills 3/4 of the aligned steps."""


class Data(NamedTuple):
    """A batch of synthetic segments: all features for the baseline, without missing inputs for ours."""

    features: dict[str, Tensor]
    batch: ModelInput


def drawn(arch: VlaArchitecture, types_of: Callable[[np.random.Generator], list[int]]) -> Iterator[Data]:
    """Yields batches of segments as long as MOSI's, padded in front."""
    draw = np.random.default_rng(0)
    while True:
        types = types_of(draw)
        words = WORDS * np.exp(SPREAD * draw.standard_normal(len(types)))
        features = {}
        for name, (steps, width) in arch.shapes.items():
            # Unaligned sequences fill 12 % of their steps.
            lengths = words if steps <= arch.text_steps else words / 100 * steps
            x_BTD = draw.standard_normal((len(types), steps, width), dtype=np.float32)
            for x_TD, length in zip(x_BTD, lengths.round().clip(1, steps).astype(int), strict=True):
                x_TD[: steps - length] = 0
            features[name] = torch.from_numpy(x_BTD)
        yield Data(features, without_missing(features, types))


def without_missing(features: dict[str, Tensor], types: list[int]) -> ModelInput:
    """The batch of samples with these missing types."""
    present_BM = torch.tensor([[not code & bit for bit in (4, 2, 1)] for code in types])
    rows = {name: present_BM[:, number].nonzero().flatten() for number, name in enumerate(features)}
    inputs = {name: x_BTD[rows[name]] for name, x_BTD in features.items()}
    return ModelInput(inputs, rows, present_BM, tuple(sorted(set(types))))


def types_in_training(draw: np.random.Generator) -> list[int]:
    """Missing types of a batch, drawn as in training."""
    return np.where(draw.random(BATCH) < MISSING, draw.integers(1, TYPES, BATCH), 0).tolist()


def classifier_of(method: str, arch: VlaArchitecture) -> MissingModalityClassifier:
    """A classifier with random weights and nonzero prompts, as after the first step."""
    torch.manual_seed(0)
    backbone = VlaBackbone(arch)
    learner = method_class(method, "vla")(backbone.places, backbone.embed_dim, MethodOptions(method, 12, 3))
    classifier = MissingModalityClassifier(backbone, learner, "mosi_classifier", LinearHead(3, backbone.embed_dim, 1))
    freeze(classifier, "mosi")
    with torch.no_grad():
        for parameter in learner.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return classifier


def step(classifier: MissingModalityClassifier, run: Callable[[Data], Tensor], data: Data) -> None:
    """Runs the forward and backward pass."""
    classifier.train().zero_grad()
    run(data).square().mean().backward()


@torch.inference_mode()
def evaluate(classifier: MissingModalityClassifier, run: Callable[[Data], Tensor], data: Data) -> None:
    """Evaluates a batch in each of the seven modes."""
    classifier.eval()
    for code in range(TYPES):
        run(Data(data.features, without_missing(data.features, [code] * len(data.batch.present_BM))))


def rows(pairs: int) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table: the case, the cells of `sides.Comparison`, and the goal."""
    for (size, arch), method in product(SIZES.items(), ("rep", "mplmm")):
        classifier = classifier_of(method, arch)

        def theirs(data: Data, of: MissingModalityClassifier = classifier) -> Tensor:
            return vla_baseline.logits(of, *data)

        def ours(data: Data, of: MissingModalityClassifier = classifier) -> Tensor:
            return of(data.batch)

        for what, work in (("training step", step), ("evaluation of the seven modes", evaluate)):
            plainly, fast = (partial(work, classifier, run) for run in (theirs, ours))
            timed = sides.compare(plainly, fast, drawn(arch, types_in_training), pairs)
            yield f"`{method}`, {size}, {what}", *timed.cells(), GOALS[size, work is step]
