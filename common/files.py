"""Writing files and folders so that a reader sees either the old one or the whole new one.

What a killed writer leaves beside its target is removed when the same target is written again. A writer locks what it
is at, so that the system itself tells whether it still lives. A process number would not: another process may have it
by now, and processes of two containers may have the same. Some network file systems keep locks to one machine; hence
the names tell the machine, and nobody touches what another one left.
"""

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from common.errors import DataError
from common.locks import in_use, is_abandoned

log = logging.getLogger(__name__)

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2."""
MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
"""In the names of unfinished files and folders; the host's name itself may be too long for that."""
NEW, OLD = "new", "old"
"""In an unfinished folder: what is to take the place of the target, and what was there until then."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields an empty file beside `target` to write to; it becomes `target` only when the block ends without an error.

    The folder is created. Concurrent writers do not meet: each has its own temporary file, the last rename wins.
    Both the content and the rename are on the disk when the block has ended: a power cut changes nothing any more.
    """
    with _part_of(target, lambda part: part.touch(exist_ok=False)) as part:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder`, as they are now, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path, marker: str, maker: str) -> Iterator[Path]:
    """As `new_folder`, for a `target` that is free, an empty folder, or one that was written in this way before.

    Args:
        marker: name of a file that says that `maker` wrote the folder.

    Raises:
        DataError: `target` is anything else.
    """
    check_replaceable(target, marker, maker)
    with new_folder(target) as fresh:
        yield fresh
        (fresh / marker).write_text(json.dumps({"written_by": maker}), "utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` to write into; it becomes `target` only when the block ends without error.

    The old folder, with all that is in it, is replaced in one step where the system can. Where it cannot (NFS), a kill
    between the two steps leaves none; `remove_leftovers` puts the old one back.
    """
    target = target.resolve()
    with _part_of(target, Path.mkdir) as part:
        fresh = part / NEW
        fresh.mkdir()
        yield fresh
        if not (target.exists() and _exchange(fresh, target)):
            if target.exists():
                target.replace(part / OLD)
            fresh.replace(target)
        sync_folder(target.parent)


def whole_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file that grows by appending, without a last one that a power cut has left without its end."""
    return (line for line in file if line.endswith("\n"))


def remove_leftovers(folder: Path, names: str) -> None:
    """Removes what killed writers of this machine left in `folder`.

    Args:
        names: regular expression of the names of their targets.
    """
    pattern = re.compile(rf"\.({names})\.{MACHINE}\.[0-9a-f]{{8}}\.part")
    try:
        found = [(path, match) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    except OSError:  # not there, or not to be listed
        return
    for path, match in found:
        if is_abandoned(path):
            try:
                _clear(path, folder / match[1])
                log.info("%s: left by a run that was killed; removed", path)
            except OSError as error:
                log.warning("%s: left by a run that was killed, but cannot be removed: %s", path, error.strerror)


@contextmanager
def _part_of(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """An unfinished file or folder beside `target`, made by `make`; it is gone when the block ends."""
    part = target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, re.escape(target.name))
        while True:
            part = target.with_name(f".{target.name}.{MACHINE}.{uuid.uuid4().hex[:8]}.part")
            make(part)
            with in_use(part) as there:
                if not there:
                    continue
                try:
                    yield part
                finally:
                    _clear(part, target)
                return
    except OSError as error:
        # A full disk shows when writing, where the system names no file; the names of parts tell a user nothing.
        at = part if error.filename is None else Path(error.filename)
        if at.is_relative_to(part / NEW):
            error.filename = str(target / at.relative_to(part / NEW))
        elif at.is_relative_to(part):
            error.filename = str(target)
        raise


def _clear(part: Path, target: Path) -> None:
    """Removes what is left of an unfinished file or folder. An old folder that has no successor is put back."""
    if not part.is_dir():
        part.unlink(missing_ok=True)
        return
    if (part / OLD).exists() and not target.exists():
        (part / OLD).replace(target)
    shutil.rmtree(part, ignore_errors=True)


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
