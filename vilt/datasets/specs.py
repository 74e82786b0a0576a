"""The table of datasets. Adding a dataset is adding a row, and the converter that it names."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vilt import missing_types
from vilt.datasets.custom import CUSTOM, CUSTOM_METRICS, SENSORS, CustomData

# fmt: off
MMIMDB_GENRES = (
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery",
    "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western",
    "Sport", "Short", "Film-Noir",
)
# fmt: on
"""The 23 genres in the order of the published label vectors."""

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


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset: what its converter writes, the loader reads, the training minimises and the report calls it."""

    name: str
    """Name of the task, and prefix of the arrow files: `NAME_SPLIT.arrow`."""
    title: str
    """For people."""
    file_splits: dict[Split, str]
    """What each split is called in the file names (`dev` for validation in two of the three datasets)."""
    modalities: dict[str, Modality]
    """Each text of a row's list of texts is a training sample of its own."""
    id_column: str | None
    """Column naming the sample, where the published files have one."""
    multilabel: bool
    """True: the label column holds a 0/1 vector over classes; False: a class number, or a number of `label_range`."""
    n_classes: int
    class_names: tuple[str, ...] | None
    """None where the names are read from the data (Food-101's class_idx.json)."""
    loss: str
    """Name of the loss function."""
    metrics: str
    """Name of the function that measures them."""
    monitor: str
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

    @property
    def text_column(self) -> str:
        """Column of the texts."""
        return self.modalities["text"].column

    def file_name(self, split: Split) -> str:
        """Name of the arrow file of `split`, for example `mmimdb_dev.arrow` for `val`."""
        return f"{self.name}_{self.file_splits[split]}.arrow"

    def replacing_mark(self, root: Path) -> Path:
        """A file that is in `root` from before the first to after the last of the arrow files is replaced."""
        return root / f".{self.name}_replacing"

    def how_to_make(self, folder: Path) -> str:
        """For messages about files that are not in `folder`."""
        return f"make it with `python make_arrow.py --dataset {self.make_arrow_name} --root RAW --target {folder}`"


def signal(name: str, channels: int, intervals: int, values: int) -> Modality:
    """Signals of a sensor, cut into intervals."""
    return Modality("array", f"signal_{name}", (channels, intervals, values))


def images_with_texts(text_column: str) -> dict[str, Modality]:
    """An image and a list of texts in each row."""
    return {"image": Modality("image", "image"), "text": Modality("text", text_column)}


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="mmimdb",
            title="MM-IMDb",
            file_splits={"train": "train", "val": "dev", "test": "test"},
            modalities=images_with_texts("plots"),
            id_column="image_id",
            multilabel=True,
            n_classes=23,
            class_names=MMIMDB_GENRES,
            loss="binary_cross_entropy",
            metrics="multilabel_f1",
            monitor="f1_macro",
            make_arrow_name="mmimdb",
            converter="vilt.utils.write_mmimdb",
            converter_options=("allow_missing",),
            kept_columns=("genres",),
            published_rows={"train": (15552,), "val": (2608,), "test": (7799,)},
        ),
        DatasetSpec(
            name="food101",
            title="UPMC Food-101",
            file_splits={"train": "train", "val": "val", "test": "test"},
            modalities=images_with_texts("text"),
            id_column="image_id",
            multilabel=False,
            n_classes=101,
            class_names=None,
            loss="cross_entropy",
            metrics="class_accuracy",
            monitor="accuracy",
            make_arrow_name="food101",
            converter="vilt.utils.write_food101",
            converter_options=("allow_missing",),
            published_rows={"train": (61142,), "val": (6846,), "test": (22716,)},
        ),
        DatasetSpec(
            name="hatememes",
            title="Hateful Memes",
            file_splits={"train": "train", "val": "dev", "test": "test"},
            modalities=images_with_texts("text"),
            id_column=None,
            multilabel=False,
            n_classes=2,
            class_names=("not hateful", "hateful"),
            loss="cross_entropy",
            metrics="auroc_and_accuracy",
            monitor="auroc",
            make_arrow_name="hateful_memes",
            converter="vilt.utils.write_hatememes",
            converter_options=("test_split", "allow_missing"),
            published_rows={"train": (8500,), "val": (500,), "test": (1000, 2000)},  # dev_seen; test_seen, test_unseen
        ),
    )
}

_SEGMENTS = {name: Modality("array", name) for name in ("text", "audio", "vision")}
VLA_OPTIONS: dict[str, Any] = {
    "missing_type": "some",
    "missing_ratio": 0.7,
    "simulate_missing": True,
    "memory_length": 12,
    "memory_depth": 3,
    "optim_type": "adam",
    "learning_rate": 1e-3,
    "weight_decay": 0,
    "clip_gradient": 0.8,
    "warmup_steps": 0,
    "decay_power": "plateau",
    "batch_size": 64,
    "per_gpu_batchsize": 64,
    "max_epoch": 40,
    "val_check_interval": 1.0,
    "precision": "32",
}
"""Those of MPLMM's code, with the missing ratio of its paper (docs/vla.md)."""


