"""Memory-mapped .npy files: all processes on a machine share one copy, and pickling copies no data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from common.errors import DataError
from common.messages import first_line

log = logging.getLogger(__name__)


class MappedArray:
    """The array in the file `path`, mapped when a process first reads from it. Only the path is pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The array, read-only. Raises DataError, which names the file, if it cannot be read."""
        if self._values is None:
            try:
                # A plain array is faster to index than a memmap.
                self._values = np.asarray(np.lib.format.open_memmap(self.path, mode="r"))
            except Exception as error:  # NumPy raises EOFError, BadZipFile, TokenError, ... on damaged files
                raise DataError(f"{self.path}: not readable as a .npy file: {first_line(error)}") from error
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_values": None}


def open_numbers(path: Path, sizes: Sequence[str]) -> np.ndarray:
    """The memory-mapped numbers in a .npy file, whose dimensions `sizes` names. Raises DataError."""
    array = MappedArray(path).values
    if array.ndim != len(sizes) or array.dtype.kind not in "iuf" or not array.size:
        raise DataError(f"{path}: expected numbers ({', '.join(sizes)}), found {array.dtype} {array.shape}")
    return array


def fault_of(path: Path, dtype: DTypeLike, shape: tuple[int | None, ...]) -> str | None:
    """What is wrong with the .npy file `path`, such as another dtype or shape (None: any size); None if it is fine."""
    try:
        found = MappedArray(path).values
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    fits = len(shape) == found.ndim and all(want in (None, have) for want, have in zip(shape, found.shape, strict=True))
    if fits and found.dtype == dtype:
        return None
    return f"expected {np.dtype(dtype)} {shape}, found {found.dtype} {found.shape}"


def is_usable(path: Path, dtype: DTypeLike, shape: tuple[int | None, ...]) -> bool:
    """Whether the .npy file `path` exists and is as expected; logs a warning if it exists but is not."""
    fault = fault_of(path, dtype, shape)
    if fault is not None and path.exists():
        log.warning("%s: not usable (%s); creating it again", path, fault)
    return fault is None
