"""Callbacks of a training run: checkpoints, the step limit, prefetching and progress lines."""

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
"""Interval of checkpoints within an epoch: writing one takes as long as several optimiser steps."""


class Checkpoints(Checkpoint):
    """Writes `best.ckpt`, the best model by a validation metric, and `last.ckpt`, for `resume_from`.

    `last.ckpt` is written at the end of each epoch, between optimiser steps once SECONDS_BETWEEN have passed, and when
    a signal stops the run: between two steps, or in a validation, which the resumed run repeats. It also carries the
    best model so far, since a resumed run has a folder of its own and must end with the same best model as an
    uninterrupted one. Lightning's ModelCheckpoint loses it in a new folder and cannot stop at a signal.

    Args:
        folder: where both are written, by the first process only.
        monitor: name of the logged metric; an undefined value (NaN) is never the best.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder = folder
        self.monitor = monitor
        self.best: dict[str, Any] | None = None  # content of `best.ckpt`
        self.seconds = 0.0  # time that training waited for writing, since Report last reset it
        self.training = False  # True after one step or validation batch, when everything restored has been used
        self._signal: int | None = None  # the first SIGTERM or Ctrl-C during training; a second one stops at once
        self._kept_step = 0
        """Optimiser steps up to the newest checkpoint, in this folder or in that of the run being resumed."""
        self._kept_at = time.monotonic()

    @property
    def best_path(self) -> Path:
        """Path of the best model; meaningful in the first process only."""
        return self.folder / "best.ckpt"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_best(trainer)  # a resumed run has one already

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept_step, self._kept_at = trainer.global_step, time.monotonic()
        for number in STOP_SIGNALS:  # replaces Lightning's handlers, which stop in the middle of an accumulation
            signal.signal(number, self._note_signal)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.training |= trainer.global_step > self._kept_step  # a step is complete
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
        if (
            batch_idx < loader.sampler.samples // trainer.world_size // loader.batch_size
        ):  # every process has this batch
            self._keep_or_stop(trainer, False)
        self.training = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        score = float(trainer.callback_metrics[self.monitor])
        if not pl_module.was_trained(trainer.global_step):
            log.info("not considered for the best model: the learning rate was 0 up to step %d", trainer.global_step)
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
        # If StepLimit ends training, this is its final state.
        self._keep_or_stop(trainer, trainer.should_stop or self._is_due(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning also calls this when StepLimit ends training in mid-epoch; a run resumed from a checkpoint written
        # then would skip the rest of the epoch.
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
            raise KeyError("best")  # before it is written to best.ckpt

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Corrects Lightning's progress counters, so that a resumed run continues with the right batch.

        As Lightning saves them, it would skip a batch that was fetched but not completed, and the rest of a validation
        that had begun.
        """
        loops = checkpoint["loops"]["fit_loop"]
        training, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        if training["current"]["ready"] > training["current"]["completed"]:
            training["is_last_batch"] = False
            for counts in (training["total"], training["current"]):
                counts["ready"] = counts["completed"]
        if validation["current"]["ready"] > validation["current"]["completed"]:  # the resumed run repeats it
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
        for logger in trainer.loggers:  # a run resumed from here does not log these steps again
            if isinstance(logger, MetricsLogger):
                logger.experiment.write()
        trainer.save_checkpoint(self.folder / "last.ckpt")  # all processes take part
        self._kept_step, self._kept_at = trainer.global_step, time.monotonic()
        self.seconds += self._kept_at - began

    def _finish(self, trainer: pl.Trainer) -> None:
        """Waits until both checkpoints are on disk."""
        began, io = time.monotonic(), trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        io.finish()
        self.seconds += time.monotonic() - began

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            stop_now(number, frame)
        self._signal = number
        name = signal.Signals(number).name
        log.info("%s: stopping after the next optimiser step; a second signal stops at once", name)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step > self._kept_step and time.monotonic() - self._kept_at >= SECONDS_BETWEEN

    def _keep_or_stop(self, trainer: pl.Trainer, due: bool) -> None:
        """Writes last.ckpt if it is due or a signal came, in any process; all must call this at the same point.

        Raises:
            Stopped: a process was asked to stop.
        """
        number = self._signal
        if trainer.world_size > 1:
            flags = torch.tensor([due, number is not None], dtype=torch.int, device=trainer.strategy.root_device)
            due, stops = trainer.strategy.reduce(flags, reduce_op="max").bool().tolist()
            number = (number or signal.SIGTERM) if stops else None
        if due or (number is not None and trainer.global_step > self._kept_step):
            self._write_last(trainer)
        if number is not None:
            self._finish(trainer)
            log.info("stopped at step %d; to resume, use resume_from=auto with the same options", self._kept_step)
            raise Stopped(number)


