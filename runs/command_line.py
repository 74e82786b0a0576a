"""The words of a command line: which command, which options, with the values that were typed.

A value is read by the type of its option. A text or a path is what was typed (`exp_name=1.10`); anything else is read
as Python writes it (`sweep_ratios=[0.5,0.9]`), and what Python does not understand is a word (`missing_type=both`).
"""

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from common.errors import ConfigError, DataError
from common.messages import quoted
from common.readers import literal, may_be_path, unquoted, wrong
from common.strict_json import Number, read_json
from config import DEFAULTS, NAMED_CONFIGS, OPTIONS, SEED, Options
from runs.other_names import CONFIGS_OF_VILT, MEANT, OPTIONS_OF_VILT, RENAMED
from vilt.datasets.custom import CUSTOM

MAIN = "main"
"""The command where none is named: a run."""
TEXTS = {str, Path}
WITH_ENTRIES = ("network", "sweep_over", "sweep_slurm", "search")
"""Options that are dictionaries of any entries."""
RECORD = ("-F", "--file_storage")
FLAGS = "-F FOLDER (Sacred's record of the run), -u (none) or -h (help)"


@dataclass
class CommandLine:
    """What the words of a command line say."""

    command: str = MAIN
    help: bool = False
    updates: dict[str, Any] = field(default_factory=dict)
    """Values of options as they are to be checked; entries of dictionaries are nested."""
    words: list[str] = field(default_factory=list)
    """Options, named configs and files as typed, for the runs of a sweep."""
    given: set[str] = field(default_factory=set)
    """Names of the options that are set here, itself or in a .json file."""
    chosen: set[str] = field(default_factory=set)
    """Those of `given` that a user has chosen: of a file, which may have all options, what is not the default."""
    record: str | None = None
    unobserved: bool = False


def read_command_line(words: Sequence[str], commands: Mapping[str, Any]) -> CommandLine:
    """Reads the words behind `run.py`.

    Args:
        commands: those of Sacred's experiment, by name.

    Raises:
        ConfigError: a command, flag, named config, option or file is unknown, or `seed`, which Sacred acts on, is none.
    """
    found = CommandLine()
    rest = _without_flags(words, found)
    if rest[:1] == ["help"]:
        found.help, rest = True, rest[1:]
    if rest and rest[0] != "with":
        found.command = _command(rest, commands)
        rest = rest[1:]
    if found.record is not None and getattr(commands[found.command], "unobserved", False):
        raise ConfigError(f"-F: {found.command} has nothing to record; leave it out")
    if rest and rest[0] != "with":
        raise ConfigError(f"{rest[0]}: expected `with` before it, as in `run.py {found.command} with {' '.join(rest)}`")
    for place, word in enumerate(rest[1:], start=1):
        name, equals, value = (part.strip() for part in word.partition("="))
        if equals and name:
            name = _known(_renamed(name, rest))
            found.given.add(option_of(name))
            found.chosen.add(option_of(name))
            found.words.append(f"{name}={value}")
        elif word.strip():
            _refuse_broken(rest[place - 1], word, rest[place + 1 : place + 2])
            found.words.append(word)
            _take_config(word, found)
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


def _renamed(name: str, words: Sequence[str]) -> str:
    """The name here of an option of DCP's; one that is also an option here needs the method on the line."""
    if name not in RENAMED or "prompt_type=dcp" in words or name not in OPTIONS:
        return RENAMED.get(name, name)
    if not any(word.startswith("prompt_type=") for word in words):
        raise ConfigError(f"{name}: expected {RENAMED[name]}, or prompt_type= with it, to say whose option it is")
    return name


def _without_flags(words: Sequence[str], found: CommandLine) -> list[str]:
    rest, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            found.help = True
        elif word in ("-u", "--unobserved"):
            found.unobserved = True
        elif flag in RECORD or word.startswith("-F"):
            if flag not in RECORD:  # -Ffolder
                flag, equals, value = "-F", "=", word[2:]
            if not equals:
                value = queue.pop(0) if queue and not _is_own(queue[0]) else ""
            if not value:
                raise ConfigError(f"{flag}: expected a folder behind it, as in {flag} records")
            if found.record is not None:
                raise ConfigError(f"{flag}: expected it once, found it twice")
            found.record = value
        elif word.startswith("-"):
            name = flag.lstrip("-").replace("-", "_")
            meant = f"{MEANT.get(name, name)}={value or '…'}" if name in {*OPTIONS, *MEANT} else "name=value"
            raise ConfigError(f"{quoted(word)}: expected {meant}, or the flag {FLAGS}")
        else:
            rest.append(word)
    if found.unobserved and found.record is not None:
        raise ConfigError("-u: means that there is no record, and contradicts -F")
    return rest


