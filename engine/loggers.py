"""The loggers of a training run: metrics.csv, TensorBoard, and a service if the option `logger` names one."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from engine.metrics_log import MetricsLogger

if TYPE_CHECKING:
    from config import Options

PROJECT = "rep"
"""Name of the Weights & Biases project and of the MLflow experiment."""


def make_loggers(options: "Options", folder: Path) -> list[Logger]:
    """The loggers of a run in `folder`; all but the one for metrics.csv also record its options."""
    loggers: list[Logger] = [TensorBoardLogger(folder, "", "tensorboard", default_hp_metric=False)]
    name = "_".join(folder.parts[-2:])
    if options.logger == "wandb":
        loggers.append(WandbLogger(name=name, save_dir=folder, project=PROJECT))
    elif options.logger == "mlflow":
        here = f"sqlite:///{options.log_dir.absolute() / 'mlflow.db'}"
        loggers.append(MLFlowLogger(PROJECT, name, tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", here)))
    values = {key: value if isinstance(value, int | float) else str(value) for key, value in asdict(options).items()}
    for logger in loggers:
        logger.log_hyperparams(values)
    return [MetricsLogger(folder, "", ""), *loggers]
