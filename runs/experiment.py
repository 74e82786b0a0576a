"""The Sacred experiment, with the features we do not use turned off, and how it runs a command."""

import logging
import sys
import warnings
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import ConfigError, reason_of
from config import DEFAULTS
from runs.command_line import CommandLine

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # Sacred uses it; requirements.txt pins setuptools
    sys.modules.setdefault("pandas", None)  # type: ignore[arg-type]  # Sacred would import it: half a second, unused
    from sacred import SETTINGS, Experiment

    if sys.modules["pandas"] is None:
        del sys.modules["pandas"]

SETTINGS.CAPTURE_MODE = "no"  # Sacred would otherwise take over standard output, progress bars included
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # run.py records the devices itself

EX = Experiment("REP", save_git_info=False)
logging.getLogger("REP").setLevel(logging.CRITICAL)  # Sacred logs steps and type changes; run.py and `check` do that
EX.logger = logging.getLogger("REP")  # type: ignore[assignment]
EX.add_config(DEFAULTS)
for _command in ("print_config", "print_dependencies", "save_config", "print_named_configs"):  # Sacred's
    del EX.commands[_command]


def run_command(asked: CommandLine) -> None:
    """Runs the given command. Sacred does not parse the command line itself, since it could run code (jsonpickle)."""
    first = not getattr(rank_zero_only, "rank", 0)  # only the first process keeps the record
    if first and asked.record is not None:
        try:
            Path(asked.record).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"-F {asked.record}: cannot be created: {reason_of(error)}") from error
    flags = {"--file_storage": asked.record if first else None}
    words = {"UPDATE": asked.words, "GIVEN": sorted(asked.given), "CHOSEN": sorted(asked.chosen)}
    EX.run(asked.command, asked.updates, options={**flags, **words})
