"""The part `sensors`: training steps at the sizes of MOD, and `none` on cached features."""

import time
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.registry import method_class
from clip.trainable import freeze
from sensors.backbone import SwtBackbone
from sensors.weights import sizes_for
from vilt.datasets.specs import DATASETS
from vilt.missing_types import code_of

BATCH, EPOCHS, SAMPLES = 32, 50, 10_000
MOD = DATASETS["mod"]


def classifier_of(prompt_type: str) -> MissingModalityClassifier:
    """A classifier at the sizes of MOD with random weights."""
    torch.manual_seed(0)
    backbone = SwtBackbone(sizes_for(MOD, {}, {}))
    method = method_class(prompt_type, "sensors")(
        backbone.places, backbone.embed_dim, MethodOptions(prompt_type, memory_length=12, memory_depth=4)
    )
    head = LinearHead(backbone.fused_parts, backbone.embed_dim, MOD.n_classes)
    classifier = MissingModalityClassifier(backbone, method, "mod_classifier", head)
    freeze(classifier, "mod")
    return classifier.train()


def batch_of(inputs: Mapping[str, Tensor], present_BM: Tensor) -> ModelInput:
    """The batch without missing inputs."""
    names = list(inputs)
    rows = {name: present_BM[:, m].nonzero().flatten() for m, name in enumerate(names)}
    lost = {sum(code_of(names, name) for m, name in enumerate(names) if not here[m]) for here in present_BM.tolist()}
    return ModelInput({name: inputs[name][rows[name]] for name in names}, rows, present_BM, tuple(sorted(lost)))


def seconds_of_step(classifier: MissingModalityClassifier, batch: ModelInput, labels: Tensor) -> float:
    """CPU time of a step's forward and backward pass."""
    began = time.process_time()
    logits_BC, _ = classifier.training_outputs(batch, labels)
    F.cross_entropy(logits_BC, labels).backward()
    return time.process_time() - began


def table(pairs: int) -> Iterator[str]:
    """Yields the lines of the Markdown table."""
    shapes = {name: [size or 1 for size in modality.shape] for name, modality in MOD.modalities.items()}
    signals = {name: torch.randn(BATCH, *shape) for name, shape in shapes.items()}
    complete_BM = torch.ones(BATCH, len(signals), dtype=torch.bool)
    some_BM, lost = complete_BM.clone(), int(0.7 * BATCH)
    some_BM[: lost // 2, 0] = some_BM[lost // 2 : lost, 1] = False
    labels = torch.arange(BATCH) % MOD.n_classes
    none, rep = classifier_of("none"), classifier_of("rep")
    batches = (none, batch_of(signals, complete_BM)), (rep, batch_of(signals, some_BM))
    found = [[seconds_of_step(*one, labels) for one in batches] for _ in range(pairs + 1)][1:]
    of_none, of_rep = (min(column) for column in zip(*found, strict=True))
    yield "| case | time | required |"
    yield "| --- | --- | --- |"
    yield f"| MOD, training step of `none`, nothing missing, batch {BATCH} | {of_none:.3f} s | |"
    ratio = f"{of_rep / of_none:.2f} × `none`"
    yield f"| MOD, training step of `rep`, 70 % both | {of_rep:.3f} s, {ratio} | ≤ 1.6 × |"
    features = {name: torch.randn(BATCH, none.model.embed_dim) for name in signals}
    on_kept = batch_of(features, complete_BM)._replace(cached=True)
    kept = [seconds_of_step(none, on_kept, labels) for _ in range(20)]
    whole = min(kept) * EPOCHS * SAMPLES / BATCH
    case = f"MOD, {EPOCHS} epochs of `none` on cached features of {SAMPLES:,} samples, steps only"
    yield f"| {case} | {whole:.0f} s | ≤ 120 s |"
