"""Caches the decoded images of an arrow file next to it, for machines whose CPU decodes slower than the GPU trains.

A cache is one .npy file, uint8 (N, 3, R, R), with the image of every row as `decode_image` returns it. Its name has a
hash of the arrow file's content and Pillow's version, so that a cache of other images is never mistaken for it.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL
from rich import filesize
from torch import Tensor
from tqdm import tqdm

from common.errors import DataError, reason_of
from common.files import atomic_path
from common.hashing import file_sha256
from common.locks import waiting_lock
from vilt.utils.mapped_array import MappedArray, fault_of, is_usable
from vilt.utils.ordered_threads import in_order

log = logging.getLogger(__name__)

ReadImage = Callable[[int], Tensor]
"""Maps a row to its image, uint8 (3, R, R); raises DataError, which names the row, if it cannot be decoded."""

FORMAT_VERSION = 2
"""Increment this when `decode_image` or the layout of the file changes."""


def open_image_cache(arrow_path: Path, n_rows: int, size: int, read_image: ReadImage, workers: int) -> MappedArray:
    """Opens the cached images of all rows, uint8 (n_rows, 3, size, size), creating the cache if absent or damaged.

    If several processes ask at once, one creates the cache and the others wait. Caches of the same image size that
    were made from other versions of the arrow file are then removed.

    Args:
        size: side of the images in pixels.
        workers: number of threads that decode.

    Raises:
        DataError: an image cannot be decoded, the disk has too little space, or the folder cannot be written. Nothing
            is left behind.
    """
    shape = (n_rows, 3, size, size)
    try:
        cache = _path_of(arrow_path, size)
        # All versions of the arrow file share one lock: its holder knows that nobody else is writing.
        lock = cache.with_name(f".{arrow_path.stem}_images{size}.lock")
        # If the lock file exists, the cache is being created, or its creator was killed and may have left old caches.
        if fault_of(cache, np.uint8, shape) is None and not os.access(lock, os.W_OK):
            return MappedArray(cache)
        busy = f"{cache}: another process is creating it ({filesize.decimal(math.prod(shape))}); waiting"
        with waiting_lock(lock, busy):
            name = f"{arrow_path.stem}_images{size}_{'[0-9a-f]' * 16}.npy"
            if not is_usable(cache, np.uint8, shape):
                _remove(cache.parent.glob(f".{name}.*.part"), "left by a killed process")
                _make(cache, shape, read_image, workers)
            _remove(set(cache.parent.glob(name)) - {cache}, "made from another version of the arrow file")
    except OSError as error:
        raise DataError(
            f"{arrow_path}: cannot cache the decoded images next to it: {reason_of(error)}; "
            f"they need {math.prod(shape):,} bytes"
        ) from error
    return MappedArray(cache)


def _path_of(arrow_path: Path, size: int) -> Path:
    parts = (str(FORMAT_VERSION), PIL.__version__, file_sha256(arrow_path))
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return arrow_path.with_name(f"{arrow_path.stem}_images{size}_{digest}.npy")


def _remove(paths: Iterable[Path], what: str) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        log.info("%s: %s; removed", path, what)


def _make(cache: Path, shape: tuple[int, ...], read_image: ReadImage, workers: int) -> None:
    """Writes the cache row by row."""
    n_rows = shape[0]
    log.info("%s: decoding %s images once (%s)", cache, f"{n_rows:,}", filesize.decimal(math.prod(shape)))
    start = time.monotonic()
    with (
        atomic_path(cache) as part,
        tqdm(total=n_rows, desc=cache.name, unit=" images", dynamic_ncols=True, disable=None) as bar,
    ):
        values = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        with part.open("r+b") as file:  # reserves the space: a full disk is an error now, not a bus error later
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        for row, image in enumerate(in_order(read_image, range(n_rows), workers)):
            values[row] = image.numpy()
            bar.update()
        values.flush()
    log.info("%s: created in %.1f s", cache, time.monotonic() - start)
