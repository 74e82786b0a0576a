"""The start of every run: its folder, the record of its environment, and first log lines."""

import importlib.metadata
import logging
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from clip.modules.registry import PRETRAINING, TRAIN_BACKBONES
from common.errors import ConfigError
from common.machine import threads_wait
from common.messages import listed
from common.strict_json import write_json
from common.text import counted, per_cent
from config import Options
from engine.contents import CONTENTS_FILE
from engine.optimization import schedule_steps, warmup_steps
from engine.tasks import counts_as_published
from runs.record import NOTED
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.custom import CUSTOM, CustomData
from vilt.datasets.specs import DatasetSpec, Split
from vilt.datasets.subsequences import subsequences

log = logging.getLogger("rep")

PACKAGES = (
    *("torch", "pytorch-lightning", "transformers", "tokenizers", "torchmetrics"),
    *("pyarrow", "pillow", "sacred", "numpy"),
)
"""Packages whose versions are recorded."""
FEW_STEPS = 20
"""With fewer optimiser steps than this, training hardly changes the model or its validation results."""


@rank_zero_only
def start_folder(options: Options, name: str, custom: CustomData | None, contents: Mapping[str, str]) -> Path:
    """Creates the run folder, with configuration, environment and `contents`; None except on the first process.

    The configuration includes the arrow files' description of a custom dataset, for `run.py runs` and `run.py report`.
    Lightning passes the folder on to the other processes.
    """
    folder = make_run_folder(options.log_dir, name)
    NOTED["folder"] = str(folder)
    write_json(folder / "config.json", config_content(options, custom))
    write_json(folder / CONTENTS_FILE, contents)
    write_json(folder / "environment.json", {"command": command(), **environment()})
    log.info("run folder: %s", folder)
    return folder


def command() -> list[str]:
    """The words after `python` in the call of this program."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m NAME`
    return ["-m", module.name.removesuffix(".__main__"), *sys.argv[1:]] if module is not None else sys.argv


def config_content(options: Options, custom: CustomData | None) -> dict[str, Any]:
    """The content of config.json: the options, and the arrow files' description of a custom dataset."""
    return asdict(options) | ({CUSTOM: asdict(custom)} if custom is not None else {})


def log_device(options: Options) -> None:
    """Logs the devices and the precision."""
    if options.num_gpus:
        log.info("%d × %s, precision %s", options.processes, torch.cuda.get_device_name(), options.precision)
    else:
        threads = f"{counted(torch.get_num_threads(), 'thread')}{threads_wait()}"
        log.info("no GPU in use: runs on the CPU (%s), precision %s", threads, options.precision)


@rank_zero_only
def log_remarks(options: Options, datasets: Mapping[Split, ArrowDataset]) -> None:
    """Logs `remarks` and classes without samples as warnings, and how the last step counts if that is as published."""
    training = datasets["train"]
    dataset, samples = training.spec, samples_of_epoch(options, training)
    absent = [] if options.prompt_type in PRETRAINING else training.absent_classes()
    which = "no sample" if options.label_ratio == 1 else f"with label_ratio={options.label_ratio:g}, no sample"
    never = [f"{training.path}: {which} is of class {listed(absent)}, which cannot be learned"] if absent else []
    if options.prompt_type not in PRETRAINING and (remark := remark_on_validation(datasets["val"])):
        never.append(f"{datasets['val'].path}: {remark}")
    for remark in [*never, *remarks(options, dataset, samples)]:
        log.warning("warning: %s", remark)
    rest = samples % (options.processes * options.per_gpu_batchsize * options.accumulation)
    if options.accumulation > 1 and rest and counts_as_published(dataset):
        text = "the last step of an epoch has only %s, but its loss is divided as in a complete step, as published"
        log.info(text, counted(rest, "sample"))


def remark_on_validation(validation: ArrowDataset) -> str | None:
    """A warning if the validation split has samples of one class only; None otherwise."""
    if (name := validation.only_class()) is None or validation.spec.monitor == "auroc":  # undefined, and refused
        return None
    best = f"the best model by val/{validation.spec.monitor} is the one that predicts it most often"
    return f"all samples are of class {name!r}, so {best}"


def samples_of_epoch(options: Options, training: ArrowDataset) -> int:
    """Number of training samples in an epoch; for pretraining, including those that fill up subsequences."""
    length = PRETRAINING.get(options.prompt_type, 1)
    return len(training.chosen) if length == 1 else subsequences(training.table, length).size


def remarks(options: Options, dataset: DatasetSpec, samples: int) -> list[str]:
    """Warnings about options that do not have the effect one would expect with this number of samples."""
    forward, step = options.processes * options.per_gpu_batchsize, options.accumulation
    batches, as_published = math.ceil(samples / forward), counts_as_published(dataset)
    steps = schedule_steps(batches, options.max_epoch, step, options.max_steps, as_published=as_published)
    warmup = warmup_steps(options.optimizer_settings(), steps)
    found = []
    if options.vit.startswith("random") and options.prompt_type not in TRAIN_BACKBONES:
        found.append(f"vit={options.vit}: the frozen backbone is untrained; expected load_path with a pretraining")
    if warmup >= steps:
        reached = per_cent(round((steps - 1) / warmup, 4))
        found.append(
            f"warmup_steps={options.warmup_steps:g}: the warm-up does not end within the {counted(steps, 'step')} of "
            f"this training, whose learning rate reaches {reached} of {options.learning_rate:g}"
        )
    elif steps < FEW_STEPS:
        found.append(
            f"only {counted(steps, 'optimiser step')} in all, {warmup} of them warm-up, hardly change the model; "
            f"a smaller batch_size or a larger max_epoch gives more"
        )
    if (options.max_steps or 0) > (possible := options.max_epoch * math.ceil(batches / step)):
        found.append(f"max_steps={options.max_steps}: max_epoch={options.max_epoch} ends the training after {possible}")
    if step * forward != options.batch_size:
        found.append(
            f"batch_size={options.batch_size}: a step has {counted(step * forward, 'sample')}, {step} × {forward}"
        )
    if (interval := options.val_check_interval) > max(1, batches):
        found.append(
            f"val_check_interval={interval}: an epoch has only {counted(batches, 'batch', 'batches')}; "
            f"validation runs at its end"
        )
    return found


def make_run_folder(log_dir: Path, name: str) -> Path:
    """Creates a folder `log_dir/name/version_N`, with the lowest free N; safe if several processes do so at once.

    Raises:
        ConfigError: log_dir cannot be written to.
    """
    parent = log_dir / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError(
            f"log_dir: cannot create a folder in {parent}: {error.strerror}; choose another log_dir"
        ) from error


def environment() -> dict[str, Any]:
    """The content of environment.json: time, versions, devices and the state of the code."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = re.search(
        r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8")
    )  # missing on some Linux systems
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": versions | {"torch": torch.__version__},  # includes the build, such as +cpu
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "cpu": processor[1] if processor else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the code; None unless git tracks it."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.rstrip("\n")

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails for a package installed inside a user's repository
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The commit of the code, with `-dirty` appended if tracked files have changed; None outside a git checkout."""
    if (state := git_state()) is None:
        return None
    changed = any(not line.startswith("??") for line in state["changed"])
    return f"{state['commit']}{'-dirty' if changed else ''}"
