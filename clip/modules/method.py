"""What a method is: the slots it gives the frozen towers, what it trains, and its own losses.

Shape suffixes: B samples, T missing types, m slots of one group, D width of a tower.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clip.modules.interfaces import Backbone, Blanks, ModelInput, Place, TowerSlots

PROMPT_STD = 0.02
METHOD = "method"
EVERY_PART = "every part"
UNUSED = "method, unused"


@dataclass(frozen=True)
class MethodOptions:
    """Which method, and the options of methods and heads; `far` to `dynamic_init` are REP's (docs/method.md, 7)."""

    prompt_type: str = "rep"
    memory_length: int = 36
    """Slots in all; a third each private, shared, dynamic. Methods without these groups have a third in each block."""
    memory_depth: int = 6
    """Blocks of each tower, from the first on, that get slots of their own."""
    far: bool = True
    """Feature aggregation and replay: the residual bypass, and the replay if `replay_depth` is above 0."""
    fmb: bool = True
    """Feature memory buffers: private slots by missing type, and shared slots."""
    replay_depth: int = 0
    """Blocks after the memory depth that get back the outputs of earlier blocks at the slots."""
    decoupling_weight: float = 0.0
    """Weight of the loss that keeps private and shared slots apart."""
    dynamic_init: bool = False
    """Shared slots start from the sample, too."""
    text_windows: int = 1
    """Windows of 75 tokens that a text is read in, at most; each is encoded as a text of its own, and the head gets
    mean and maximum of their features."""
    group_texts: bool = False
    """Whether all texts of a row, such as the plots of a film, are read together, as one sample."""
    train_ends: bool | None = None
    """Whether what follows the last blocks is trained; None: as method and head are published."""
    dpl_margins: tuple[float, ...] = (0.1, 0.1, 0.1)
    """Head DPL: in radians, for complete samples, those without text, those without image."""
    dpl_contrast_weight: float = 0.0
    """Head DPL: weight of the contrast between prototypes."""
    lora_matrices: str = "qk"
    """MoRA and LoRA: which of q, k, v are adapted."""
    lora_rank: tuple[int, ...] = (4, 4, 4)
    """Of the shared update, the image tower's own and the text tower's own."""
    lora_alpha: float = 0.001
    """Factor on the updates."""
    aoept_prototypes: int = 256
    """AOEPT: clusters of each tower and block."""
    aoept_weight: float = 0.05
    """AOEPT: of the auxiliary loss."""
    aoept_read: str = "published"
    """AOEPT: position of the text that is read, that of the published code or `end`."""
    rdn_hidden: int = 32
    """Of text, audio and vision, like the options below: width within REP's projections."""
    mask_readout: bool = False
    """What is read out of the tower of a missing modality becomes 0."""
    train_pooler: bool = False
    """REP trains the pooler too."""
    prompt_length: int = 16
    """MPLMM: steps of each of its prompts."""
    neighbours: int = 0
    """Nearest training samples, of frozen towers, that the head uses too (`clip/modules/neighbours.py`); 0: none."""

    @property
    def slots(self) -> int:
        """m; raises ValueError unless `memory_length` is a positive multiple of 3."""
        if self.memory_length < 3 or self.memory_length % 3:
            raise ValueError(
                f"memory_length must be a positive multiple of 3 (private, shared and dynamic slots), "
                f"found {self.memory_length}"
            )
        return self.memory_length // 3


