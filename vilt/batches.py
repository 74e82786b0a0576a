"""Batches of samples. Missing inputs take up no space in them."""

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
"""Tensors up to this size are copied from worker to main process rather than shared."""


class Batch(NamedTuple):
    """A batch of B samples, of which b have a given modality."""

    inputs: dict[str, Tensor]
    """Inputs of each modality, for the samples in `rows`. In evaluation an input that samples share is stored once."""
    rows: dict[str, Tensor]
    """Positions (b,) in the batch of the samples that `inputs` belong to, keyed by modality."""
    present_BM: Tensor
    """True where a sample has a modality."""
    types: tuple[int, ...]
    """The missing types that occur, ascending. Kept on the host so that reading them needs no device sync."""
    lengths: dict[str, int]
    """Number of positions up to the last one in use, for modalities padded at the end; on the host too."""
    length_b: dict[str, Tensor]
    """Length (b,) of each input, for modalities padded in front."""
    source_of_B: dict[str, Tensor]
    """For modalities with shared inputs: the row whose input each sample uses (its own row if it has no input)."""
    label: Tensor
    """(B, C) uint8, or (B,) int64 or float32, see `Sample`."""
    index_B: Tensor
    """Indices of the samples in the dataset."""
    cached: bool = False
    """Whether `inputs` are cached features, see `ArrowDataset.cached`."""
    windows_BW: Tensor | None = None
    """Set if a text spans several windows. All fields above except `label` and `index_B` then have one entry per window
    in place of one per sample; this maps each sample to its windows, padded with -1."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles small tensors as arrays, since each tensor that a worker sends needs a connection of its own."""
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
    kinds: Mapping[str, type[Kind]], samples: Sequence[Sample], *, once: bool = False, cached: bool = False
) -> Batch:
    """Collates samples into a batch, leaving out missing inputs.

    Args:
        kinds: kind of each modality, in the dataset's order.
        once: an input shared by several samples is stored once. Valid only without dropout, when its features are the
            same for all of them.
        cached: the inputs are cached features.
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
        collated[name] = Collated(torch.stack(given) if given else torch.empty(0, 0)) if cached else kind.collate(given)
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
        cached=cached,
        windows_BW=pad_sequence(windows, batch_first=True, padding_value=-1) if windows else None,
    )


def by_window(kinds: Mapping[str, type[Kind]], samples: Sequence[Sample]) -> tuple[list[Sample], list[range]]:
    """Splits samples whose text spans several windows into one sample per window, each with all other inputs.

    Also returns the range of positions that each original sample takes in the new list.
    """
    parts: list[Sample] = []
    places: list[range] = []
    for sample in samples:
        text = next((name for name, kind in kinds.items() if kind.of_sample and name in sample.inputs), "")
        windows = sample.inputs[text].unbind() if text and sample.inputs[text].ndim == 2 else ()
        own = [sample._replace(inputs={**sample.inputs, text: window}) for window in windows] or [sample]
        places.append(range(len(parts), len(parts) + len(own)))
        parts += own
    return parts, places
