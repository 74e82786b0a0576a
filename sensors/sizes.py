"""Sizes of the backbones for sensor time series, and their defaults."""

from dataclasses import asdict, dataclass, field
from typing import Any

from common.records import record_of

SWT, DEEPSENSE = NETWORKS = ("swt", "deepsense")
MOST_MODALITIES = 4
OF_NETWORK = {
    SWT: ("patch", "window", "blocks", "heads", "feature_width", "train_patch_embed"),
    DEEPSENSE: ("kernel", "stride", "inner_kernel", "inner_layers", "recurrent_width"),
}
"""The sizes that only one network has."""


def check_sizes(sizes: object, *names: str) -> None:
    """Raises ValueError unless each named size, or each value in a list of sizes, is an integer of at least 1."""
    for name in names:
        value = getattr(sizes, name)
        values = value if isinstance(value, list) else [value]
        if not values or any(type(one) is not int or one < 1 for one in values):
            raise ValueError(f"{name}: expected integers of at least 1, found {value}")


@dataclass(frozen=True)
class ModalitySizes:
    """Sizes of one modality."""

    channels: int
    samples: int
    """Number of values in an interval."""
    patch: list[int] = field(default_factory=lambda: [1, 1])
    """SW-Transformer: numbers of intervals and bins in a token."""
    window: list[int] = field(default_factory=lambda: [3, 3])
    """SW-Transformer: numbers of rows and columns of tokens in an attention window."""
    kernel: int = 3
    """DeepSense: kernel size of the first convolution."""
    stride: int = 1
    """DeepSense: stride of the first convolution."""
    inner_kernel: int = 3
    """DeepSense: kernel size of the other convolutions."""

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "samples", "patch", "window", "kernel", "stride", "inner_kernel")
        for name, pair in (("patch", self.patch), ("window", self.window)):
            if len(pair) != 2:
                raise ValueError(f"{name}: expected two sizes, found {pair}")


@dataclass(frozen=True)
class SensorSizes:
    """Sizes of a backbone. Fields that only the other network has (OF_NETWORK) are ignored."""

    network: str
    """One of NETWORKS."""
    location: str
    """Location of the sensors, part of the names of checkpoint entries."""
    intervals: int
    """Number of intervals in a sample."""
    modalities: dict[str, Any]
    """Fields of `ModalitySizes`, keyed by modality, in order."""
    width: int
    """SW-Transformer: width C of the first stage. DeepSense: output width of the convolutions."""
    feature_width: int
    """SW-Transformer: width E of features."""
    projection_width: int
    """Width of FOCAL's projected features."""
    blocks: list[int] = field(default_factory=lambda: [2, 2, 4])
    """SW-Transformer: number of blocks in each stage."""
    heads: int = 4
    """SW-Transformer: number of heads, in every stage and in the fusion."""
    inner_layers: int = 4
    """DeepSense: number of convolutions after the first."""
    recurrent_width: int = 256
    """DeepSense: width of each direction of the GRU."""
    temperature: float = 0.07
    """FOCAL: temperature of its losses."""
    train_patch_embed: bool = False
    """SW-Transformer: whether pretraining trains the patch embedding, which the published code leaves random."""
    input_scale: dict[str, float] = field(default_factory=dict)
    """Divisor of the signals, keyed by modality; 1 if there is no entry."""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network: expected {' or '.join(NETWORKS)}, found {self.network!r}")
        if not 1 <= len(self.modalities) <= MOST_MODALITIES:
            raise ValueError(f"modalities: expected 1 to {MOST_MODALITIES}, found {len(self.modalities)}")
        widths = ("width", "feature_width", "projection_width", "recurrent_width")
        check_sizes(self, "intervals", *widths, "blocks", "heads")
        if self.projection_width % 2:
            raise ValueError(
                f"projection_width: expected an even number (shared and private half), found {self.projection_width}"
            )
        if self.inner_layers < 0 or self.temperature <= 0:
            found = f"{self.inner_layers} and {self.temperature}"
            raise ValueError(f"inner_layers and temperature: expected at least 0 and above 0, found {found}")

    def of(self, modality: str) -> ModalitySizes:
        """The sizes of a modality; ValueError if its fields are invalid."""
        return record_of(ModalitySizes, self.modalities[modality])


def shapes_of(sizes: SensorSizes) -> str:
    """The modalities that a backbone is for, in order, with the shapes of their signals."""
    by_modality = {name: sizes.of(name) for name in sizes.modalities}
    return ", ".join(f"{name} ({x.channels}, {sizes.intervals}, {x.samples})" for name, x in by_modality.items())


def size_of(sizes: SensorSizes, entry: str) -> Any:
    """The value of an entry of the option `network`, keyed by modality if it differs between modalities."""
    if entry == "type":
        return sizes.network
    if hasattr(sizes, entry):
        return getattr(sizes, entry)
    return {name: getattr(sizes.of(name), entry) for name in sizes.modalities}


MOD_SIZES = {
    "seismic": asdict(ModalitySizes(1, 20)),
    "audio": asdict(ModalitySizes(1, 1600, patch=[1, 40], kernel=80, stride=80, inner_kernel=5)),
}
