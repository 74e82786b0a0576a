"""How names, numbers and tables are written for people, on the terminal and in reports alike."""

import io
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

GAP, NARROWEST, ONE_LINE = 2, 4, 10_000
"""Characters: between columns of a table, at least in a column, and at most in a table that is not folded."""


class Estimate(NamedTuple):
    """A mean with the sample standard deviation (divisor N-1), which is 0 where there is one value only."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 4, factor: float = 1) -> str:
        """`mean ± deviation`, each times `factor`; the deviation only where there are several values."""
        figures = (self.mean, self.std) if self.n > 1 else (self.mean,)
        return " ± ".join(f"{factor * figure:.{digits}f}" for figure in figures)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and deviation, exact before they are rounded: of equal values that value and 0. None of no values."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Estimate(float(statistics.mean(values)), std, len(values))


def natural_key(name: str | Path) -> list[tuple[int, str]]:
    """Sorts version_10 after version_9."""
    parts = re.split(r"([0-9]+)", str(name))  # every second one is a number
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]


def duration(seconds: float) -> str:
    """For example `8 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def per_cent(share: float) -> str:
    """A fraction as `70 %`."""
    return f"{round(100 * share, 6):g} %"


def pattern_text(missing_type: str, ratio: float, both_ratio: float) -> str:
    """A missing pattern as `70 % both`, with both_ratio where it has an effect and is not a half."""
    share = f" {both_ratio:g}" if missing_type == "both" and both_ratio != 0.5 else ""
    return f"{per_cent(ratio)} {missing_type}{share}"


def terminal_table(heads: Sequence[str], rows: Sequence[Sequence[str] | None], sides: str) -> str:
    """A table for the terminal, folded to its width. Into a pipe or a file a row is one line, however long.

    Args:
        rows: None is a line between rows.
        sides: `<` or `>` for each column, the side that it is aligned to.
    """
    lines = [heads, *(row for row in rows if row is not None)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    available = shutil.get_terminal_size((0, 0)).columns or ONE_LINE  # 0: no terminal, and no COLUMNS either
    while sum(widths) + GAP * len(widths) > available and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="")
    for head, side, width in zip(heads, sides, widths, strict=True):
        table.add_column(head, justify="left" if side == "<" else "right", overflow="fold", width=width)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    file = io.StringIO()
    console = Console(file=file, width=available, markup=False, highlight=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
