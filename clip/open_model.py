"""A trained model ready to compute: its classifier on the backbone it was trained on, and its tokenizer."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from clip.backbone import HUB_NAMES, load_backbone
from clip.checkpoint import Checkpoint, check_tokenizer, restore_classifier
from clip.modules.classifier import MissingModalityClassifier
from clip.tokenizer import ClipTokenizer, load_tokenizer
from common.errors import BackboneError

log = logging.getLogger("rep")

COMPUTE_TYPES = {
    **dict.fromkeys(("32", "32-true"), torch.float32),
    **dict.fromkeys(("16", "16-mixed"), torch.float16),
    **dict.fromkeys(("bf16", "bf16-mixed"), torch.bfloat16),
}
"""Of the frozen towers, by the precision as the option has it, and as Lightning calls it."""


class BackboneChoice(NamedTuple):
    """What the user says of the frozen weights; None: what the checkpoint says."""

    vit: str | None = None
    activation: str | None = None
    tokenizer: str | None = None
    trust: bool = False
    published_seed: int = 0
    """Of the run that wrote a published checkpoint."""


def open_model(
    checkpoint: Checkpoint, choice: BackboneChoice, published_vit: str
) -> tuple[MissingModalityClassifier, ClipTokenizer]:
    """The model of `checkpoint`.

    Args:
        published_vit: for a published checkpoint, which holds its CLIP weights: whose tokenizer goes with them.

    Raises:
        BackboneError, CheckpointError: weights or tokenizer are not found, do not fit each other, or are not those of
            the training.
    """
    spec = checkpoint.spec
    if checkpoint.published:
        log.info("%s: a checkpoint of the published code; it holds its own CLIP weights", checkpoint.path)
        vit, backbone = published_vit, None
    else:
        vit, activation = choice.vit or str(checkpoint.backbone_name), choice.activation
        if activation is None and Path(vit).is_file():
            activation = spec.architecture.activation
        backbone = load_backbone(vit, trust=choice.trust, activation=activation)
    tokenizer = tokenizer_for(choice.tokenizer, vit, spec.architecture.vocab_size)
    check_tokenizer(checkpoint, tokenizer)
    return restore_classifier(checkpoint, backbone, choice.published_seed), tokenizer


def tokenizer_for(tokenizer: str | None, vit: str, vocab_size: int) -> ClipTokenizer:
    """The tokenizer that the user names, or the one that comes with the backbone.

    Raises:
        BackboneError: there is none, or it has ids that the backbone has no embedding for.
    """
    fallback = vit if Path(vit).is_dir() else HUB_NAMES.get(vit, HUB_NAMES["ViT-B/16"])
    found = load_tokenizer(tokenizer or fallback)
    if found.vocab_size > vocab_size:
        raise BackboneError(
            f"tokenizer={tokenizer or fallback}: has {found.vocab_size} ids, but the backbone embeds only {vocab_size}"
        )
    return found
