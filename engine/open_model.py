"""A trained model ready to compute: its classifier on the backbone it was trained on, and what it takes."""

import logging
from dataclasses import replace

import torch

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import MethodOptions
from clip.modules.registry import PRETRAINING
from common.errors import CheckpointError
from engine.checkpoint import Checkpoint, check_tokenizer, restore_classifier
from engine.families import BackboneChoice, family_of
from vilt.datasets.kinds import InputFormat

log = logging.getLogger("rep")

COMPUTE_TYPES = {
    **dict.fromkeys(("32", "32-true"), torch.float32),
    **dict.fromkeys(("16", "16-mixed"), torch.float16),
    **dict.fromkeys(("bf16", "bf16-mixed"), torch.bfloat16),
}
"""Of the frozen towers, by the precision as the option has it, and as Lightning calls it."""

# cuDNN's attention, which torch prefers on Hopper GPUs, takes some hundred milliseconds to plan for each new shape, and
# with missing modalities and texts of any length nearly every batch has one. Flash attention has no plans.
torch.backends.cuda.enable_cudnn_sdp(False)


def reading_texts(inputs: InputFormat, method: MethodOptions) -> InputFormat:
    """What a model takes, with how much of the texts it reads."""
    return replace(inputs, text_windows=method.text_windows, group_texts=method.group_texts)


def open_model(
    checkpoint: Checkpoint, choice: BackboneChoice, published_vit: str
) -> tuple[MissingModalityClassifier, InputFormat]:
    """The model of `checkpoint`, and what it takes.

    Args:
        published_vit: for a published checkpoint, which holds its CLIP weights: whose tokenizer goes with them.

    Raises:
        BackboneError, CheckpointError: weights or tokenizer are not found, do not fit each other, or are not those of
            the training.
        ConfigError: `choice` contradicts the model.
    """
    spec, family, backbone = checkpoint.spec, family_of(checkpoint.spec.task), None
    if spec.method.prompt_type in PRETRAINING:
        raise CheckpointError(
            f"{checkpoint.path}: a pretrained backbone (prompt_type={spec.method.prompt_type}), whose head nothing has "
            f"trained; expected a model that was fine-tuned from it, with load_path={checkpoint.path}"
        )
    if checkpoint.published:
        log.info("%s: a checkpoint of the published code; it holds its own CLIP weights", checkpoint.path)
        choice = choice._replace(vit=published_vit)
    else:
        choice = choice._replace(vit=choice.vit or str(checkpoint.backbone_name))
        backbone = family.load(choice, spec.architecture)
    inputs = reading_texts(family.inputs(choice, spec.architecture), spec.method)
    check_tokenizer(checkpoint, inputs.fingerprint)
    return restore_classifier(checkpoint, backbone, choice.published_seed), inputs
