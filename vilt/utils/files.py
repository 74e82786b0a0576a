"""Writing files and folders so that a reader sees either the old one or the whole new one."""

import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilt.errors import DataError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to; it becomes `target` only when the block ends without an error.

    The folder is created. Concurrent writers do not meet: each has its own temporary file, the last rename wins.
    Both the content and the rename are on the disk when the block has ended: a power cut changes nothing any more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk shows when writing, where the system names no file
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder`, as they are now, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path, marker: str, maker: str) -> Iterator[Path]:
    """Yields a new folder beside `target` to write into; it becomes `target` only when the block ends without error.

    An empty folder, and one that was written in this way before, are replaced, in one step where the system can.

    Args:
        marker: name of a file that says that `maker` wrote the folder.

    Raises:
        DataError: `target` is anything else.
    """
    check_replaceable(target, marker, maker)
    target, mark = target.resolve(), uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("part", "old"))
    try:
        fresh.mkdir(parents=True)
        yield fresh
        (fresh / marker).write_text(json.dumps({"written_by": maker}), "utf-8")
        if target.exists() and _exchange(fresh, target):
            return  # the old one is removed under the name of the new one
        if target.exists():
            target.replace(old)
        try:
            fresh.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names, which no reader sees half done; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) == 0


def check_replaceable(target: Path, marker: str, maker: str) -> None:
    """Raises DataError unless `target` is free, empty, or a folder with the file `marker`, which `maker` wrote."""
    is_folder = target.is_dir()
    if (target.exists() and not is_folder) or (is_folder and not (target / marker).is_file() and any(target.iterdir())):
        what = f"no {marker} in it" if is_folder else "a file"
        raise DataError(f"{target} exists and was not written by {maker} ({what}): choose another folder")
