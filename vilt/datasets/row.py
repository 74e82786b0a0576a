"""The row of a dataset: all that the program knows of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vilt import missing_types
from vilt.datasets.custom import CustomData

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
CLIP, VLA = "clip", "vla"


class Modality(NamedTuple):
    """Where a modality is in the arrow files, and what reads it."""

    kind: str
    """A key of `vilt.datasets.kinds.KINDS`."""
    column: str
    shape: tuple[int | None, ...] = ()
    """Of an `array`; None as the first size where it varies. None at all: what the metadata of the arrow files says."""
    step: int = 0
    """Of signals: values from the start of an interval to that of the next."""
    rate: float = 0.0
    """Likewise, in Hz."""
    padded: bool = False
    """Whether shorter arrays than the shape are padded in front, where users give them."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset: what its converter writes, the loader reads, the training minimises and the report calls it."""

    name: str
    """Name of the task, and prefix of the arrow files: `NAME_SPLIT.arrow`."""
    title: str
    """For people."""
    file_splits: dict[Split, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    """What each split is called in the file names; for validation some datasets have `dev` or `valid`."""
    modalities: dict[str, Modality]
    """By name, in the order of the digits of missing types (vilt/missing_types.py)."""
    id_column: str | None
    """Column naming the sample, where the published files have one."""
    multilabel: bool = False
    """True: the label column holds a 0/1 vector over classes; False: a class number, or a number of `label_range`."""
    n_classes: int
    class_names: tuple[str, ...] | None = None
    """None where the names are read from the data (Food-101's class_idx.json)."""
    loss: str = "cross_entropy"
    """Name of the loss function."""
    metrics: str = "class_accuracy"
    """Name of the function that measures them."""
    monitor: str = "accuracy"
    """The metric that chooses the best model."""
    make_arrow_name: str
    """Name of the dataset on the command line of make_arrow.py."""
    converter: str
    """Module with `open_raw(raw, **options)`, which returns a RawDataset."""
    converter_options: tuple[str, ...] = ()
    """Options of make_arrow.py that this converter takes."""
    converter_arguments: dict[str, Any] = field(default_factory=dict)
    """What its converter is also given, where it is that of several datasets."""
    kept_columns: tuple[str, ...] = ()
    """Columns with lists of texts that are kept as given and not read."""
    published_rows: dict[Split, tuple[int, ...]] = field(default_factory=dict)
    """Samples that the published splits list (DATA.md)."""
    label_range: float | None = None
    """Where labels are numbers: none is larger, positive or negative."""
    options: dict[str, Any] = field(default_factory=dict)
    """Defaults of `run.py` for this task, where they are others."""
    pretraining: dict[str, Any] = field(default_factory=dict)
    """Likewise for pretraining without labels, beside `options`; none where there is no such."""
    redrawn: bool = False
    """What the option simulate_missing does in training: True: draws anew in each epoch what each sample loses, and
    there is no missing table; False: complete samples lose something too."""
    family: str = CLIP
    """Name of the family of backbones."""
    custom: CustomData | None = None
    """What the arrow files say of a custom dataset."""
    recordings: bool = False
    """Whether samples are cut from recordings, which their rows name."""
    scaled: bool = False
    """Whether signals are divided by their root mean square in the training split."""
    pretraining_file: str | None = None
    """What the file of further samples without labels is called, for pretraining; None where there is none."""

    @property
    def table_name(self) -> str:
        """What missing tables call it: where modalities are the data's own, with them (see `row_of`)."""
        return self.name if self.custom is None or not self.custom.signals else "+".join([self.name, *self.modalities])

    @property
    def missing_types(self) -> tuple[str, ...]:
        """What the chosen samples of a missing pattern may lose."""
        return missing_types.missing_types(self.modalities)

    @property
    def type_names(self) -> tuple[str, ...]:
        """What the missing types of samples are called, in the order of their numbers."""
        return missing_types.type_names(self.modalities)

    def column_of(self, kind: str) -> str | None:
        """Column of the first modality of a kind."""
        return next((modality.column for modality in self.modalities.values() if modality.kind == kind), None)

    def file_name(self, split: Split) -> str:
        """Name of the arrow file of `split`, for example `mmimdb_dev.arrow` for `val`."""
        return f"{self.name}_{self.file_splits[split]}.arrow"

    def replacing_mark(self, root: Path) -> Path:
        """A file that is in `root` from before the first to after the last of the arrow files is replaced."""
        return root / f".{self.name}_replacing"

    def how_to_make(self, folder: Path) -> str:
        """For messages about files that are not in `folder`."""
        return f"make it with `python make_arrow.py --dataset {self.make_arrow_name} --root RAW --target {folder}`"
