"""What happens beside the steps of a training run: checkpoints, and a line per validation."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from clip.checkpoint import DESCRIPTION
from clip.checkpoint_file import write_checkpoint
from clip.interruption import Stopped, StopRequest
from clip.training import FinetuneModule
from common.errors import CheckpointError
from vilt.datamodules import Batch, TimedLoader

log = logging.getLogger("rep")


class Checkpoints(Checkpoint):
    """Keeps `best.ckpt`, the best model by a validation metric, and `last.ckpt`, from which `resume_from` goes on.

    `last.ckpt` also carries the best model so far: a resumed run, which has a folder of its own, ends with the same
    best model as an uninterrupted one. It is written after validations and epochs, and where a signal stops the run:
    between two optimiser steps, or amid a validation, which is then run anew.

    Args:
        folder: where both are written, by the first process alone.
        monitor: name of the logged metric; higher is better.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder = folder
        self.monitor = monitor
        self.best: dict[str, Any] | None = None
        """What `best.ckpt` holds."""
        self._stop = StopRequest()
        self._kept_step = 0
        """Optimiser steps behind the newest checkpoint, here or in the folder of the run that is resumed."""
        self.training = False
        """Whether the training has begun, all that a checkpoint resumes being restored."""

    @property
    def best_path(self) -> Path:
        """Of the best model; meaningful in the first process."""
        return self.folder / "best.ckpt"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.best is not None:  # a resumed run
            self._write_best(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept_step = trainer.global_step
        self._stop.listen()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

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
            self._stop_if_asked(trainer)
        self.training = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        score = float(trainer.callback_metrics[self.monitor])
        if self.best is None or score > self.best["score"] or math.isnan(self.best["score"]):
            self.best = {
                "state_dict": {name: value.cpu().clone() for name, value in pl_module.state_dict().items()},
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "monitor": self.monitor,
                "score": score,
                DESCRIPTION: pl_module.description(),
            }
            self._write_best(trainer)
        self._write_last(trainer)
        self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning also calls this where StepLimit ends the training in mid-epoch, and would take what is left of the
        # epoch for done in a run resumed from there.
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed == trainer.num_training_batches:
            self._write_last(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.ignore()
        if number := self._stop.made(trainer):
            raise Stopped(number)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop.ignore()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        whole = isinstance(best, dict) and type(best.get("score")) is float and isinstance(best.get("state_dict"), dict)
        if best is not None and not whole:
            raise CheckpointError(
                "resume_from: expected the best model so far in it, with its score, found another thing"
            )
        self.best = best

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes Lightning's counts say what it has to do next when it reads them back."""
        loops = checkpoint["loops"]["fit_loop"]
        training, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        if training["current"]["ready"] > training["current"]["completed"]:  # a batch was fetched, but not trained on
            training["is_last_batch"] = False
            for counts in (training["total"], training["current"]):
                counts["ready"] = counts["completed"]
        if validation["current"]["ready"] > validation["current"]["completed"]:
            # In its first batch: what Lightning takes for a validation that is to be run, in whole.
            validation["is_last_batch"] = False
            validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            validation["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}

    def _write_best(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            assert self.best is not None
            write_checkpoint(self.best, self.best_path)

    def _write_last(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")  # by WholeCheckpoints; all processes take part
        self._kept_step = trainer.global_step

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        number = self._stop.made(trainer)
        if number is None:
            return
        if trainer.global_step > self._kept_step:
            self._write_last(trainer)
        log.info("stopped at step %d; resume_from=auto, other options as before, goes on from there", self._kept_step)
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
        if not (batches == trainer.num_training_batches and epoch.ready > epoch.completed) and (
            validation.ready == validation.completed
        ):
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._look(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True


class Report(pl.Callback):
    """A line per validation, and one per epoch on how fast the training was and what held it up."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self._samples = 0
        self._started = 0.0
        self._paused: tuple[float, float] | None = None
        """Clock and seconds waited for data when a validation began, until training goes on."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)  # a run resumed in mid-epoch does not start that epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._go_on(trainer)
        self._samples += len(batch.index_B) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter(), _loader(trainer).waited

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        shown = [name for name in ("train/loss", "val/loss", self.monitor) if name in metrics]
        values = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in shown)
        log.info("epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, values)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._go_on(trainer)
        seconds = time.perf_counter() - self._started
        log.info(
            "epoch %d: %s training samples in %.1f s, %.1f per second; %.0f %% of the time waiting for data",
            trainer.current_epoch,
            f"{self._samples:,}",
            seconds,
            self._samples / seconds,
            100 * _loader(trainer).waited / seconds,
        )

    def _begin(self, trainer: pl.Trainer) -> None:
        _loader(trainer).waited = 0.0
        self._samples, self._started = 0, time.perf_counter()

    def _go_on(self, trainer: pl.Trainer) -> None:
        """Takes a validation, and the checkpoints after it, out of the training time."""
        if self._paused is not None:
            clock, waited = self._paused
            self._started += time.perf_counter() - clock - (_loader(trainer).waited - waited)
            self._paused = None


def _loader(trainer: pl.Trainer) -> TimedLoader:
    loader = trainer.train_dataloader
    assert isinstance(loader, TimedLoader)
    return loader
