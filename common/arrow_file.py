"""Opening arrow files: every one that is read passes here, checked as a whole before anything of it is used.

Tables are memory-mapped, so that a file takes no more memory than what is asked of it. That holds where nothing has
to be unpacked: a file that is compressed is refused before any of it is read. pyarrow does not say which files are, and
has no limit on what it unpacks, so that this is looked up in the file's own descriptions, which are FlatBuffers.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from common.errors import DataError
from common.messages import first_line

FOOTER_TAIL = struct.Struct("<i6s")
"""At the end of the file: the length of the footer, and a magic word."""
DICTIONARIES, BATCHES = 2, 3
"""Of the footer: numbers of the fields that list where the messages are."""
BLOCK = struct.Struct("<qi4xq")
"""An entry of these lists: place of a message in the file, length of its description and of its content."""
HEADER, CONTENT_OF_DICTIONARY, COMPRESSION = 2, 1, 3
"""Numbers of fields: of a message its batch or dictionary, of a dictionary its batch, of a batch its compression."""
OLD_COMPRESSION = b"ARROW:experimental_compression"
"""Key among a message's own metadata, by which the format before 1.0 said the same."""


def open_table(path: Path, what: str = "an arrow file", how_to_make: str | None = None) -> pa.Table:
    """The memory-mapped table in `path`, with every column once and every value within the file.

    No values are read but texts, whose UTF-8 is checked. Columns that nothing needs are checked too: pyarrow ends the
    whole process on some that are damaged.

    Args:
        what: what messages call the file.
        how_to_make: what they say where it is not there.

    Raises:
        DataError: it is not there, damaged, compressed, or has two columns of one name.
    """
    try:
        with pa.memory_map(str(path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            _check_stored(mapped)
            table = reader.read_all()
        names = table.column_names
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file" + (f"; {how_to_make}" if how_to_make else "")) from error
    except (OSError, EOFError, MemoryError, ValueError, struct.error, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as {what}: {first_line(error)}") from error
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise DataError(f"{path}: expected each column once, found {twice[0]} twice")
    for name in names:
        try:
            table[name].validate(full=True)  # offsets within the file, texts in UTF-8
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}: damaged: {error}") from error
    return table


def _check_stored(mapped: pa.MemoryMappedFile) -> None:
    """Raises ValueError where batches would have to be unpacked, or take more room than the file; others on damage."""
    claimed, there = 0, mapped.size()
    for place in _places_of_messages(mapped):
        mapped.seek(place)
        message = pa.ipc.read_message(mapped)
        if _is_compressed(message):
            raise ValueError("it is compressed; write it without compression")
        claimed += message.metadata.size + message.body.size
        if claimed > there:
            raise ValueError(f"its batches claim more than the {there:,} bytes that it has")


def _places_of_messages(mapped: pa.MemoryMappedFile) -> Iterator[int]:
    """Where the batches and dictionaries are that the footer names."""
    end = mapped.size() - FOOTER_TAIL.size
    length, _ = FOOTER_TAIL.unpack(mapped.read_at(FOOTER_TAIL.size, end))
    footer = memoryview(mapped.read_at(length, end - length))
    for number in (DICTIONARIES, BATCHES):
        entries = _reference(footer, _follow(footer, 0), number)
        if entries is not None:
            for index in range(_unpack("<I", footer, entries)):
                yield BLOCK.unpack_from(footer, entries + 4 + index * BLOCK.size)[0]


def _is_compressed(message: pa.Message) -> bool:
    described = memoryview(message.metadata)
    batch = _reference(described, _follow(described, 0), HEADER)
    if batch is not None and message.type == "dictionary":
        batch = _reference(described, batch, CONTENT_OF_DICTIONARY)
    if batch is not None and _field(described, batch, COMPRESSION) is not None:
        return True
    return OLD_COMPRESSION in message.metadata.to_pybytes()


# FlatBuffers: a table begins with the distance back to the list of its fields' offsets, a reference leads forward.


def _unpack(form: str, data: memoryview, place: int) -> int:
    if place < 0:  # Python would count from the end
        raise struct.error("a reference that leads out of the file")
    return int(struct.unpack_from(form, data, place)[0])


def _follow(data: memoryview, place: int) -> int:
    return place + _unpack("<I", data, place)


def _field(data: memoryview, table: int, number: int) -> int | None:
    """The place of a field of the table at `table`; None where it has its default."""
    fields = table - _unpack("<i", data, table)
    within = 4 + 2 * number
    if within >= _unpack("<H", data, fields):
        return None
    offset = _unpack("<H", data, fields + within)
    return table + offset if offset else None


def _reference(data: memoryview, table: int, number: int) -> int | None:
    """The place that a field of the table at `table` refers to; None where it refers to nothing."""
    place = _field(data, table, number)
    return None if place is None else _follow(data, place)
