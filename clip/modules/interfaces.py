"""What data, backbone, method and head hand each other. Modalities go by name, in the order of the backbone's places.

Shape suffixes: B samples of the batch, b samples with a modality, M modalities, L sequence, m slots, P prefix keys,
D width of a tower, E width of a modality's features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Where slots can enter: a tower."""

    width: int
    depth: int
    """Blocks."""
    widths: tuple[int, ...] = ()
    """Of each block, where they differ; slots come in with the width of the first."""
    projection: int = 0
    """Width that pretraining compares features in."""
    input_shape: tuple[int, ...] = ()
    """Of an input of its modality, where all have one that methods may depend on."""


class ModelInput(NamedTuple):
    """A batch. A modality that a sample lacks is not in it, so it costs nothing."""

    inputs: Mapping[str, Tensor]
    """By modality, what b samples have of it: images (b, 3, R, R), token ids (b, L), arrays."""
    rows: Mapping[str, Tensor]
    """By modality, the numbers (b,) of these samples in the batch; B in rows of padding (see `rounded`), at the end."""
    present_BM: Tensor
    """True where a sample has a modality."""
    types: tuple[int, ...]
    """The missing types that occur, ascending, known without asking the device."""
    lengths: Mapping[str, int] = {}
    """By modality, the positions that matter (of texts: up to the last `<end>`), likewise; without an entry, all."""
    length_b: Mapping[str, Tensor] = {}
    """By modality that is padded in front, the length (b,) of each input."""
    source_of_B: Mapping[str, Tensor] = {}
    """By modality, where samples share an input: the row whose input each sample has; `rows` has just those."""
    index_B: Tensor | None = None
    """Numbers of the samples in their dataset."""
    split: str = ""
    """Which of a training's splits they are of, as `train`; "": of none."""
    kept: bool = False
    """Whether `inputs` are (b, D) what `Tower.body` made of each input, see `engine/kept_features.py`."""
    windows_BW: Tensor | None = None
    """Where texts are in several windows, B above is the number of all windows, each with the other inputs of its
    sample: of each sample the places of its own, -1 where another one has more."""

    @property
    def missing_type_B(self) -> Tensor:  # noqa: N802
        """The missing modalities as a binary number, the last modality the lowest digit.

        With image and text: 0 complete, 1 text missing, 2 image missing.
        """
        M = self.present_BM.shape[1]
        digits_M = 2 ** torch.arange(M - 1, -1, -1, device=self.present_BM.device)
        return ((~self.present_BM) * digits_M).sum(dim=1)

    def joined(self) -> "ModelInput":
        """What heads need to know of the samples, where `windows_BW` are several to a sample."""
        return self if self.windows_BW is None else self._replace(present_BM=self.present_BM[self.windows_BW[:, 0]])

    def samples_of(self, modality: str) -> Tensor:
        """The numbers (b,) of the samples that the inputs are of, for padding that of the last sample."""
        return self.rows[modality].clamp(max=len(self.present_BM) - 1)

    def to_all_samples(self, modality: str, x_b: Tensor) -> Tensor:
        """(B, …) of (b, …): zero for samples without the modality."""
        B = len(self.present_BM)
        x_B = x_b.new_zeros(B + 1, *x_b.shape[1:])  # the last row takes the padding, which is dropped
        return x_B.index_copy(0, self.rows[modality], x_b)[:B]

    def rounded(self, step: int | None = None) -> "ModelInput":
        """The batch in one of few shapes, since each new shape costs a GPU time.

        What becomes of the inputs that are added, by repeating the last one, is dropped: results stay the same, and no
        gradient comes from them. Lengths are rounded up to a multiple of 4.

        Args:
            step: what numbers of inputs are rounded up to a multiple of; None: half the root of B, as they vary by it.
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
        """Every sample with inputs of its own, for methods that treat samples with the same input differently."""
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
"""What takes the place of a block's projections: (0 query, 1 key or 2 value; input (…, D); frozen weight (D, D); bias
(D,)) to (…, D)."""


class Blanks(NamedTuple):
    """What stands for a missing input, for methods that encode it all the same."""

    grey: float
    """Level of the image, 0 to 1, before it is normalised."""
    text_marks: Tensor
    """(2,): the token ids of start and `<end>`, between which an empty text has nothing."""


class TowerSlots(NamedTuple):
    """What a method puts into one tower, a row for each sample. Lists go by block, from the first.

    The sequence of a block is `[replaced | inserted | dynamic | tokens]`, for REP
    `[private | shared | dynamic | tokens]`.
    """

    replaced_BmD: Sequence[Tensor] = ()
    """Take the place of those of the block before; the last ones stay."""
    inserted_BmD: Sequence[Tensor] = ()
    """Come in before a block, in front of the sequence, and stay; where slots are replaced, before the first alone."""
    dynamic_BmD: Tensor | None = None
    """Come in before the first block, right in front of the tokens, and stay."""
    appended_BmD: Tensor | None = None
    """Tokens behind the others, embedded like them; of towers that read a sequence's last token."""
    prefix_BP2D: Sequence[Tensor] = ()
    """Keys and values that all positions of a block see, without positions of their own."""
    replay: Sequence[Callable[[Sequence[Tensor]], Tensor]] = ()
    """For blocks after those that replace slots: from the outputs (B, P, D) of each replacing block at replaced and
    inserted slots to what is added to these slots (B, P, D)."""
    adapters: Mapping[int, Adapter] = {}
    """By block, for those whose projections are adapted."""

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
        """All of them."""
        single = [each for each in (self.dynamic_BmD, self.appended_BmD) if each is not None]
        return [*self.replaced_BmD, *self.inserted_BmD, *single, *self.prefix_BP2D]


