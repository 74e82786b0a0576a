"""Opens arrow files. Every arrow file is read through this module and checked before anything in it is used."""

from pathlib import Path

import pyarrow as pa

from common.errors import DataError
from common.messages import first_line


def open_table(path: Path, what: str = "an arrow file", how_to_make: str | None = None) -> pa.Table:
    """The memory-mapped table in `path`, checked for repeated columns and for values that lie outside the file.

    Only the pages that are accessed take memory. The check reads no values except texts, whose UTF-8 it validates.

    Args:
        what: what error messages call the file.
        how_to_make: hint added to the error if the file is missing.

    Raises:
        DataError: the file is missing, damaged or compressed, or two of its columns have the same name.
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
    for name in names:  # unused columns too: some damaged ones make pyarrow abort the whole process
        try:
            table[name].validate(full=True)  # offsets within the file, texts in UTF-8
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}: damaged: {error}") from error
    if table.nbytes > path.stat().st_size:  # every process would hold the whole table in memory
        raise DataError(f"{path}: not readable as {what}: it is compressed; write it without compression")
    return table
