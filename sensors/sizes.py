"""Sizes of the backbones for sensor time series, and what they are where a task does not say otherwise."""

from dataclasses import asdict, dataclass, field
from typing import Any

from common.records import record_of

SWT, DEEPSENSE = NETWORKS = ("swt", "deepsense")
MOST_MODALITIES = 4


@dataclass(frozen=True)
class ModalitySizes:
    """Those of one modality."""

    channels: int
    samples: int
    """Values of an interval."""
    patch: list[int] = field(default_factory=lambda: [1, 1])
    """SW-Transformer: intervals and bins of a token."""
    window: list[int] = field(default_factory=lambda: [3, 3])
    """SW-Transformer: rows and columns of tokens that see each other."""
    kernel: int = 3
    """DeepSense: of the first convolution."""
    stride: int = 1
    """Likewise."""
    inner_kernel: int = 3
    """DeepSense: of the other convolutions."""


@dataclass(frozen=True)
class SensorSizes:
    """A backbone. What the other network alone needs does not matter."""

    network: str
    """One of NETWORKS."""
    location: str
    """Part of the names of entries in checkpoints."""
    intervals: int
    """Of a sample."""
    modalities: dict[str, Any]
    """By name, in order: the fields of `ModalitySizes`."""
    width: int
    """SW-Transformer: C, of the first stage. DeepSense: of what the convolutions give."""
    feature_width: int
    """SW-Transformer: E."""
    projection_width: int
    """Of FOCAL's projected features."""
    blocks: list[int] = field(default_factory=lambda: [2, 2, 4])
    """SW-Transformer: of each stage."""
    heads: int = 4
    """SW-Transformer: in every stage, and in the fusion."""
    inner_layers: int = 4
    """DeepSense: convolutions after the first."""
    recurrent_width: int = 256
    """DeepSense: of each direction of the GRU."""
    temperature: float = 0.07
    """FOCAL's."""
    train_patch_embed: bool = False
    """SW-Transformer: whether pretraining trains the embedding of patches, which the published code leaves random."""
    input_scale: dict[str, float] = field(default_factory=dict)
    """By modality, what signals are divided by; none: 1."""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network: expected {' or '.join(NETWORKS)}, found {self.network!r}")
        if not 1 <= len(self.modalities) <= MOST_MODALITIES:
            raise ValueError(f"modalities: expected 1 to {MOST_MODALITIES}, found {len(self.modalities)}")

    def of(self, modality: str) -> ModalitySizes:
        """The sizes of a modality; raises ValueError where they are none."""
        return record_of(ModalitySizes, self.modalities[modality])


MOD_SIZES = {
    "seismic": asdict(ModalitySizes(1, 20)),
    "audio": asdict(ModalitySizes(1, 1600, patch=[1, 40], kernel=80, stride=80, inner_kernel=5)),
}
