"""What tests of the report ask of it: the dataset that runs give, the notes of its section, the cells of a table."""

import csv
import io
from pathlib import Path

from runs.report import parts
from runs.report.lines import Dataset, by_dataset
from runs.report.parts import section_of
from runs.report.results import read_report_runs
from runs.report.table import Table


def dataset_of(*folders: Path) -> Dataset:
    (found,) = by_dataset(read_report_runs(folders))
    return found


def notes_in(part: parts.Part) -> list[parts.Note]:
    return [item for item in part.shown if isinstance(item, parts.Note)]


def notes_of(*folders: Path) -> str:
    """Text of all notes in the dataset's section."""
    return "\n".join(note.text for part in section_of(dataset_of(*folders)).parts for note in notes_in(part))


def as_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def rows_of(table: Table) -> list[list[str]]:
    """Texts of the cells shown."""
    return [[cell.text for cell in row.values()] for row in table.cells]
