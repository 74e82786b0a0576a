"""Opening arrow files that others wrote: checked as a whole before anything of them is used, and never unpacked."""

import struct
from pathlib import Path

import pyarrow as pa

from vilt.errors import DataError

MAGIC_BYTES = 8
FOOTER_TAIL = struct.Struct("<i6s")
"""At the end of the file: the length of the footer, and a magic word."""
FOOTER_DICTIONARIES, FOOTER_BATCHES, MESSAGE_KIND, MESSAGE_HEADER = 2, 3, 1, 2
DICTIONARY_BATCH, BATCH_COMPRESSION = 1, 3
"""Numbers of fields in the tables of Arrow's own format, which is FlatBuffers."""
KIND_DICTIONARY = 2
BLOCK = struct.Struct("<qi4xq")
"""Of a batch: its place in the file, the length of its description and of its content."""


def open_table(path: Path, what: str = "an arrow file") -> pa.Table:
    """The memory-mapped table in `path`; every column is there once, and within the file.

    Opening reads no values but texts, whose UTF-8 is checked. Other columns than those that are needed are checked too:
    pyarrow ends the whole process on some that are damaged.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is damaged, compressed, or has two columns of one name; calls the file `what`.
    """
    try:
        mapped = pa.memory_map(str(path))
        reader = pa.ipc.open_file(mapped)
        if _is_compressed(mapped):
            raise DataError(f"{path}: not readable as {what}: it is compressed; write it without compression")
        table = reader.read_all()
        names = table.column_names
    except FileNotFoundError:
        raise
    except (OSError, MemoryError, UnicodeDecodeError, struct.error, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as {what}: {error}") from error
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise DataError(f"{path}: expected each column once, found {twice[0]} twice")
    for name in names:
        try:
            table[name].validate(full=True)
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}: damaged: {error}") from error
    return table


def _is_compressed(mapped: pa.MemoryMappedFile) -> bool:
    """Whether a batch of an arrow file is compressed: it could be of any size then. Raises struct.error on damage."""
    data = memoryview(mapped.read_buffer(mapped.size()))
    length, _ = FOOTER_TAIL.unpack_from(data, len(data) - FOOTER_TAIL.size)
    footer = data[len(data) - FOOTER_TAIL.size - length : len(data) - FOOTER_TAIL.size]
    for part in (FOOTER_DICTIONARIES, FOOTER_BATCHES):
        blocks = _field(footer, _table(footer), part)
        if blocks is None:
            continue
        start = _follow(footer, blocks)
        for number in range(_unpack("<I", footer, start)[0]):
            place, described, _ = BLOCK.unpack_from(footer, start + 4 + number * BLOCK.size)
            message = data[place + MAGIC_BYTES : place + described]  # after a mark and the length of what follows
            if _batch_is_compressed(message):
                return True
    return False


def _batch_is_compressed(message: memoryview) -> bool:
    table = _table(message)
    kind, header = _field(message, table, MESSAGE_KIND), _field(message, table, MESSAGE_HEADER)
    batch = None if header is None else _follow(message, header)
    if batch is not None and kind is not None and _unpack("<B", message, kind) == (KIND_DICTIONARY,):
        inner = _field(message, batch, DICTIONARY_BATCH)
        batch = None if inner is None else _follow(message, inner)
    return batch is not None and _field(message, batch, BATCH_COMPRESSION) is not None


# FlatBuffers: a table begins with the distance back to its list of field offsets; references are distances forward.


def _unpack(form: str, data: memoryview, place: int) -> tuple[int, ...]:
    if place < 0:
        raise struct.error("a reference that leads out of the file")
    return struct.unpack_from(form, data, place)


def _follow(data: memoryview, place: int) -> int:
    return place + _unpack("<I", data, place)[0]


def _table(data: memoryview) -> int:
    return _follow(data, 0)


def _field(data: memoryview, table: int, number: int) -> int | None:
    """The place of a field of the table at `table`; None where it has its default."""
    fields = table - _unpack("<i", data, table)[0]
    size = _unpack("<H", data, fields)[0]
    if 4 + 2 * number >= size:
        return None
    offset = _unpack("<H", data, fields + 4 + 2 * number)[0]
    return table + offset if offset else None
