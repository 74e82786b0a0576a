"""Cutting recordings of any length into the samples that a model takes, with their times, for prediction."""

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


def split_recordings(items: "Sequence[Item]", dataset: DatasetSpec) -> "list[Item]":
    """Replaces each item whose signals are recordings, (values, channels), by one item per sample.

    Samples do not overlap. An incomplete sample at the end is left out, as is the rest of a modality whose recording is
    longer than another's.

    Raises:
        DataError: a file cannot be read, or a recording is shorter than a sample; names the item.
    """
    if not dataset.recordings:
        return list(items)
    return [one for item in items for one in _samples_of(item, dataset)]


def _samples_of(item: "Item", dataset: DatasetSpec) -> "list[Item]":
    signals = {name: _opened(value, f"{item.place}: {name}") for name, value in item.inputs.items()}
    if not any(signal.ndim == 2 for signal in signals.values()):
        return [item]  # single samples; anything else is reported when they are read
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
            raise DataError(f"{item.place}: {name}: expected at least {length} values, one sample, found {len(signal)}")
    if len({*counts.values()}) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        log.warning("%s: recordings differ in length, in samples: %s; the rest is left out", item.place, found)
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
    """Number of values in a sample."""
    _, intervals, values = modality.shape
    assert intervals is not None and values is not None
    return (intervals - 1) * modality.step + values


def sample_of(signal_Nc: np.ndarray, modality: Modality, number: int) -> np.ndarray:
    """The sample at index `number`, (c, I, S), as a view."""
    length, values = values_of(modality), modality.shape[2]
    assert values is not None
    sample = signal_Nc[number * length : (number + 1) * length]
    intervals = np.lib.stride_tricks.sliding_window_view(sample, values, axis=0)[:: modality.step]  # (I, c, S)
    return intervals.transpose(1, 0, 2)


def given_signals(signals: Mapping[str, Any], dataset: DatasetSpec) -> dict[str, Any]:
    """The signals that are not None; raises DataError if a name is not one of the dataset's modalities."""
    if unknown := [name for name in signals if name not in dataset.modalities]:
        raise DataError(f"expected signals of {', '.join(dataset.modalities)}, found {unknown[0]}")
    return {name: value for name, value in signals.items() if value is not None}
