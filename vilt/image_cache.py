"""The decoded images of an arrow file, kept beside it: for machines whose CPU cannot decode as fast as the GPU trains.

A cache is one .npy file, uint8 (N, 3, R, R), with the image of every row as `decode_image` gives it. Its name tells the
arrow file's state and Pillow's version, so that a cache of other images is never taken for the right one.
"""

import fcntl
import hashlib
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import DataError
from common.files import atomic_path, remove_leftovers
from vilt.utils.mapped_array import MappedArray, fault_of

log = logging.getLogger(__name__)

ReadImage = Callable[[int], Tensor]
"""Row to image, uint8 (3, R, R); raises DataError, which names the row, where it cannot be decoded."""

FORMAT_VERSION = 1
"""To be raised when `decode_image` or the file's layout changes."""
FOOTER_BYTES = 64 * 2**10
"""The end of an arrow file, which is identified by it: there lie the places of all its batches."""
BATCH_BYTES = 2**20
"""How much a worker process hands over at a time, through shared memory, of which containers have little."""


def open_image_cache(arrow_path: Path, n_rows: int, size: int, read_image: ReadImage, workers: int) -> MappedArray:
    """The images of all rows, uint8 (n_rows, 3, size, size); made first if they are not there, or damaged.

    Of several processes that ask at the same time one makes the cache, and the others wait for it. Caches of the same
    size that were made from an older state of the arrow file are removed then.

    Args:
        size: side of the images in pixels.
        workers: number of processes that decode; 0 decodes in this process.

    Raises:
        DataError: an image cannot be decoded, the disk has too little room, or the folder cannot be written. Then
            nothing is left behind.
    """
    shape = (n_rows, 3, size, size)
    needed = math.prod(shape)  # bytes; the header is 128 more
    try:
        cache = _path_of(arrow_path, size)
        # One lock for all states of the arrow file: its holder knows that nobody else is writing.
        lock = cache.with_name(f".{arrow_path.stem}_images{size}.lock")
        # Where the lock is there, the cache is just being made, or its maker was killed, and may have left others.
        if fault_of(cache, np.uint8, shape) is None and not os.access(lock, os.W_OK):
            return MappedArray(cache)
        with _locked(lock, f"{cache}: another process is making it ({_size(needed)}); waiting for that"):
            fault = fault_of(cache, np.uint8, shape)
            if fault is not None:
                if cache.exists():
                    log.warning("%s: not readable (%s); making it anew", cache, fault)
                remove_leftovers(cache.parent, _names(arrow_path, size))
                _make(cache, shape, read_image, workers)
            _remove_others(cache, arrow_path, size)
    except OSError as error:
        raise DataError(
            f"{arrow_path}: cannot keep the decoded images beside it: {error.strerror or error}; "
            f"they need {needed:,} bytes"
        ) from error
    return MappedArray(cache)


def missing_bytes(arrow_path: Path, n_rows: int, size: int) -> int:
    """What the cache still needs of the disk: nothing where it is there."""
    shape = (n_rows, 3, size, size)
    return 0 if fault_of(_path_of(arrow_path, size), np.uint8, shape) is None else math.prod(shape)


def _path_of(arrow_path: Path, size: int) -> Path:
    with arrow_path.open("rb") as file:
        state = os.fstat(file.fileno())
        file.seek(max(0, state.st_size - FOOTER_BYTES))
        footer = hashlib.sha256(file.read()).hexdigest()
    parts = (FORMAT_VERSION, PIL.__version__, state.st_size, state.st_mtime_ns, footer)
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
    return arrow_path.with_name(f"{arrow_path.stem}_images{size}_{digest}.npy")


def _size(n_bytes: int) -> str:
    return tqdm.format_sizeof(n_bytes, "B")


@contextmanager
def _locked(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file `path`, one process at a time, and removes it; logs `waiting` if another one holds it.

    The system frees the lock of a process that is killed.
    """
    told = False
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    log.info(waiting)
                told = True
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not _is_at(path, file.fileno()):
                    continue  # its holder has removed it: a lock that those who come now cannot see
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: forked loader processes share the file


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _names(arrow_path: Path, size: int) -> str:
    """The names of the caches of all states of the arrow file, as a regular expression."""
    return rf"{re.escape(arrow_path.stem)}_images{size}_[0-9a-f]{{16}}\.npy"


def _remove_others(cache: Path, arrow_path: Path, size: int) -> None:
    """Removes caches of other states of the arrow file."""
    for path in list(cache.parent.iterdir()):
        if re.fullmatch(_names(arrow_path, size), path.name) and path != cache:
            what = "of another state of the arrow file or Pillow"
            try:
                path.unlink(missing_ok=True)
                log.info("%s: %s; removed", path, what)
            except OSError as error:
                log.warning("%s: %s, but cannot be removed: %s", path, what, error.strerror or error)


class _Rows(Dataset[Tensor | DataError]):
    """Images by ranges of rows; an error is handed back, since torch would wrap what a worker process raises."""

    def __init__(self, read_image: ReadImage) -> None:
        self.read_image = read_image

    def __getitem__(self, rows: range) -> Tensor | DataError:
        try:
            return torch.stack([self.read_image(row) for row in rows])
        except DataError as error:
            return error


def _make(cache: Path, shape: tuple[int, ...], read_image: ReadImage, workers: int) -> None:
    """Writes the file front to back, a batch at a time.

    Not through a memory map: on a full disk that is a bus error, which no program survives, in place of an OSError.
    """
    n_rows, needed = shape[0], math.prod(shape)
    free = shutil.disk_usage(cache.parent).free
    if free < needed:
        raise DataError(f"{cache}: too little room: {needed:,} bytes needed, {free:,} bytes free")
    log.info("%s: decoding %s images once, %s", cache, f"{n_rows:,}", _size(needed))
    start = time.monotonic()
    step = max(1, BATCH_BYTES // math.prod(shape[1:]))
    batches: DataLoader[Tensor | DataError] = DataLoader(
        _Rows(read_image),
        batch_size=None,
        sampler=[range(first, min(first + step, n_rows)) for first in range(0, n_rows, step)],
        num_workers=workers,
        generator=torch.Generator(),  # else torch draws from the global one, and making a cache would change the run
    )
    with (
        atomic_path(cache) as temporary,
        temporary.open("wb") as file,
        tqdm(total=n_rows, desc=cache.name, unit=" images", dynamic_ncols=True, disable=None) as bar,
    ):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for images in batches:
            if isinstance(images, DataError):
                raise images
            file.write(images.numpy().data)
            bar.update(len(images))
    log.info("%s: made in %.1f s", cache, time.monotonic() - start)
