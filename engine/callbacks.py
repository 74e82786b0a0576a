"""What happens beside the steps of a training run: checkpoints, a limit of steps, and lines about the progress."""

import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from common.signals import STOP_SIGNALS, Stopped, stop_now
from common.text import counted, figure, order_of
from engine.checkpoint_file import AtomicCheckpointIO
from engine.exported import DESCRIPTION
from engine.metrics_log import MetricsLogger
from engine.training import FinetuneModule
from vilt.batches import Batch
from vilt.datamodules import TimedLoader

log = logging.getLogger("rep")

SECONDS_BETWEEN = 300.0
"""At most, between two checkpoints: writing one takes as long as several optimiser steps."""


class Checkpoints(Checkpoint):
    """Keeps `best.ckpt`, the best model by a validation metric, and `last.ckpt`, for `resume_from`.

    `last.ckpt` also carries the best model so far: a resumed run, which has a folder of its own, ends with the same
    best model as an uninterrupted one. Lightning's ModelCheckpoint loses it in another folder, and knows no way to
    stop at a signal: `last.ckpt` is written at the end of each epoch, between optimiser steps once SECONDS_BETWEEN have
    passed, and where a signal stops the run, between two steps or in a validation, which is then repeated.

    Args:
        folder: where both are written, by the first process alone.
        monitor: name of the logged metric; undefined (NaN) is never best.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder = folder
        self.monitor = monitor
        self.best: dict[str, Any] | None = None  # what `best.ckpt` holds
        self.seconds = 0.0  # that the training waited for writing, since the reader last set it to 0
        self.training = False  # whether a validation has begun, by when all that a checkpoint restores has been used
        self._asked: int | None = None  # the first SIGTERM or Ctrl-C in a training; a second one stops at once
        self._kept_step = 0
        """Optimiser steps behind the newest checkpoint, here or in the folder of the run that is resumed."""
        self._kept_at = time.monotonic()

    @property
    def best_path(self) -> Path:
        """Of the best model; meaningful in the first process."""
        return self.folder / "best.ckpt"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_best(trainer)  # of a resumed run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept_step, self._kept_at = trainer.global_step, time.monotonic()
        for number in STOP_SIGNALS:  # in place of Lightning's handlers, which stop in the middle of an accumulation
            signal.signal(number, self._note_signal)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.training |= trainer.global_step > self._kept_step  # a step is through
            self._keep_or_stop(trainer, self._is_due(trainer))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loader: Any = trainer.val_dataloaders
        if batch_idx < loader.sampler.samples // trainer.world_size // loader.batch_size:  # every process gets there
            self._keep_or_stop(trainer, False)
        self.training = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        score = float(trainer.callback_metrics[self.monitor])
        if not pl_module.was_trained(trainer.global_step):
            log.info("not kept as the best model: the learning rate was 0 up to step %d", trainer.global_step)
        elif order_of(score, self.monitor) > order_of(self.best["score"] if self.best else math.nan, self.monitor):
            self.best = {
                "state_dict": {name: value.to("cpu", copy=True) for name, value in pl_module.state_dict().items()},
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "monitor": self.monitor,
                "score": score,
                DESCRIPTION: pl_module.description,
            }
            self._write_best(trainer)
        # Where StepLimit ends the training, this is its last state.
        self._keep_or_stop(trainer, trainer.should_stop or self._is_due(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning also calls this where StepLimit ends the training in mid-epoch, and would take the rest of the epoch
        # for done in a run resumed from there.
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed == trainer.num_training_batches:
            self._keep_or_stop(trainer, True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, stop_now)
        self._keep_or_stop(trainer, False)
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        if self.best is not None and not {"score", "state_dict"} <= self.best.keys():
            raise KeyError("best")  # rather than write it into best.ckpt

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes Lightning's counts say what it has to do next when it reads them back.

        By itself it leaves out a batch that was fetched, and the rest of a validation that had begun.
        """
        loops = checkpoint["loops"]["fit_loop"]
        training, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        if training["current"]["ready"] > training["current"]["completed"]:
            training["is_last_batch"] = False
            for counts in (training["total"], training["current"]):
                counts["ready"] = counts["completed"]
        if validation["current"]["ready"] > validation["current"]["completed"]:  # which it has to repeat
            validation["is_last_batch"] = False
            validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            validation["current"] = dict.fromkeys(validation["total"], 0)

    def _write_best(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        if trainer.is_global_zero and self.best is not None:
            trainer.strategy.checkpoint_io.save_checkpoint(self.best, self.best_path)
        self.seconds += time.monotonic() - began

    def _write_last(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        for logger in trainer.loggers:  # a run resumed from here measures nothing of these steps again
            if isinstance(logger, MetricsLogger):
                logger.experiment.write()
        trainer.save_checkpoint(self.folder / "last.ckpt")  # all processes take part
        self._kept_step, self._kept_at = trainer.global_step, time.monotonic()
        self.seconds += self._kept_at - began

    def _finish(self, trainer: pl.Trainer) -> None:
        """Waits until both are on the disk."""
        began, io = time.monotonic(), trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        io.finish()
        self.seconds += time.monotonic() - began

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            stop_now(number, frame)
        self._asked = number
        log.info("%s: stopping after the next optimiser step; a second one stops at once", signal.Signals(number).name)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step > self._kept_step and time.monotonic() - self._kept_at >= SECONDS_BETWEEN

    def _keep_or_stop(self, trainer: pl.Trainer, due: bool) -> None:
        """Writes last.ckpt if it is due in any process, or one was asked to stop; all have to call at the same place.

        Raises:
            Stopped: one was asked to.
        """
        number = self._asked
        if trainer.world_size > 1:
            mine = torch.tensor([due, number is not None], dtype=torch.int, device=trainer.strategy.root_device)
            due, stops = trainer.strategy.reduce(mine, reduce_op="max").bool().tolist()
            number = (number or signal.SIGTERM) if stops else None
        if due or (number is not None and trainer.global_step > self._kept_step):
            self._write_last(trainer)
        if number is not None:
            self._finish(trainer)
            log.info("stopped at step %d; resume_from=auto, other options as before, resumes there", self._kept_step)
            raise Stopped(number)


class StepLimit(pl.Callback):
    """Ends a training after `max_steps` optimiser steps, with a validation.

    Lightning's own max_steps does not: it neither validates then, nor knows, on resuming, an epoch that is over from
    one that it stopped in the middle of, and leaves the next one out.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        epoch, validation = loop.epoch_progress.current, loop.epoch_loop.val_loop.batch_progress.total
        batches = loop.epoch_loop.batch_progress.current.completed
        # In a resumed run the end of an epoch, or a validation that was stopped, may be still to come.
        ends_epoch = batches == trainer.num_training_batches and epoch.ready > epoch.completed
        if validation.ready > validation.completed and trainer.global_step >= self.max_steps:
            trainer.val_check_batch = batches  # the last one, wherever it is: Lightning repeats only those that are due
        elif not ends_epoch and validation.ready == validation.completed:
            self._look(trainer)

    def _look(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    on_train_batch_end = on_validation_end = on_train_epoch_end = _look


class AheadOfTime(pl.Callback):
    """While a validation or a training goes on, loader processes begin with what comes after it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_last_batch and self._goes_on(trainer):
            loader: Any = trainer.train_dataloader
            loader.sampler.set_epoch(trainer.current_epoch + 1)
            loader.begin()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._goes_on(trainer):
            loader: Any = trainer.val_dataloaders
            loader.begin()

    def _goes_on(self, trainer: pl.Trainer) -> bool:
        in_epoch = not trainer.is_last_batch
        return not trainer.should_stop and (in_epoch or trainer.current_epoch + 1 < (trainer.max_epochs or 0))


class Report(pl.Callback):
    """A line per validation, and one per epoch on how fast the run was and where its time went."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._samples = 0
        self._seconds = dict.fromkeys(("step", "validation"), 0.0)
        self._epoch_began = self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)  # a run resumed in mid-epoch has no start of an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, trainer.current_epoch - 1)
        # For the test: one less in a run that resumes where StepLimit ended it in mid-epoch.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            # The number that loggers get: Lightning's is one more in a run that resumes right behind a validation.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._samples += len(batch.index_B) * trainer.world_size
        self._began = time.perf_counter() - self.checkpoints.seconds  # one may be written before the step begins

    def on_train_batch_end(self, *_: Any) -> None:
        self._seconds["step"] += time.perf_counter() - self.checkpoints.seconds - self._began

    def on_validation_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds["validation"] += time.perf_counter() - self._began
        metrics = trainer.callback_metrics
        shown = [name for name in ("train/loss", "val/loss", self.checkpoints.monitor) if name in metrics]
        values = "  ".join(f"{name} {figure(float(metrics[name]))}" for name in shown)
        log.info("epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, values)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._samples, self._seconds = 0, dict.fromkeys(self._seconds, 0.0)
        self.checkpoints.seconds = _loader(trainer).waited = 0.0
        self._epoch_began = time.perf_counter()

    def _say(self, trainer: pl.Trainer, epoch: int) -> None:
        """Of the epoch that is over, its last checkpoint included; a step is what the host waits for it."""
        if self._samples:  # none in a run resumed at the end of an epoch
            total = time.perf_counter() - self._epoch_began
            parts = {"data": _loader(trainer).waited, **self._seconds, "checkpoints": self.checkpoints.seconds}
            parts["rest"] = max(0.0, total - sum(parts.values()))
            text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
            samples = counted(self._samples, "training sample")
            speed = f"{samples} in {total:.1f} s, {self._samples / total:.1f} per second"
            log.info("epoch %d: %s\n  %s", epoch, speed, text)  # within 80 columns
        self._begin(trainer)


def _loader(trainer: pl.Trainer) -> TimedLoader:
    loader = trainer.train_dataloader
    assert isinstance(loader, TimedLoader)
    return loader
