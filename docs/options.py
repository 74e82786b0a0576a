"""Writes options.md from config.py: `make docs`."""

from pathlib import Path

from config import EX

PAGE = Path(__file__).with_name("options.md")
HEAD = """\
# Options

Anything can be set as `name=value` after `with`, in any order; named configs (`task_finetune_mmimdb`) stand there
alone. The whole configuration is checked first: what is wrong is one line, and exit status 2. `make docs` writes this
page from config.py; `python run.py print_config with …` shows the values that a command would use.

| option | default | |
|---|---|---|
"""


def page() -> str:
    """A row for each option, in the order of config.py."""
    defaults = EX.configurations[0]()
    rows = [f"| `{name}` | `{value!r}` | {defaults.docs.get(name, '')} |" for name, value in defaults.items()]
    named = [
        f"| `{name}` | {', '.join(f'`{option}={value!r}`' for option, value in scope().items())} |"
        for name, scope in EX.named_configs.items()
    ]
    return HEAD + "\n".join([*rows, "", "## Named configs", "", "| name | sets |", "|---|---|", *named, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
