"""Decoded images in a file beside the arrow file, for machines whose CPU cannot feed the GPU.

One file of uint8 images (N, 3, R, R) in NumPy's format, which all processes map. Its name follows from the arrow file's
size, time and footer, so that a changed arrow file has no cache; what is left of an earlier one is removed.
"""

import fcntl
import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vilt.errors import DataError
from vilt.utils.files import atomic_path

log = logging.getLogger(__name__)

FORMAT = 1
FOOTER = 64 * 1024
"""Bytes at the end of an arrow file that describe all of it: schema, places and lengths."""
ROWS_PER_BATCH = 64

ReadImage = Callable[[int], Tensor]
"""Row number to its decoded image, uint8 (3, R, R)."""


def make_image_cache(arrow: Path, rows: int, size: int, read_image: ReadImage, workers: int) -> Path:
    """The cache of all rows of `arrow`, made if it is not there; processes that ask at once make it once.

    Args:
        rows: N.
        size: R.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: an image cannot be decoded, there is no room for the file, or its folder cannot be written.
    """
    path = arrow.with_name(f"{_prefix(arrow, size)}{_identity(arrow)}.npy")
    shape = (rows, 3, size, size)
    if _is_whole(path, shape):
        return path
    needed = rows * 3 * size * size
    try:
        with _lock(arrow.with_name(f".{_prefix(arrow, size)}lock")):
            if not _is_whole(path, shape):  # another process may have made it meanwhile
                free = shutil.disk_usage(arrow.parent).free
                if free < needed:
                    raise DataError(f"{path}: {_gb(needed)} needed for the decoded images, {_gb(free)} free")
                _write(path, shape, read_image, workers)
                for stale in arrow.parent.glob(f"{_prefix(arrow, size)}*.npy"):
                    if stale != path:
                        stale.unlink(missing_ok=True)
                        log.info("%s: removed; it belonged to an earlier %s", stale, arrow.name)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); it takes {_gb(needed)}") from error
    return path


def open_image_cache(path: Path) -> np.ndarray:
    """The images, mapped: uint8 (N, 3, R, R)."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


class _Images(Dataset[Tensor]):
    def __init__(self, rows: int, read_image: ReadImage) -> None:
        self.rows = rows
        self.read_image = read_image

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Tensor:
        return self.read_image(row)


def _write(path: Path, shape: tuple[int, ...], read_image: ReadImage, workers: int) -> None:
    started = time.monotonic()
    log.info("%s: decoding %s images, %s", path, f"{shape[0]:,}", _gb(int(np.prod(shape))))
    batches = DataLoader(_Images(shape[0], read_image), batch_size=ROWS_PER_BATCH, num_workers=workers)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in tqdm(batches, desc="decoding", unit_scale=ROWS_PER_BATCH, disable=not sys.stderr.isatty()):
            file.write(batch.numpy().data)
    log.info("%s: made in %.0f s", path, time.monotonic() - started)


def _prefix(arrow: Path, size: int) -> str:
    return f"{arrow.stem}_images{size}_"


def _identity(arrow: Path) -> str:
    status = arrow.stat()
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {status.st_size} {status.st_mtime_ns}".encode())
    with arrow.open("rb") as file:
        file.seek(max(0, status.st_size - FOOTER))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    if not path.is_file():
        return False
    try:
        images = open_image_cache(path)
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"expected uint8 {shape}, found {images.dtype} {images.shape}")
    except Exception as error:  # NumPy raises EOFError, TokenError, ... on damaged files
        log.warning("%s: not readable (%s); making it anew", path, error)
        return False
    return True


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when its holder ends, however that happens."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is decoding the images; waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
