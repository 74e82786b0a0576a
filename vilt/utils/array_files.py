"""Reads files with arrays of many samples, keyed by modality: `.npz`, or pickles, whose code is never run."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.messages import listed
from vilt.utils.pickled_arrays import SUFFIXES, PickledArray, read_pickle
from vilt.utils.write_vla import LABELS, MODALITIES, id_of, lengths_of, padded_in_front

log = logging.getLogger("rep")


def samples_of_arrays(path: Path, modalities: Sequence[str]) -> list[tuple[str, dict[str, np.ndarray], str]]:
    """Reads a file that has an array (N, ...) for each modality.

    A modality that the file lacks is missing in all samples. It is missing in one sample if all its numbers are NaN.

    Returns:
        For each sample, its id, its arrays keyed by modality, and what messages call it.

    Raises:
        DataError: the file is unreadable, has none of the modalities, or its arrays differ in the number of samples.
    """
    arrays = _read(path)
    present = [name for name in modalities if name in arrays]
    if not present:
        raise DataError(f"input={path}: expected {' or '.join(modalities)}, found {listed(list(arrays))}")
    if path.suffix.lower() not in SUFFIXES:
        say_unread(path, modalities, arrays)
    count = len(arrays[present[0]])
    for name in (*present, *(["id"] if "id" in arrays else [])):
        if len(arrays[name]) != count:
            raise DataError(
                f"input={path}: {name}: expected {count} rows, as in {present[0]}, found {len(arrays[name])}"
            )
    ids = [id_of(one) for one in arrays["id"]] if "id" in arrays else [str(row) for row in range(count)]
    samples = []
    for row in range(count):
        inputs = {name: np.asarray(arrays[name][row]) for name in present}
        given = {name: array for name, array in inputs.items() if not _is_absent(array)}
        samples.append((ids[row], given, f"{path}, row {row}"))
    return samples


def say_unread(path: Path, modalities: Sequence[str], names: Iterable[str]) -> None:
    """Warns about unread entries if a file lacks a modality: one of them may be that modality under another name."""
    lacking, unread = set(modalities) - {*names}, [name for name in names if name not in (*modalities, "id")]
    if lacking and unread:
        lacking_of = " or ".join(name for name in modalities if name in lacking)
        log.warning("input=%s: no sample has %s; not read: %s", path, lacking_of, listed(unread))


def _is_absent(array: Any) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).all())


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() not in SUFFIXES:
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: np.atleast_1d(file[name]) for name in file.files}
        except Exception as error:  # many types, on damaged files
            raise DataError(f"input={path}: not readable as .npz: {str(error) or type(error).__name__}") from None
    content = read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("test"), dict):
        content = content["test"]
    if not isinstance(content, dict):
        raise DataError(f"input={path}: expected arrays by name, found {type(content).__name__}")
    arrays = {name: value[:] for name, value in content.items() if isinstance(value, PickledArray)}
    present = [name for name in MODALITIES if name in arrays and arrays[name].ndim == 3]
    of_mmsa = LABELS[1] in content or any(f"{name}_lengths" in content for name in present)
    if LABELS[0] in content or not of_mmsa or not present:
        return arrays
    absent = {f"{name}_lengths" for name in MODALITIES if name not in present}
    absent |= {"text_bert"} if "text" not in present else set()
    described = {name: value for name, value in content.items() if name not in absent}
    lengths = lengths_of(path, "test", described, len(arrays[present[0]]))
    for name in present:  # MMSA's files are padded at the end
        of_rows = lengths.get(name, [None] * len(arrays[name]))
        arrays[name] = np.stack([padded_in_front(x, length) for x, length in zip(arrays[name], of_rows, strict=True)])
    return arrays
