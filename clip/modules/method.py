"""The interface of methods: the slots they give the frozen towers, the parts they train, and their own losses.

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
    """Options of methods and heads; `far` to `dynamic_init` are REP's (docs/method.md section 7)."""

    prompt_type: str = "rep"
    memory_length: int = 36
    """Total number of slots: a third each are private, shared and dynamic. Methods without these groups have a third of
    it in each block."""
    memory_depth: int = 6
    """Number of blocks of each tower, from the first on, that get slots of their own."""
    far: bool = True
    """Feature aggregation and replay: the residual bypass, and the replay if `replay_depth` is above 0."""
    fmb: bool = True
    """Feature memory buffers: private slots for each missing type, and shared slots."""
    replay_depth: int = 0
    """Number of blocks after the memory depth that earlier blocks' outputs at the slots are replayed into."""
    decoupling_weight: float = 0.0
    """Weight of the loss that keeps private and shared slots apart."""
    dynamic_init: bool = False
    """Whether shared slots start from the sample as well."""
    text_windows: int = 1
    """Largest number of 75-token windows that a text is read in; each is encoded as a separate text, and the head gets
    the mean and maximum of their features."""
    group_texts: bool = False
    """Whether all texts of a row, such as the plots of a film, are read together as one sample."""
    train_ends: bool | None = None
    """Whether the layers after the last blocks are trained; None: as published for the method and head."""
    dpl_margins: tuple[float, ...] = (0.1, 0.1, 0.1)
    """DPL head: angular margins in radians for samples that are complete, without text, and without image."""
    dpl_contrast_weight: float = 0.0
    """DPL head: weight of the contrast loss between prototypes."""
    lora_matrices: str = "qk"
    """MoRA and LoRA: which of q, k, v are adapted."""
    lora_rank: tuple[int, ...] = (4, 4, 4)
    """MoRA and LoRA: ranks of the shared update, the image tower's own update and the text tower's own."""
    lora_alpha: float = 0.001
    """MoRA and LoRA: factor on the updates."""
    aoept_prototypes: int = 256
    """AOEPT: number of clusters for each tower and block."""
    aoept_weight: float = 0.05
    """AOEPT: weight of the auxiliary loss."""
    aoept_read: str = "published"
    """AOEPT: position where the text is read out, `published` (that of the published code) or `end`."""
    rdn_hidden: int = 32
    """Text, audio and vision: hidden width of REP's projections."""
    mask_readout: bool = False
    """Text, audio and vision: whether the feature of a missing modality is set to 0."""
    train_pooler: bool = False
    """Text, audio and vision: whether REP also trains the pooler."""
    prompt_length: int = 16
    """MPLMM: number of steps in each prompt."""
    neighbours: int = 0
    """`none`: number of nearest training samples that the head also uses, see `clip/modules/neighbours.py`."""

    @property
    def slots(self) -> int:
        """Number of slots m in one group; raises ValueError unless `memory_length` is a positive multiple of 3."""
        if self.memory_length < 3 or self.memory_length % 3:
            raise ValueError(
                f"memory_length must be a positive multiple of 3 (private, shared and dynamic slots), "
                f"found {self.memory_length}"
            )
        return self.memory_length // 3


