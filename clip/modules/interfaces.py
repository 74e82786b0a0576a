"""The types that data, backbone, method and head exchange. Mappings keyed by modality are in the order of the
backbone's places.

Shape suffixes: B samples of the batch, b samples with a modality, M modalities, L sequence, m slots, P prefix keys,
D width of a tower, E width of a modality's features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """A tower that slots can enter."""

    width: int
    depth: int
    """Number of blocks."""
    widths: tuple[int, ...] = ()
    """Width of each block, if they differ; slots enter with the width of the first."""
    projection: int = 0
    """Width to which pretraining projects features before it compares them."""
    input_shape: tuple[int, ...] = ()
    """Shape of one input, if all inputs of the modality share one that methods may depend on."""


class ModelInput(NamedTuple):
    """A batch. Missing inputs are left out, so they cost nothing."""

    inputs: Mapping[str, Tensor]
    """Inputs of the b samples that have a modality, keyed by it: images (b, 3, R, R), token ids (b, L), arrays."""
    rows: Mapping[str, Tensor]
    """Batch row (b,) of each input, keyed by modality; B for padding (see `rounded`), which comes last."""
    present_BM: Tensor
    """True where a sample has a modality."""
    types: tuple[int, ...]
    """Missing types that occur, in ascending order; known without a read from the device."""
    lengths: Mapping[str, int] = {}
    """Number of leading positions that matter (in texts, up to the last `<end>`), keyed by modality; all if there is no
    entry. Also known without a read from the device."""
    length_b: Mapping[str, Tensor] = {}
    """Length (b,) of each input, keyed by modality, for modalities padded in front."""
    source_of_B: Mapping[str, Tensor] = {}
    """Row (B,) whose input each sample uses, keyed by modality, where samples share inputs; `rows` has these alone."""
    index_B: Tensor | None = None
    """Indices of the samples in their dataset."""
    split: str = ""
    """Split of the training that the samples are from, for example `train`; "" if they are from none."""
    cached: bool = False
    """Whether `inputs` are cached outputs (b, D) of `Tower.body`, see `engine/cached_features.py`."""
    windows_BW: Tensor | None = None
    """Rows of each sample's windows, padded with -1, where texts are split into windows. The other fields then have one
    row per window (B is the number of windows), and each window comes with the other inputs of its sample."""

    @property
    def missing_type_B(self) -> Tensor:  # noqa: N802
        """Missing type of each sample: its missing modalities as a binary number, with the last as the lowest bit.

        With image and text: 0 complete, 1 text missing, 2 image missing.
        """
        M = self.present_BM.shape[1]
        digits_M = 2 ** torch.arange(M - 1, -1, -1, device=self.present_BM.device)
        return ((~self.present_BM) * digits_M).sum(dim=1)

    def joined(self) -> "ModelInput":
        """The batch for heads, with `present_BM` per sample even where other fields are per window."""
        return self if self.windows_BW is None else self._replace(present_BM=self.present_BM[self.windows_BW[:, 0]])

    def samples_of(self, modality: str) -> Tensor:
        """Row (b,) of the sample that each input belongs to; the last row for padding."""
        return self.rows[modality].clamp(max=len(self.present_BM) - 1)

    def to_all_samples(self, modality: str, x_b: Tensor) -> Tensor:
        """Scatters (b, …) to (B, …), with zeros for samples without the modality."""
        B = len(self.present_BM)
        x_B = x_b.new_zeros(B + 1, *x_b.shape[1:])  # the extra row receives the padding and is dropped
        return x_B.index_copy(0, self.rows[modality], x_b)[:B]

    def rounded(self, step: int | None = None) -> "ModelInput":
        """Pads the batch to one of a few shapes, because each new shape costs time on a GPU.

        The padding repeats the last input. Its outputs are dropped, so it changes no result and gets no gradient.
        Lengths are rounded up to a multiple of 4.

        Args:
            step: numbers of inputs are rounded up to a multiple of it; None: half the square root of B, which is about
                how much they vary.
        """
        B = len(self.present_BM)
        step, inputs, rows = step or max(1, round(B**0.5 / 2)), dict(self.inputs), dict(self.rows)
        for modality, rows_b in self.rows.items():
            b = len(rows_b)
            if more := min(B, -(-b // step) * step) - b:
                last = inputs[modality][-1:]
                inputs[modality] = torch.cat([inputs[modality], last.expand(more, *last.shape[1:])])
                rows[modality] = torch.cat([rows_b, rows_b.new_full((more,), B)])
        lengths = {name: min(inputs[name].shape[1], -(-length // 4) * 4) for name, length in self.lengths.items()}
        return self._replace(inputs=inputs, rows=rows, lengths=lengths)

    def with_own_inputs(self) -> "ModelInput":
        """The batch with shared inputs copied to each sample, for methods that treat samples with the same input
        differently."""
        inputs, rows, length_b = dict(self.inputs), dict(self.rows), dict(self.length_b)
        for modality, source_B in self.source_of_B.items():
            column = list(self.inputs).index(modality)
            rows[modality] = self.present_BM[:, column].nonzero().flatten()
            places_b = torch.searchsorted(self.rows[modality], source_B[rows[modality]])
            inputs[modality] = inputs[modality][places_b]
            if modality in length_b:
                length_b[modality] = length_b[modality][places_b]
        return self._replace(inputs=inputs, rows=rows, length_b=length_b, source_of_B={})


Adapter = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Replaces a block's projections: takes 0 (query), 1 (key) or 2 (value), the input (…, D), the frozen weight (D, D) and
the bias (D,), and returns (…, D)."""


