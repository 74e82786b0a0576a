"""Training and evaluation steps of a classifier, as a Lightning module."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from clip.checkpoint import DESCRIPTION, ModelSpec, describe, kept_state, load_kept_state
from clip.modules.classifier import MissingModalityClassifier, ModelInput
from clip.tasks import task_of
from clip.trainable import optimizer_groups
from vilt.datamodules import Batch, MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.errors import NonFiniteLossError
from vilt.transforms import normalise

Stage = Literal["train", "val", "test"]
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-8
LOSSES_PER_CHECK = 32
"""Looking at a loss makes the host wait for the GPU."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The schedule (METHOD.md section 5)."""

    learning_rate: float
    lr_mult: float
    weight_decay: float
    warmup_steps: float
    """Optimiser steps, or a share of all steps if below 1."""
    end_lr: float
    decay_power: float | str
    """Power of the polynomial decay, or `cosine`."""


def model_input(batch: Batch) -> ModelInput:
    """A batch as the model takes it."""
    return ModelInput(
        image_b3RR=normalise(batch.image_b3RR),
        tokens_bL=batch.tokens_bL,
        missing_type_B=batch.missing_type_B,
        image_rows=batch.image_rows,
        text_rows=batch.text_rows,
        types=batch.types,
        text_length=batch.text_length,
        image_of_B=batch.image_of_B,
    )


class FinetuneModule(pl.LightningModule):
    """Trains what the table of trainable parameters says; logs `train/`, `val/` and `test/` metrics of whole epochs.

    Its state dict is what checkpoints keep, so that the frozen weights are not in them.

    Args:
        classifier: frozen as `spec.task` says.
        backbone: name and SHA-256 of the frozen weights, for the checkpoints; None where none are written.
        settings: None where nothing is trained.
        seed: with epoch, batch and process it gives the dropout masks, so that a resumed run draws the same ones.
    """

    def __init__(
        self,
        classifier: MissingModalityClassifier,
        spec: ModelSpec,
        backbone: tuple[str, str] | None = None,
        settings: OptimizerSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.spec = spec
        self.task = task_of(spec.task, spec.custom)
        self.backbone = backbone
        self.settings = settings
        self.seed = seed
        self._kept: dict[Stage, list[tuple[Tensor, Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
        self._unchecked: list[tuple[Tensor, int, int, Tensor]] = []
        """(loss, step, batch, samples) of steps whose loss nobody has looked at yet."""
        self.test_metrics: dict[str, float] = {}
        """The test metrics of all processes' samples, after a test run."""
        self.tested_samples = 0

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        return self.classifier(model_input(batch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the dropout masks by their place in the training, so that an interruption does not change them."""
        place = f"{self.seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "big"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch, with the method's own.

        Raises:
            NonFiniteLossError: names the step and the samples.
        """
        logits, penalty = self.classifier.training_outputs(model_input(batch), batch.label)
        logits = logits.float()
        loss = self.task.loss(logits, batch.label)
        if penalty is not None:
            loss = loss + penalty
        self._unchecked.append((loss.detach(), self.global_step, batch_idx, batch.index_B))
        if loss.device.type == "cpu" or len(self._unchecked) == LOSSES_PER_CHECK:
            self._check_losses()
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=len(logits))
        self._keep("train", batch, logits)
        return loss

    def _check_losses(self) -> None:
        """Raises NonFiniteLossError for the first of the losses since the last check that is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or torch.stack([loss for loss, *_ in unchecked]).isfinite().all():
            return
        loss, step, batch_idx, index_B = next(entry for entry in unchecked if not entry[0].isfinite())
        raise NonFiniteLossError(
            f"the loss became {loss.item()} at step {step} (epoch {self.current_epoch}, batch {batch_idx}); "
            f"samples: {', '.join(self._sample_names(index_B))}"
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the logits; the metrics are those of the whole split."""
        self._keep("val", batch, self(batch).float())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the logits; the metrics are those of the whole split."""
        self._keep("test", batch, self(batch).float())

    def on_validation_start(self) -> None:
        self._check_losses()  # ahead of the checkpoint that follows a validation

    def on_train_epoch_end(self) -> None:
        self._check_losses()
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self.test_metrics = self._log_metrics("test")

    def _keep(self, stage: Stage, batch: Batch, logits: Tensor) -> None:
        self._kept[stage].append((batch.index_B, logits.detach(), batch.label))

    def _log_metrics(self, stage: Stage) -> dict[str, float]:
        collected = self._collect(stage)
        if collected is None:
            return {}
        logits, labels = collected
        metrics = {"loss": self.task.loss(logits, labels).item(), **self.task.metrics(logits, labels)}
        if stage == "test":
            self.tested_samples = len(logits)
        for name, value in metrics.items():
            if (stage, name) != ("train", "loss"):  # logged step by step
                # Every process has computed the same value of all samples: nothing to average.
                self.log(f"{stage}/{name}", value, prog_bar=name == self.task.monitor, rank_zero_only=False)
        return metrics

    def _collect(self, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """Logits and labels that all processes kept since the last call, in dataset order, each sample once.

        None where nothing was kept: a run resumed at the end of an epoch.
        """
        parts = self._kept[stage]
        kept: list[Any] = [tuple(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)) if parts else None]
        parts.clear()
        if self.trainer.world_size > 1:
            mine, kept = kept[0], [None] * self.trainer.world_size
            torch.distributed.all_gather_object(kept, mine)
        kept = [of_process for of_process in kept if of_process is not None]
        if not kept:
            return None
        index_N, logits_NC, labels = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        order = torch.argsort(index_N, stable=True)
        index_N = index_N[order]
        first = torch.ones_like(index_N, dtype=torch.bool)
        first[1:] = index_N[1:] != index_N[:-1]  # training repeats samples so that all processes have as many
        return logits_NC[order][first], labels[order][first]

    def _sample_names(self, index_B: Tensor) -> list[str]:
        dataset = self._train_data()
        return [dataset.sample_name(number) for number in index_B.tolist()]

    def _train_data(self) -> ArrowDataset:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MissingModalityData)
        return data.datasets["train"]

    def configure_optimizers(self) -> Any:
        """AdamW over the declared groups, with warm-up and decay per optimiser step."""
        assert self.settings is not None
        settings = self.settings
        groups = optimizer_groups(
            self.classifier, self.task.head_name, settings.learning_rate, settings.lr_mult, settings.weight_decay
        )
        optimizer = AdamW(groups, lr=settings.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
        scheduler = make_schedule(optimizer, settings, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint keeps: not the frozen weights."""
        return kept_state(self.classifier)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Takes what `state_dict` gave; every name is accounted for, whatever `strict` says."""
        load_kept_state(self.classifier, state_dict, "checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.backbone is not None
        checkpoint[DESCRIPTION] = describe(self.spec, *self.backbone, self._train_data().class_names())


def make_schedule(optimizer: Optimizer, settings: OptimizerSettings, total_steps: int) -> LRScheduler:
    """Linear warm-up, then decay to `end_lr` at `total_steps`."""
    warmup = settings.warmup_steps
    warmup_steps = int(total_steps * warmup) if warmup < 1 else int(warmup)
    if settings.decay_power == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup_steps, total_steps, lr_end=settings.end_lr, power=float(settings.decay_power)
    )