def _is_own(word: str) -> bool:
    """Whether a word is a flag, an option or a named config, and so hardly a folder."""
    return word.startswith("-") or word == "with" or word in NAMED_CONFIGS or option_of(word) in OPTIONS


def _command(rest: Sequence[str], commands: Collection[str]) -> str:
    word = rest[0]
    if word in commands:
        return word
    if "=" in word or word.endswith(".json") or word in NAMED_CONFIGS or option_of(word) in OPTIONS:
        raise ConfigError(f"{word}: expected `with` before it, as in `run.py with {' '.join(rest)}`")
    names = [name for name in commands if name != MAIN]
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{quoted(word)}: expected `with`, or one of the commands {', '.join(names)}{hint}")


def _refuse_broken(before: str, word: str, after: Sequence[str]) -> None:
    """Raises ConfigError where `word` is part of an option with blanks in it: of a list, or around its `=`."""
    if word in NAMED_CONFIGS or word.endswith(".json"):
        return
    name, equals, value = before.partition("=")
    if equals and any(value.count(left) > value.count(right) for left, right in ("[]", "{}", "()")):
        raise ConfigError(f"{name}: expected no blank before {word}; without blanks, or all of it in quotes")
    if equals and name and not value:
        raise ConfigError(f"{name}: expected no blank behind =, as in {name}={word}")
    if word.startswith("=") or (after and after[0].startswith("=")):
        name = word if not word.startswith("=") else before if before != "with" else "NAME"
        raise ConfigError(f"{name}: expected no blanks around =, as in {name}=VALUE")


def _take_config(word: str, found: CommandLine) -> None:
    """Applies a named config, or the options in a .json file."""
    if word in NAMED_CONFIGS:
        for name, value in NAMED_CONFIGS[word].items():
            set_option(found.updates, name, value)
            found.chosen |= {name} if is_of_sweep(name) else set()
        return
    if word.startswith(CONFIGS_OF_VILT):
        raise ConfigError(f"{word}: a named config of ViLT, whose tasks and model are not here; leave it out")
    if word in OPTIONS:
        raise ConfigError(f"{word}: expected a value, as in {word}={DEFAULTS[word] or 'VALUE'}")
    if not word.endswith(".json"):
        near = difflib.get_close_matches(word, NAMED_CONFIGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMED_CONFIGS)}"
        raise ConfigError(
            f"{word}: expected name=value (a value with blanks in quotes), a named config or a .json file; {hint}"
        )
    if not may_be_path(word) or not Path(word).is_file():
        raise ConfigError(f"{word}: expected a file with options as JSON, found no file there")
    try:
        options = read_json(Path(word), Number)
    except DataError as error:
        raise ConfigError(f"{error}; expected options as JSON") from error
    for name, value in options.items():
        if name == CUSTOM and isinstance(value, dict):  # of the config.json of a run: what its data said, no option
            continue
        name = _known(name if name in OPTIONS else RENAMED.get(name, name), f"{word}: ")
        set_option(found.updates, name, from_file(name, value))
        option = option_of(name)
        if option == "seed":  # which Sacred acts on, before the options are checked
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
    if option in OPTIONS_OF_VILT:
        raise ConfigError(f"{where}{name}: an option of ViLT, whose tasks and model are not here; leave it out")
    default = DEFAULTS.get(option)
    has_entry = option in WITH_ENTRIES or (isinstance(default, dict) and entry in default)
    if option not in OPTIONS or (dot and not has_entry):
        raise ConfigError(f"{where}{unknown_option([name], list(OPTIONS))}")
    return name


def unknown_option(names: Sequence[str], known: Sequence[str]) -> ConfigError:
    """The error for options that do not exist, with the nearest that do."""
    found = []
    for name in names:
        near = [MEANT[name]] if MEANT.get(name) in known else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        found.append(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return ConfigError("; ".join(found) + " (`python run.py print_config` shows all)")


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


def from_file(name: str, value: Any) -> Any:
    """A value of a .json file for the option `name`: a number is one, or for a text what is written there."""
    if isinstance(value, Number):
        return str(value) if is_text(name) else value.number
    if isinstance(value, list):
        return [from_file(name, one) for one in value]
    if isinstance(value, dict):
        of_options = name in ("sweep_over", "search")
        return {key: from_file(key if of_options else name, one) for key, one in value.items()}
    return value


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