class Blanks(NamedTuple):
    """Placeholders for missing inputs, for methods that encode them."""

    grey: float
    """Grey level of the image, 0 to 1, before normalisation."""
    text_marks: Tensor
    """The token ids (2,) of start and `<end>`, which make up an empty text."""


class TowerSlots(NamedTuple):
    """The slots that a method puts into one tower, with a row for each sample. Lists are indexed by block.

    The sequence of a block is `[replaced | inserted | dynamic | tokens]`, for REP
    `[private | shared | dynamic | tokens]`.
    """

    replaced_BmD: Sequence[Tensor] = ()
    """Slots that replace those of the block before; the last ones stay."""
    inserted_BmD: Sequence[Tensor] = ()
    """Slots inserted at the front before a block, which stay; before the first block only, if slots are replaced."""
    dynamic_BmD: Tensor | None = None
    """Slots inserted directly in front of the tokens before the first block, which stay."""
    appended_BmD: Tensor | None = None
    """Tokens appended to the others and embedded like them, for towers that read out the last token."""
    prefix_BP2D: Sequence[Tensor] = ()
    """Keys and values that all positions of a block attend to; they take up no positions themselves."""
    replay: Sequence[Callable[[Sequence[Tensor]], Tensor]] = ()
    """Functions for the blocks right after the replacing ones: each maps the replacing blocks' outputs (B, P, D) at
    replaced and inserted slots to the addition (B, P, D) to these slots."""
    adapters: Mapping[int, Adapter] = {}
    """Adapters of the blocks whose projections are adapted, keyed by block."""

    def of_rows(self, rows: Tensor) -> "TowerSlots":
        """The slots of the samples `rows`, in that order."""
        replaced, inserted, prefix = (
            [slots.index_select(0, rows) for slots in group]
            for group in (self.replaced_BmD, self.inserted_BmD, self.prefix_BP2D)
        )
        single = (self.dynamic_BmD, self.appended_BmD)
        dynamic, appended = (each if each is None else each.index_select(0, rows) for each in single)
        return TowerSlots(replaced, inserted, dynamic, appended, prefix, self.replay, self.adapters)

    def tensors(self) -> list[Tensor]:
        """All slots."""
        single = [each for each in (self.dynamic_BmD, self.appended_BmD) if each is not None]
        return [*self.replaced_BmD, *self.inserted_BmD, *single, *self.prefix_BP2D]


NO_SLOTS = TowerSlots()


class Tower(nn.Module):
    """The encoder of one modality."""

    def embed(self, input_b: Tensor) -> Tensor:
        """Input tokens (b, L, D)."""
        raise NotImplementedError

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots) -> Tensor:
        """The last block's output (b, D) at the position where features are read."""
        raise NotImplementedError

    def end(self, x_bD: Tensor) -> Tensor:
        """Features (b, E) from the output of `body`: the layers after the last block, see `Backbone.ends`."""
        return x_bD

    def encode(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, E) of input tokens."""
        return self.end(self.body(tokens_bLD, input_b, slots))

    def forward(self, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, E) of inputs."""
        return self.encode(self.embed(input_b), input_b, slots)


