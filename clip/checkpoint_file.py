"""Writing a checkpoint so that the one before it goes only when the new one is known to be whole."""

import errno
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from common.errors import NO_SPACE, CheckpointError, StorageError
from common.files import atomic_path
from common.messages import first_line


class WholeCheckpoints(TorchCheckpointIO):
    """How Lightning writes checkpoints: with `write_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Called by Lightning in the first process alone."""
        write_checkpoint(checkpoint, Path(path))


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Writes beside `path`, reads back from the disk what was written, and then puts it in the place of `path`.

    Raises:
        StorageError: there is too little room, or what was written reads back damaged; `path` is as it was before.
    """
    needed, free = _size(content), shutil.disk_usage(path.parent).free
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                _save(content, file)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory would be read, not the disk
            check_whole(temporary)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; {needed:,} bytes needed, {free:,} free"
            f"{_before(path)}"
        ) from error
    except CheckpointError as error:
        raise StorageError(f"{path}: does not read back as it was written ({error}){_before(path)}") from error


def check_whole(path: Path) -> None:
    """Raises CheckpointError unless each entry of a checkpoint has the size and the checksum that the file records.

    torch.load does not look at the checksums.
    """
    try:
        with zipfile.ZipFile(path) as entries:
            damaged = entries.testzip()
    except Exception as error:  # zipfile raises many types on damaged files
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of its entry {damaged} is wrong")


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Within the block, a full disk is one line that says what is left of the run, also from TensorBoard's thread.

    Raises:
        StorageError: metrics, results or the like could not be written into `folder`.
    """
    before = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:  # the thread's next caller gets the error too
        if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in NO_SPACE:
            before(args)

    threading.excepthook = tell
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise StorageError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; "
            f"{shutil.disk_usage(folder).free:,} bytes free{_before(folder / 'last.ckpt')}"
        ) from error
    finally:
        threading.excepthook = before


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch finds the file too short where a write has failed
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _before(path: Path) -> str:
    if not path.is_file():
        return "; there is no earlier checkpoint"
    return f"; the checkpoint before, {path}, is whole: make room and go on with resume_from"


def _size(content: Any) -> int:
    """Bytes of the tensors in `content`, which is nearly all there is to a file."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, (list, tuple)) else 0
