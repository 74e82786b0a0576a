"""Several models as one: the mean of their logits."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput, TowerSlots
from common.errors import CheckpointError, ConfigError
from engine.checkpoint import Checkpoint
from engine.families import BackboneChoice
from engine.open_model import open_model
from vilt.datasets.kinds import InputFormat

log = logging.getLogger("rep")


class Ensemble(MissingModalityClassifier):
    """Several classifiers, where one is evaluated."""

    def __init__(self, members: Sequence[MissingModalityClassifier]) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)

    def forward(self, batch: ModelInput) -> Tensor:
        """Logits (B, C)."""
        return torch.stack([member(batch) for member in self.members]).mean(0)

    def features(self, batch: ModelInput) -> tuple[dict[str, Tensor], dict[str, TowerSlots]]:
        """Raises ConfigError: members have features of their own."""
        raise ConfigError("load_path: expected one checkpoint, as only logits are averaged")

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """As `MissingModalityClassifier.compute`."""
        for member in self.members:
            assert isinstance(member, MissingModalityClassifier)
            member.compute(dtype, checkpointing=checkpointing)


def open_models(
    checkpoints: Sequence[Checkpoint], choice: BackboneChoice, published_vit: str
) -> tuple[MissingModalityClassifier, InputFormat]:
    """The model of one checkpoint, or those of several as one, and what they take. Errors are those of `open_model`.

    Raises:
        ConfigError: they do not all take the same.
    """
    opened = [open_model(checkpoint, choice, published_vit) for checkpoint in checkpoints]
    (classifier, inputs), *others = opened
    for checkpoint, (_, other) in zip(checkpoints[1:], others, strict=True):
        if other != inputs:
            raise ConfigError(
                f"load_path: expected models of one image size, tokenizer and reading of texts, found others in "
                f"{checkpoints[0].path} and {checkpoint.path}"
            )
    return Ensemble([one for one, _ in opened]) if others else classifier, inputs


def as_one(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The first, called by the names of all; its offset is the mean of theirs, where all have one.

    Raises:
        CheckpointError: they are not of one task and its classes.
    """
    first, *others = checkpoints
    for other in others:
        names = [one.class_names for one in (first, other) if one.class_names]
        custom, theirs = first.spec.custom, other.spec.custom
        same_custom = custom is None or theirs is None or custom.difference(theirs) is None
        if other.spec.task != first.spec.task or len(set(names)) > 1 or not same_custom:
            found = f"{first.path} ({first.spec.task}) and {other.path} ({other.spec.task})"
            raise CheckpointError(f"load_path: expected models of the same classes, found {found}")
    if not others:
        return first
    if len(heads := {one.spec.head for one in checkpoints}) > 1 and "dpl" in heads:
        log.warning("load_path: logits of head=dpl are cosines, from -1 to 1: in the mean they weigh less than others")
    offsets = [one.offset for one in checkpoints]
    known = [offset for offset in offsets if offset is not None]
    return replace(
        first,
        path=Path(", ".join(str(one.path) for one in checkpoints)),
        sha256=hashlib.sha256(" ".join(one.sha256 for one in checkpoints).encode()).hexdigest(),
        offset=sum(known) / len(known) if len(known) == len(offsets) else None,
    )
