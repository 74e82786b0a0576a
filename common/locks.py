"""Locks that a dead process cannot hold: `flock`, which the system frees when the holder ends, in whatever way.

Forked children do not have them: loader processes outlive a killed run by seconds, and would hold on to its locks.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import BusyError, ConfigError

log = logging.getLogger("rep")

NAMING_S = 0.1
"""By when the holder of a lock has written its name."""

_held: set[int] = set()
"""Descriptors whose locks this process holds."""


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[int]:
    """Holds the lock file `path`, which names its holder; yields its descriptor, which a started program may hold too.

    The file is removed at the end. Where the file system knows no locks, it goes on without, and a warning says so.

    Raises:
        BusyError: another process holds it: `busy`, and who.
        ConfigError: it cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"log_dir: cannot write to {path.parent}: {error.strerror}") from error
        with _kept_open(descriptor):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(NAMING_S)
                raise BusyError(f"{busy} ({os.pread(descriptor, 200, 0).decode(errors='replace').strip()})") from None
            except OSError as error:
                log.warning("%s: no lock is to be had there (%s): start nothing twice", path.parent, error.strerror)
            if not _is_at(path, descriptor):
                continue  # its holder has removed it: a lock that those who come now cannot see
            with suppress(OSError):  # a full disk is no reason to stop here
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            try:
                yield descriptor
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def in_use(path: Path) -> Iterator[bool]:
    """Within the block, `is_abandoned` is false of the file or folder `path`, which was made a moment ago.

    Yields false where another process has taken it for abandoned before, and removed it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks what is open for writing
    except FileNotFoundError:
        yield False
        return
    with _kept_open(descriptor):
        with suppress(OSError):  # a file system without locks, where `is_abandoned` is always false
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _is_at(path, descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether no process of this machine has the file or folder `path` `in_use`; false where that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _kept_open(descriptor: int) -> Iterator[None]:
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked child, where the number may be another file's by now
            _held.remove(descriptor)
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
