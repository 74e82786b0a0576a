"""Tables that users write: CSV, TSV and JSONL, read row by row."""

import csv
import io
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import listed, quoted
from common.strict_json import kind_of, parse_json
from vilt.utils.names import normal
from vilt.utils.raw_data import read_bytes

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def table_rows(path: Path, needed: Sequence[str], files: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Pairs of line (from 1, where the row begins) and values by column: strings, or of a `.jsonl` what JSON has.

    Args:
        needed: columns that the header of a CSV or TSV must have.
        files: columns with the names of files.

    Raises:
        DataError: the file cannot be read, or a row cannot be told from the others; names file and row.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    return _json_rows(path) if delimiter is None else _csv_rows(path, delimiter, needed, files)


def read_text(path: Path) -> str:
    """The content of a top-level file in UTF-8, without a byte order mark. Raises DataError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8: {error}; save it as UTF-8") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for row, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, row {row}: not valid JSON in UTF-8: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, row {row}: expected an object, found {kind_of(value)}")
        yield row, {normal(name): cell for name, cell in value.items()}


def _csv_rows(
    path: Path, delimiter: str, needed: Sequence[str], files: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = list(io.StringIO(read_text(path), newline=""))
    header: list[str] = []
    row, reader = 1, csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields and not header:
                header = _header(path, fields, needed)
            elif fields:
                if len(fields) != len(header):
                    found = f"expected {len(header)} values, as in the header, found {len(fields)}"
                    raise DataError(f"{path}, row {row}: {found}")
                for line in range(row + 1, reader.line_num + 1):
                    if _is_row(lines[line - 1].split(delimiter), header, files):
                        raise DataError(f"{path}, row {row}: a quote is not closed; the cell includes row {line}")
                yield row, dict(zip(header, fields, strict=True))
            row = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, row {row}: {error}") from None
    if not header:
        _header(path, [], needed)


def _header(path: Path, fields: Sequence[str], needed: Sequence[str]) -> list[str]:
    header = [normal(name) for name in fields]
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise DataError(f"{path}, row 1: the column {quoted(repeated[0])} is repeated")
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(f"{path}, row 1: expected the columns {listed(missing)}, found {listed(header)}")
    return header


def _is_row(fields: Sequence[str], header: Sequence[str], files: Sequence[str]) -> bool:
    """Whether a line within a cell has as many fields as a row, and images where a row has them."""
    if len(fields) != len(header):
        return False
    cells = [field for name, field in zip(header, fields, strict=True) if name in files]
    kinds = [mimetypes.guess_type(cell.strip(' "\r\n'), strict=False)[0] or "" for cell in cells]
    return bool(kinds) and all(kind.startswith("image/") for kind in kinds)
