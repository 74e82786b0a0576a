"""The words of a command line: which command, which options, with the values that were typed.

A value is read by the type of its option. A text or a path is what was typed (`exp_name=1.10`); anything else is read
as Python writes it (`sweep_ratios=[0.5,0.9]`), and what Python does not understand is a word (`missing_type=both`).
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from common.errors import ConfigError, DataError
from common.messages import near, quoted
from common.readers import literal, may_be_path, unquoted, wrong
from common.strict_json import read_json
from config import DEFAULTS, NAMED_CONFIGS, OPTIONS, SEED, Options
from runs.comparable import GONE
from vilt.datasets.custom import CUSTOM

MAIN = "main"
"""The command where none is named: a run."""
TEXTS = {str, Path}
WITH_ENTRIES = ("network", "sweep_over", "sweep_slurm", "search")
"""Options that are dictionaries of any entries."""
MEANT = {
    **{"lr": "learning_rate", "base_lr": "learning_rate", "method": "prompt_type", "model": "prompt_type"},
    **{"backbone": "vit", "encoder": "vit", "dataset": "task", "epochs": "max_epoch", "batch": "per_gpu_batchsize"},
    **{"checkpoint": "load_path", "ckpt": "load_path", "name": "exp_name"},
}
"""Options by names that other programs have for them, which a hint mentions."""
OF_DCP = {"prompt_length": "memory_length", "prompt_depth": "memory_depth"}
"""DCP's names of options, which are taken for ours. MPLMM has a `prompt_length` of its own."""
OF_VILT = (
    *("datasets", "loss_names", "train_transform_keys", "val_transform_keys", "max_image_len", "patch_size"),
    *("draw_false_image", "draw_false_text", "image_only", "max_text_len", "vocab_size", "whole_word_masking"),
    *("mlm_prob", "vqav2_label_size", "get_recall_metric", "hidden_size", "num_heads", "num_layers", "mlp_ratio"),
    *("drop_rate", "mmimdb_class_num", "food101_class_num", "hatememes_class_num", "learnt_p", "prompt_layers"),
    "multi_layer_prompt",
)
CONFIGS_OF_VILT = (
    *("task_mlm_itm", "task_finetune_nlvr2", "task_finetune_vqa", "task_finetune_irtr_", "env_dandelin", "vit32_base"),
    *("step25k", "step50k", "step100k", "step200k"),
)
"""Options, and beginnings of named configs, of ViLT's tasks and model, which the published code inherits."""


@dataclass
class CommandLine:
    """What the words of a command line say."""

    command: str = MAIN
    help: bool = False
    updates: dict[str, Any] = field(default_factory=dict)
    """Values of options as they are to be checked; entries of dictionaries are nested."""
    words: list[str] = field(default_factory=list)  # options, named configs and files as typed, for the runs of a sweep
    given: set[str] = field(default_factory=set)  # names of the options that are set here, itself or in a .json file
    chosen: set[str] = field(default_factory=set)
    """Those of `given` that a user has chosen: of a file, which may have all options, what is not the default."""
    record: str | None = None  # folder of Sacred's record of the run


