"""Reads tables written by users, in CSV, TSV or JSONL, row by row."""

import csv
import io
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import listed, quoted
from common.strict_json import kind_of, parse_json
from vilt.datasets.specs import SPLITS, VALIDATION
from vilt.utils.names import spelled_as
from vilt.utils.raw_data import read_bytes

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = (*DELIMITERS, ".jsonl")
"""Suffixes of tables."""


def table_rows(
    path: Path, known: Sequence[str], needed: Sequence[str] | None = None, files: Sequence[str] = ()
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields each row as the line on which it begins, from 1, and its values, keyed by column.

    Values are strings, or JSON values if the file is a `.jsonl`.

    Args:
        known: columns that are read; variants of their spelling are recognised.
        needed: columns that the header of a CSV or TSV must have; None means all in `known`.
        files: columns with file names.

    Raises:
        DataError: the file cannot be read, or has a malformed row; the message names file and row.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        return _json_rows(path, known)
    return _csv_rows(path, delimiter, known, known if needed is None else needed, files)


def read_text(path: Path) -> str:
    """The content of a top-level file in UTF-8, without a byte order mark. Raises DataError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8: {error}; save it as UTF-8") from None


def _json_rows(path: Path, known: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for row, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, row {row}: not valid JSON in UTF-8: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, row {row}: expected an object, found {kind_of(value)}")
        yield row, dict(zip(_columns(path, row, list(value), known), value.values(), strict=True))


def _csv_rows(
    path: Path, delimiter: str, known: Sequence[str], needed: Sequence[str], files: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = list(io.StringIO(read_text(path), newline=""))
    header: list[str] = []
    row, reader = 1, csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields and not header:
                header = _columns(path, row, fields, known, needed)
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
        hint = "; a quote is not closed" if "end of data" in str(error) else ""
        hint = "; maybe a quote is not closed" if "field limit" in str(error) else hint
        raise DataError(f"{path}, row {row}: {error}{hint}") from None
    if not header:
        _columns(path, row, [], known, needed)


def _columns(path: Path, row: int, names: Sequence[str], known: Sequence[str], needed: Sequence[str] = ()) -> list[str]:
    columns = spelled_as(names, known)
    if len(set(columns)) < len(columns):
        repeated = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{path}, row {row}: the column {quoted(repeated)} is repeated")
    if missing := [name for name in needed if name not in columns]:
        raise DataError(f"{path}, row {row}: expected the columns {listed(missing)}, found {listed(columns)}")
    return columns


def _is_row(fields: Sequence[str], header: Sequence[str], files: Sequence[str]) -> bool:
    """Whether a line inside a cell looks like a row: as many fields, with a split or image names in the right place."""
    if len(fields) != len(header):
        return False
    row = {name: field.strip(' "\r\n') for name, field in zip(header, fields, strict=True)}
    if row.get("split", "").lower() in (*SPLITS, *VALIDATION):
        return True
    kinds = [mimetypes.guess_type(row[name], strict=False)[0] or "" for name in header if name in files]
    return bool(kinds) and all(kind.startswith("image/") for kind in kinds)
