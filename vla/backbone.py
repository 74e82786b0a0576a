"""MulT (Tsai et al., ACL 2019), the backbone of MPLMM (arXiv 2407.05374): docs/vla.md sections 2 and 3.

All modalities are projected to one width. Six cross-modal encoders let each modality attend to each of the others. A
causal encoder for each modality, its tower, runs on their outputs, and its last step is the modality's feature.

Shape suffixes: B samples, n some of them, T steps of a target, S steps of a source, D width of an encoder, d width of
the backbone, m slots.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import Backbone, ModelInput, Place, Tower, TowerSlots
from common.dropout import dropout
from vla.encoder import DROPOUT, EMBEDDING_DROPOUT, LANES, Encoder, embed, seen

LETTERS = {"text": "l", "audio": "a", "vision": "v"}
"""The letters for modalities in published parameter names; all concatenations are in this order."""
START_STD = 0.02
FRONTENDS, POOLER, ENCODERS = "projections", "pooler", "encoders"
LEAST_TOWER_LAYERS = 3
GROUPS, SHORT = 3, 64
"""Number of groups of samples of similar length, each padded only as far as it needs; up to SHORT steps, one group."""


@dataclass(frozen=True)
class VlaArchitecture:
    """Sizes of the backbone."""

    text_steps: int
    audio_steps: int
    vision_steps: int
    text_dim: int
    audio_dim: int
    vision_dim: int
    width: int = 30
    heads: int = 5
    layers: int = 5
    """Number of layers of the cross-modal encoders; the towers have as many, but at least three."""
    project_all: bool = True
    """False in stage 1, where a modality that already has the width is not projected, as published."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(T, D) of each modality's features."""
        return {name: (getattr(self, f"{name}_steps"), getattr(self, f"{name}_dim")) for name in LETTERS}


