"""Locks that a dead process cannot hold: the system frees them when their holder ends, in whatever way."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import BusyError, ConfigError

log = logging.getLogger("rep")

NAMING_S = 0.1
"""By when the holder of a lock has written its name."""


@contextmanager
def waiting_lock(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path`; as long as another process does, waits for that, and says `busy`."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s", busy)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it opens a new one
        lock.release()


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path`, which names its holder.

    Forked children do not hold it. The file is removed at the end. On a file system without locks the block runs
    without one, and a warning says so.

    Raises:
        BusyError: another process holds it: `busy`, and who.
        ConfigError: it cannot be created.
    """
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"log_dir: cannot write to {path.parent}: {error.strerror}") from error
    try:
        lock.acquire()
    except Timeout:
        time.sleep(NAMING_S)
        with suppress(OSError):  # its holder has just removed it
            busy = f"{busy} ({path.read_text(errors='replace').strip()})"
        raise BusyError(busy) from None
    except OSError as error:
        log.warning("%s: no lock available (%s): do not start anything twice", path.parent, error.strerror)
    try:
        with suppress(OSError):  # a full disk is no reason to stop here
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it opens a new one
        lock.release()