class _Flags(argparse.ArgumentParser):
    """The flags; whatever else begins with a dash is refused."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("-F", "--file_storage", metavar="FOLDER")
        self.add_argument("words", nargs="*")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; flags are -F FOLDER (Sacred's record) and -h; options are name=value")


def read_command_line(words: Sequence[str], commands: Mapping[str, Any]) -> CommandLine:
    """Reads the words behind `run.py`.

    Args:
        commands: those of Sacred's experiment, by name.

    Raises:
        ConfigError: a command, flag, named config, option or file is unknown, or `seed`, which Sacred acts on, is none.
    """
    flags = _Flags().parse_intermixed_args(["-h" if word == "help" else word for word in words])
    found, rest = CommandLine(help=flags.help, record=flags.file_storage), list(flags.words)
    if found.record is not None and ("=" in found.record or found.record in ("with", *NAMED_CONFIGS)):
        raise ConfigError(f"-F: expected a folder behind it, found {found.record}")
    if rest and rest[0] != "with":
        found.command = rest.pop(0)
        if found.command not in commands:
            an_option = "=" in found.command or found.command in NAMED_CONFIGS
            example = f"as in `run.py with {found.command}`, " if an_option else ""
            raise ConfigError(
                f"{quoted(found.command)}: expected `with` before options, {example}or one of the commands "
                f"{', '.join(commands)}{near(found.command, ['with', *commands])}"
            )
    if found.help:
        return found
    if found.record is not None and getattr(commands[found.command], "unobserved", False):
        raise ConfigError(f"-F: {found.command} has nothing to record; leave it out")
    if rest and rest[0] != "with":
        raise ConfigError(f"{rest[0]}: expected `with` before it, as in `run.py {found.command} with {' '.join(rest)}`")
    for before, word in itertools.pairwise(rest):
        name, equals, value = (part.strip() for part in word.partition("="))
        if equals and name:
            name = _known(_ours(name, rest))
            found.given.add(option_of(name))
            found.chosen.add(option_of(name))
            found.words.append(f"{name}={value}")
        elif word.strip():
            found.words.append(word)
            _take_config(word, before, found)
    for word in found.words:  # they count more than named configs and files, wherever they stand
        name, equals, value = word.partition("=")
        if equals:
            set_option(found.updates, name, typed(name, value))
    for name, value in found.updates.items():  # what Sacred would refuse without naming it, or act on
        if isinstance(value, dict) and name not in WITH_ENTRIES:
            if not isinstance(DEFAULTS[name], dict) or any(isinstance(one, dict) for one in value.values()):
                raise wrong(name, "no dictionary", value)
            for entry in value:
                _known(f"{name}.{entry}")
    SEED("seed", found.updates.get("seed", 0))
    return found


def _ours(name: str, words: Sequence[str]) -> str:
    """The name here of an option of DCP's. Raises ConfigError where `words` do not say whether it is MPLMM's."""
    if name not in OPTIONS or {"prompt_type=dcp", "prompt_type=rep"} & set(words):
        return OF_DCP.get(name, name)
    if name in OF_DCP and not any(word.startswith("prompt_type=") for word in words):
        raise ConfigError(f"{name}: expected {OF_DCP[name]}, or prompt_type= with it, to say whose option it is")
    return name


def _take_config(word: str, before: str, found: CommandLine) -> None:
    """Applies a named config, or the options in a .json file; `before` is the word in front of it."""
    if word in NAMED_CONFIGS:
        for name, value in NAMED_CONFIGS[word].items():
            set_option(found.updates, name, value)
            found.chosen |= {name} if is_of_sweep(name) else set()
        return
    if word.startswith(CONFIGS_OF_VILT):
        raise ConfigError(f"{word}: a named config of ViLT, whose tasks and model are not here; leave it out")
    if not word.endswith(".json"):
        shown = f"{before} {word}" if "=" in before else word
        example = f", as in {word}={DEFAULTS[word] or 'VALUE'}" if word in OPTIONS else near(word, [*NAMED_CONFIGS])
        raise ConfigError(
            f"{shown}: expected name=value without blanks in it or around = (or all of it in quotes), a named config "
            f"or a .json file{example}"
        )
    if not may_be_path(word) or not Path(word).is_file():
        raise ConfigError(f"{word}: expected a file with options as JSON, found no file there")
    try:
        options = read_json(Path(word))
    except DataError as error:
        raise ConfigError(f"{error}; expected options as JSON") from error
    for name, value in options.items():
        if name in GONE or (name == CUSTOM and isinstance(value, dict)):  # of a run: what its data said, no option
            continue
        name = _known(name if name in OPTIONS else OF_DCP.get(name, name), f"{word}: ")
        set_option(found.updates, name, value)
        option = option_of(name)
        if option == "seed":
            SEED(f"{word}: seed", found.updates["seed"])
        found.given.add(option)
        if option != "exp_name" and not _is_default(option, found.updates[option]):  # every run has a name
            found.chosen.add(option)


def _is_default(name: str, value: Any) -> bool:
    default, found = (None if one in ("", {}) else one for one in (DEFAULTS[name], value))
    return json.dumps(found, default=str) == json.dumps(default, default=str)


def option_of(word: str) -> str:
    """The name of the option that a word such as `sweep_over.memory_depth=[3,6]` sets."""
    return word.partition("=")[0].partition(".")[0].strip()


def is_of_sweep(name: str) -> bool:
    """Whether an option, or a word of a command line, is one of a sweep and not of its runs."""
    return name.startswith("sweep_") or name in ("search", "search_trials")


def _known(name: str, where: str = "") -> str:
    """`name`, if it is one of an option or of an entry of one. Raises ConfigError."""
    option, dot, entry = name.partition(".")
    if option in OF_VILT:
        raise ConfigError(f"{where}{name}: an option of ViLT, whose tasks and model are not here; leave it out")
    default = DEFAULTS.get(option)
    has_entry = option in WITH_ENTRIES or (isinstance(default, dict) and entry in default)
    if option not in OPTIONS or (dot and not has_entry):
        raise ConfigError(f"{where}{unknown_option(name)}")
    return name


def unknown_option(name: str) -> ConfigError:
    """The error for an option that does not exist, with the nearest that does."""
    dictionaries = {option: default for option, default in DEFAULTS.items() if isinstance(default, dict)}
    entries = [f"{option}.{entry}" for option, default in dictionaries.items() for entry in default]
    hint = f"; did you mean {MEANT[name]}?" if name in MEANT else near(name, [*OPTIONS, *entries])
    return ConfigError(f"unknown option {name}{hint} (`python run.py print_config` shows all)")


# Values


def set_option(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets an option, or an entry of one that is a dictionary: of one value for all entries that entry alone."""
    option, dot, entry = name.partition(".")
    if not dot:
        options[option] = value
        return
    current, default = options.get(option), DEFAULTS[option]
    if not isinstance(current, dict):
        current = dict.fromkeys(default, current) if isinstance(default, dict) and option in options else {}
    options[option] = {**current, entry: value}


def typed(name: str, value: str) -> Any:
    """A value as it was typed for the option `name`, or for an entry of it (`sweep_over.vit`)."""
    option, _, entry = name.partition(".")
    if option in ("sweep_over", "search") and entry:
        option = entry
    if is_text(option):
        if value == "None" and takes_none(option):
            return None
        return unquoted(value)
    found = literal(value)
    if option == "sweep_slurm" and isinstance(found, (int, float)) and str(found) != value:
        return value  # submitit writes it into a script: a partition called 1.10
    return found


def is_text(name: str) -> bool:
    """Whether an option is a text or a path, or a list of them."""
    hint = get_type_hints(Options).get(name)
    types = {one for part in (hint, *get_args(hint)) for one in (part, *get_args(part)) if not get_args(one)}
    return hint is not None and types - {type(None), Ellipsis} <= TEXTS


def takes_none(name: str) -> bool:
    """Whether an option may be left open."""
    try:
        return OPTIONS[name].read(name, None) is None
    except ConfigError:
        return False


def written(name: str, value: Any) -> str:
    """`name=value` as a command line has it, so that `value` is read from it again."""
    text = str(value)
    return f"{name}={text if typed(name, text) == value or not isinstance(value, str) else repr(text)}"
