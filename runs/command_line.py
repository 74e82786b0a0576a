"""Parses a command line: the command, and the options with the values that were typed.

The option's type decides how its value is read. Strings and paths are taken as typed (`exp_name=1.10`); anything else
is parsed as a Python literal (`sweep_ratios=[0.5,0.9]`), or taken as a string if it is not one (`missing_type=both`).
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from common.errors import ConfigError, DataError
from common.messages import quoted, suggestion
from common.readers import literal, may_be_path, unquoted, wrong
from common.strict_json import read_json
from config import DEFAULTS, NAMED_CONFIGS, OPTIONS, SEED, Options
from runs.comparable import REMOVED
from vilt.datasets.custom import CUSTOM

MAIN = "main"
"""The command if none is named: a run."""
RECORDED = (MAIN, "robustness", "sweep")
"""Commands of which Sacred can keep a record."""
TEXTS = {str, Path}
WITH_ENTRIES = ("network", "sweep_over", "sweep_slurm", "search")
"""Options that are dictionaries with arbitrary keys."""
ALIASES = {
    **{"lr": "learning_rate", "base_lr": "learning_rate", "method": "prompt_type", "model": "prompt_type"},
    **{"backbone": "vit", "encoder": "vit", "dataset": "task", "epochs": "max_epoch", "batch": "per_gpu_batchsize"},
    **{"checkpoint": "load_path", "ckpt": "load_path", "name": "exp_name"},
}
"""Names that other programs give our options; an error about one of them suggests ours."""
DCP_NAMES = {"prompt_length": "memory_length", "prompt_depth": "memory_depth"}
"""DCP's names for our options, accepted as synonyms. MPLMM has a `prompt_length` of its own."""
VILT_OPTIONS = (
    *("datasets", "loss_names", "train_transform_keys", "val_transform_keys", "max_image_len", "patch_size"),
    *("draw_false_image", "draw_false_text", "image_only", "max_text_len", "vocab_size", "whole_word_masking"),
    *("mlm_prob", "vqav2_label_size", "get_recall_metric", "hidden_size", "num_heads", "num_layers", "mlp_ratio"),
    *("drop_rate", "mmimdb_class_num", "food101_class_num", "hatememes_class_num", "learnt_p", "prompt_layers"),
    "multi_layer_prompt",
)
VILT_CONFIGS = (
    *("task_mlm_itm", "task_finetune_nlvr2", "task_finetune_vqa", "task_finetune_irtr_", "env_dandelin", "vit32_base"),
    *("step25k", "step50k", "step100k", "step200k"),
)
"""Options, and prefixes of named configs, that the published code inherits from ViLT's tasks and model."""


@dataclass
class CommandLine:
    """A parsed command line."""

    command: str = MAIN
    help: bool = False
    updates: dict[str, Any] = field(default_factory=dict)
    """Option values, still to be checked; entries of dictionaries are nested."""
    words: list[str] = field(default_factory=list)  # options, named configs and files as typed, for the runs of a sweep
    given: set[str] = field(default_factory=set)  # options set on the command line or in a .json file
    chosen: set[str] = field(default_factory=set)
    """Options set on purpose. A .json file may list every option, so only its values other than the default count."""
    record: str | None = None  # folder for Sacred's record of the run


