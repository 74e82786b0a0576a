"""Setting up the Lightning trainer of a run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from common.errors import ConfigError
from common.messages import first_line
from common.shares import part_of
from engine.callbacks import Checkpoints, Prefetch, Report, StepLimit
from engine.checkpoint_file import AtomicCheckpointIO
from engine.loggers import make_loggers
from engine.progress import RunBar

if TYPE_CHECKING:
    from config import Options

GPU_STEPS_PER_LOOK = 50
"""Training steps on a GPU between two reads of the loss for logging; each read makes the host wait."""


def make_trainer(
    options: "Options",
    folder: Path | None,
    steps_per_epoch: int,
    checkpoints: Checkpoints | None = None,
    *more_callbacks: pl.Callback,
) -> pl.Trainer:
    """Creates the trainer: for training if `checkpoints` is given, else for evaluation.

    Validations fall on optimiser steps, so that no checkpoint is written in the middle of an accumulation.
    """
    strategy: DDPStrategy | str = "auto"
    if options.processes > 1:
        # Missing types absent from a batch leave parameters without gradients. Buffers are not broadcast in the forward
        # pass: they are equal by construction, and processes may have different numbers of evaluation batches.
        strategy = DDPStrategy(find_unused_parameters=True, forward_sync_buffers=False)
    steps_per_read = GPU_STEPS_PER_LOOK if options.num_gpus else 1
    monitor = checkpoints.monitor if checkpoints is not None else None
    callbacks = [RunBar(monitor, steps_per_read, options.max_steps), *more_callbacks]
    interval, accumulation = steps_per_epoch, 1
    keeps = checkpoints is not None and not options.fast_dev_run
    if checkpoints is not None:
        accumulation = options.accumulation
        interval = validation_interval(options.val_check_interval, steps_per_epoch, accumulation)
        if options.max_steps is not None:
            callbacks.append(StepLimit(options.max_steps))  # before Prefetch, which asks whether training continues
        callbacks += [Prefetch(), Report(checkpoints)]
        if keeps:
            callbacks += [checkpoints, LearningRateMonitor("step")]
    log_folder = folder or options.log_dir
    plugins: list[Any] = [AtomicCheckpointIO()]
    try:
        if SLURMEnvironment.detect():
            if (tasks := os.environ["SLURM_NTASKS"]) != str(options.processes):
                raise ValueError(f"srun started {tasks} processes, but the run has {options.processes}")
            # Lightning's own requeueing stops in the middle of an accumulation; slurm.sh requeues instead.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return pl.Trainer(
            accelerator="gpu" if options.num_gpus else "cpu",
            devices=options.num_gpus or options.cpu_processes,
            num_nodes=options.num_nodes,
            strategy=strategy,
            precision=options.precision,  # type: ignore[arg-type]
            max_epochs=options.max_epoch,
            accumulate_grad_batches=accumulation,
            gradient_clip_val=options.clip_gradient or None,
            val_check_interval=interval,
            log_every_n_steps=steps_per_read,
            num_sanity_val_steps=0,
            fast_dev_run=options.fast_dev_run,
            use_distributed_sampler=False,  # EpochSampler distributes, with each evaluation sample once
            enable_model_summary=False,
            enable_progress_bar=False,  # RunBar replaces it
            enable_checkpointing=keeps,
            logger=make_loggers(options, log_folder) if keeps else False,
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=folder,
        )
    except (MisconfigurationException, KeyError, RuntimeError, ValueError) as error:  # from SLURM's variables
        if "SLURM_NTASKS" not in os.environ:
            raise
        text = "num_gpus, num_nodes or cpu_processes do not fit the SLURM job"
        raise ConfigError(f"{text}: {first_line(error)}") from error


def validation_interval(wanted: int | float, batches: int, accumulation: int) -> int:
    """Number of batches between validations; `wanted` is a share of the `batches` of an epoch, or a number.

    The interval is rounded down to whole batches, then to whole optimiser steps, at least one. It is never rounded up,
    so that the last share of an epoch is validated too.
    """
    interval = part_of(batches, wanted) if isinstance(wanted, float) else wanted
    if interval >= batches:
        return batches  # an epoch ends with a step
    return min(batches, max(1, interval // accumulation) * accumulation)
