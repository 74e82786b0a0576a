"""The table of datasets. To add one, add a row and the converter that it names."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from vilt.datasets.custom import CUSTOM, CUSTOM_METRICS, SENSORS, CustomData
from vilt.datasets.row import CLIP as CLIP
from vilt.datasets.row import SPLITS as SPLITS
from vilt.datasets.row import VALIDATION as VALIDATION
from vilt.datasets.row import VLA, DatasetSpec, Modality, Split
from vilt.datasets.sensor_rows import SENSOR_ROWS, recordings, signal

# fmt: off
MMIMDB_GENRES = (
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery",
    "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western",
    "Sport", "Short", "Film-Noir",
)
# fmt: on
"""The 23 genres, in the order of the published label vectors."""


def images_with_texts(text_column: str) -> dict[str, Modality]:
    """Modalities of a dataset with an image and a list of texts in each row."""
    return {"image": Modality("image", "image"), "text": Modality("text", text_column)}


CLIP_ROWS = (
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
        modalities=images_with_texts("text"),
        id_column="image_id",
        n_classes=101,
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
        n_classes=2,
        class_names=("not hateful", "hateful"),
        metrics="auroc_and_accuracy",
        monitor="auroc",
        make_arrow_name="hateful_memes",
        converter="vilt.utils.write_hatememes",
        converter_options=("test_split", "allow_missing"),
        published_rows={"train": (8500,), "val": (500,), "test": (1000, 2000)},  # dev_seen; test_seen, test_unseen
    ),
)

_SEGMENTS = {name: Modality("array", name, padded=True) for name in ("text", "audio", "vision")}
VLA_OPTIONS: dict[str, Any] = {
    "vit": "random",
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
"""Settings of MPLMM's code, with the missing ratio of its paper (docs/vla.md)."""


def segments(
    name: str, title: str, metrics: str, label_range: float, rows: dict[Split, tuple[int, ...]], **others: Any
) -> DatasetSpec:
    """A dataset of extracted text, audio and vision features, labelled with sentiment."""
    return DatasetSpec(
        name=name,
        title=title,
        file_splits={"train": "train", "val": "valid", "test": "test"},
        modalities=_SEGMENTS,
        id_column="id",
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


VLA_ROWS = (
    segments("mosi", "CMU-MOSI", "sentiment", 3, {"train": (1284,), "val": (229,), "test": (686,)}),
    segments(
        *("mosei", "CMU-MOSEI", "sentiment", 3),
        {"train": (16265, 16326), "val": (1869, 1871), "test": (4643, 4659)},
        pretraining={"prompt_type": "full", "missing_ratio": 0.0, "simulate_missing": False},
    ),
    segments("sims", "CH-SIMS", "sentiment_of_sims", 1, {"train": (1368,), "val": (456,), "test": (457,)}),
    segments("vla", "text, audio and vision", "sentiment", 3, {}, converter_options=("table",)),
)
DATASETS: dict[str, DatasetSpec] = {row.name: row for row in (*CLIP_ROWS, *VLA_ROWS, *SENSOR_ROWS)}
_CUSTOM = {
    SENSORS: recordings(
        *(SENSORS, "sensor dataset", {}),
        n_classes=0,
        converter="vilt.utils.write_sensors",
        converter_options=("spec", "split"),
    ),
    CUSTOM: DatasetSpec(
        name=CUSTOM,
        title="custom dataset",
        modalities=images_with_texts("text"),
        id_column="image_id",
        n_classes=0,
        make_arrow_name=CUSTOM,
        converter="vilt.utils.write_custom",
        converter_options=("spec", "table", "split_seed", "follow_links", "allow_missing"),
    ),
}
EVERY_DATASET: MutableMapping[str, DatasetSpec] = ChainMap(_CUSTOM, DATASETS)
"""DATASETS and the rows of custom datasets, which `custom_spec` completes from their arrow files."""


def with_shapes(spec: DatasetSpec, shapes: Mapping[str, tuple[int | None, ...]]) -> DatasetSpec:
    """The row with the given shapes of its arrays, keyed by modality."""
    modalities = {name: each._replace(shape=shapes.get(name, each.shape)) for name, each in spec.modalities.items()}
    return replace(spec, modalities=modalities)


def row_of(table_name: str) -> DatasetSpec:
    """The row for a dataset's name in missing tables (`table_name`); if custom, with modalities but without classes."""
    name, *modalities = table_name.split("+")
    row = EVERY_DATASET[name]
    return replace(row, modalities={each: signal(each, 1, 1, 1, 1, 1) for each in modalities}) if modalities else row


def spec_of(name: str, custom: CustomData | None) -> DatasetSpec:
    """The row of a dataset; `custom` is the description of a custom one."""
    return DATASETS[name] if custom is None else custom_spec(custom)


def custom_spec(custom: CustomData) -> DatasetSpec:
    """The complete row of a custom dataset."""
    multilabel = custom.labels == "multi"
    signals = {each[0]: signal(*each) for each in custom.signals}
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
