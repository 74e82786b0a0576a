"""The Python interface and the command `rep`, which `pip install .` adds to `python run.py`.

import rep

rep.convert(data_frame, "datasets/birds", columns={"image": "photo"})
model = rep.load_model("result/rep_seed0/version_0/best.ckpt")
found = rep.robustness("result/rep_seed0/version_0/best.ckpt", data_root="datasets/mmimdb")

In a checkout, import these functions from this module. Heavy modules are imported only when used.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from config import DEFAULTS, OPTIONS

if TYPE_CHECKING:
    from engine.predict import load_model
    from engine.robustness import Results
    from vilt.convert import convert

__all__ = ["convert", "load_model", "robustness"]
ELSEWHERE = {"load_model": "engine.predict", "convert": "vilt.convert"}
MEANINGS = {"train": (), "test": ("test_only=True",)}
"""Commands of `rep` for which run.py needs none, with the options that they add."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("rep-missing-modality")
    if name not in ELSEWHERE:
        raise AttributeError(f"{__name__}: expected one of {', '.join([*ELSEWHERE, 'robustness'])}, found {name}")
    return getattr(importlib.import_module(ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def robustness(load_path: str | Path, **options: Any) -> "list[Results]":
    """Evaluates checkpoints at every missing type and ratio, and writes the same files as `run.py robustness`.

    Args:
        load_path: a checkpoint, or a folder of runs.
        options: options of `run.py robustness`, such as data_root, robustness_ratios and robustness_seeds.

    Returns:
        The contents of robustness.json for each checkpoint.

    Raises:
        UserError: an option, a checkpoint or the dataset is invalid.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(f"{unknown[0]}: expected an option of `run.py robustness`")
    from runs.robustness import measure_target
    from runs.targets import open_targets

    targets = open_targets({**DEFAULTS, **options, "load_path": str(load_path)}, set(options))
    return [found for target in targets if (found := measure_target(target, set(options))) is not None]


def main() -> int:
    """The command `rep`: `rep train with …`, `rep test with …`, `rep convert --dataset …`, and run.py's commands."""
    command, *words = sys.argv[1:] or ["--help"]
    if command == "convert":
        from make_arrow import main as convert

        sys.argv[0] = "rep convert"  # for its usage
        return convert(words)
    from run import command_line

    return command_line(["rep", *as_words_of_run(command, words)])


def as_words_of_run(command: str, words: Sequence[str]) -> list[str]:
    """Translates `rep COMMAND WORDS` into the words of run.py."""
    if command not in MEANINGS:
        return [command, *words]
    return ["main", *words, *([] if "--help" in words or "-h" in words else MEANINGS[command])]
