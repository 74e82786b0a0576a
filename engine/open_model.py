"""Opening a trained model: its classifier on the backbone it was trained on, and its input format."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import MethodOptions
from clip.modules.registry import PRETRAINING
from common.errors import CheckpointError
from common.messages import quoted
from engine.checkpoint import Checkpoint, check_tokenizer, restore_classifier
from engine.families import BackboneChoice, family_of
from vilt.datasets.kinds import InputFormat

log = logging.getLogger("rep")

COMPUTE_TYPES = {
    **dict.fromkeys(("32", "32-true"), torch.float32),
    **dict.fromkeys(("16", "16-mixed"), torch.float16),
    **dict.fromkeys(("bf16", "bf16-mixed"), torch.bfloat16),
}
"""Dtype of the frozen towers, keyed by precision, as the option spells it and as Lightning does."""

# cuDNN's attention, which torch prefers on Hopper GPUs, takes a few hundred milliseconds to plan each new shape; with
# missing modalities and texts of any length, nearly every batch has one. Flash attention needs no plans.
torch.backends.cuda.enable_cudnn_sdp(False)


def reading_texts(inputs: InputFormat, method: MethodOptions) -> InputFormat:
    """`inputs` with the method's options on how much of the texts it reads."""
    return replace(inputs, text_windows=method.text_windows, group_texts=method.group_texts)


def precision_of(checkpoints: Sequence[Checkpoint], default: str, *, on_gpu: bool) -> str:
    """The precision to evaluate models in if the user names none: the training's, so that results agree.

    It is `default` if the checkpoints do not record one, record different ones, or record one that a CPU cannot
    compute.

    Raises:
        CheckpointError: a checkpoint records an unknown precision.
    """
    trained: list[str] = []
    for one in checkpoints:
        precision = None if one.training is None else one.training.precision
        if precision not in (None, *COMPUTE_TYPES):
            raise CheckpointError(f"{one.path}: precision: expected 32, 16 or bf16, found {quoted(precision)}")
        trained += [] if precision is None or precision in trained else [precision]
    if not trained or trained == [default]:
        return default
    if len(trained) > 1 or (COMPUTE_TYPES[trained[0]] is torch.float16 and not on_gpu):
        why = "the checkpoints differ" if len(trained) > 1 else "a CPU cannot compute in it"
        log.info("precision=%s instead of the training's %s: %s", default, " and ".join(trained), why)
        return default
    log.info("precision=%s, as in training; %s is the default here", trained[0], default)
    return trained[0]


def open_model(
    checkpoint: Checkpoint, choice: BackboneChoice, published_vit: str
) -> tuple[MissingModalityClassifier, InputFormat]:
    """The model of `checkpoint`, and its input format.

    Args:
        published_vit: for a published checkpoint, which holds its CLIP weights: the backbone whose tokenizer to use.

    Raises:
        BackboneError, CheckpointError: weights or tokenizer are missing, do not fit together, or differ from those used
            in training.
        ConfigError: `choice` contradicts the model.
    """
    spec, family, backbone = checkpoint.spec, family_of(checkpoint.spec.task), None
    if spec.method.prompt_type in PRETRAINING:
        raise CheckpointError(
            f"{checkpoint.path}: a pretrained backbone (prompt_type={spec.method.prompt_type}), whose head is not "
            f"trained; expected a model fine-tuned from it, by training with load_path={checkpoint.path}"
        )
    if checkpoint.published:
        log.info("%s: a checkpoint of the published code; it holds its own CLIP weights", checkpoint.path)
        choice = choice._replace(vit=published_vit)
    else:
        choice = choice._replace(vit=choice.vit or checkpoint.backbone_place)
        backbone = family.load(choice, spec.architecture)
    inputs = reading_texts(family.inputs(choice, spec.architecture), spec.method)
    check_tokenizer(checkpoint, inputs.fingerprint)
    return restore_classifier(checkpoint, backbone, choice.published_seed), inputs
