"""Locks that a dead process cannot hold: the system releases them when their holder ends, however it ends."""

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
"""Seconds within which the holder of a lock has written its name into it."""


@contextmanager
def waiting_lock(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path`. If another process holds it, logs `busy` and waits."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s", busy)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: a waiting process opens a new file
        lock.release()


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path`, which names its holder.

    Forked children do not hold the lock. The file is removed at the end. On a file system without locks, the block
    runs unlocked, with a warning.

    Raises:
        BusyError: another process holds the lock; the message is `busy` and the holder.
        ConfigError: the file cannot be created.
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
        with suppress(OSError):  # the holder has just removed it
            busy = f"{busy} ({path.read_text(errors='replace').strip()})"
        raise BusyError(busy) from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s): do not start anything twice", path.parent, error.strerror)
    try:
        with suppress(OSError):  # a full disk is no reason to stop here
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: a waiting process opens a new file
        lock.release()
