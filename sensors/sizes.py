"""Sizes of the backbones for sensor time series, and what they are where a task does not say otherwise."""

from dataclasses import asdict, dataclass, field
from typing import Any

from common.records import record_of

SWT, DEEPSENSE = NETWORKS = ("swt", "deepsense")
MOST_MODALITIES = 4


def check_sizes(sizes: object, *names: str) -> None:
    """Raises ValueError where one, or a value of a list of them, is no integer of at least 1."""
    for name in names:
        value = getattr(sizes, name)
        values = value if isinstance(value, list) else [value]
        if not values or any(type(one) is not int or one < 1 for one in values):
            raise ValueError(f"{name}: expected integers of at least 1, found {value}")


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

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "samples", "patch", "window", "kernel", "stride", "inner_kernel")
        for name, pair in (("patch", self.patch), ("window", self.window)):
            if len(pair) != 2:
                raise ValueError(f"{name}: expected two sizes, found {pair}")


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
        widths = ("width", "feature_width", "projection_width", "recurrent_width")
        check_sizes(self, "intervals", *widths, "blocks", "heads")
        if self.projection_width % 2:
            raise ValueError(
                f"projection_width: expected two halves, shared and private, found {self.projection_width}"
            )
        if self.inner_layers < 0 or self.temperature <= 0:
            found = f"{self.inner_layers} and {self.temperature}"
            raise ValueError(f"inner_layers and temperature: expected 0 or more, and above 0, found {found}")

    def of(self, modality: str) -> ModalitySizes:
        """The sizes of a modality; raises ValueError where they are none."""
        return record_of(ModalitySizes, self.modalities[modality])


def shapes_of(sizes: SensorSizes) -> str:
    """The modalities, in order, and the shapes of their signals, which a backbone is for."""
    of = {name: sizes.of(name) for name in sizes.modalities}
    return ", ".join(f"{name} ({x.channels}, {sizes.intervals}, {x.samples})" for name, x in of.items())


def size_of(sizes: SensorSizes, entry: str) -> Any:
    """What an entry of the option `network` is: of all, or by modality."""
    if entry == "type":
        return sizes.network
    if hasattr(sizes, entry):
        return getattr(sizes, entry)
    return {name: getattr(sizes.of(name), entry) for name in sizes.modalities}


MOD_SIZES = {
    "seismic": asdict(ModalitySizes(1, 20)),
    "audio": asdict(ModalitySizes(1, 1600, patch=[1, 40], kernel=80, stride=80, inner_kernel=5)),
}
