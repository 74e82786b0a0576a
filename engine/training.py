"""Training and evaluation steps of a classifier, as a Lightning module."""

import hashlib
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.fused import PLAIN
from clip.modules.interfaces import ModelInput
from clip.modules.registry import PRETRAINING
from common.errors import NonFiniteLossError
from common.text import counted
from engine.checkpoint import OFFSET, ModelSpec, load_saved_state, saved_state
from engine.cuda_graphs import Forward, Losses, Step, use_ops
from engine.decision import best_offset
from engine.exported import DESCRIPTION
from engine.numerics import FiniteWatch, NotFinite, first_not_finite
from engine.optimization import (
    OptimizerSettings,
    make_optimizer,
    make_schedule,
    plateau_of,
    schedule_steps,
    weight_in_step,
)
from engine.tasks import counts_as_published, task_of
from vilt.batches import Batch
from vilt.datamodules import MissingModalityData

log = logging.getLogger("rep")

T = TypeVar("T")
Stage = Literal["train", "val", "test"]
Kept = tuple[Tensor, Tensor, Tensor]
"""Indices of samples, their logits and labels."""
EPOCH_SO_FAR = "epoch_so_far"
"""Key in a checkpoint: the training outputs that each process has collected in the current epoch."""
BAD_STEPS = "bad_steps"
"""Key in a checkpoint: the number of steps with a gradient that is not finite, in total and in a row up to now."""
MINUS_LOSS = "minus_loss"
"""Metric that chooses the best model in pretraining."""
RUNNING_STATISTICS = ("running_mean", "running_var")
"""Suffixes of the names of buffers that each process computes from its own samples."""
GPU_STEPS_PER_CHECK = 32
"""Steps between checks of losses and gradients on a GPU: each check makes the host wait."""


def model_input(batch: Batch, split: str = "") -> ModelInput:
    """The model's input: a batch without its labels."""
    fields = batch._asdict()
    del fields["label"]
    return ModelInput(**fields, split=split)


