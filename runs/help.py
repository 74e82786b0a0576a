"""The options in words: `run.py --help`, `COMMAND --help`, `print_config`, and docs/options.md (`make docs`)."""

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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
PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """\
# Options

Set any option as `name=value` after `with`, in any order; named configs such as `task_finetune_mmimdb` are given by
name alone. The whole configuration is checked before anything starts: an error is one line, with exit status 2.
`python run.py print_config with …` shows the values that a command would use, and `python run.py COMMAND --help` the
options of a command (`main` for a run). `make docs` writes this page from config.py.

Strings and paths are taken as typed, with or without quotes: `exp_name=1.10`, `data_root=2024_11`, `runs=[1.10,a]`.
Anything else is read as a Python literal: `seed=3`, `sweep_ratios=[0.5,0.9]`. `None` leaves an option open, if it may
be. Options on the command line override those in a `.json` file (`with options.json`, or the `config.json` of a run).
"""


def help_on(command: str | None, commands: Mapping[str, Callable[..., Any]], about: str) -> str:
    """Help on a command and its options or, without one, on the program and its commands."""
    configs = {name: ", ".join(f"{option}={value}" for option, value in v.items()) for name, v in NAMED_CONFIGS.items()}
    named_configs = {"Named configs, which also go after `with`:": configs}
    if command is None:
        title = "Commands (`run.py COMMAND --help` shows its options; `run.py main --help` those of a run):"
        docs = {name: inspect.getdoc(function) or "" for name, function in commands.items() if name != MAIN}
        sections = {title: {name: doc.partition("\n")[0] for name, doc in docs.items()}, "Flags:": FLAGS}
        return _page(about, sections | named_configs)
    own = [name for name, option in OPTIONS.items() if command in option.help.partition(":")[0].split(", ")]
    wanted = OTHERS.get(command, ())
    sections = {"": _options([*own, *(name for name in wanted if name in OPTIONS and name not in own)])}
    for kind in (kind for kind in wanted if kind in KINDS):
        names = [name for name, each in OPTIONS.items() if each.kind == kind and name not in (*own, *wanted)]
        sections[f"{KINDS[kind]}:"] = _options(names)
    usage = f"python run.py {'' if command == MAIN else f'{command} '}with name=value …"
    about = f"{usage}\n\n{inspect.getdoc(commands[command]) or ''}"
    return _page(about, sections | (named_configs if DATA in wanted else {}))


def _options(names: Sequence[str]) -> dict[str, str]:
    return {f"{name}={OPTIONS[name].default}": OPTIONS[name].help for name in names}


def _page(about: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    """A text and, below titles, names with texts; a text starts on a new line if the name is long."""
    width, column = min(100, shutil.get_terminal_size((100, 24)).columns), 28
    lines = [part for line in about.strip().splitlines() for part in textwrap.wrap(line, width) or [""]]
    for title, entries in sections.items():
        lines += ["", *(part for part in (*textwrap.wrap(title, width), "") if title)]
        for name, text in entries.items():
            rows = textwrap.wrap(text, max(20, width - column)) or [""]
            lines.append(f"  {name:<{column - 3}} {rows.pop(0)}" if len(name) < column - 2 else f"  {name}")
            lines += [" " * column + row for row in rows]
    return "\n".join(lines)


def described_options(config: Mapping[str, Any]) -> str:
    """All options with their values and help, one per line; `*` marks values other than the default."""
    lines = []
    for name, each in OPTIONS.items():
        value = config[name]
        changed = json.dumps(value, default=str) != json.dumps(each.default, default=str)
        lines.append(f"{'*' if changed else ' '} {name} = {value!r}  # {each.help}")
    return "\n".join(lines)


def page() -> str:
    """The page: a table for each kind of option, with a row for each option, in the order of config.py."""
    lines = [HEAD]
    for kind, title in KINDS.items():
        lines += [f"## {title}", "", "| option | default | |", "|---|---|---|"]
        lines += [f"| `{name}` | `{o.default!r}` | {o.help} |" for name, o in OPTIONS.items() if o.kind == kind]
        lines.append("")
    lines += ["## Named configs", "", "| name | sets |", "|---|---|"]
    for name, values in NAMED_CONFIGS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{option}={value!r}`' for option, value in values.items())} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
