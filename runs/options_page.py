"""Writes docs/options.md from config.py (`make docs`)."""

from pathlib import Path

from config import KINDS, NAMED_CONFIGS, OPTIONS

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
