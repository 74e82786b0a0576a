"""The loop of run.py on the demo's films and a tiny CLIP, and the bare step on the same batches."""

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import make_arrow
from benchmarks.sides import seconds
from config import DEFAULTS
from demo.backbone import make_backbone
from demo.data import write_pretrain, write_task
from engine.training import model_input
from runs.check_options import check
from runs.training import train_from
from vilt.batches import Batch

FILMS, BATCH = 1200, 32


class Stopwatch(pl.Callback):
    """Times each epoch without its validations and, right after it, the bare step on its batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        """Batches of the current epoch."""
        self.took = 0.0
        """Seconds taken by the current epoch."""
        self.rates: list[tuple[float, float]] = []
        """Samples per second of the bare step and of the loop, for each epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._compare(trainer, pl_module)
        self.batches, self.took = [], -time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.took += time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs before checkpoints are written, so their time counts: Lightning calls checkpoint callbacks last."""
        self.took -= time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._compare(trainer, pl_module)

    def _compare(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def bare_steps() -> None:
            for batch in self.batches:
                with trainer.precision_plugin.forward_context():
                    loss, *_ = pl_module.step(model_input(batch), batch.label, len(batch.label))
                loss.backward()
                trainer.optimizers[0].step()
                trainer.optimizers[0].zero_grad()

        self.took += seconds(lambda: None) + time.perf_counter()  # `seconds` waits for a GPU
        if self.batches:  # none before the first epoch
            pl_module.train()
            samples = sum(len(batch.label) for batch in self.batches)
            self.rates.append((samples / seconds(bare_steps), samples / self.took))


def timed(folder: Path, device: torch.device, epochs: int) -> list[tuple[float, float]]:
    """Samples per second of the bare step and of the loop, for each of `epochs` epochs after a first one."""
    logging.disable(logging.INFO)
    write_task(folder / "raw", FILMS, 0)
    write_pretrain(folder / "pretrain", 192, 0)
    make_backbone(folder / "pretrain", folder / "backbone", 2, 0)
    convert(folder)
    small = {"memory_length": 12, "memory_depth": 3, "num_workers": 0}
    found = rates(folder, device, epochs, per_gpu_batchsize=BATCH, batch_size=BATCH, val_check_interval=1.0, **small)
    logging.disable(logging.NOTSET)
    return found


def convert(folder: Path, workers: int = 0) -> None:
    """Converts the films in `raw` to arrow files."""
    places = ["--root", str(folder / "raw"), "--target", str(folder / "arrow")]
    assert make_arrow.main(["--dataset", "mmimdb", *places, "--workers", str(workers)]) == 0


def rates(folder: Path, device: torch.device, epochs: int, **more: Any) -> list[tuple[float, float]]:
    """The rates of `timed`, for the arrow files and the backbone in `folder`."""
    places = {"data_root": "arrow", "vit": "backbone", "log_dir": "result", "missing_table_root": "tables"}
    options = {
        **{"task": "mmimdb", "max_epoch": 1 + epochs, "test_after_fit": False, "image_cache": True},
        **{"num_gpus": int(device.type == "cuda"), "precision": "bf16" if device.type == "cuda" else "32"},
        **{name: str(folder / place) for name, place in places.items()},
    }
    stopwatch = Stopwatch()
    train_from(check({**DEFAULTS, **options, **more}), "timed", stopwatch)
    return stopwatch.rates[1:]  # the first epoch warms up