class StepLimit(pl.Callback):
    """Ends training after `max_steps` optimiser steps, with a validation.

    Lightning's own max_steps does not validate then. On resuming, it also cannot tell a finished epoch from one that it
    stopped in the middle of, and skips the next one.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        epoch, validation = loop.epoch_progress.current, loop.epoch_loop.val_loop.batch_progress.total
        batches = loop.epoch_loop.batch_progress.current.completed
        # In a resumed run, the end of an epoch or an interrupted validation may still be to come.
        ends_epoch = batches == trainer.num_training_batches and epoch.ready > epoch.completed
        if validation.ready > validation.completed and trainer.global_step >= self.max_steps:
            trainer.val_check_batch = batches  # now, wherever it is: Lightning only repeats one that is due
        elif not ends_epoch and validation.ready == validation.completed:
            self._check(trainer)

    def _check(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    on_train_batch_end = on_validation_end = on_train_epoch_end = _check


class Prefetch(pl.Callback):
    """Lets workers load the next epoch's first batches during validation, and the next validation's during training."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_last_batch and self._continues(trainer):
            loader: Any = trainer.train_dataloader
            loader.sampler.set_epoch(trainer.current_epoch + 1)
            loader.begin()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._continues(trainer):
            loader: Any = trainer.val_dataloaders
            loader.begin()

    def _continues(self, trainer: pl.Trainer) -> bool:
        in_epoch = not trainer.is_last_batch
        return not trainer.should_stop and (in_epoch or trainer.current_epoch + 1 < (trainer.max_epochs or 0))


class Report(pl.Callback):
    """Logs a line per validation, and one per epoch with the speed of the run and where its time went."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._samples = 0
        self._seconds = dict.fromkeys(("step", "validation"), 0.0)
        self._epoch_began = self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset(trainer)  # in a run resumed in mid-epoch, on_train_epoch_start is not called

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_epoch(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_epoch(trainer, trainer.current_epoch - 1)
        # Step and epoch that the test is logged at: one too low in a run resumed where StepLimit ended it in mid-epoch.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        epoch = trainer.fit_loop.epoch_progress.current
        epoch.completed = epoch.ready

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            # The step that loggers see: Lightning's is one too high in a run resumed right after a validation.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._samples += len(batch.index_B) * trainer.world_size
        self._began = time.perf_counter() - self.checkpoints.seconds  # a checkpoint may precede the step

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

    def _reset(self, trainer: pl.Trainer) -> None:
        self._samples, self._seconds = 0, dict.fromkeys(self._seconds, 0.0)
        self.checkpoints.seconds = _loader(trainer).waited = 0.0
        self._epoch_began = time.perf_counter()

    def _log_epoch(self, trainer: pl.Trainer, epoch: int) -> None:
        """Logs the epoch that is over, with its last checkpoint; a step counts for as long as the host waits for it."""
        if self._samples:  # 0 in a run resumed at the end of an epoch
            total = time.perf_counter() - self._epoch_began
            parts = {"data": _loader(trainer).waited, **self._seconds, "checkpoints": self.checkpoints.seconds}
            parts["rest"] = max(0.0, total - sum(parts.values()))
            text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
            samples = counted(self._samples, "training sample")
            speed = f"{samples} in {total:.1f} s, {self._samples / total:.1f} per second"
            log.info("epoch %d: %s\n  %s", epoch, speed, text)  # within 80 columns
        self._reset(trainer)


def _loader(trainer: pl.Trainer) -> TimedLoader:
    loader = trainer.train_dataloader
    assert isinstance(loader, TimedLoader)
    return loader
