"""Recordings of any length for prediction: cut into the samples that a model takes, with their times."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DataError
from vilt.datasets.row import DatasetSpec, Modality
from vilt.utils.mapped_array import MappedArray

if TYPE_CHECKING:
    from engine.items import Item

log = logging.getLogger("rep")


def in_samples(items: "Sequence[Item]", dataset: DatasetSpec) -> "list[Item]":
    """The items, of which those whose signals are recordings, (values, channels), become one for each sample.

    Samples do not overlap; what is left over at the end, and what a modality has beyond another one, is left out.

    Raises:
        DataError: a file cannot be read, or a recording is shorter than a sample; names it.
    """
    if not dataset.recordings:
        return list(items)
    return [one for item in items for one in _samples_of(item, dataset)]


def _samples_of(item: "Item", dataset: DatasetSpec) -> "list[Item]":
    signals = {name: _opened(value, f"{item.place}: {name}") for name, value in item.inputs.items()}
    if not any(signal.ndim == 2 for signal in signals.values()):
        return [item]  # single samples, or something else, which reading them says
    counts = {}
    for name, signal in signals.items():
        modality, length = dataset.modalities[name], values_of(dataset.modalities[name])
        if signal.ndim != 2 or signal.shape[1] != modality.shape[0]:
            found = f"found {signal.shape}"
            raise DataError(
                f"{item.place}: {name}: expected a recording (values, {modality.shape[0]} channels), {found}"
            )
        counts[name] = len(signal) // length
        if not counts[name]:
            raise DataError(f"{item.place}: {name}: expected {length} values at least, a sample, found {len(signal)}")
    if len({*counts.values()}) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        log.warning("%s: recordings of different lengths, in samples: %s; the rest is left out", item.place, found)
    samples = []
    for number in range(min(counts.values())):
        inputs = {name: sample_of(signal, dataset.modalities[name], number) for name, signal in signals.items()}
        modality = dataset.modalities[next(iter(signals))]
        seconds = values_of(modality) / modality.rate
        times = (round(number * seconds, 6), round((number + 1) * seconds, 6))
        samples.append(item._replace(inputs=inputs, times=times, place=f"{item.place}, from {times[0]:g} s on"))
    return samples


def _opened(value: Any, place: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, str | Path):
        raise DataError(f"{place}: expected an array or the path of a .npy file, found {type(value).__name__}")
    try:
        return MappedArray(Path(value)).values
    except DataError as error:
        raise DataError(f"{place} {error}") from error


def values_of(modality: Modality) -> int:
    """Values of a sample."""
    _, intervals, values = modality.shape
    assert intervals is not None and values is not None
    return (intervals - 1) * modality.step + values


def sample_of(signal_Nc: np.ndarray, modality: Modality, number: int) -> np.ndarray:
    """(c, I, S): the sample of a number, as a view."""
    length, values = values_of(modality), modality.shape[2]
    assert values is not None
    sample = signal_Nc[number * length : (number + 1) * length]
    intervals = np.lib.stride_tricks.sliding_window_view(sample, values, axis=0)[:: modality.step]  # (I, c, S)
    return intervals.transpose(1, 0, 2)


def named(signals: Mapping[str, Any], dataset: DatasetSpec) -> dict[str, Any]:
    """The signals that are there; raises DataError where a name is none of the dataset's modalities."""
    if unknown := [name for name in signals if name not in dataset.modalities]:
        raise DataError(f"expected signals of {', '.join(dataset.modalities)}, found {unknown[0]}")
    return {name: value for name, value in signals.items() if value is not None}
