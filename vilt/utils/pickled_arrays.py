"""Reads pickles of NumPy arrays without running any code in them, and without a second copy of the data.

The published feature files are pickles. Only dicts, lists, tuples, texts, numbers and NumPy's arrays, dtypes and
scalars are accepted; a reference to anything else is an error. The bytes of an array stay as they are in the file, and
parts of it become arrays on access.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.messages import first_line, quoted

SUFFIXES = (".pkl", ".pickle")

KINDS = re.compile(r"[biufSU]\d{1,6}|O8?|b1|\?")
"""Codes of the dtypes accepted: numbers, bytes, texts, and objects, whose data are lists."""
BLOCK = 2**20


class NotNumpyError(ValueError):
    """A pickle refers to something that might run code."""


class _Type:
    """A NumPy dtype, made from its code."""

    def __init__(self, spelled: object, *_: object) -> None:
        if isinstance(spelled, bytes):
            spelled = spelled.decode("ascii")
        if not isinstance(spelled, str) or not KINDS.fullmatch(spelled):
            raise NotNumpyError(f"expected an array of numbers or texts, found the dtype {quoted(spelled)}")
        self.spelled, self.order = spelled, "="

    def __setstate__(self, state: Any) -> None:
        if str(state[1]) in "<>":
            self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spelled if self.spelled[0] == "O" else self.order + self.spelled)


class PickledArray:
    """An array whose data are still as in the file. Slices of the first axis become NumPy arrays."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = np.dtype("f8")
    _raw: Any = b""
    _fortran = False

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        *_, shape, kind, fortran, raw = state
        self._set(shape, kind, fortran, raw)

    def _set(self, shape: Any, kind: Any, fortran: object, raw: Any) -> None:
        if not isinstance(kind, _Type) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            raise ValueError(f"expected an array with shape and dtype, found {quoted(shape)}, {quoted(kind)}")
        self.shape, self.dtype, self._fortran, self._raw = shape, kind.dtype, bool(fortran), raw
        size = int(np.prod(shape, dtype=object))
        values = len(raw) if self.dtype == object else len(raw) // max(1, self.dtype.itemsize)
        if min(shape, default=0) < 0 or values != size:
            raise ValueError(f"an array of shape {shape} has {values:,} values")
        if isinstance(raw, str):
            for start in range(0, len(raw), BLOCK):  # in blocks: a complete copy would double the memory
                _bytes(raw[start : start + BLOCK])

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        """A copy of a slice of the first axis."""
        start, stop, _ = rows.indices(len(self))
        if self.dtype == object:
            array = np.empty(len(self._raw), dtype=object)
            array[:] = self._raw
            return array.reshape(self.shape)[start:stop]
        if self._fortran and len(self.shape) > 1:
            whole = np.frombuffer(_bytes(self._raw), self.dtype)
            return whole.reshape(self.shape, order="F")[start:stop].copy()
        row = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        part = _bytes(self._raw[start * row : stop * row])
        return np.frombuffer(part, self.dtype).reshape(stop - start, *self.shape[1:]).copy()


class _FromBuffer(PickledArray):
    """The form of arrays in pickle protocol 5: `_frombuffer(buffer, dtype, shape, order)`."""

    def __init__(self, raw: Any, kind: Any, shape: Any, order: str) -> None:
        super().__init__()
        self._set(shape, kind, order == "F", raw)


def _bytes(raw: Any) -> bytes:
    return raw.encode("latin1") if isinstance(raw, str) else bytes(raw)


def _encode(text: object, encoding: object) -> Any:
    if not isinstance(text, str) or encoding != "latin1":
        raise NotNumpyError(f"bytes in an unknown encoding: {quoted(encoding)}")
    return text


def _scalar(kind: Any, raw: Any = b"") -> Any:
    if not isinstance(kind, _Type) or kind.dtype == object:
        raise NotNumpyError(f"expected a NumPy number, found {quoted(kind)}")
    return np.frombuffer(_bytes(raw), kind.dtype)[0].item()


def _known() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("numpy", "dtype"): _Type,
        ("numpy", "ndarray"): PickledArray,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        known |= {
            (f"{core}.multiarray", "_reconstruct"): PickledArray,
            (f"{core}.multiarray", "scalar"): _scalar,
            (f"{core}.numeric", "_frombuffer"): _FromBuffer,
        }
    return known


KNOWN = _known()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise NotNumpyError(f"it mentions {module}.{name}, which might run code; not opened")
        return KNOWN[module, name]


def read_pickle(path: Path) -> Any:
    """The content of a pickle: plain values, with a PickledArray for each array.

    Raises:
        DataError: the file cannot be read, is damaged, or has anything but plain values and arrays.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # pickle raises all kinds of errors on damaged files
        raise DataError(f"{path}: not readable as a pickle of arrays: {first_line(error)}") from None
