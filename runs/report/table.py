"""A table, described once for the page, Markdown and CSV."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from common.text import Estimate
from runs.report.text import capital, percent, spread

_NUMBER = re.compile(r"[+−]?[\d,.]+( ± [\d.]+| \[.*\])?|undefined")


@dataclass(frozen=True)
class Cell:
    """A value that is shown otherwise than in CSV."""

    text: str
    csv: dict[str, float | None]
    """Value by what is added to the column's name; None where there is no value."""

    @property
    def absent(self) -> bool:
        """Whether there is no value."""
        return self.csv[""] is None


def absent(text: str) -> Cell:
    """`text` stands where there is no value."""
    return Cell(text, {"": None})


NOT_MEASURED, NOT_APPLICABLE, MISSING = absent("not measured"), absent("—"), absent("missing")


def share(value: float | None, otherwise: Cell = MISSING) -> Cell:
    """A fraction, in per cent."""
    return otherwise if value is None else Cell(percent(value), {"": None if math.isnan(value) else 100 * value})


def points(difference: float) -> Cell:
    """A difference in percentage points, with its sign."""
    return Cell(f"{round(difference, 2) + 0.0:+.2f}".replace("-", "−"), {"": difference})


def mean_std(found: Estimate | None) -> Cell:
    """Mean and deviation of fractions, in per cent."""
    if found is None:
        return Cell(NOT_MEASURED.text, {"": None, " std": None})
    mean, std = (100 * figure if found.n > at_least else None for figure, at_least in ((found.mean, 0), (found.std, 1)))
    return Cell(spread(found), {"": mean, " std": std})


def interval(value: float, low: float, high: float) -> Cell:
    """A fraction with its confidence interval, in per cent."""
    if math.isnan(value):
        return Cell(percent(value), {"": None, " low": None, " high": None})
    text = f"{percent(value)} [{percent(low)}, {percent(high)}]"
    return Cell(text, {"": 100 * value, " low": 100 * low, " high": 100 * high})


Value = str | int | float | Cell
Row = dict[str, Value]
"""Value by column, as CSV names it."""


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its CSV file."""

    name: str
    caption: str
    rows: Sequence[Mapping[str, Value]]
    titles: dict[str, str] = field(default_factory=dict)
    """Of columns whose title does not follow from the name."""
    strong: set[tuple[int, str]] = field(default_factory=set)
    """(row, column) of the values that stand out."""

    @property
    def columns(self) -> dict[str, str]:
        """Titles of the columns."""
        return {name: self.titles.get(name, capital(name.replace("_", " "))) for name in self.rows[0]}

    def shown(self) -> list[dict[str, str]]:
        """The cells as texts, by column."""
        return [{name: _shown(value) for name, value in row.items()} for row in self.rows]

    def is_numeric(self, column: str) -> bool:
        """Whether a column is one of numbers, which stand to the right."""
        values = (row[column] for row in self.rows)
        there = (value for value in values if not (isinstance(value, Cell) and value.absent))
        return all(_NUMBER.fullmatch(_shown(value)) for value in there)

    def csv(self) -> str:
        """The table as CSV: values in per cent, a deviation or the ends of an interval in columns of their own."""
        rows = [{name: text for key, value in row.items() for name, text in _csv(key, value)} for row in self.rows]
        return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value.text if isinstance(value, Cell) else f"{value:,}" if isinstance(value, int) else value


def _csv(name: str, value: Value) -> list[tuple[str, str]]:
    if not isinstance(value, Cell):
        return [(name, f"{value:g}" if isinstance(value, float) else str(value))]
    return [(name + part, "" if number is None else f"{number:.4f}") for part, number in value.csv.items()]
