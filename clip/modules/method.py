"""What a method is: the slots it gives the frozen towers, what it trains, and its own loss.

Shape suffixes: B batch, N rows (missing types), m slots of one group, V widths of both towers together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import ClipArchitecture, TowerMemory

PROMPT_STD = 0.02
ALL_TYPES = (0, 1, 2)
NO_TASK: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MethodOptions:
    """Which method, and its options; those after the third are REP's (METHOD.md section 7)."""

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
    """Blocks after the memory depth that get back what earlier blocks made of the slots."""
    decoupling_weight: float = 0.0
    """Weight of the loss that keeps private and shared slots apart."""
    dynamic_init: bool = False
    """Shared slots start from the sample, too."""

    @property
    def slots(self) -> int:
        """m; raises ValueError unless `memory_length` is a positive multiple of 3."""
        if self.memory_length < 3 or self.memory_length % 3:
            raise ValueError(
                f"memory_length must be a positive multiple of 3 (private, shared and dynamic slots), "
                f"found {self.memory_length}"
            )
        return self.memory_length // 3


class Memory(NamedTuple):
    """What a method gives for a batch, or for missing types."""

    image: TowerMemory
    text: TowerMemory
    penalty: Tensor | None = None
    """A loss of the method's own, already weighted; in training only."""

    def rows(self, index: Tensor) -> "Memory":
        """The memory of the rows `index`, in that order."""
        return Memory(self.image.rows(index), self.text.rows(index), self.penalty)


class Method(nn.Module):
    """A method. A new one is a subclass in a file of its own and a line in `clip/modules/registry.py`.

    Subclasses take `(arch, options)`, and give slots by missing type in `of_types`. Those whose slots are drawn for
    each sample (dropout), or depend on its input, override `forward` too.

    Raises:
        ValueError: the sizes do not fit each other or the backbone.
    """

    attribute: ClassVar[str] = "prompt_learner"
    """Where it is in the model: part of the names in checkpoints."""
    dynamic_names: ClassVar[tuple[str, tuple[str, str, str]] | None] = None
    """Of the attention and the queries that read dynamic slots from the input, where it has them."""
    trains_towers_on: ClassVar[frozenset[str]] = NO_TASK
    """Tasks for which it also trains the dynamic attention, the final norms and the image projection."""
    start_as_nothing: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of parameters that change nothing at their start values, for options of the method."""
    reads_input = False
    """True: `forward` needs the mean input tokens, and its slots are not the same for all samples of a type."""

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Beginnings of the names of its own parameters that it does not train."""
        return ()

    def of_types(self, types: Sequence[int]) -> Memory:
        """Slots of the missing types `types` (0 complete, 1 text missing, 2 image missing), a row for each."""
        raise NotImplementedError

    def forward(self, missing_type_B: Tensor, types: tuple[int, ...], input_BV: Tensor | None = None) -> Memory:
        """Slots of every sample of a batch.

        Args:
            missing_type_B: 0 complete, 1 text missing, 2 image missing.
            types: the values that occur in it, ascending.
            input_BV: with `reads_input`, each sample's mean input token of either tower, image first, zero where the
                modality is missing.
        """
        return self.of_types(types).rows(row_of_type(missing_type_B, types))

    def start_from(self, class_embedding_D: Tensor, end_embedding_D: Tensor) -> None:
        """Takes what its start values need of the backbone: the class token, and the embedding of `<end>`."""


def row_of_type(missing_type_B: Tensor, types: Sequence[int]) -> Tensor:
    """Of each sample, the row of its missing type among `types`, which are ascending."""
    absent = [missing_type for missing_type in ALL_TYPES if missing_type not in types]
    return missing_type_B - sum((missing_type_B > missing_type).long() for missing_type in absent)


def prompts(*shape: int) -> nn.Parameter:
    """Learnable prompts of this shape, N(0, 0.02²)."""
    return nn.Parameter(PROMPT_STD * torch.randn(*shape))


def check_depth(arch: ClipArchitecture, blocks: int, option: str) -> None:
    """Raises ValueError where either tower has fewer than `blocks` blocks, which `option` asks for."""
    if blocks > min(arch.vision_layers, arch.text_layers):
        raise ValueError(
            f"{option} is more than the backbone has blocks "
            f"({arch.vision_layers} in the image tower, {arch.text_layers} in the text tower)"
        )