def segments(
    name: str, title: str, metrics: str, label_range: float, rows: dict[Split, tuple[int, ...]], **others: Any
) -> DatasetSpec:
    """A dataset of extracted text, audio and vision features with a sentiment."""
    return DatasetSpec(
        name=name,
        title=title,
        file_splits={"train": "train", "val": "valid", "test": "test"},
        modalities=_SEGMENTS,
        id_column="id",
        multilabel=False,
        n_classes=1,
        class_names=("sentiment",),
        loss="mean_absolute_error",
        metrics=metrics,
        monitor="mae",
        make_arrow_name=name,
        converter="vilt.utils.write_vla",
        converter_arguments={"dataset": name},
        kept_columns=("raw_text",),
        published_rows=rows,
        label_range=label_range,
        options=VLA_OPTIONS,
        redrawn=True,
        family=VLA,
        **others,
    )


for _spec in (
    segments("mosi", "CMU-MOSI", "sentiment", 3, {"train": (1284,), "val": (229,), "test": (686,)}),
    segments(
        *("mosei", "CMU-MOSEI", "sentiment", 3),
        {"train": (16265, 16326), "val": (1869, 1871), "test": (4643, 4659)},
    ),
    segments("sims", "CH-SIMS", "sentiment_of_sims", 1, {"train": (1368,), "val": (456,), "test": (457,)}),
    segments("vla", "text, audio and vision", "sentiment", 3, {}, converter_options=("table",)),
):
    DATASETS[_spec.name] = _spec

SENSOR_OPTIONS: dict[str, Any] = {
    "vit": "random",
    "memory_length": 12,
    "memory_depth": 3,
    "learning_rate": 1e-3,
    "weight_decay": 5e-3,
    "warmup_steps": 0,
    "decay_power": "cosine",
    "end_lr": 1e-6,
    "batch_size": 128,
    "per_gpu_batchsize": 128,
    "max_epoch": 50,
    "val_check_interval": 1.0,
}
SENSOR_PRETRAINING: dict[str, Any] = {
    "prompt_type": "focal",
    "missing_ratio": 0.0,
    "test_after_fit": False,
    "weight_decay": 0.05,
    "end_lr": 1e-7,
    "batch_size": 256,
    "per_gpu_batchsize": 256,
    "max_epoch": 100,
}
"""Of FOCAL's code, but for the epochs, of which it has thousands."""


_CUSTOM = {
    SENSORS: DatasetSpec(
        name=SENSORS,
        title="sensor dataset",
        file_splits={"train": "train", "val": "val", "test": "test"},
        modalities={},
        id_column="sample",
        multilabel=False,
        n_classes=0,
        class_names=None,
        loss="cross_entropy",
        metrics="class_accuracy",
        monitor="accuracy",
        make_arrow_name=SENSORS,
        converter="vilt.utils.write_sensors",
        converter_options=("spec", "split"),
        family="sensors",
        recordings=True,
        scaled=True,
        options=SENSOR_OPTIONS,
        pretraining=SENSOR_PRETRAINING,
    ),
    CUSTOM: DatasetSpec(
        name=CUSTOM,
        title="custom dataset",
        file_splits={"train": "train", "val": "val", "test": "test"},
        modalities=images_with_texts("text"),
        id_column="image_id",
        multilabel=False,
        n_classes=0,
        class_names=None,
        loss="cross_entropy",
        metrics="class_accuracy",
        monitor="accuracy",
        make_arrow_name=CUSTOM,
        converter="vilt.utils.write_custom",
        converter_options=("spec", "table", "split_seed", "follow_links", "allow_missing"),
    ),
}
EVERY_DATASET: MutableMapping[str, DatasetSpec] = ChainMap(_CUSTOM, DATASETS)
"""With the row of custom datasets; `custom_spec` fills in what the arrow files say."""


def with_shapes(spec: DatasetSpec, shapes: Mapping[str, tuple[int | None, ...]]) -> DatasetSpec:
    """The row with the shapes of its arrays, by modality."""
    modalities = {name: each._replace(shape=shapes.get(name, each.shape)) for name, each in spec.modalities.items()}
    return replace(spec, modalities=modalities)


def row_of(table_name: str) -> DatasetSpec:
    """The row of what missing tables call a dataset, with its modalities, and without classes if it is a custom one."""
    name, *modalities = table_name.split("+")
    row = EVERY_DATASET[name]
    return replace(row, modalities={each: signal(each, 1, 1, 1) for each in modalities}) if modalities else row


def spec_of(name: str, custom: CustomData | None) -> DatasetSpec:
    """The row of a dataset; that of a custom one follows from what its arrow files say."""
    return DATASETS[name] if custom is None else custom_spec(custom)


def custom_spec(custom: CustomData) -> DatasetSpec:
    """The complete row of a custom dataset."""
    multilabel = custom.labels == "multi"
    signals = {name: signal(name, *sizes) for name, *sizes in custom.signals}
    return replace(
        EVERY_DATASET[custom.task],
        modalities=signals or EVERY_DATASET[custom.task].modalities,
        title=custom.name,
        multilabel=multilabel,
        n_classes=custom.n_classes,
        class_names=custom.class_names,
        loss="binary_cross_entropy" if multilabel else "cross_entropy",
        metrics=CUSTOM_METRICS[custom.labels][custom.metric],
        monitor=custom.metric,
        custom=custom,
    )
