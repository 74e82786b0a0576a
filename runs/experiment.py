"""The Sacred experiment, and the check of a command line before Sacred acts on it."""

import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.messages import first_line, quoted
from common.readers import may_be_path
from common.strict_json import parse_json
from config import DEFAULTS, NAMED_CONFIGS, OPTIONS, SEED

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # Sacred's; requirements.txt holds setuptools back
    sys.modules.setdefault("pandas", None)  # type: ignore[arg-type]  # Sacred would load it, half a second, for nothing
    from sacred import SETTINGS, Experiment, arg_parser
    from sacred.arg_parser import get_config_updates
    from sacred.config.config_files import HANDLER_BY_EXT
    from sacred.config.utils import normalize_or_die
    from sacred.utils import ConfigAddedError, SacredError

    if sys.modules["pandas"] is None:
        del sys.modules["pandas"]

SETTINGS.CAPTURE_MODE = "no"  # Sacred would otherwise take over standard output, progress bars included
arg_parser.restore = lambda value: value  # Sacred's own, jsonpickle, calls what a value on the command line names
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # run.py records the devices itself
for _extension in set(HANDLER_BY_EXT) - {".json"}:  # of the files that `with` takes; pickles and YAML can run code,
    del HANDLER_BY_EXT[_extension]
HANDLER_BY_EXT[".json"].load = lambda file: parse_json(file.read().encode())  # and so can Sacred's reading of JSON

EX = Experiment("REP", save_git_info=False)
logging.getLogger("REP").setLevel(logging.CRITICAL)  # Sacred's steps and type changes; run.py and `check` report
EX.logger = logging.getLogger("REP")  # type: ignore[assignment]
FLAGS = {"-h": False, "--help": False, "-u": False, "--unobserved": False, "-F": True, "--file_storage=": True}
"""Sacred's flags that serve here, with whether a value is part of them."""

EX.add_config(DEFAULTS)
for _name, _config in NAMED_CONFIGS.items():
    EX.add_named_config(_name, _config)

__all__ = ["EX", "ConfigAddedError", "SacredError"]


def check_command_line(argv: Sequence[str]) -> None:
    """Checks what Sacred acts on before anything else is checked.

    Raises:
        ConfigError: `seed` is none (in a .json file too), a value cannot be read, a flag is none of FLAGS, or a file
            stands where a named config is expected that is no JSON: Sacred would read options from it, in ways that can
            run code.
        DataError: a .json file is not readable.
    """
    words = []
    for word in argv[1:]:
        if "seed" in (in_file := options_in_files([word])):
            SEED(f"{word}: seed", in_file["seed"])
        if word.startswith("-"):
            if not any(word == flag or (takes and word.startswith(flag)) for flag, takes in FLAGS.items()):
                raise ConfigError(f"{quoted(word)}: expected one of {', '.join(FLAGS)}, or name=value")
        elif "=" in word:
            words.append(word)
        elif may_be_path(word) and Path(word).suffix != ".json" and Path(word).is_file():
            raise ConfigError(f"{word}: expected name=value, a named config, or a .json file, found another file")
    try:
        given = get_config_updates(words)[0]
        normalize_or_die(given)
    except (TypeError, LookupError, RecursionError, MemoryError) as error:
        raise ConfigError(f"expected name=value, found none: {first_line(error)}") from error
    if "seed" in given:
        SEED("seed", given["seed"])


def option_of(update: str) -> str:
    """The name of the option that a word such as `sweep_over.memory_depth=[3,6]` of a command line sets."""
    return update.partition("=")[0].partition(".")[0].strip()


def is_of_sweep(name: str) -> bool:
    """Whether an option, or a word of a command line, is one of a sweep and not of its runs."""
    return name.startswith("sweep_") or name in ("search", "search_trials")


def options_in_files(words: Sequence[str]) -> dict[str, Any]:
    """What the .json files among the words of a command line set; raises ConfigError where one is damaged."""
    found: dict[str, Any] = {}
    for file in (Path(word) for word in words if "=" not in word and word.endswith(".json") and may_be_path(word)):
        if not file.is_file():
            continue
        try:
            read = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(f"{file}: expected options as JSON: {first_line(error)}") from error
        if not isinstance(read, dict):
            raise ConfigError(f"{file}: expected an object with options, found {quoted(read)}")
        found |= read
    return found


def described_options(config: Mapping[str, Any]) -> str:
    """The options with their values and help, a line each; `*` marks those that are not the default."""
    lines = []
    for name, each in OPTIONS.items():
        value = config[name]
        changed = json.dumps(value, default=str) != json.dumps(each.default, default=str)
        lines.append(f"{'*' if changed else ' '} {name} = {value!r}  # {each.help}")
    return "\n".join(lines)
