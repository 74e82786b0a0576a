"""Formats names, numbers and tables for people, on the terminal and in reports."""

import io
import math
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import gt
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.machine import as_printed

GAP, NARROWEST, ESTIMATE, ONE_LINE = 2, 4, len("0.1234 ± 0.1234"), 10_000
"""Widths in characters: the gap between columns, a column without a heading, a column of estimates, and the limit for
tables outside a terminal, which are not folded."""
BREAK = r"(?<=[/=_])"
"""Where a word that is longer than its column may be broken."""

LOWER_IS_BETTER = ("loss", "mae")
"""Metrics whose lowest value is the best."""
AT_OFFSET = "f1_macro_at_offset"
"""Macro F1 at the decision offset chosen on validation data, see `engine/decision.py`."""


class Estimate(NamedTuple):
    """A mean and the sample standard deviation (divisor N-1), which is 0 for a single value."""

    mean: float  # NaN if every value is undefined
    std: float
    n: int  # number of defined values
    undefined: int = 0  # number of undefined values, which are left out

    def text(self, digits: int = 4, factor: float = 1) -> str:
        """`mean ± deviation`, each times `factor`; the deviation only if there are several values."""
        figures = (self.mean, self.std) if self.n > 1 else (self.mean,)
        left_out = f" ({self.n} of {self.n + self.undefined})" if self.n and self.undefined else ""
        return " ± ".join(figure(factor * value, digits) for value in figures) + left_out


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and deviation, computed exactly, so that equal values have deviation 0. None if there are no values."""
    defined = [value for value in values if not math.isnan(value)]
    if not values:
        return None
    mean = float(statistics.mean(defined)) if defined else math.nan
    std = statistics.stdev(defined) if len(defined) > 1 else 0.0
    return Estimate(mean, std, len(defined), len(values) - len(defined))


def order_of(value: float, metric: str) -> float:
    """Sort key under which the best value of a metric is the highest; an undefined value (NaN) is below all others."""
    lower = metric.rpartition("/")[2] in LOWER_IS_BETTER
    return -math.inf if math.isnan(value) else -value if lower else value


def metric_text(metric: str) -> str:
    """The name of a metric, with `(lower is better)` if that is so."""
    return f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric


def figure(value: float, digits: int = 4) -> str:
    """A number as text; `undefined` for NaN, which stands for a metric that is undefined on the samples."""
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def interval_text(low: float, high: float, write: Callable[[float], str] = figure) -> str:
    """`0.1 to 0.2`, each end formatted by `write`; `undefined` alone if either end is."""
    return "undefined" if math.isnan(low + high) else f"{write(low)} to {write(high)}"


def counted(number: int, noun: str, several: str = "") -> str:
    """`1 run`, `2 runs`; `several` is the plural if it is not formed with an `s`."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def baseline_texts(baselines: Mapping[str, Any], metric: str) -> list[str]:
    """`always the 15 most frequent classes: f1_macro 0.1893`, for each baseline in a results file."""
    values = {each["answer"]: each["metrics"].get(metric) for each in baselines.values()}
    return [f"{name}: {metric} {figure(math.nan if value is None else value)}" for name, value in values.items()]


def natural_key(name: str | Path) -> list[tuple[int, str]]:
    """Sort key that puts version_10 after version_9. Keys are unique, so the order never depends on the file system."""
    parts = re.split(r"([0-9]+)", str(name))  # every second one is a number
    return [*((int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)), (-2, str(name))]


def duration(seconds: float) -> str:
    """A duration as `8 s`, `12 min` or `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def per_cent(share: float) -> str:
    """A fraction as `70 %`."""
    return f"{round(100 * share, 6):g} %"


def terminal_table(
    heads: Sequence[str], rows: Sequence[Sequence[str] | None], sides: str, repeated: int | None = None
) -> str:
    """A table for the terminal, folded to its width. In a pipe or a file each row is one line, however long.

    Args:
        rows: cells of each row; None draws a line.
        sides: the alignment of each column, `<` or `>`.
        repeated: if the other columns do not fit the terminal, the table is split into several, one below the other;
            this many leading columns are repeated in each. None: the table is never split.
    """
    heads, rows = [*map(as_printed, heads)], [None if row is None else [*map(as_printed, row)] for row in rows]
    lines = [heads, *(row for row in rows if row is not None)]
    columns = [*zip(*lines, strict=True)]
    widths = [max(map(len, cells)) for cells in columns]
    figures = [cells if side == ">" else [cells[0]] for cells, side in zip(columns, sides, strict=True)]  # or heads
    least = [max(map(len, " ".join(cells).split()), default=NARROWEST) for cells in figures]  # never narrower
    words = [max(map(len, re.split(rf"\s|{BREAK}", " ".join(cells)))) for cells in columns]  # narrower only if need be
    available = shutil.get_terminal_size((0, 0)).columns or ONE_LINE  # 0: neither a terminal nor COLUMNS
    if repeated is not None:
        others = zip(least[repeated:], widths[repeated:], strict=True)
        each = GAP + max(max(low, min(width, ESTIMATE)) for low, width in others)
        if (n := max(1, (available - sum(widths[:repeated]) - GAP * repeated) // each)) < len(heads) - repeated:
            first, starts = slice(0, repeated), range(repeated, len(heads), n)
            parts = [slice(start, start + n) for start in starts]
            return "\n\n".join(
                terminal_table(
                    [*heads[first], *heads[part]],
                    [None if row is None else [*row[first], *row[part]] for row in rows],
                    sides[first] + sides[part],
                )
                for part in parts
            )
    for lowest in ([*map(max, least, words)], least):
        while sum(widths) + GAP * len(widths) > available and any(map(gt, widths, lowest)):
            room = [width if width > low else 0 for width, low in zip(widths, lowest, strict=True)]
            widths[room.index(max(room))] -= 1
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="")
    for head, side, width in zip(heads, sides, widths, strict=True):
        table.add_column(head, justify="left" if side == "<" else "right", overflow="fold", width=width)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(_folded, row, widths))
    file = io.StringIO()
    console = Console(file=file, width=available, markup=False, highlight=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _folded(cell: str, width: int) -> str:
    """The cell, with words longer than its column broken after `/`, `=` and `_` if they contain any."""

    def broken(word: re.Match[str]) -> str:
        lines = [""]
        for piece in re.split(BREAK, word[0]):
            lines = [*lines, piece] if len(lines[-1] + piece) > width else [*lines[:-1], lines[-1] + piece]
        return "\n".join(filter(None, lines))

    return re.sub(rf"\S{{{width + 1},}}", broken, cell)
