"""Tables that users write: CSV, TSV and JSONL, read row by row."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import listed, quoted
from common.strict_json import kind_of, parse_json
from vilt.utils.raw_data import read_bytes

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def csv_fields(path: Path, delimiter: str = ",", strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Pairs of line (from 1, where the row begins) and fields of the rows that are not blank.

    Args:
        strict: refuse an unclosed quote, or text behind one, rather than read what follows into the same field.

    Raises:
        DataError: the file is not UTF-8, or a row cannot be told from the others; names file and row.
    """
    row = 1
    try:
        text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        lines = csv.reader(text, delimiter=delimiter, strict=strict)
        for fields in lines:
            if fields:
                yield row, fields
            row = lines.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8: {error}") from None
    except csv.Error as error:
        raise DataError(f"{path}, row {row}: {error}") from None


def table_rows(path: Path, needed: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Pairs of line (from 1, where the row begins) and values by column: strings, or of a `.jsonl` what JSON has.

    Args:
        needed: columns that the header of a CSV or TSV must have.

    Raises:
        DataError: the file cannot be read, or a row cannot be told from the others; names file and row.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    return _json_rows(path) if delimiter is None else _csv_rows(path, delimiter, needed)


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
        yield row, value


def _csv_rows(path: Path, delimiter: str, needed: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv_fields(path, delimiter)
    _, header = next(rows, (1, []))
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise DataError(f"{path}, row 1: the column {quoted(repeated[0])} is repeated")
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(f"{path}, row 1: expected the columns {listed(missing)}, found {listed(header)}")
    for row, fields in rows:
        if len(fields) != len(header):
            raise DataError(f"{path}, row {row}: expected {len(header)} values, as in the header, found {len(fields)}")
        yield row, dict(zip(header, fields, strict=True))
