"""A table, described once for the page, Markdown and CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from common.text import Estimate
from runs.report.text import capital, percent


@dataclass(frozen=True)
class Cell:
    """A value as it is shown and as CSV has it."""

    text: str
    csv: dict[str, str | float | None]
    """Value by what is added to the column's name; None where there is no value."""
    is_number: bool = True
    strong: bool = False
    shade: float | None = None
    """From 0 to 1, how dark the cell is."""

    @property
    def absent(self) -> bool:
        """Whether there is no value."""
        return self.csv[""] is None


Value = str | int | float | Cell
Row = dict[str, Value]
"""Value by column, as CSV names it."""


def absent(text: str) -> Cell:
    """`text` stands where there is no value."""
    return Cell(text, {"": None})


NOT_APPLICABLE, MISSING = absent("—"), absent("missing")


def share(value: float | None, digits: int, otherwise: Cell = MISSING) -> Cell:
    """A fraction, in per cent."""
    return otherwise if value is None else Cell(percent(value, digits), {"": 100 * value})


def points(difference: float, digits: int) -> Cell:
    """A difference of fractions in percentage points, with its sign."""
    text = f"{round(100 * difference, digits) + 0.0:+.{digits}f}"
    return Cell(text.replace("-", "−"), {"": 100 * difference})


def mean_std(found: Estimate | None, digits: int) -> Cell:
    """Mean and deviation of fractions, in per cent."""
    if found is None:
        return Cell("not measured", {"": None, " std": None})
    spread = {" std": 100 * found.std if found.n > 1 else None}
    return Cell(found.text(digits, 100), {"": 100 * found.mean, **spread})


def interval(value: float, low: float, high: float, digits: int) -> Cell:
    """A fraction with its confidence interval, in per cent."""
    text = percent(value, digits)
    text += f" [{percent(low, digits)}, {percent(high, digits)}]" if math.isfinite(low) else ""
    return Cell(text, {"": 100 * value, " low": 100 * low, " high": 100 * high})


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its CSV file."""

    name: str
    caption: str
    rows: Sequence[Mapping[str, Value]]
    titles: dict[str, str] = field(default_factory=dict)
    """Of columns whose title does not follow from the name."""
    long: Sequence[Mapping[str, Value]] | None = None
    """The same in long form, for CSV."""

    @property
    def columns(self) -> dict[str, str]:
        """Titles of the columns."""
        return {name: self.titles.get(name, capital(name.replace("_", " "))) for name in self.rows[0]}

    @property
    def cells(self) -> list[dict[str, Cell]]:
        """The rows."""
        return [{name: _cell(value) for name, value in row.items()} for row in self.rows]

    def is_numeric(self, column: str) -> bool:
        """Whether a column is one of numbers, which stand to the right."""
        return all(_cell(row[column]).is_number for row in self.rows)

    def csv(self) -> str:
        """The table as CSV: values in per cent, a deviation or the ends of an interval in columns of their own."""
        cells = replace(self, rows=self.long or self.rows).cells
        rows = [{name + part: value for name, cell in row.items() for part, value in cell.csv.items()} for row in cells]
        return pd.DataFrame(rows, dtype=object).map(_csv_text).to_csv(index=False, lineterminator="\n")


def _cell(value: Value) -> Cell:
    if isinstance(value, Cell):
        return value
    csv = f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(f"{value:,}" if isinstance(value, int) else csv, {"": csv}, is_number=not isinstance(value, str))


def _csv_text(value: str | float | None) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return value or ""
