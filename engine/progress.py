"""The progress display on a terminal: one bar, with log lines above it."""

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.text import duration

VALIDATION_COST = 0.5
"""Cost of a validation batch relative to a training batch: there is no backward pass."""
REFRESH_S = 0.2
"""Shortest time between two redraws, in seconds."""


class RunBar(pl.Callback):
    """One bar for all epochs with their validations, or for a test: epoch, loss, metric, samples per second, time left.

    Shown by the first process only, and only on a terminal; other output appears above it. It is drawn between batches,
    not by a thread, whose locks forked loader workers would inherit.

    Args:
        monitor: name of the metric to show, if there is one.
        steps_per_look: batches between two reads of the loss; on a GPU, each makes the host wait.
        max_steps: optimiser steps after which training ends, if the epochs have more.
        console: console to draw on; standard error by default.
    """

    def __init__(
        self, monitor: str | None, steps_per_read: int = 1, max_steps: int | None = None, console: Console | None = None
    ) -> None:
        self.monitor, self.steps_per_read, self.max_steps = monitor, steps_per_read, max_steps
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._values: dict[str, float] = {}
        self._validated = 0  # batches done in the current validation
        self._began = self._first = 0.0  # clock, and work already done, at the start
        self._drawn = 0.0  # clock at the last redraw
        self._samples = 0  # samples computed since then

    def _work(self, trainer: pl.Trainer, batches: int) -> float:
        """The work of so many training batches and the validations among them, in units of training batches."""
        per_epoch, interval = int(trainer.num_training_batches), int(trainer.val_check_batch)  # type: ignore[arg-type]
        epochs, rest = divmod(batches, per_epoch)
        validations = epochs * (per_epoch // interval) + rest // interval
        return batches + VALIDATION_COST * validations * sum(map(int, trainer.num_val_batches))

    def _done(self, trainer: pl.Trainer) -> float:
        return self._work(trainer, trainer.fit_loop.total_batch_idx + 1)

    def _start(self, trainer: pl.Trainer, total: float, done: float, text: str) -> None:
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[speed]}{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self.console, auto_refresh=False, expand=True, transient=True)
        self._bar.add_task(text, total=total, completed=int(done), speed="", left="")
        self._began = self._drawn = time.monotonic()
        self._first, self._samples = done, 0
        self._bar.start()

    def _draw(self, done: float, text: str, samples: int = 0) -> None:
        """Redraws the bar if that is due; `samples` were computed since the last call."""
        now, self._samples = time.monotonic(), self._samples + samples
        if self._bar is None or now - self._drawn < REFRESH_S:
            return
        task = self._bar.tasks[0]
        if samples:
            self._bar.update(task.id, speed=f"{self._samples / max(now - self._drawn, 1e-6):,.0f}/s")
        if done > self._first and task.total is not None:
            seconds = (now - self._began) * max(0.0, task.total - done) / (done - self._first)
            self._bar.update(task.id, left=f"  {duration(seconds)} left")
        self._bar.update(task.id, completed=done, description=text)
        self._bar.refresh()
        self._drawn, self._samples = now, 0

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, trainer: pl.Trainer) -> str:
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
        values = "".join(f"  {name} {value:.4f}" for name, value in self._values.items())
        return f"epoch {epoch}/{trainer.max_epochs}{values}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        per_epoch, accumulation = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        batches = (trainer.max_epochs or 1) * per_epoch
        if self.max_steps is not None:
            epochs, steps = divmod(self.max_steps, -(-per_epoch // accumulation))
            batches = min(batches, epochs * per_epoch + steps * accumulation)
        self._start(trainer, self._work(trainer, batches), self._done(trainer), self._text(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and batch_idx % self.steps_per_read == 0:
            self._values["loss"] = float(trainer.callback_metrics["train/loss"])
        self._draw(self._done(trainer), self._text(trainer), len(batch.index_B) * trainer.world_size)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._validated += 1
        # `_done` already counts the whole validation that follows the newest training batch.
        left = sum(map(int, trainer.num_val_batches)) - self._validated
        self._draw(self._done(trainer) - VALIDATION_COST * left, self._text(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            self._values[self.monitor.rpartition("/")[2]] = float(trainer.callback_metrics[self.monitor])
        self._validated, self._samples, self._drawn = 0, 0, time.monotonic()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, sum(map(int, trainer.num_test_batches)), 0, "test")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._draw(batch_idx + 1, "test", len(batch.index_B) * trainer.world_size)

    on_train_end = on_test_end = on_exception = _stop
