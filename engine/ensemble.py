"""Ensembles: several models as one, whose logits are the mean of theirs."""

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
    """Several classifiers that are evaluated like one."""

    def __init__(self, members: Sequence[MissingModalityClassifier]) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)

    def forward(self, batch: ModelInput) -> Tensor:
        """Logits (B, C)."""
        return torch.stack([member(batch) for member in self.members]).mean(0)

    def features(self, batch: ModelInput) -> tuple[dict[str, Tensor], dict[str, TowerSlots]]:
        """Raises ConfigError: each member has its own features."""
        raise ConfigError("load_path: expected one checkpoint, as only logits can be averaged")

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """Sets the dtype of each member, see `MissingModalityClassifier.compute`."""
        for member in self.members:
            assert isinstance(member, MissingModalityClassifier)
            member.compute(dtype, checkpointing=checkpointing)


def open_models(
    checkpoints: Sequence[Checkpoint], choice: BackboneChoice, published_vit: str
) -> tuple[MissingModalityClassifier, InputFormat]:
    """The model of one checkpoint, or the ensemble of several, and its input format.

    Raises:
        ConfigError: they do not share one input format.
        BackboneError, CheckpointError: as from `open_model`.
    """
    opened = [open_model(checkpoint, choice, published_vit) for checkpoint in checkpoints]
    (classifier, inputs), *others = opened
    for checkpoint, (_, other) in zip(checkpoints[1:], others, strict=True):
        if other != inputs:
            raise ConfigError(
                f"load_path: expected models with the same image size, tokenizer and text options, found different "
                f"ones in {checkpoints[0].path} and {checkpoint.path}"
            )
    return Ensemble([one for one, _ in opened]) if others else classifier, inputs


def merged_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The first checkpoint, with the paths of all and a joint hash; its offset is the mean, if all have one.

    Raises:
        CheckpointError: they differ in task or classes.
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
        log.warning("load_path: logits of head=dpl are cosines, from -1 to 1: they weigh less in the mean than others")
    offsets = [one.offset for one in checkpoints]
    known = [offset for offset in offsets if offset is not None]
    return replace(
        first,
        path=Path(", ".join(str(one.path) for one in checkpoints)),
        sha256=hashlib.sha256(" ".join(one.sha256 for one in checkpoints).encode()).hexdigest(),
        offset=sum(known) / len(known) if len(known) == len(offsets) else None,
    )
