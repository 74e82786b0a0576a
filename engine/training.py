"""Training and evaluation steps of a classifier, as a Lightning module."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from common.errors import NonFiniteLossError
from engine.checkpoint import DESCRIPTION, ModelSpec, TokenizerUsed, describe, kept_state, load_kept_state
from engine.numerics import FiniteWatch, NotFinite, first_not_finite
from engine.optimization import OptimizerSettings, make_optimizer, make_schedule, schedule_steps
from engine.tasks import task_of
from vilt.datamodules import Batch, MissingModalityData

log = logging.getLogger("rep")

T = TypeVar("T")
Stage = Literal["train", "val", "test"]
Kept = tuple[Tensor, Tensor, Tensor]
"""Numbers of samples, their logits and labels."""
EPOCH_SO_FAR = "epoch_so_far"
"""Key of a checkpoint: what each process has kept of the epoch that it was written in."""
BAD_STEPS = "bad_steps"
"""Likewise: how many steps had a gradient that is not finite, in all and of the newest ones in a row."""
GPU_STEPS_PER_CHECK = 32
"""Looking at losses and gradients makes the host wait for the GPU."""


def model_input(batch: Batch) -> ModelInput:
    """A batch as the model takes it: without labels."""
    of_model = batch._asdict()
    del of_model["label"]
    return ModelInput(**of_model)


def _full_precision(logits: Tensor) -> Tensor:
    """float32 in place of 16 bits; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class FinetuneModule(pl.LightningModule):
    """Trains what the table of trainable parameters says; logs `train/`, `val/` and `test/` metrics of whole epochs.

    Its state dict is what checkpoints keep, so that the frozen weights are not in them.

    Args:
        classifier: frozen as `spec.task` says.
        backbone: name and SHA-256 of the frozen weights, for the checkpoints; None where none are written.
        settings: None where nothing is trained.
        seed: with epoch, batch and process it gives the dropout masks, so that a resumed run draws the same ones.
        skip_bad_steps: optimiser steps in a row that may have a gradient that is not finite (see FiniteWatch).
        class_names, tokenizer: of the training data, for the checkpoints.
    """

    def __init__(
        self,
        classifier: MissingModalityClassifier,
        spec: ModelSpec,
        backbone: tuple[str, str] | None = None,
        settings: OptimizerSettings | None = None,
        seed: int = 0,
        skip_bad_steps: int = 0,
        class_names: Sequence[str] = (),
        tokenizer: TokenizerUsed | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.spec = spec
        self.task = task_of(spec.task, spec.custom)
        self.backbone = backbone
        self.class_names = class_names
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed
        self._kept: dict[Stage, list[Kept]] = {"train": [], "val": [], "test": []}
        self._watch = FiniteWatch(skip_bad_steps)
        self._batches: list[Batch] = []
        """Of the optimiser step that is under way."""
        self.test_metrics: dict[str, float] = {}
        """The test metrics of all processes' samples, after a test run."""
        self.tested_samples = 0
        self.tested: tuple[Tensor, Tensor] | None = None
        """Logits and labels of the test split."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        return self.classifier(model_input(batch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the dropout masks by their place in the training, so that an interruption does not change them."""
        place = f"{self.seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "big"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch, with the method's own losses, each of which is logged by its name."""
        logits, own_losses = self.classifier.training_outputs(model_input(batch), batch.label)
        logits = _full_precision(logits)
        loss = self.task.loss(logits, batch.label) + sum(own_losses.values())
        self._watch.note_loss(batch_idx, batch.index_B, loss)
        self._batches.append(batch)
        several = self.trainer.world_size > 1
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=len(logits), sync_dist=several)
        for name, value in own_losses.items():
            self.log(f"train/{name}", value.detach(), on_step=True, batch_size=len(logits), sync_dist=several)
        self._keep("train", batch, logits)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Looks at losses and gradients, on a GPU at those of many steps together.

        Raises:
            NonFiniteLossError: see `_check_finite`.
        """
        waiting = self._watch.note_gradients(self.classifier.named_parameters(), self.global_step)
        if self.device.type == "cpu" or waiting == GPU_STEPS_PER_CHECK:
            self._check_finite()
        self._batches = []

    def _check_finite(self) -> None:
        """All processes have to call this at the same place, and end with the same message.

        Raises:
            NonFiniteLossError: for the first loss that is not finite, or too many such gradients in a row; names the
                step, the samples and the layer.
        """
        bad = self._watch.look()
        mine = None
        if bad is not None:
            mine = bad.of_gradient, bad.step, self._describe(bad), self._sample_names(bad.samples)
        found = sorted(of_process for of_process in self._of_all_processes(mine) if of_process is not None)
        if found:
            *_, message, _ = found[0]  # of a gradient, all processes have the same
            samples = [name for *_, other, names in found if other == message for name in names]
            raise NonFiniteLossError(f"{message}; samples: {', '.join(samples)}")

    def _describe(self, bad: NotFinite) -> str:
        if bad.of_gradient:
            allowed = self._watch.allowed
            several = f"; so were {allowed} before it (skip_bad_steps)" if allowed else ""
            return f"the gradient of {bad.what} is not finite at step {bad.step} (epoch {self.current_epoch}){several}"
        place, batch = None, next((batch for batch in self._batches if batch.index_B is bad.samples), None)
        if batch is not None:  # of this step: its forward pass can still be looked into
            self.on_train_batch_start(batch, bad.batch)  # the same dropout masks
            place = first_not_finite(self.classifier, lambda: self(batch))
        return (
            f"the loss became {bad.what} at step {bad.step} (epoch {self.current_epoch}, batch {bad.batch})"
            f"{f', first in the {place}' if place else ''}"
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the logits; the metrics are those of the whole split."""
        self._keep("val", batch, _full_precision(self(batch)))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the logits; the metrics are those of the whole split."""
        self._keep("test", batch, _full_precision(self(batch)))

    def on_validation_start(self) -> None:
        self._check_finite()  # before the checkpoint that follows a validation

    def on_train_epoch_end(self) -> None:
        self._check_finite()
        if self._watch.skipped:
            log.info("%d optimiser steps skipped so far: gradients not finite", self._watch.skipped)
        metrics = self._log_metrics("train")
        # Lightning would write the line after the checkpoint of the epoch's end, and a run killed between lose it.
        for logger in self.trainer.loggers if metrics else []:
            line = {f"train/{name}": value for name, value in metrics.items() if name != "loss"}
            logger.log_metrics({**line, "epoch": self.current_epoch}, step=self.global_step - 1)
            logger.save()

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
            self.tested_samples, self.tested = len(logits), (logits, labels)
        for name, value in metrics.items():
            if (stage, name) != ("train", "loss"):  # logged step by step
                # Every process has computed the same value of all samples: nothing to average.
                shown, logged = name == self.task.monitor, False if stage == "train" else None
                self.log(f"{stage}/{name}", value, prog_bar=shown, logger=logged, rank_zero_only=False)
        return metrics

    def _collect(self, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """Logits and labels that all processes kept since the last call, in dataset order, each sample once.

        None where nothing was kept: a run resumed at the end of an epoch.
        """
        kept = [of_process for of_process in self._gathered(stage) if of_process is not None]
        self._kept[stage].clear()
        if not kept:
            return None
        index_N, logits_NC, labels = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        order = torch.argsort(index_N, stable=True)
        index_N = index_N[order]
        first = torch.ones_like(index_N, dtype=torch.bool)
        first[1:] = index_N[1:] != index_N[:-1]  # training repeats samples so that all processes have as many
        return logits_NC[order][first], labels[order][first]

    def _gathered(self, stage: Stage) -> list[Kept | None]:
        """What each process has kept, None for one that has nothing."""
        parts = self._kept[stage]
        columns = zip(*parts, strict=True)  # what a resumed run took from its checkpoint is on the host
        mine: Any = tuple(torch.cat([part.cpu() for part in column]) for column in columns) if parts else None
        return self._of_all_processes(mine)

    def _of_all_processes(self, mine: T) -> list[T]:
        """What each process gives; all have to call this at the same place."""
        gathered: list[Any] = [mine]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, mine)
        return gathered

    def _sample_names(self, index_B: Tensor) -> list[str]:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MissingModalityData)
        dataset = data.datasets["train"]
        return [dataset.sample_name(number) for number in index_B.tolist()]

    def configure_optimizers(self) -> Any:
        """The optimiser over the declared groups, with warm-up and decay per optimiser step."""
        assert self.settings is not None
        optimizer = make_optimizer(self.classifier, self.task.head_name, self.settings)
        trainer = self.trainer
        _ = trainer.estimated_stepping_batches  # sets up the loaders that `num_training_batches` counts
        assert trainer.max_epochs is not None
        steps = schedule_steps(
            int(trainer.num_training_batches),
            trainer.max_epochs,
            trainer.accumulate_grad_batches,
            self.settings.max_steps,
        )
        scheduler = make_schedule(optimizer, self.settings, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """In a resumed run, gives back the gradients of 0 that `optimizer_zero_grad` keeps."""
        [optimizer] = self.trainer.optimizers
        for parameter in optimizer.state:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zeroes gradients instead of dropping them.

        As published: once a parameter has had a gradient, a step that has none for it (a start slot whose missing type
        is absent) still moves it by momentum and weight decay.
        """
        optimizer.zero_grad(set_to_none=False)

    def on_validation_model_zero_grad(self) -> None:
        """Leaves the gradients alone, which Lightning would drop before a validation."""

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint keeps: not the frozen weights."""
        return kept_state(self.classifier)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Takes what `state_dict` gave; every name is accounted for, whatever `strict` says."""
        load_kept_state(self.classifier, state_dict, "resume_from")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description, and what the train metrics of the epoch follow from so far; all processes take part."""
        self._check_finite()
        checkpoint[DESCRIPTION] = self.description()
        checkpoint[EPOCH_SO_FAR] = self._gathered("train")
        checkpoint[BAD_STEPS] = (self._watch.skipped, self._watch.in_a_row)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what `on_save_checkpoint` added, so that train metrics are those of whole epochs."""
        kept, rank = checkpoint.get(EPOCH_SO_FAR, []), self.trainer.global_rank
        if len(kept) == self.trainer.world_size:
            kept = kept[rank : rank + 1]
        elif rank:
            kept = []
        self._kept["train"] = [part for part in kept if part is not None]
        self._watch.skipped, self._watch.in_a_row = checkpoint.get(BAD_STEPS, (0, 0))

    def description(self) -> dict[str, Any]:
        """What checkpoints hold under DESCRIPTION."""
        assert self.backbone is not None
        return describe(self.spec, *self.backbone, self.class_names, self.tokenizer)
