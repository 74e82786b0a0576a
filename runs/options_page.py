"""Writes docs/options.md from config.py: `make docs`."""

from pathlib import Path

from config import KINDS, NAMED_CONFIGS, OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """\
# Options

Anything can be set as `name=value` after `with`, in any order; named configs (`task_finetune_mmimdb`) stand there
alone. The whole configuration is checked first: what is wrong is one line, and exit status 2. `make docs` writes this
page from config.py; `python run.py print_config with …` shows the values that a command would use, and
`python run.py COMMAND --help` the options of a command (of a run: `main`).

A text or a path is what you type, in quotes or not: `exp_name=1.10`, `data_root=2024_11`, `runs=[1.10,a]`. Anything
else is read as Python writes it: `seed=3`, `sweep_ratios=[0.5,0.9]`. `None` leaves open what may be open. Options in
a `.json` file (`with options.json`, also the `config.json` of a run) count less than those on the command line.
"""


def page() -> str:
    """A table for each kind of options, a row for each option, in the order of config.py."""
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