class _Flags(argparse.ArgumentParser):
    """Parser of the flags; rejects any other word that starts with a dash."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("-F", "--file_storage", metavar="FOLDER")
        self.add_argument("words", nargs="*")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; the flags are -F FOLDER (Sacred's record) and -h, and options are name=value")


def read_command_line(words: Sequence[str], commands: Mapping[str, Any]) -> CommandLine:
    """Parses the words after `run.py`.

    Args:
        commands: the commands, keyed by name.

    Raises:
        ConfigError: a command, flag, named config, option or file is unknown, or `seed` is invalid.
    """
    flags = _Flags().parse_intermixed_args(["-h" if word == "help" else word for word in words])
    found, rest = CommandLine(help=flags.help, record=flags.file_storage), list(flags.words)
    if found.record is not None and ("=" in found.record or found.record in ("with", *NAMED_CONFIGS)):
        raise ConfigError(f"-F: expected a folder, found {found.record}")
    if rest and rest[0] != "with":
        found.command = rest.pop(0)
        if found.command not in commands:
            an_option = "=" in found.command or found.command in NAMED_CONFIGS
            example = f"as in `run.py with {found.command}`, " if an_option else ""
            raise ConfigError(
                f"{quoted(found.command)}: expected `with` before options, {example}or one of the commands "
                f"{', '.join(commands)}{suggestion(found.command, ['with', *commands])}"
            )
    if found.help:
        return found
    if found.record is not None and found.command not in RECORDED:
        raise ConfigError(f"-F: {found.command} keeps no record; leave it out")
    if rest and rest[0] != "with":
        raise ConfigError(f"{rest[0]}: expected `with` before it, as in `run.py {found.command} with {' '.join(rest)}`")
    for before, word in itertools.pairwise(rest):
        name, equals, value = (part.strip() for part in word.partition("="))
        if equals and name:
            name = _checked_name(_our_name(name, rest))
            found.given.add(option_of(name))
            found.chosen.add(option_of(name))
            found.words.append(f"{name}={value}")
        elif word.strip():
            found.words.append(word)
            _take_config(word, before, found)
    for word in found.words:  # options override named configs and files, wherever they stand
        name, equals, value = word.partition("=")
        if equals:
            set_option(found.updates, name, typed(name, value))
    for name, value in found.updates.items():  # some would otherwise go unchecked
        if isinstance(value, dict) and name not in WITH_ENTRIES:
            if not isinstance(DEFAULTS[name], dict) or any(isinstance(one, dict) for one in value.values()):
                raise wrong(name, "a value, not a dictionary", value)
            for entry in value:
                _checked_name(f"{name}.{entry}")
    SEED("seed", found.updates.get("seed", 0))
    return found


def _our_name(name: str, words: Sequence[str]) -> str:
    """Our name for an option of DCP. Raises ConfigError if `words` do not tell whether DCP's or MPLMM's is meant."""
    if name not in OPTIONS or {"prompt_type=dcp", "prompt_type=rep"} & set(words):
        return DCP_NAMES.get(name, name)
    if name in DCP_NAMES and not any(word.startswith("prompt_type=") for word in words):
        raise ConfigError(f"{name}: expected {DCP_NAMES[name]}, or prompt_type= to tell whose option is meant")
    return name


def _take_config(word: str, before: str, found: CommandLine) -> None:
    """Applies a named config, or the options in a .json file; `before` is the preceding word."""
    if word in NAMED_CONFIGS:
        for name, value in NAMED_CONFIGS[word].items():
            set_option(found.updates, name, value)
            found.chosen |= {name} if is_of_sweep(name) else set()
        return
    if word.startswith(VILT_CONFIGS):
        raise ConfigError(f"{word}: a named config of ViLT's tasks and model, which do not exist here; leave it out")
    if not word.endswith(".json"):
        shown = f"{before} {word}" if "=" in before else word
        example = (
            f", as in {word}={DEFAULTS[word] or 'VALUE'}" if word in OPTIONS else suggestion(word, [*NAMED_CONFIGS])
        )
        raise ConfigError(
            f"{shown}: expected name=value without spaces in it or around = (or all of it in quotes), a named config "
            f"or a .json file{example}"
        )
    if not may_be_path(word) or not Path(word).is_file():
        raise ConfigError(f"{word}: expected a JSON file of options, found no such file")
    try:
        options = read_json(Path(word))
    except DataError as error:
        raise ConfigError(f"{error}; expected a JSON file of options") from error
    for name, value in options.items():
        if name in REMOVED or (name == CUSTOM and isinstance(value, dict)):  # recorded by runs
            continue
        name = _checked_name(name if name in OPTIONS else DCP_NAMES.get(name, name), f"{word}: ")
        set_option(found.updates, name, value)
        option = option_of(name)
        if option == "seed":
            SEED(f"{word}: seed", found.updates["seed"])
        found.given.add(option)
        if option != "exp_name" and not _is_default(option, found.updates[option]):  # every config.json has an exp_name
            found.chosen.add(option)


def _is_default(name: str, value: Any) -> bool:
    default, found = (None if one in ("", {}) else one for one in (DEFAULTS[name], value))
    return json.dumps(found, default=str) == json.dumps(default, default=str)


def option_of(word: str) -> str:
    """The name of the option that a word such as `sweep_over.memory_depth=[3,6]` sets."""
    return word.partition("=")[0].partition(".")[0].strip()


def is_of_sweep(name: str) -> bool:
    """Whether an option, or a word of a command line, concerns a sweep itself and not its runs."""
    return name.startswith("sweep_") or name in ("search", "search_trials")


def _checked_name(name: str, where: str = "") -> str:
    """`name`, if an option or an entry of one has this name. Raises ConfigError otherwise."""
    option, dot, entry = name.partition(".")
    if option in VILT_OPTIONS:
        raise ConfigError(f"{where}{name}: an option of ViLT's tasks and model, which do not exist here; leave it out")
    default = DEFAULTS.get(option)
    has_entry = option in WITH_ENTRIES or (isinstance(default, dict) and entry in default)
    if option not in OPTIONS or (dot and not has_entry):
        raise ConfigError(f"{where}{unknown_option(name)}")
    return name


def unknown_option(name: str) -> ConfigError:
    """The error for an option that does not exist, with a suggestion."""
    dictionaries = {option: default for option, default in DEFAULTS.items() if isinstance(default, dict)}
    entries = [f"{option}.{entry}" for option, default in dictionaries.items() for entry in default]
    hint = f"; did you mean {ALIASES[name]}?" if name in ALIASES else suggestion(name, [*OPTIONS, *entries])
    return ConfigError(f"unknown option {name}{hint} (`python run.py print_config` lists all)")


# Values


def set_option(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets an option, or a single entry of one that is a dictionary, even if one value stands for all its entries."""
    option, dot, entry = name.partition(".")
    if not dot:
        options[option] = value
        return
    current, default = options.get(option), DEFAULTS[option]
    if not isinstance(current, dict):
        current = dict.fromkeys(default, current) if isinstance(default, dict) and option in options else {}
    options[option] = {**current, entry: value}


def typed(name: str, value: str) -> Any:
    """Parses a value as typed for the option `name`, or for an entry of it (`sweep_over.vit`)."""
    option, _, entry = name.partition(".")
    if option in ("sweep_over", "search") and entry:
        option = entry
    if is_text(option):
        if value == "None" and accepts_none(option):
            return None
        return unquoted(value)
    found = literal(value)
    if option == "sweep_slurm" and isinstance(found, (int, float)) and str(found) != value:
        return value  # submitit writes it into a script: a partition may be called 1.10
    return found


def is_text(name: str) -> bool:
    """Whether an option is a string or a path, or a list of them."""
    hint = get_type_hints(Options).get(name)
    types = {one for part in (hint, *get_args(hint)) for one in (part, *get_args(part)) if not get_args(one)}
    return hint is not None and types - {type(None), Ellipsis} <= TEXTS


def accepts_none(name: str) -> bool:
    """Whether an option may be None."""
    try:
        return OPTIONS[name].read(name, None) is None
    except ConfigError:
        return False


def written(name: str, value: Any) -> str:
    """`name=value` for a command line, quoted if that is needed to read `value` back."""
    text = str(value)
    return f"{name}={text if typed(name, text) == value or not isinstance(value, str) else repr(text)}"
