"""Batches of samples, in which what is missing takes no room."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vilt.datasets.arrow_dataset import Sample
from vilt.datasets.kinds import Collated, Kind
from vilt.missing_types import code_of

SMALL_BYTES = 2**16
"""Of a tensor that is sent from process to process, not shared."""


class Batch(NamedTuple):
    """What `collate` makes of B samples, of which b have the modality in question."""

    inputs: dict[str, Tensor]
    """By modality, those of the samples `rows`; in evaluation, one that several samples share once."""
    rows: dict[str, Tensor]
    """By modality, the numbers (b,) of these samples in the batch."""
    present_BM: Tensor
    """True where a sample has a modality."""
    types: tuple[int, ...]
    """The missing types that occur, ascending; on the host, so that nobody has to ask the device."""
    lengths: dict[str, int]
    """By modality with padding at the end, the positions up to the last one that matters, on the host too."""
    length_b: dict[str, Tensor]
    """By modality with padding in front, the length (b,) of each input."""
    source_of_B: dict[str, Tensor]
    """By modality that samples share: the row whose input each sample has (its own if it has none)."""
    label: Tensor
    """(B, C) uint8, or (B,) int64 or float32, see `Sample`."""
    index_B: Tensor
    """Numbers of the samples in the dataset."""
    kept: bool = False
    """Whether `inputs` are what the model has made of them, see `ArrowDataset.kept`."""
    windows_BW: Tensor | None = None
    """Where texts are in several windows, everything above but labels and numbers is of as many samples as there are
    windows: of each sample the places of its own there, -1 where another sample has more."""

    def __reduce__(self) -> tuple[Any, ...]:
        """From a loader process small tensors come as arrays: for each tensor a connection to it is made."""
        return _of_arrays, tuple(_each(field, _as_array) for field in self)


def _of_arrays(*fields: Any) -> Batch:
    return Batch(*(_each(field, _as_tensor) for field in fields))


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.nbytes <= SMALL_BYTES else value


def _each(field: Any, change: Callable[[Any], Any]) -> Any:
    return {name: change(value) for name, value in field.items()} if isinstance(field, dict) else change(field)


def collate(
    kinds: Mapping[str, type[Kind]], samples: Sequence[Sample], *, once: bool = False, kept: bool = False
) -> Batch:
    """Stacks samples; what is missing takes no room.

    Args:
        kinds: by modality, in order.
        once: an input that several samples share is there once: without dropout its features are the same for all.
        kept: inputs are what the model has made of them.
    """
    collated: dict[str, Collated] = {}
    rows, sources = {}, {}
    parts, places = by_window(kinds, samples)
    sample_of = [number for number, own in enumerate(places) for _ in own]
    for name, kind in kinds.items():
        inputs = {row: part.inputs[name] for row, part in enumerate(parts) if name in part.inputs}
        first_row: dict[int, int] = {}
        shared = {row: id(read) if once else row if kind.of_sample else sample_of[row] for row, read in inputs.items()}
        source_of = {row: first_row.setdefault(which, row) for row, which in shared.items()}
        if any(row != source for row, source in source_of.items()):
            sources[name] = torch.tensor([source_of.get(row, row) for row in range(len(parts))])
        own = [row for row, source in source_of.items() if row == source]
        rows[name] = torch.tensor(own, dtype=torch.long)
        given = [inputs[row] for row in own]
        collated[name] = Collated(torch.stack(given) if given else torch.empty(0, 0)) if kept else kind.collate(given)
    missing = [sum(code_of(kinds, name) for name in kinds if name not in sample.inputs) for sample in samples]
    windows = [torch.tensor(own) for own in places] if len(parts) > len(samples) else []
    return Batch(
        inputs={name: of_kind.input_b for name, of_kind in collated.items()},
        rows=rows,
        present_BM=torch.tensor([[name in part.inputs for name in kinds] for part in parts]),
        types=tuple(sorted(set(missing))),
        lengths={name: of_kind.length for name, of_kind in collated.items() if of_kind.length is not None},
        length_b={name: of_kind.length_b for name, of_kind in collated.items() if of_kind.length_b is not None},
        source_of_B=sources,
        label=torch.stack([sample.label for sample in samples]),
        index_B=torch.tensor([sample.number for sample in samples]),
        kept=kept,
        windows_BW=pad_sequence(windows, batch_first=True, padding_value=-1) if windows else None,
    )


def by_window(kinds: Mapping[str, type[Kind]], samples: Sequence[Sample]) -> tuple[list[Sample], list[range]]:
    """Samples whose texts are in windows as one for each window, with the other inputs; of each sample their places."""
    parts: list[Sample] = []
    places: list[range] = []
    for sample in samples:
        text = next((name for name, kind in kinds.items() if kind.of_sample and name in sample.inputs), "")
        windows = sample.inputs[text].unbind() if text and sample.inputs[text].ndim == 2 else ()
        own = [sample._replace(inputs={**sample.inputs, text: window}) for window in windows] or [sample]
        places.append(range(len(parts), len(parts) + len(own)))
        parts += own
    return parts, places