class VlaBackbone(Backbone):
    """The model of stage 1, without its output layer, which is the head; parameter names are the published ones."""

    mixes = True
    always_trained = (FRONTENDS,)
    plain_head = True

    def __init__(self, arch: VlaArchitecture) -> None:
        super().__init__()
        d, w = arch.width, 2 * arch.width
        if d % arch.heads or arch.width < 4:
            raise ValueError(f"width: expected a multiple of heads={arch.heads}, 4 or more, found {arch.width}")
        self.arch = arch
        tower_layers = max(arch.layers, LEAST_TOWER_LAYERS)
        self.places = {name: Place(w, tower_layers, input_shape=shape) for name, shape in arch.shapes.items()}
        self.embed_dim = w
        for name, letter in LETTERS.items():
            self.add_module(f"proj_{letter}", nn.Conv1d(arch.shapes[name][1], d, kernel_size=1, bias=False))
        for target, source in permutations(LETTERS, 2):
            self.add_module(_cross_name(target, source), Encoder(d, arch.heads, arch.layers))
        for name in LETTERS:
            self.add_module(_tower_name(name), Encoder(w, arch.heads, tower_layers))
        self.proj1, self.proj2 = nn.Linear(3 * w, 3 * w), nn.Linear(3 * w, 3 * w)
        # With a bias of 0, padding would enter the towers as exact zeros, where a LayerNorm is 300 times as steep.
        for encoder in self._cross_encoders():
            nn.init.normal_(encoder.layer_norm.bias, std=START_STD)

    @property
    def towers(self) -> dict[str, Tower]:
        return {name: self._encoder(_tower_name(name)) for name in LETTERS}

    def _encoder(self, name: str) -> Encoder:
        encoder = self.get_submodule(name)
        assert isinstance(encoder, Encoder)
        return encoder

    def _cross_encoders(self) -> Iterator[Encoder]:
        return (self._encoder(_cross_name(target, source)) for target, source in permutations(LETTERS, 2))

    def prepare(self, batch: ModelInput) -> ModelInput:
        """Applies dropout to the text features, once for all later uses."""
        text = dropout(batch.inputs["text"], EMBEDDING_DROPOUT, self.training)
        return batch._replace(inputs={**batch.inputs, "text": text})

    def embed(self, batch: ModelInput) -> dict[str, Tensor]:
        """Projected features (b, T, d) of every modality that any sample has."""
        projected = {}
        for name, x_bTD in batch.inputs.items():
            if len(x_bTD):
                weight = self.get_parameter(f"proj_{LETTERS[name]}.weight")
                skip = not self.arch.project_all and x_bTD.shape[-1] == self.arch.width
                projected[name] = x_bTD if skip else F.linear(x_bTD, weight[..., 0])
        return projected

    def mix(self, batch: ModelInput, tokens: Mapping[str, Tensor], *, padded: bool = True) -> dict[str, Tensor]:
        """Embedded inputs (B, T, 2d) of the towers, including samples without the modality.

        Args:
            tokens: (B, T, d) of all samples, or (b, T, d) of those that have the modality, with zeros for the others.
            padded: whether steps of zeros are padding rather than made by parameters.
        """
        B, lengths, targets, sources = len(batch.present_BM), {}, {}, {}
        for name, (T, _) in self.arch.shapes.items():
            x_BTd = tokens.get(name)
            if x_BTd is None:
                x_BTd = next(iter(tokens.values())).new_zeros(B, T, self.arch.width)
            elif len(x_BTd) < B:
                x_BTd = batch.to_all_samples(name, x_BTd)
            lengths[name] = _lengths(x_BTd) if padded and not x_BTd.is_cuda else [T] * B  # would stall a GPU
            targets[name], sources[name] = (embed(x_BTd, self.training) for _ in range(2))
        mixed = {}
        for target, tower in self.towers.items():
            streams = [
                cross(
                    self._encoder(_cross_name(target, source)),
                    targets[target],
                    sources[source],
                    lengths[target],
                    lengths[source],
                )
                for source in self.arch.shapes
                if source != target
            ]
            mixed[target] = tower.embed(torch.cat(streams, dim=-1))
        return mixed

    def encode(
        self, batch: ModelInput, tokens: Mapping[str, Tensor], slots: Mapping[str, TowerSlots]
    ) -> dict[str, Tensor]:
        """Features (B, 2d) of every modality; for a missing one, they hold what it read from the others."""
        return {name: tower.encode(tokens[name], tokens[name], slots[name]) for name, tower in self.towers.items()}

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        """The concatenated features (B, 6d), after the residual pooler."""
        z = super().fuse(features, present_BM)
        return self.proj2(dropout(F.relu(self.proj1(z)), DROPOUT, self.training)) + z

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The feature projections, the pooler and the encoders."""
        projections = [self.get_parameter(f"proj_{letter}.weight") for letter in LETTERS.values()]
        pooler = [*self.proj1.parameters(), *self.proj2.parameters()]
        encoders = [p for encoder in (*self._cross_encoders(), *self.towers.values()) for p in encoder.parameters()]
        return {FRONTENDS: projections, POOLER: pooler, ENCODERS: encoders}

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        """See `Backbone.compute`. 16-bit precision is left to autocast, since there are few weights."""
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpointing = checkpointing


def _lengths(x_BTd: Tensor) -> list[int]:
    """Length of each sample: the number of steps from its first nonzero step to the end."""
    real_BT = (x_BTd != 0).any(dim=-1)
    return ((real_BT.shape[1] - real_BT.int().argmax(dim=1)) * real_BT.any(dim=1)).tolist()


def cross(
    encoder: Encoder, target_BTd: Tensor, source_BSd: Tensor, target_lengths: list[int], source_lengths: list[int]
) -> Tensor:
    """Runs a cross-modal encoder on embedded targets and sources, with as little work on padding as possible.

    The lengths count the steps from a sample's first nonzero step to the end; padding comes before it. Padding steps
    that see only padding have equal outputs, which depend on no parameter before the encoder. The padding in front of a
    source is represented by a single step, weighted by the number of steps that it stands for.
    """
    T, S = target_BTd.shape[1], source_BSd.shape[1]
    groups = _groups(target_lengths, source_lengths, T, S)
    most = T - min(R for _, R, _ in groups)
    blank_BTd = encoder.cross_zeros(len(target_BTd), seen(T, S)[:most]) if most else target_BTd[:, :0]
    read, start = [], 0
    for rows, R, K in groups:
        W = min(-(-(K + 1) // LANES) * LANES, S) if K else 0
        target_nRd, source_nWd = target_BTd[:, T - R :], source_BSd[:, S - W :]
        if len(groups) > 1:
            target_nRd, source_nWd = target_nRd[rows], source_nWd[rows]
        live_nRd = encoder.cross(target_nRd, source_nWd, T, S) if R else target_nRd
        end = start + len(rows)
        read.append(torch.cat([blank_BTd[start:end, : T - R], live_nRd], dim=1))
        start = end
    if len(groups) == 1:
        return read[0]
    order = torch.tensor([row for rows, _, _ in groups for row in rows], device=target_BTd.device)
    return torch.cat(read)[order.argsort()]


def _groups(targets: list[int], sources: list[int], T: int, S: int) -> list[tuple[list[int], int, int]]:
    """Groups of samples to compute together, each with the number of last steps that any of its samples needs, R of the
    target and K of the source.

    Args:
        targets: length of each sample's target without padding.
        sources: length of each sample's source without padding.
    """
    # Step i sees the first nonzero step of the source if i + |S - T| ≥ S - length.
    seeing = [T - min(max(S - length - abs(S - T), 0), T) if length else 0 for length in sources]
    sizes = [(bool(source), max(pair), source) for source, *pair in zip(sources, targets, seeing, strict=True)]
    groups: dict[tuple[bool, int], list[int]] = {}
    count = min(GROUPS, len(set(sizes))) if max(T, S) > SHORT else 1
    for rank, row in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        groups.setdefault((sizes[row][0], rank * count // len(sizes)), []).append(row)
    return [
        (sorted(rows), max(sizes[row][1] for row in rows), max(sizes[row][2] for row in rows))
        for rows in groups.values()
    ]


def _cross_name(target: str, source: str) -> str:
    return f"trans_{LETTERS[target]}_with_{LETTERS[source]}"


def _tower_name(modality: str) -> str:
    return f"trans_{LETTERS[modality]}_mem"
