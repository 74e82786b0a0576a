"""`run.py --help`, `run.py COMMAND --help` and `run.py print_config`."""

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from config import COMMAND, DATA, KINDS, MACHINE, NAMED_CONFIGS, OPTIONS
from runs.command_line import MAIN

A_RUN = [kind for kind in KINDS if kind != COMMAND]
PREDICTION = (
    *("load_path", "output", "per_gpu_batchsize", "vit", "vit_activation", "tokenizer", "trust_backbone"),
    *("published_seed", "image_size", "num_gpus", "num_workers", "precision"),
)
OTHERS: dict[str, Sequence[str]] = {
    MAIN: A_RUN,
    "doctor": A_RUN,
    "sweep": A_RUN,
    "features": A_RUN,
    "robustness": ("load_path", DATA, MACHINE),
    "predict": PREDICTION,
    "embed": (*PREDICTION, DATA),
    "runs": ("log_dir",),
    "export": ("load_path",),
}
"""Further options, and kinds of options, of each command; the help of its own options starts with its name."""
FLAGS = {
    "-F FOLDER": "writes Sacred's record of the run to FOLDER",
    "-h, --help": "shows this help, or a command's options",
}


def help_on(command: str | None, commands: Mapping[str, Callable[..., Any]], about: str) -> str:
    """Help on a command and its options or, without one, on the program and its commands."""
    if command is None:
        lines = [
            *_wrapped(about),
            "",
            *_wrapped("Commands (`run.py COMMAND --help` shows its options; `run.py main --help` those of a run):"),
            "",
        ]
        for name, function in ((name, function) for name, function in commands.items() if name != MAIN):
            lines += _entry(name, (inspect.getdoc(function) or "").partition("\n")[0])
        lines += ["", "Flags:", "", *(line for flag, text in FLAGS.items() for line in _entry(flag, text))]
        return "\n".join([*lines, "", *_configs()])
    lines = [
        f"python run.py {'' if command == MAIN else f'{command} '}with name=value …",
        "",
        *_wrapped(inspect.getdoc(commands[command]) or ""),
    ]
    own = [name for name, option in OPTIONS.items() if command in option.help.partition(":")[0].split(", ")]
    lines += ["", *_options(own)]
    wanted = OTHERS.get(command, ())
    lines += _options([name for name in wanted if name in OPTIONS and name not in own])
    for kind in (kind for kind in wanted if kind in KINDS):
        names = [name for name, each in OPTIONS.items() if each.kind == kind and name not in (*own, *wanted)]
        lines += ["", f"{KINDS[kind]}:", "", *_options(names)]
    return "\n".join([*lines, "", *(_configs() if DATA in wanted else [])])


def _configs() -> list[str]:
    lines = ["Named configs, which also go after `with`:", ""]
    for name, values in NAMED_CONFIGS.items():
        lines += _entry(name, ", ".join(f"{option}={value}" for option, value in values.items()))
    return lines


def _options(names: Sequence[str]) -> list[str]:
    return [line for name in names for line in _entry(f"{name}={OPTIONS[name].default}", OPTIONS[name].help)]


def _entry(name: str, text: str) -> list[str]:
    """A name and its text, which starts on a new line if the name is long."""
    column = 28
    lines = textwrap.wrap(text, max(20, _width() - column)) or [""]
    first = [f"  {name:<{column - 3}} {lines.pop(0)}"] if len(name) < column - 2 else [f"  {name}"]
    return [*first, *(" " * column + line for line in lines)]


def _wrapped(text: str) -> list[str]:
    return [part for line in text.strip().splitlines() for part in textwrap.wrap(line, _width()) or [""]]


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def described_options(config: Mapping[str, Any]) -> str:
    """All options with their values and help, one per line; `*` marks values other than the default."""
    lines = []
    for name, each in OPTIONS.items():
        value = config[name]
        changed = json.dumps(value, default=str) != json.dumps(each.default, default=str)
        lines.append(f"{'*' if changed else ' '} {name} = {value!r}  # {each.help}")
    return "\n".join(lines)
