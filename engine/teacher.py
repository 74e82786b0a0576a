"""Soft labels: a trained model's predictions for the training samples, with the missing table applied.

The student may see less of a sample than the teacher, with `simulate_missing` or `modality_dropout`.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from tqdm import tqdm

from clip.backbone import FrozenWeights
from clip.modules.classifier import MissingModalityClassifier
from common.errors import ConfigError
from common.hashing import file_sha256
from engine.cached_features import at_their_index, has_constant_features, training_batches
from engine.checkpoint import Checkpoint, check_classes, read_checkpoint
from engine.families import BackboneChoice
from engine.open_model import COMPUTE_TYPES, open_model
from engine.training import model_input
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import InputFormat

if TYPE_CHECKING:
    from config import Options

log = logging.getLogger("rep")


def open_teacher(
    path: Path, options: "Options", dataset: ArrowDataset, given: InputFormat
) -> tuple[Checkpoint, MissingModalityClassifier]:
    """Opens the teacher's checkpoint and its model.

    Args:
        options: options of the student's run.
        dataset: the training split.
        given: its input format.

    Raises:
        ConfigError: the teacher takes other inputs, or is for another task.
        BackboneError, CheckpointError: the teacher cannot be opened, or is for other classes.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.spec.task != options.task:
        found = f"found one of {checkpoint.spec.task}"
        raise ConfigError(f"teacher={path}: expected a model of the classes of {options.task}, {found}")
    check_classes(checkpoint, dataset)
    trust, seed = options.trust_backbone, options.published_seed
    choice = BackboneChoice(tokenizer=options.tokenizer, trust=trust, published_seed=seed)
    classifier, inputs = open_model(checkpoint, choice, published_vit="ViT-B/16")
    if inputs != given:
        raise ConfigError(f"teacher={path}: expected this run's image size, tokenizer and text options, found others")
    if classifier.neighbours is not None and checkpoint.contents.get("data of train") != file_sha256(dataset.path):
        expected = f"expected one trained on {dataset.path}, as no sample may be its own neighbour"
        raise ConfigError(f"teacher={path}: {expected}; found other data")
    return checkpoint, classifier


@torch.no_grad()
def soft_labels(
    checkpoint: Checkpoint,
    classifier: MissingModalityClassifier,
    precision: str,
    data: MissingModalityData,
    backbone: FrozenWeights,
    device: torch.device,
) -> Tensor:
    """The teacher's class probabilities (N, C) for every training sample, 0 for those that training leaves out.

    Args:
        checkpoint, classifier: the teacher, as `open_teacher` returned it.
        backbone: the backbone whose cached outputs `data` holds, if it holds any.
    """
    dataset, dtype = data.datasets["train"], COMPUTE_TYPES[precision]
    classifier.compute(dtype)
    classifier.to(device).eval()
    same = (checkpoint.backbone_sha256, checkpoint.spec.architecture) == (backbone.sha256, backbone.architecture)
    loader = training_batches(data, cached=same and has_constant_features(classifier) and dataset.cached is not None)
    probabilities = []
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        for batch in tqdm(loader, desc="teacher", unit=" batches", dynamic_ncols=True, disable=None):
            logits_BC = classifier(model_input(move_data_to_device(batch, device), "train"))
            logits_BC *= classifier.head.logit_scale  # cosines alone would give nearly uniform probabilities
            probabilities.append((logits_BC.sigmoid() if dataset.spec.multilabel else logits_BC.softmax(-1)).cpu())
    log.info("soft labels for %d training samples from %s", len(dataset.chosen), checkpoint.path)
    return at_their_index(dataset, torch.cat(probabilities)).to(device)
