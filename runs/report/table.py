"""Tables, described once for the page, Markdown and CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from common.text import Estimate
from runs.report.text import Unit, capital


@dataclass(frozen=True)
class Cell:
    """A value as text and as written to CSV."""

    text: str
    csv: dict[str, str | float | None]  # values keyed by a suffix to the column's name; None if there is no value
    is_number: bool = True
    strong: bool = False
    shade: float | None = None  # from 0 to 1, how dark the cell is

    @property
    def absent(self) -> bool:
        """Whether there is no value."""
        return self.csv[""] is None


Value = str | int | float | Cell
Row = dict[str, Value]
"""Values keyed by column, as named in CSV."""


def absent(text: str) -> Cell:
    """A cell without a value, which shows `text`."""
    return Cell(text, {"": None})


NOT_APPLICABLE, MISSING, NOT_MEASURED = absent("—"), absent("missing"), absent("not measured")


def number(value: float | None, unit: Unit, otherwise: Cell = MISSING) -> Cell:
    """A cell with the value of a metric."""
    return otherwise if value is None else Cell(unit.text(value), {"": unit.factor * value})


def mean_std(found: Estimate | None, unit: Unit) -> Cell:
    """A cell with mean and deviation."""
    if found is None:
        return replace(NOT_MEASURED, csv={"": None, " std": None})
    std = unit.factor * found.std if found.n > 1 else None
    return Cell(found.text(unit.digits, unit.factor), {"": unit.factor * found.mean, " std": std})


def interval(value: float, ends: Sequence[float], unit: Unit) -> Cell:
    """A cell with a value and its confidence interval, if there is one."""
    has_interval = all(map(math.isfinite, ends))
    text = unit.text(value) + (f" [{', '.join(map(unit.text, ends))}]" if has_interval else "")
    return Cell(
        text, {"": unit.factor * value, **{e: unit.factor * x for e, x in zip((" low", " high"), ends, strict=True)}}
    )


def difference(value: float, unit: Unit, ends: Sequence[float] = (math.nan, math.nan)) -> Cell:
    """A cell with a signed difference (percentage points for percentages) and its confidence interval, if any."""
    text, *end_texts = (f"{round(unit.factor * x, unit.digits) + 0.0:+.{unit.digits}f}" for x in (value, *sorted(ends)))
    text += "" if math.isnan(ends[0]) else f" [{', '.join(end_texts)}]"
    return replace(interval(value, sorted(ends), unit), text=text.replace("-", "−"))


@dataclass(frozen=True)
class Table:
    """A table."""

    name: str  # stem of its CSV file's name
    caption: str
    rows: Sequence[Mapping[str, Value]]
    titles: dict[str, str] = field(default_factory=dict)  # titles of columns, if they do not follow from the name
    pictures: dict[str, bytes | None] = field(default_factory=dict)
    """JPEG files of the rows, if they have any, keyed by path in the report's folder; None if it cannot be shown."""

    @property
    def columns(self) -> dict[str, str]:
        """Titles of the columns, keyed by name."""
        return {name: self.titles.get(name, capital(name.replace("_", " "))) for name in self.rows[0]}

    @property
    def cells(self) -> list[dict[str, Cell]]:
        """The rows, with every value as a Cell."""
        return [{name: _cell(value) for name, value in row.items()} for row in self.rows]

    def is_numeric(self, column: str) -> bool:
        """Whether a column has only numbers, and so is aligned to the right."""
        return all(_cell(row[column]).is_number for row in self.rows)

    def csv(self) -> str:
        """The table as CSV, with deviations and the ends of intervals in columns of their own."""
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
