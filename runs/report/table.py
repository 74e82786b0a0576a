"""A table, described once for the page, Markdown and CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from common.text import Estimate
from runs.report.text import Unit, capital


@dataclass(frozen=True)
class Cell:
    """A value as it is shown and as CSV has it."""

    text: str
    csv: dict[str, str | float | None]  # value by what is added to the column's name; None where there is no value
    is_number: bool = True
    strong: bool = False
    shade: float | None = None  # from 0 to 1, how dark the cell is

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


NOT_APPLICABLE, MISSING, NOT_MEASURED = absent("—"), absent("missing"), absent("not measured")


def number(value: float | None, unit: Unit, otherwise: Cell = MISSING) -> Cell:
    """A value of a metric."""
    return otherwise if value is None else Cell(unit.text(value), {"": unit.factor * value})


def mean_std(found: Estimate | None, unit: Unit) -> Cell:
    """Mean and deviation."""
    if found is None:
        return replace(NOT_MEASURED, csv={"": None, " std": None})
    std = unit.factor * found.std if found.n > 1 else None
    return Cell(found.text(unit.digits, unit.factor), {"": unit.factor * found.mean, " std": std})


def interval(value: float, ends: Sequence[float], unit: Unit) -> Cell:
    """A value with its confidence interval, if there is one."""
    there = all(map(math.isfinite, ends))
    text = unit.text(value) + (f" [{', '.join(map(unit.text, ends))}]" if there else "")
    return Cell(
        text, {"": unit.factor * value, **{e: unit.factor * x for e, x in zip((" low", " high"), ends, strict=True)}}
    )


def difference(value: float, unit: Unit, ends: Sequence[float] = (math.nan, math.nan)) -> Cell:
    """A difference, in per cent in percentage points, with its sign, and its confidence interval if there is one."""
    text, *of_ends = (f"{round(unit.factor * x, unit.digits) + 0.0:+.{unit.digits}f}" for x in (value, *sorted(ends)))
    text += "" if math.isnan(ends[0]) else f" [{', '.join(of_ends)}]"
    return replace(interval(value, sorted(ends), unit), text=text.replace("-", "−"))


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its CSV file."""

    name: str
    caption: str
    rows: Sequence[Mapping[str, Value]]
    titles: dict[str, str] = field(default_factory=dict)  # of columns whose title does not follow from the name

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
        """The table as CSV, where a deviation or the ends of an interval have columns of their own."""
        rows = [
            {name + part: value for name, cell in row.items() for part, value in cell.csv.items()} for row in self.cells
        ]
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
