"""What every run begins with: its folder, its log, and a line on the machine."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from common.strict_json import write_json
from config import Options
from runs.experiment import EX
from runs.run_folder import environment, make_run_folder
from vilt.datasets.custom import CUSTOM, CustomData

log = logging.getLogger("rep")


@rank_zero_only
def start_folder(options: Options, name: str, custom: CustomData | None) -> Path:
    """The run's new folder, with the configuration and the environment in it; None on other processes than the first.

    The configuration also says what the arrow files say of a custom dataset, for `run.py runs` and `run.py report`.
    Lightning tells the others where it is.
    """
    folder = make_run_folder(options.log_dir, name)
    EX.current_run.info["folder"] = str(folder)  # type: ignore[attr-defined]  # for `command_line`, and Sacred's record
    write_json(folder / "config.json", described(options, custom))
    write_json(folder / "environment.json", {"command": sys.argv, **environment()})
    log.info("run folder: %s", folder)
    return folder


def described(options: Options, custom: CustomData | None) -> dict[str, Any]:
    """What config.json holds: the options, and what the arrow files say of a custom dataset."""
    return asdict(options) | ({CUSTOM: asdict(custom)} if custom is not None else {})


def say_device(options: Options) -> None:
    """Says what the run computes on."""
    if options.num_gpus:
        log.info("%d × %s, precision %s", options.processes, torch.cuda.get_device_name(), options.precision)
    else:
        log.info(
            "no GPU in use: runs on the CPU (%d threads), precision %s", torch.get_num_threads(), options.precision
        )