class Backbone(nn.Module):
    """Towers whose features are joined. Each family of models has its own subclass."""

    places: dict[str, Place]
    """The towers that slots can enter, keyed by modality."""
    embed_dim: int
    """Width E of a modality's features."""
    mixes = False
    """Whether modalities interact before their towers; samples with the same input then have different features."""
    ends: tuple[str, ...] = ()
    """Parts (see `parts`) after the last blocks, which `train_ends` trains."""
    always_trained: tuple[str, ...] = ()
    """Parts (see `parts`) that are trained whatever the method."""
    plain_head = False
    """Whether a linear head starts with PyTorch's default initialisation, as in the published model."""

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers, keyed by modality."""
        raise NotImplementedError

    def prepare(self, batch: ModelInput) -> ModelInput:
        """The batch as all later steps read it, for example with dropout on its inputs."""
        return batch

    def complete(self, batch: ModelInput, blanks: Blanks, *, once: bool) -> ModelInput:
        """The batch with `blanks` for missing inputs; with `once`, all samples that lack a modality share one."""
        raise ValueError("the method encodes missing inputs, which this family of backbones does not support")

    def mix(self, batch: ModelInput, tokens: Mapping[str, Tensor], *, padded: bool = True) -> Mapping[str, Tensor]:
        """Turns the tokens of `embed` into the towers' input tokens, where modalities interact before the towers.

        Args:
            padded: whether steps of zeros are padding rather than made by parameters, see `Method.generates_missing`.
        """
        return tokens

    def embed(self, batch: ModelInput) -> dict[str, Tensor]:
        """Input tokens (b, L, D) of the modalities that any sample has."""
        present = {modality: tower for modality, tower in self.towers.items() if len(batch.rows[modality])}
        if batch.cached:
            return {modality: batch.inputs[modality] for modality in present}
        with torch.autocast(batch.present_BM.device.type, enabled=False):  # towers use the dtype of their weights
            return {modality: tower.embed(batch.inputs[modality]) for modality, tower in present.items()}

    def encode(
        self, batch: ModelInput, tokens: Mapping[str, Tensor], slots: Mapping[str, TowerSlots]
    ) -> dict[str, Tensor]:
        """Features (B, E) of every modality, zero where a sample lacks it."""
        features = {}
        for modality, tower in self.towers.items():
            if modality not in tokens:
                trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
                zero_feature = zero_of([*trained, *slots[modality].tensors()], batch.present_BM.device)
                features[modality] = zero_feature.expand(len(batch.present_BM), self.embed_dim)
                continue
            with torch.autocast(batch.present_BM.device.type, enabled=False):
                if batch.cached:
                    feature_bE = tower.end(tokens[modality])
                else:
                    tokens_bLD = tokens[modality][:, : batch.lengths.get(modality)]
                    slots_b = slots[modality].of_rows(batch.samples_of(modality))
                    feature_bE = tower.encode(tokens_bLD, batch.inputs[modality], slots_b)
            feature_BE = batch.to_all_samples(modality, feature_bE)
            source_B = batch.source_of_B.get(modality)
            features[modality] = feature_BE if source_B is None else feature_BE[source_B]
        return features

    @property
    def fused_parts(self) -> int:
        """Width of the output of `fuse`, in units of E."""
        return len(self.places)

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        """The head's input (B, ME): the concatenated features, zero where `present_BM` is false."""
        return torch.cat([features[modality] for modality in self.places], dim=-1)

    def decays(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether weight decay applies to a trained parameter; None: the published rule, by name, decides."""
        return None

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, each in one named part that a method may train (`Method.trains`)."""
        raise NotImplementedError

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """Sets how the backbone computes, without changing what it computes.

        Args:
            dtype: dtype of the blocks' matrix products and convolutions. Their frozen weights are stored in it, so they
                are never cast again; norms, embeddings and trained parameters keep their dtype.
            checkpointing: recompute activations within a block in the backward pass instead of storing them.
        """
        raise NotImplementedError


def zero_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """A scalar zero that depends on `tensors`, so that their gradients are zero rather than None.

    It stands in for a computation that no sample of the batch needs: the published code encodes everything and masks
    it, and in training with several processes, another process may have samples with the modality.
    """
    return sum((0.0 * tensor.float().sum() for tensor in tensors), torch.zeros((), device=device))