class Method(nn.Module):
    """A method. A new one is a subclass in a file of its own and a line in `clip/modules/registry.py`.

    Parameters and buffers may have any name: checkpoints keep them all, but for those in the part UNUSED.

    Args:
        places: where slots can enter, by modality.
        embed_dim: E, the width that all modalities' features have.

    Raises:
        ValueError: the sizes do not fit each other or the backbone.
    """

    attribute: ClassVar[str] = "prompt_learner"
    """Its name in the model, and in published checkpoints."""
    identity_at_init: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of parameters that change nothing at their start values, for options of the method."""
    grey: ClassVar[float | None] = None
    """Of methods that encode missing inputs all the same: level of the image in place of one, see `blanks`."""
    sees_training_split: ClassVar[bool] = False
    """Whether the training starts with a pass over its samples, see `see`."""
    fills: ClassVar[bool] = False
    """Whether `adapt` gives tokens with parameters in them where inputs are zeros."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.98)
    """Of AdamW."""
    trains_head: ClassVar[bool] = True
    """Whether the head, and what the backbone always trains, are trained too."""
    decays_all: ClassVar[bool] = False
    """Whether weight decay is for all that it trains."""
    per_sample = False
    """True: a modality's slots follow from more of a sample than its missing type and its input of that modality, so
    that an input that several samples share has to be encoded for each of them."""

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__()
        self.places = places
        self.options = options
        if self.grey is not None:
            self.register_buffer("text_marks", torch.zeros(2, dtype=torch.long))

    @property
    def blanks(self) -> Blanks | None:
        """What it encodes in place of missing inputs; None where they are left out, as most methods have it."""
        return None if self.grey is None else Blanks(self.grey, self.get_buffer("text_marks"))

    def adapt(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tokens of `Backbone.embed` as they enter the frozen layers, (B, L, D) where it makes missing ones up."""
        return tokens

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The slots of a batch, by place, B rows each.

        Args:
            tokens: input tokens (b, L, D) of the modalities that any sample has.
        """
        raise NotImplementedError

    def encode(
        self,
        backbone: Backbone,
        batch: ModelInput,
        tokens: Mapping[str, Tensor],
        slots: Mapping[str, TowerSlots],
    ) -> dict[str, Tensor]:
        """Features (B, E) by modality; a method whose towers read each other goes through the blocks itself."""
        return backbone.encode(batch, tokens, slots)

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Its own losses in training, weighted, by the names that they are logged under (`train/NAME`).

        Args:
            slots: what `forward` gave.
            features: (B, E) by modality.
            labels: (B, C) of 0 and 1, or (B,) class numbers.
        """
        return {}

    def augment(self, batch: ModelInput, labels: Tensor, n_classes: int) -> tuple[ModelInput, Tensor]:
        """The batch and the labels to train on; (B, C) shares of classes where samples are mixed."""
        return batch, labels

    def pretraining_losses(self, backbone: Backbone, batch: ModelInput) -> dict[str, Tensor]:
        """Of a method in PRETRAINING: what it minimises, weighted, by name; in evaluation mode too."""
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters, each in one named part."""
        return {METHOD: list(self.parameters())}

    def trains(self, task: str) -> tuple[str, ...]:
        """The parts, of its own and of the backbone, that it trains for `task`; the head always is."""
        return (METHOD,)

    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        """Takes what its start values need of the backbone.

        Args:
            embeddings: (D,) by place: the class token of the image tower, the embedding of `<end>` of the text tower;
                and as `text_marks` (2,) the token ids of start and `<end>`.
        """
        if self.grey is not None:
            self.get_buffer("text_marks").copy_(embeddings["text_marks"])

    def start_on(self, backbone: Backbone) -> None:
        """Takes what its start values need of the frozen weights."""

    def see(self, backbone: Backbone, batches: Iterable[ModelInput]) -> None:
        """Looks at the samples of the training split before the training, where `sees_training_split`."""


def of_missing_type(slots_of_type: Sequence[Tensor], batch: ModelInput) -> Tensor:
    """(B, m, D) of T tensors (m, D): those of each sample's missing type, see `by_missing_type`."""
    return by_missing_type(slots_of_type, batch)[batch.missing_type_B]


def by_missing_type(slots_of_type: Sequence[Tensor], batch: ModelInput) -> Tensor:
    """(T, m, D) of T tensors (m, D).

    Slots of types that do not occur get no gradient, not one of zero: as published, the optimiser leaves them alone.
    """
    return torch.stack([
        slots if missing_type in batch.types else slots.detach() for missing_type, slots in enumerate(slots_of_type)
    ])  # fmt: skip


def without(parameters: Iterable[nn.Parameter], *taken: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are in none of the groups `taken`."""
    ids = {id(parameter) for group in taken for parameter in group}
    return [parameter for parameter in parameters if id(parameter) not in ids]


def prompts(*shape: int) -> nn.Parameter:
    """Learnable prompts of this shape, N(0, 0.02²)."""
    return nn.Parameter(PROMPT_STD * torch.randn(*shape))


def check_depth(places: Mapping[str, Place], depth: int, replayed: int = 0) -> None:
    """Raises ValueError unless `depth` is 1 or more, and each tower has so many blocks and `replayed` more."""
    if depth < 1:
        raise ValueError(f"memory_depth must be at least 1, found {depth}")
    option, value, most = "memory_depth", depth, min(place.depth for place in places.values())
    if depth <= most:
        option, value, most = f"memory_depth={depth} with replay_depth", replayed, most - depth
    if value > most:
        there = ", ".join(f"{place.depth} in the {name} tower" for name, place in places.items())
        fits = f"; {option}={most} is the most" if most else ""
        raise ValueError(f"{option}={value} is more than the backbone has blocks ({there}){fits}")
