"""Runs a command. Runs, robustness and sweeps are Sacred experiments; with -F, Sacred keeps a record of them."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import ConfigError, reason_of
from config import DEFAULTS
from runs.command_line import RECORDED, CommandLine

Command = Callable[[dict[str, Any], CommandLine], Any]
"""A command, which gets the options, not checked yet, and the command line."""
NOTED: dict[str, Any] = {}
"""What the current command notes for the record: `folder`, once it has a run folder."""


def run_command(command: Command, asked: CommandLine) -> None:
    """Runs a command with the options asked for: as a Sacred experiment, if Sacred can keep a record of it."""
    config = {name: _merged(default, asked.updates.get(name, default)) for name, default in DEFAULTS.items()}
    if asked.command not in RECORDED:
        command(config, asked)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # requirements.txt pins setuptools
        sys.modules.setdefault("pandas", None)  # type: ignore[arg-type]  # Sacred would import it, unused: half a second
        from sacred import SETTINGS, Experiment
        from sacred.observers import FileStorageObserver

        if sys.modules["pandas"] is None:
            del sys.modules["pandas"]
    SETTINGS.CAPTURE_MODE = "no"  # Sacred would otherwise take over standard output, progress bars included
    SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # run folders record the devices
    experiment = Experiment("REP", save_git_info=False)
    experiment.logger = logging.getLogger("REP")  # type: ignore[assignment]  # Sacred would set up the root logger
    logging.getLogger("REP").setLevel(logging.CRITICAL)  # it logs its steps
    experiment.add_config(config)
    if asked.record is not None and not getattr(rank_zero_only, "rank", 0):  # only the first process keeps the record
        try:
            Path(asked.record).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"-F {asked.record}: cannot be created: {reason_of(error)}") from error
        experiment.observers.append(FileStorageObserver(asked.record))

    def recorded(_run: Any) -> Any:
        _run.info = NOTED
        return command(config, asked)

    recorded.__name__ = asked.command
    experiment.command(recorded)
    experiment.run(asked.command)


def _merged(default: Any, value: Any) -> Any:
    """The value of an option; entries of dictionaries that it lacks have their defaults."""
    return {**default, **value} if isinstance(default, dict) and isinstance(value, dict) else value
