"""The rows of sensor datasets."""

from collections.abc import Mapping
from typing import Any

from vilt.datasets.row import SPLITS, DatasetSpec, Modality

PAMAP2_CLASSES = (
    *("lying", "sitting", "standing", "walking", "running", "cycling", "Nordic walking", "watching TV"),
    *("computer work", "car driving", "ascending stairs", "descending stairs", "vacuum cleaning", "ironing"),
    *("folding laundry", "house cleaning", "playing soccer", "rope jumping"),
)
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
"""Settings of FOCAL's code, except for the number of epochs, which runs to thousands there."""
WEARABLE_PRETRAINING = {**SENSOR_PRETRAINING, "learning_rate": 5e-4}


def signal(name: str, channels: int, intervals: int, values: int, step: int, rate: float) -> Modality:
    """The signals of a sensor, cut into intervals."""
    return Modality("array", f"signal_{name}", (channels, intervals, values), step, rate)


def recordings(
    name: str, title: str, sizes: Mapping[str, tuple[int, int, int, int, float]], **others: Any
) -> DatasetSpec:
    """A sensor dataset, whose samples are cut from recordings.

    Args:
        sizes: for each modality, channels, intervals per sample, values per interval, step between intervals, rate.
    """
    given: dict[str, Any] = {
        "converter_options": ("split",),
        "scaled": True,
        "options": SENSOR_OPTIONS,
        "pretraining": SENSOR_PRETRAINING,
        **others,
    }
    return DatasetSpec(
        name=name,
        title=title,
        modalities={modality: signal(modality, *of) for modality, of in sizes.items()},
        id_column="sample",
        make_arrow_name=name,
        family="sensors",
        recordings=True,
        **given,
    )


SENSOR_ROWS = (
    recordings(
        *("mod", "MOD"),
        {"seismic": (1, 10, 20, 20, 100), "audio": (1, 10, 1600, 1600, 8000)},
        n_classes=7,
        class_names=("Polaris", "Warhog", "Silverado", "motor", "tesla", "mustang", "walk"),
        converter="vilt.utils.write_mod",
        file_splits={**{split: split for split in SPLITS}, "pretrain": "pretrain"},
        pretraining_file="mod_pretrain.arrow",
        scaled=False,
        options={**SENSOR_OPTIONS, "memory_depth": 4},
    ),
    recordings(
        *("pamap2", "PAMAP2"),
        dict.fromkeys(("Acc", "Gyro", "Mag"), (3, 9, 40, 20, 100)),
        n_classes=18,
        class_names=PAMAP2_CLASSES,
        converter="vilt.utils.write_wearables",
        converter_arguments={"dataset": "pamap2"},
        pretraining=WEARABLE_PRETRAINING,
    ),
    recordings(
        *("rwhar", "RealWorld-HAR"),
        {**dict.fromkeys(("acc", "gyr", "mag"), (3, 9, 50, 25, 50)), "lig": (1, 9, 50, 25, 50)},
        n_classes=8,
        class_names=(*("climbingdown", "climbingup", "jumping", "lying", "running", "sitting", "standing", "walking"),),
        converter="vilt.utils.write_wearables",
        converter_arguments={"dataset": "rwhar"},
        pretraining=WEARABLE_PRETRAINING,
    ),
)
