"""Writes files and folders atomically: a reader sees either the old one or the new one, never a part.

An unfinished file or folder lies next to its target, under a hidden name that ends in `.part`. If its writer is killed,
it is removed when the same target is next written, provided that it is more than a day old.
"""

import csv
import errno
import glob
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import DataError, reason_of

log = logging.getLogger(__name__)

ABANDONED_S = 86_400
"""Age in seconds above which an unfinished file or folder counts as left by a killed writer."""
NEW, OLD = "new", "old"
"""Names inside an unfinished folder: the replacement for the target, and the previous target."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields an empty file next to `target` to write to; it becomes `target` only if the block ends without an error.

    The folder is created. Concurrent writers do not interfere: each has its own temporary file, and the last rename
    wins. Once the block has ended, both content and rename are on disk and survive a power cut.
    """
    with _part_of(target) as part:
        part.touch(exist_ok=False)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
        sync_folder(target.parent)


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turns an OSError within the block into a DataError that says that `what` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{what}: cannot be written: {reason_of(error)}") from error


def sync_folder(folder: Path) -> None:
    """Waits until the current entries of `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path, marker: str, maker: str) -> Iterator[Path]:
    """Like `new_folder`, but replaces only an empty folder or one that this function has written before.

    Args:
        marker: name of the file that marks the folder as written by `maker`.

    Raises:
        DataError: `target` exists and is anything else.
    """
    check_replaceable(target, marker, maker)
    with new_folder(target) as fresh:
        yield fresh
        (fresh / marker).write_text(json.dumps({"written_by": maker}), "utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to `target` to write into; it becomes `target` only if the block ends without error.

    The old folder is moved away first. If the process is killed between the two renames, no folder has the name
    `target`: `restore_folder`, or writing it again, puts the old one back.
    """
    target = target.resolve()
    with _part_of(target) as part:
        fresh = part / NEW
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            target.replace(part / OLD)
        fresh.replace(target)
        sync_folder(target.parent)


def restore_folder(target: Path) -> None:
    """Puts the old folder back if a writer of `target` was killed between its two renames."""
    target = target.resolve()
    for part in _parts(target):
        if (part / OLD).exists() and not target.exists():
            (part / OLD).replace(target)


def check_replaceable(target: Path, marker: str, maker: str) -> None:
    """Raises DataError unless `target` is free, empty, or a folder with the file `marker`, which `maker` wrote."""
    is_folder = target.is_dir()
    if (target.exists() and not is_folder) or (is_folder and not (target / marker).is_file() and any(target.iterdir())):
        what = f"no {marker} in it" if is_folder else "a file"
        raise DataError(f"{target} exists and was not written by {maker} ({what}): choose another folder")


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """Yields an unused name next to `target` for an unfinished file or folder, which is gone when the block ends."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        _remove_abandoned(target)
        try:
            yield part
        finally:
            restore_folder(target)
            _remove(part)
    except OSError as error:
        # A full disk shows up in a write, for which the system names no file; names of parts tell the user nothing.
        at = part if error.filename is None else Path(error.filename)
        if at.is_relative_to(part / NEW):
            error.filename = str(target / at.relative_to(part / NEW))
        elif at.is_relative_to(part):
            error.filename = str(target)
        elif at not in part.parents:
            raise
        if error.errno == errno.ENOENT:  # a place where nothing can be created, such as /proc
            raise OSError(errno.EACCES, f"nothing can be created there: {error.strerror}", error.filename) from error
        raise


def _parts(target: Path) -> list[Path]:
    """The unfinished files and folders next to `target`, abandoned or still being written."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.????????.part"))


def _remove_abandoned(target: Path) -> None:
    for part in _parts(target):
        with suppress(FileNotFoundError):  # its writer has finished in the meantime
            if time.time() - part.lstat().st_mtime > ABANDONED_S:
                _remove(part)
                log.info("%s: left by a killed writer; removed", part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Writes a table atomically. NaN, an undefined value, becomes an empty cell.

    Args:
        columns: column names; by default the keys of the first row.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
