"""The row of a dataset: everything that the program knows about it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vilt import missing_types
from vilt.datasets.custom import CustomData

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
VALIDATION: dict[str, Split] = {"validation": "val", "valid": "val", "dev": "val"}
"""Other names of the validation split, in files and libraries."""
CLIP, VLA = "clip", "vla"


class Modality(NamedTuple):
    """How a modality is stored in the arrow files."""

    kind: str
    """A key of `vilt.datasets.kinds.KINDS`."""
    column: str
    shape: tuple[int | None, ...] = ()
    """Shape of an `array`; the first size is None if it varies. Empty: the arrow files' metadata give the shape."""
    step: int = 0
    """For signals, the step from one interval to the next, in values."""
    rate: float = 0.0
    """For signals, the sampling rate in Hz."""
    padded: bool = False
    """Whether arrays given by users are padded in front if they are shorter than the shape."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset: what its converter writes, the loader reads, training minimises, and reports call it."""

    name: str
    """Name of the task, and prefix of the arrow files: `NAME_SPLIT.arrow`."""
    title: str
    """Name shown to people."""
    file_splits: dict[Split, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    """Name of each split in file names; some datasets call validation `dev` or `valid`."""
    modalities: dict[str, Modality]
    """Modalities, keyed by name and in the order of the digits of missing types (vilt/missing_types.py)."""
    id_column: str | None
    """Column that identifies the sample, if the published files have one."""
    multilabel: bool = False
    """True: the label column holds 0/1 vectors over classes; False: class numbers, or numbers within `label_range`."""
    n_classes: int
    class_names: tuple[str, ...] | None = None
    """None if the names are read from the data (Food-101's class_idx.json)."""
    loss: str = "cross_entropy"
    """Name of the loss function."""
    metrics: str = "class_accuracy"
    """Name of the function that computes the metrics."""
    monitor: str = "accuracy"
    """Metric that chooses the best model."""
    make_arrow_name: str
    """Name of the dataset on the command line of make_arrow.py."""
    converter: str
    """Module with `open_raw(raw, **options)`, which returns a RawDataset."""
    converter_options: tuple[str, ...] = ()
    """Options of make_arrow.py that this converter takes."""
    converter_arguments: dict[str, Any] = field(default_factory=dict)
    """Fixed arguments for a converter that serves several datasets."""
    kept_columns: tuple[str, ...] = ()
    """Columns with lists of texts that are stored unchanged and never read."""
    published_rows: dict[Split, tuple[int, ...]] = field(default_factory=dict)
    """Sizes that each published split may have (DATA.md)."""
    label_range: float | None = None
    """Largest absolute value of numeric labels; None if labels are classes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `run.py` whose defaults differ for this task."""
    pretraining: dict[str, Any] = field(default_factory=dict)
    """Further defaults for pretraining without labels; empty if the dataset has no pretraining."""
    redrawn: bool = False
    """Effect of the option simulate_missing in training. True: what each sample loses is redrawn in each epoch, without
    a missing table; False: complete samples lose something too."""
    family: str = CLIP
    """Name of the family of backbones."""
    custom: CustomData | None = None
    """Description of a custom dataset, from its arrow files."""
    recordings: bool = False
    """Whether samples are cut from recordings, which their rows name."""
    scaled: bool = False
    """Whether signals are divided by their root mean square in the training split."""
    pretraining_file: str | None = None
    """Name of the pretraining file, which also has unlabelled samples; None if there is none."""

    @property
    def table_name(self) -> str:
        """Name of the dataset in missing tables; includes the modalities if the data define them (see `row_of`)."""
        return self.name if self.custom is None or not self.custom.signals else "+".join([self.name, *self.modalities])

    @property
    def missing_types(self) -> tuple[str, ...]:
        """Missing types that a missing pattern may have."""
        return missing_types.missing_types(self.modalities)

    @property
    def type_names(self) -> tuple[str, ...]:
        """Names of the missing types of samples, in the order of their numbers."""
        return missing_types.type_names(self.modalities)

    def column_of(self, kind: str) -> str | None:
        """Column of the first modality of a kind; None if there is none."""
        return next((modality.column for modality in self.modalities.values() if modality.kind == kind), None)

    def file_name(self, split: Split) -> str:
        """Name of the arrow file of `split`, for example `mmimdb_dev.arrow` for `val`."""
        return f"{self.name}_{self.file_splits[split]}.arrow"

    def replacing_mark(self, root: Path) -> Path:
        """Marker file that exists in `root` while the arrow files are being replaced, one after the other."""
        return root / f".{self.name}_replacing"

    def how_to_make(self, folder: Path) -> str:
        """Advice for messages about files missing from `folder`."""
        return f"make it with `python make_arrow.py --dataset {self.make_arrow_name} --root RAW --target {folder}`"