class Method(nn.Module):
    """Base class of methods. To add one, write a subclass in its own file and a line in `clip/modules/registry.py`.

    Parameters and buffers may have any name: checkpoints contain all of them except those in the part UNUSED.

    Args:
        places: the towers that slots can enter, keyed by modality.
        embed_dim: width E of every modality's features.

    Raises:
        ValueError: the sizes do not fit each other or the backbone.
    """

    attribute: ClassVar[str] = "prompt_learner"
    """Name of the method in the model and in published checkpoints."""
    identity_at_init: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of optional parameters that change nothing at their initial values."""
    grey: ClassVar[float | None] = None
    """Grey level of the image encoded for a missing one, see `blanks`; None: missing inputs are not encoded."""
    sees_training_split: ClassVar[bool] = False
    """Whether training starts with a pass over its samples, see `see`."""
    generates_missing: ClassVar[bool] = False
    """Whether `adapt` adds parameters to tokens where inputs are zero."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.98)
    """AdamW's betas."""
    trains_head: ClassVar[bool] = True
    """Whether the head and the backbone's `always_trained` parts are trained too."""
    decays_all: ClassVar[bool] = False
    """Whether weight decay applies to everything that is trained."""
    per_sample = False
    """Whether a modality's slots depend on more than the sample's missing type and its input of that modality; an input
    shared by several samples is then encoded separately for each of them."""

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__()
        self.places = places
        self.options = options
        if self.grey is not None:
            self.register_buffer("text_marks", torch.zeros(2, dtype=torch.long))

    @property
    def blanks(self) -> Blanks | None:
        """Placeholders encoded for missing inputs; None in most methods, which leave missing inputs out."""
        return None if self.grey is None else Blanks(self.grey, self.get_buffer("text_marks"))

    def adapt(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tokens of `Backbone.embed` as they enter the frozen layers; (B, L, D) if the method generates missing
        ones."""
        return tokens

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The slots of a batch, keyed by modality, with B rows each.

        Args:
            tokens: input tokens (b, L, D) of every modality that any sample has.
        """
        raise NotImplementedError

    def encode(
        self,
        backbone: Backbone,
        batch: ModelInput,
        tokens: Mapping[str, Tensor],
        slots: Mapping[str, TowerSlots],
    ) -> dict[str, Tensor]:
        """Features (B, E), keyed by modality; a method in which towers interact overrides this to run the blocks."""
        return backbone.encode(batch, tokens, slots)

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The method's own weighted losses in training, keyed by the name they are logged under (`train/NAME`).

        Args:
            slots: the output of `forward`.
            features: (B, E), keyed by modality.
            labels: 0 and 1 (B, C), or class indices (B,).
        """
        return {}

    def augment(self, batch: ModelInput, labels: Tensor, n_classes: int) -> tuple[ModelInput, Tensor]:
        """The batch and labels to train on; the labels are class shares (B, C) if samples are mixed."""
        return batch, labels

    def pretraining_losses(self, backbone: Backbone, batch: ModelInput) -> dict[str, Tensor]:
        """Weighted losses of a method in PRETRAINING, keyed by name; also called in evaluation mode."""
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The method's parameters, each in one named part."""
        return {METHOD: list(self.parameters())}

    def trains(self, task: str) -> tuple[str, ...]:
        """Parts of the method and of the backbone that are trained for `task`; for the head see `trains_head`."""
        return (METHOD,)

    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        """Sets initial values that depend on the backbone's embeddings.

        Args:
            embeddings: (D,), keyed by modality: the image tower's class token, the text tower's embedding of `<end>`;
                and under `text_marks` the token ids (2,) of start and `<end>`.
        """
        if self.grey is not None:
            self.get_buffer("text_marks").copy_(embeddings["text_marks"])

    def start_on(self, backbone: Backbone) -> None:
        """Sets initial values that depend on the frozen weights."""

    def see(self, backbone: Backbone, batches: Iterable[ModelInput]) -> None:
        """Passes over the samples of the training split before training, if `sees_training_split`."""


def select_by_missing_type(slots_of_type: Sequence[Tensor], batch: ModelInput) -> Tensor:
    """Slots (B, m, D) for each sample's missing type, selected from T tensors (m, D), see `by_missing_type`."""
    return by_missing_type(slots_of_type, batch)[batch.missing_type_B]


def by_missing_type(slots_of_type: Sequence[Tensor], batch: ModelInput) -> Tensor:
    """Stacks T tensors (m, D) to (T, m, D).

    Slots of missing types that do not occur in the batch get no gradient rather than a zero one, so the optimiser skips
    them, as in the published code.
    """
    return torch.stack([
        slots if missing_type in batch.types else slots.detach() for missing_type, slots in enumerate(slots_of_type)
    ])  # fmt: skip


def excluding(parameters: Iterable[nn.Parameter], *taken: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters in none of the groups `taken`."""
    ids = {id(parameter) for group in taken for parameter in group}
    return [parameter for parameter in parameters if id(parameter) not in ids]


def prompts(*shape: int) -> nn.Parameter:
    """Learnable prompts of this shape, initialised from N(0, 0.02²)."""
    return nn.Parameter(PROMPT_STD * torch.randn(*shape))


def check_depth(places: Mapping[str, Place], depth: int, replayed: int = 0) -> None:
    """Raises ValueError unless `depth` is at least 1 and every tower has `depth + replayed` blocks."""
    if depth < 1:
        raise ValueError(f"memory_depth must be at least 1, found {depth}")
    option, value, most = "memory_depth", depth, min(place.depth for place in places.values())
    if depth <= most:
        option, value, most = f"memory_depth={depth} with replay_depth", replayed, most - depth
    if value > most:
        depths = ", ".join(f"{place.depth} in the {name} tower" for name, place in places.items())
        limit = f"; the maximum is {option}={most}" if most else ""
        raise ValueError(f"{option}={value} needs more blocks than the backbone has ({depths}){limit}")