NO_SLOTS = TowerSlots()


class Tower(nn.Module):
    """The encoder of one modality."""

    def embed(self, input_b: Tensor) -> Tensor:
        """Input tokens (b, L, D)."""
        raise NotImplementedError

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots) -> Tensor:
        """(b, D): what the last block gives of input tokens, where features are read."""
        raise NotImplementedError

    def end(self, x_bD: Tensor) -> Tensor:
        """Features (b, E) of what `body` gave: what follows the last block, see `Backbone.ends`."""
        return x_bD

    def encode(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, E) of input tokens."""
        return self.end(self.body(tokens_bLD, input_b, slots))

    def forward(self, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, E) of inputs."""
        return self.encode(self.embed(input_b), input_b, slots)


class Backbone(nn.Module):
    """Towers whose features are joined. Another family of models is another subclass."""

    places: dict[str, Place]
    """By modality."""
    embed_dim: int
    """E."""
    mixes = False
    """Whether modalities read each other before their towers, so that samples cannot share the features of one."""
    ends: tuple[str, ...] = ()
    """Parts (see `parts`) that follow the last blocks, for `train_ends`."""
    always_trained: tuple[str, ...] = ()
    """Parts (see `parts`) that are trained whatever the method."""
    plain_head = False
    """Whether a linear head starts at PyTorch's own values, as that of the published model does."""

    @property
    def towers(self) -> dict[str, Tower]:
        """By modality."""
        raise NotImplementedError

    def prepare(self, batch: ModelInput) -> ModelInput:
        """The batch as all that follows reads it: with dropout on its inputs, for example."""
        return batch

    def complete(self, batch: ModelInput, blanks: Blanks, *, once: bool) -> ModelInput:
        """The batch with `blanks` in place of missing inputs; with `once`, all samples that miss one share it."""
        raise ValueError("the method encodes missing inputs, which this family of backbones has not defined")

    def mix(self, batch: ModelInput, tokens: Mapping[str, Tensor], *, padded: bool = True) -> Mapping[str, Tensor]:
        """Input tokens of the towers, where modalities read each other before: from those of `embed`.

        Args:
            padded: whether steps of zeros are padding, which no parameter has made, see `Method.fills`.
        """
        return tokens

    def embed(self, batch: ModelInput) -> dict[str, Tensor]:
        """Input tokens (b, L, D) of the modalities that any sample has."""
        present = {modality: tower for modality, tower in self.towers.items() if len(batch.rows[modality])}
        if batch.kept:
            return {modality: batch.inputs[modality] for modality in present}
        with torch.autocast(batch.present_BM.device.type, enabled=False):  # towers compute in the type of their weights
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
                if batch.kept:
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
        """How many times E what `fuse` gives is wide."""
        return len(self.places)

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        """What the head classifies: (B, ME), the features side by side, zero where `present_BM` is false."""
        return torch.cat([features[modality] for modality in self.places], dim=-1)

    def decays(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether weight decay is for a trained parameter; None: as the published rule of names says."""
        return None

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters, each in one named part, which a method may train (`Method.trains`)."""
        raise NotImplementedError

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """Sets how it computes; what it computes stays the same.

        Args:
            dtype: of the blocks' matrix products and convolutions. Their weights, which are frozen, are held in it and
                never cast again; norms, embeddings and trained parameters keep their type.
            checkpointing: recompute activations within a block for the gradients instead of keeping them.
        """
        raise NotImplementedError


def zero_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """A scalar zero that depends on `tensors`, so that their gradients are zero, not absent.

    For what no sample of a batch needs: the published code encodes everything and masks, and in a training over several
    processes another one may have the modality.
    """
    return sum((0.0 * tensor.float().sum() for tensor in tensors), torch.zeros((), device=device))
