"""Opening arrow files: every one that is read passes here, and is checked before anything of it is used."""

from pathlib import Path

import pyarrow as pa

from common.errors import DataError
from common.messages import first_line


def open_table(path: Path, what: str = "an arrow file", how_to_make: str | None = None) -> pa.Table:
    """The memory-mapped table in `path`, with every column once and every value within the file.

    A file takes no more memory than what is asked of it: no values are read but texts, whose UTF-8 is checked.

    Args:
        what: what messages call the file.
        how_to_make: what they say where it is not there.

    Raises:
        DataError: it is not there, damaged, compressed, or has two columns of one name.
    """
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        names = table.column_names
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file" + (f"; {how_to_make}" if how_to_make else "")) from error
    except (OSError, EOFError, MemoryError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as {what}: {first_line(error)}") from error
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise DataError(f"{path}: expected each column once, found {twice[0]} twice")
    for name in names:  # also those that nothing needs: pyarrow ends the whole process on some damaged ones
        try:
            table[name].validate(full=True)  # offsets within the file, texts in UTF-8
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}: damaged: {error}") from error
    if table.nbytes > path.stat().st_size:  # each process would hold all of it in memory
        raise DataError(f"{path}: not readable as {what}: it is compressed; write it without compression")
    return table
