"""Arrays in .npy files, memory-mapped, so that all processes of a machine share one copy and pickling copies none."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from common.errors import DataError


class MappedArray:
    """The array in the file `path`.

    Each process maps the file when it first reads from it; what is pickled for a worker process is the path alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The array, read-only.

        Raises:
            DataError: the file cannot be read; names it.
        """
        if self._values is None:
            try:
                self._values = _load(self.path)
            except Exception as error:  # NumPy raises EOFError, BadZipFile, TokenError, ... on damaged files
                raise DataError(f"{self.path}: not readable as a .npy file: {error}") from error
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_values": None}


def fault_of(path: Path, dtype: DTypeLike, shape: tuple[int | None, ...]) -> str | None:
    """What is wrong with the .npy file `path`: not readable, truncated, or another array; None if nothing is.

    Args:
        shape: the shape expected; None stands for any length.
    """
    try:
        found = _load(path)
    except Exception as error:  # as above
        return str(error) or type(error).__name__
    fits = len(shape) == found.ndim and all(want in (None, have) for want, have in zip(shape, found.shape, strict=True))
    return (
        None
        if fits and found.dtype == dtype
        else f"expected {np.dtype(dtype)} {shape}, found {found.dtype} {found.shape}"
    )


def _load(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain array is quicker to index
