"""Files with the arrays of many samples, by modality: `.npz`, or a pickle, in which nothing runs."""

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
    """Id, arrays by modality, and what messages call it, of each sample in a file with (N, ...) by modality.

    A modality that the file lacks is missing in all samples; so is one of a sample whose numbers are all NaN.

    Raises:
        DataError: the file is not readable, has none of the modalities, or other numbers of samples.
    """
    arrays = _read(path)
    there = [name for name in modalities if name in arrays]
    if not there:
        raise DataError(f"input={path}: expected {' or '.join(modalities)}, found {listed(list(arrays))}")
    if path.suffix.lower() not in SUFFIXES:
        say_unread(path, modalities, arrays)
    count = len(arrays[there[0]])
    for name in (*there, *(["id"] if "id" in arrays else [])):
        if len(arrays[name]) != count:
            raise DataError(
                f"input={path}: {name}: expected {count} rows, as {there[0]} has, found {len(arrays[name])}"
            )
    ids = [id_of(one) for one in arrays["id"]] if "id" in arrays else [str(row) for row in range(count)]
    samples = []
    for row in range(count):
        inputs = {name: np.asarray(arrays[name][row]) for name in there}
        given = {name: array for name, array in inputs.items() if not _is_absent(array)}
        samples.append((ids[row], given, f"{path}, row {row}"))
    return samples


def say_unread(path: Path, modalities: Sequence[str], names: Iterable[str]) -> None:
    """Logs what is not read of a file that lacks a modality: it may be that modality by another name."""
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
        except Exception as error:  # of many types, on damaged files
            raise DataError(f"input={path}: not readable as .npz: {str(error) or type(error).__name__}") from None
    content = read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("test"), dict):
        content = content["test"]
    if not isinstance(content, dict):
        raise DataError(f"input={path}: expected arrays by name, found {type(content).__name__}")
    arrays = {name: value[:] for name, value in content.items() if isinstance(value, PickledArray)}
    there = [name for name in MODALITIES if name in arrays and arrays[name].ndim == 3]
    of_mmsa = LABELS[1] in content or any(f"{name}_lengths" in content for name in there)
    if LABELS[0] in content or not of_mmsa or not there:
        return arrays
    absent = {f"{name}_lengths" for name in MODALITIES if name not in there}
    absent |= {"text_bert"} if "text" not in there else set()
    described = {name: value for name, value in content.items() if name not in absent}
    lengths = lengths_of(path, "test", described, len(arrays[there[0]]))
    for name in there:  # the padding of MMSA's files is at the end
        of_rows = lengths.get(name, [None] * len(arrays[name]))
        arrays[name] = np.stack([padded_in_front(x, length) for x, length in zip(arrays[name], of_rows, strict=True)])
    return arrays