class FinetuneModule(pl.LightningModule):
    """Trains the parameters of a classifier that are not frozen, and evaluates it.

    It logs `train/`, `val/` and `test/` metrics of whole epochs. Its state dict leaves out the frozen weights, so
    checkpoints do not contain them.

    Args:
        classifier: has the parameters frozen that `spec.task` does not train.
        description: description saved in checkpoints under DESCRIPTION, to which each validation adds its offset (see
            `engine/decision.py`); None if no checkpoints are written.
        settings: None if nothing is trained.
        seed: seeds the dropout masks with epoch, batch and process, so that a resumed run draws the same ones.
        skip_bad_steps: how many optimiser steps in a row may have gradients that are not finite (see FiniteWatch).
    """

    def __init__(
        self,
        classifier: MissingModalityClassifier,
        spec: ModelSpec,
        description: dict[str, Any] | None = None,
        settings: OptimizerSettings | None = None,
        seed: int = 0,
        skip_bad_steps: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.task = task_of(spec.task, spec.custom)
        self.description = description
        self.pretrains = spec.method.prompt_type in PRETRAINING
        self.settings = settings
        self.seed = seed
        self.counts_as_published = counts_as_published(spec.dataset)
        self._kept: dict[Stage, list[Kept]] = {"train": [], "val": [], "test": []}
        self._watch = FiniteWatch(skip_bad_steps)
        self._batches: dict[int, Batch] = {}  # batches of the current optimiser step, keyed by index in the epoch
        self._rate_at: Callable[[int], float] = lambda step: 1.0
        """Maps an optimiser step to its share of the learning rate."""
        self._groups: list[dict[str, Any]] = []  # the optimiser's groups from the options, without their parameters
        self.step: Step = self._step  # computation of a training step
        self.evaluate: Forward = classifier.__call__
        self.soft_labels: Tensor | None = None  # (N, C), targets of half the loss, see `engine/teacher.py`
        self.test_metrics: dict[str, float] = {}  # metrics over the test samples of all processes, after a test run
        self.tested: tuple[Tensor, Tensor] | None = None  # logits and labels of the test split, after a test run

    def forward(self, batch: Batch, split: str = "") -> Tensor:
        """Logits (B, C)."""
        return self.evaluate(model_input(batch, split))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the dropout masks by their position in training, so that an interruption does not change them."""
        place = f"{self.seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "big")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also queue calls for unused GPUs
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch plus the method's own losses, which are also logged by name."""
        inputs = model_input(batch, "train")
        unweighted = self.counts_as_published or self.pretrains  # a pretraining's batches are subsequences, not samples
        counted, weight = (len(batch.index_B), 1.0) if unweighted else self._weight(batch_idx)
        if self.pretrains:
            own_losses = self.classifier.pretraining_losses(inputs)
            loss = sum(own_losses.values(), torch.zeros((), device=self.device))
        else:
            inputs, labels = self.classifier.method.augment(inputs, batch.label, self.task.n_classes)
            loss, logits, own_losses = self.step(inputs, labels, counted)
            self._keep("train", batch, logits)
        self._watch.note_loss(batch_idx, batch.index_B, loss)
        self._batches[batch_idx] = batch
        several, samples = self.trainer.world_size > 1, len(batch.index_B)
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=samples, sync_dist=several)
        for name, value in own_losses.items():
            self.log(f"train/{name}", value.detach(), on_step=True, batch_size=samples, sync_dist=several)
        return loss * weight if weight != 1 else loss

    def _step(self, inputs: ModelInput, labels: Tensor, counted: int) -> Losses:
        logits, own_losses = self.classifier.training_outputs(inputs, labels)
        loss = self.task.loss(logits[:counted], labels[:counted])
        if self.soft_labels is not None and inputs.index_B is not None:
            loss = (loss + self.task.loss(logits[:counted], self.soft_labels[inputs.index_B[:counted]])) / 2
        return loss + sum(own_losses.values()), logits, own_losses

    def _weight(self, batch_idx: int) -> tuple[int, float]:
        data, trainer = self._data, self.trainer
        step = (data.settings.per_gpu_batchsize, trainer.accumulate_grad_batches)
        samples = len(data.datasets["train"].chosen)
        return weight_in_step(batch_idx, *step, samples, trainer.global_rank, trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Checks losses and gradients, on a GPU those of many steps at once.

        First it sets missing gradients to zero, as published: once a parameter has been trained, a step without a
        gradient for it (a start slot whose missing type is absent) still moves it by momentum and weight decay.

        Raises:
            NonFiniteLossError: see `_check_finite`.
        """
        for parameter in optimizer.state:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        waiting = self._watch.note_gradients(self._trained, self.global_step)
        if self.device.type == "cpu" or waiting == GPU_STEPS_PER_CHECK:
            self._check_finite()
        self._batches.clear()

    @cached_property
    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [each for each in self.classifier.named_parameters() if each[1].requires_grad]

    def _check_finite(self) -> None:
        """Checks the recorded losses and gradients; all processes must call this at the same point.

        Raises:
            NonFiniteLossError: for the first loss that is not finite, or too many such gradients in a row; the message
                is the same in all processes. It names the step, the samples and the layer; for a loss, the layer only
                if its step is not over yet (on a GPU it often is).
        """
        bad = self._watch.look()
        own = None
        if bad is not None:
            own = bad.of_gradient, bad.step, self._describe(bad), self._sample_names(bad.samples)
        found = sorted(each for each in self._of_all_processes(own) if each is not None)
        if found:
            *_, message, _ = found[0]  # for a gradient, the same in all processes
            samples = [name for *_, other, names in found if other == message for name in names]
            raise NonFiniteLossError(f"{message}; samples: {', '.join(samples)}")

    def _describe(self, bad: NotFinite) -> str:
        if bad.of_gradient:
            allowed = self._watch.allowed
            several = f"; so were {allowed} before it (skip_bad_steps)" if allowed else ""
            return f"the gradient of {bad.what} is not finite at step {bad.step} (epoch {self.current_epoch}){several}"
        place = first_not_finite(self.classifier, lambda: self._repeat(bad.batch)) if bad.batch in self._batches else ""
        return f"the loss became {bad.what} at step {bad.step} (epoch {self.current_epoch}, batch {bad.batch}){place}"

    def _repeat(self, batch_idx: int) -> None:
        """Repeats the forward pass of a batch with the same dropout masks, in a form that exposes every module."""
        use_ops(self.classifier, PLAIN)
        batch = self._batches[batch_idx]
        self.on_train_batch_start(batch, batch_idx)
        inputs = model_input(batch, "train")
        if self.pretrains:
            self.classifier.pretraining_losses(inputs)
        else:
            inputs, labels = self.classifier.method.augment(inputs, batch.label, self.task.n_classes)
            self._step(inputs, labels, len(batch.index_B))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects the logits, for metrics of the whole split; in pretraining, logs the losses instead."""
        if self.pretrains:
            return self._log_pretraining(batch, batch_idx)
        return self._keep("val", batch, self(batch, "val"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects the logits, for metrics of the whole split."""
        self._keep("test", batch, self(batch, "test"))

    def _log_pretraining(self, batch: Batch, batch_idx: int) -> None:
        """Logs the mean losses over the split, with the same augmented views each time."""
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)
            losses = self.classifier.pretraining_losses(model_input(batch))
        several, samples = self.trainer.world_size > 1, len(batch.index_B)
        loss = sum(losses.values(), torch.zeros((), device=self.device))
        for name, value in {**losses, "loss": loss, MINUS_LOSS: -loss}.items():
            self.log(f"val/{name}", value, batch_size=samples, sync_dist=several)

    def on_validation_start(self) -> None:
        self._check_finite()  # before the checkpoint that follows a validation
        if self.trainer.world_size > 1:  # else each process would validate a different model, and only one is saved
            for name, buffer in self.classifier.named_buffers():
                if name.endswith(RUNNING_STATISTICS):
                    torch.distributed.broadcast(buffer, src=0)

    def on_train_epoch_end(self) -> None:
        self._check_finite()
        if self._watch.skipped:
            log.info("%s skipped so far: gradients not finite", counted(self._watch.skipped, "optimiser step"))
        metrics = self._log_metrics("train")
        # Lightning would write the line after the checkpoint at the epoch's end; a run killed in between would lose it.
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
        if stage == "val":
            if labels.ndim == 2 and self.description is not None:
                self.description = {**self.description, OFFSET: best_offset(logits, labels)}
            for config in self.trainer.strategy.lr_scheduler_configs:
                if (plateau := plateau_of(config.scheduler)) is not None:
                    plateau.see(metrics["loss"], config.scheduler)  # type: ignore[arg-type]
        if stage == "test":
            self.tested = logits, labels
        for name, value in metrics.items():
            if (stage, name) != ("train", "loss"):  # logged step by step
                # Every process has computed the same value over all samples: nothing to average.
                shown, logged = name == self.task.monitor, False if stage == "train" else None
                self.log(f"{stage}/{name}", value, prog_bar=shown, logger=logged, rank_zero_only=False)
        return metrics

    def _collect(self, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """Logits and labels that all processes collected since the last call, in dataset order, each sample once.

        None if nothing was collected, as in a run resumed at the end of an epoch.
        """
        kept = [each for each in self._gathered(stage) if each is not None]
        self._kept[stage].clear()
        if not kept:
            return None
        index_N, logits_NC, labels = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        order = torch.argsort(index_N, stable=True)
        index_N = index_N[order]
        first = torch.ones_like(index_N, dtype=torch.bool)
        first[1:] = index_N[1:] != index_N[:-1]  # training repeats samples to give all processes equally many
        return logits_NC[order][first], labels[order][first]

    def _gathered(self, stage: Stage) -> list[Kept | None]:
        """The outputs that each process has collected, None for a process without any."""
        parts = self._kept[stage]
        columns = zip(*parts, strict=True)  # parts that a resumed run took from its checkpoint are on the host
        own: Any = tuple(torch.cat([part.cpu() for part in column]) for column in columns) if parts else None
        return self._of_all_processes(own)

    def _of_all_processes(self, own: T) -> list[T]:
        """The values that all processes pass as `own`; all must call this at the same point."""
        gathered: list[Any] = [own]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, own)
        return gathered

    @property
    def _data(self) -> MissingModalityData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MissingModalityData)
        return data

    def _sample_names(self, index_B: Tensor) -> list[str]:
        return [self._data.datasets["train"].sample_name(index) for index in index_B.tolist()]

    def configure_optimizers(self) -> Any:
        """The optimiser with its parameter groups, and the schedule, which advances with each optimiser step."""
        assert self.settings is not None
        classifier, head = self.classifier, self.task.head_name
        optimizer = make_optimizer(classifier, head, self.settings, classifier.decays, classifier.method.betas)
        trainer = self.trainer
        _ = trainer.estimated_stepping_batches  # sets up the loaders that `num_training_batches` counts
        assert trainer.max_epochs is not None
        batches, accumulation = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        run_length = (batches, trainer.max_epochs, accumulation, self.settings.max_steps)
        self.steps = schedule_steps(*run_length, as_published=self.counts_as_published)
        scheduler = make_schedule(optimizer, self.settings, self.steps)
        [self._rate_at, *_] = scheduler.lr_lambdas
        self._groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def was_trained(self, steps: int) -> bool:
        """Whether any of the first `steps` optimiser steps had a learning rate above 0; a warm-up's first has 0."""
        return any(self._rate_at(step) > 0 for step in range(steps))

    def on_train_start(self) -> None:
        """In a resumed run, applies the options of this run.

        Lightning also restores the optimiser's settings from the run being resumed; its learning rate would hold only
        up to the first step, since the schedule is not restored.
        """
        [optimizer], [schedule] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        scheduler: Any = schedule.scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in self._groups]
        step = scheduler.last_epoch
        for group, own in zip(optimizer.param_groups, self._groups, strict=True):
            group |= own
            group["lr"] = own["initial_lr"] * self._rate_at(step)
        if step and self.trainer.is_global_zero:
            rate = max(group["lr"] for group in optimizer.param_groups)
            text = "resumed at step %d; learning rate %.3g, by this run's schedule (%d steps)"
            log.info(text, step, rate, self.steps)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The entries saved in a checkpoint: all but the frozen weights."""
        return saved_state(self.classifier)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Loads what `state_dict` returned; the names must match exactly, whatever `strict` says."""
        load_saved_state(self.classifier, state_dict, "resume_from")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description and the training outputs of the epoch so far; all processes take part."""
        self._check_finite()
        checkpoint[DESCRIPTION] = self.description
        checkpoint[EPOCH_SO_FAR] = self._gathered("train")
        checkpoint[BAD_STEPS] = (self._watch.skipped, self._watch.in_a_row)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` added, so that train metrics cover whole epochs."""
        if self.description is not None and OFFSET in checkpoint[DESCRIPTION]:
            self.description = {**self.description, OFFSET: checkpoint[DESCRIPTION][OFFSET]}
        kept, rank = checkpoint.get(EPOCH_SO_FAR, []), self.trainer.global_rank
        if len(kept) == self.trainer.world_size:
            kept = kept[rank : rank + 1]
        elif rank:
            kept = []
        self._kept["train"] = [part for part in kept if part is not None]
        self._watch.skipped, self._watch.in_a_row = checkpoint.get(BAD_STEPS, (0, 0))
