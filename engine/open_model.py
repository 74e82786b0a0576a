"""A trained model ready to compute: its classifier on the backbone it was trained on, and what it takes."""

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
"""Of the frozen towers, by the precision as the option has it, and as Lightning calls it."""

# cuDNN's attention, which torch prefers on Hopper GPUs, takes some hundred milliseconds to plan for each new shape, and
# with missing modalities and texts of any length nearly every batch has one. Flash attention has no plans.
torch.backends.cuda.enable_cudnn_sdp(False)


def reading_texts(inputs: InputFormat, method: MethodOptions) -> InputFormat:
    """What a model takes, with how much of the texts it reads."""
    return replace(inputs, text_windows=method.text_windows, group_texts=method.group_texts)


def precision_of(checkpoints: Sequence[Checkpoint], default: str, *, on_gpu: bool) -> str:
    """What models are evaluated in where the user does not say: what they were trained and tested in, so that numbers
    agree; `default` where they do not say it, differ in it, or a CPU cannot compute in it.

    Raises:
        CheckpointError: one says something else than a precision.
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
        why = "they differ" if len(trained) > 1 else "a CPU cannot compute in it"
        log.info("precision=%s, not the training's, %s: %s", default, " and ".join(trained), why)
        return default
    log.info("precision=%s, the training's; %s is the default here", trained[0], default)
    return trained[0]


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
        choice = choice._replace(vit=choice.vit or checkpoint.backbone_place)
        backbone = family.load(choice, spec.architecture)
    inputs = reading_texts(family.inputs(choice, spec.architecture), spec.method)
    check_tokenizer(checkpoint, inputs.fingerprint)
    return restore_classifier(checkpoint, backbone, choice.published_seed), inputs
