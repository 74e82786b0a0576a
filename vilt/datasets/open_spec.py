"""The row of a dataset, which for a custom dataset is read from its arrow files."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.arrow_file import open_table
from common.errors import DataError
from common.messages import quoted
from vilt.datasets.custom import CUSTOM, CustomData
from vilt.datasets.specs import DATASETS, EVERY_DATASET, DatasetSpec, Split, custom_spec


def open_spec(dataset: str, root: Path, splits: Sequence[Split]) -> DatasetSpec:
    """The row of `dataset`, with classes and metric of the arrow files of `splits` in `root` if it is a custom one.

    Raises:
        DataError: such a file is not there, not readable or not of a custom dataset, or the files do not agree.
    """
    if dataset != CUSTOM:
        return DATASETS[dataset]
    paths = [root / EVERY_DATASET[CUSTOM].file_name(split) for split in splits]
    first, *others = [_read(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if other != first:
            names = f"name {first.name} and metric {first.metric}, found {other.name} and {other.metric}"
            difference = first.difference(other) or f"expected the {names}"
            raise DataError(f"{path}: not of one dataset with {paths[0].name}: {difference}; convert them together")
    return custom_spec(first)


def _read(path: Path) -> CustomData:
    """What the metadata of an arrow file says. Raises DataError."""
    how_to_make = EVERY_DATASET[CUSTOM].how_to_make(path.parent)
    metadata = open_table(path, how_to_make=how_to_make).schema.metadata or {}
    try:
        if not {b"custom", b"class_names"} <= set(metadata):
            raise ValueError("expected metadata with class names, labels and metric, found none")
        described = json.loads(metadata[b"custom"])
        if not isinstance(described, dict):
            raise ValueError(f"metadata custom: expected an object, found {quoted(described)}")
        return CustomData.of({**described, "class_names": json.loads(metadata[b"class_names"])})
    except (ValueError, RecursionError) as error:  # of json too
        raise DataError(f"{path}: {error}; {how_to_make}") from error
