"""Looks up the row of a dataset, and completes it with what only its arrow files say."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.arrow_file import open_table
from common.errors import DataError
from common.messages import first_line, quoted
from vilt.datasets.custom import CUSTOM_TASKS, CustomData
from vilt.datasets.specs import DATASETS, EVERY_DATASET, SPLITS, DatasetSpec, Split, custom_spec, with_shapes


def open_spec(dataset: str, root: Path, splits: Sequence[Split]) -> DatasetSpec:
    """The row of `dataset`, completed from the arrow files of `splits` in `root`.

    For a custom dataset they provide classes and metric, and for arrays whose row gives no shape, the shape.

    Raises:
        DataError: a file is missing, unreadable or of another dataset, or the files contradict each other.
    """
    if dataset not in CUSTOM_TASKS:
        spec = DATASETS[dataset]
        if any(modality.kind == "array" and not modality.shape for modality in spec.modalities.values()):
            return _with_shapes(spec, [root / spec.file_name(split) for split in splits])
        return spec
    paths = [root / EVERY_DATASET[dataset].file_name(split) for split in splits]
    first, *others = [_read(path, dataset) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if other != first:
            names = f"name {first.name} and metric {first.metric}, found {other.name} and {other.metric}"
            difference = first.difference(other) or f"expected the {names}"
            raise DataError(f"{path}: not the same dataset as {paths[0].name}: {difference}; convert them together")
    return custom_spec(first)


def _with_shapes(spec: DatasetSpec, paths: Sequence[Path]) -> DatasetSpec:
    """The row with the shapes found in the metadata of its arrow files."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        how_to_make = spec.how_to_make(path.parent)
        metadata = open_table(path, how_to_make=how_to_make).schema.metadata or {}
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata[b"shapes"]).items()}
            if set(shapes) != set(spec.modalities) or any(
                len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape)
                for shape in shapes.values()
            ):
                raise ValueError(quoted(shapes))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            expected = f"metadata shapes: expected (steps, width) of {', '.join(spec.modalities)}"
            raise DataError(f"{path}: {expected}: {first_line(error)}; {how_to_make}") from error
        if found and shapes != found:
            raise DataError(f"{path}: expected the shapes {found} of {paths[0].name}, found {shapes}")
        found = shapes
    return with_shapes(spec, found)


def _read(path: Path, dataset: str) -> CustomData:
    """Reads the description of a custom dataset from an arrow file's metadata. Raises DataError."""
    how_to_make = EVERY_DATASET[dataset].how_to_make(path.parent)
    metadata = open_table(path, how_to_make=how_to_make).schema.metadata or {}
    try:
        if not {b"custom", b"class_names"} <= set(metadata):
            raise ValueError("expected metadata with class names, labels and metric, found none")
        described = json.loads(metadata[b"custom"])
        if not isinstance(described, dict):
            raise ValueError(f"metadata custom: expected an object, found {quoted(described)}")
        found = CustomData.from_dict({**described, "class_names": json.loads(metadata[b"class_names"])})
        if found.task != dataset:
            raise ValueError(f"expected data of task {dataset}, found {found.task}")
        return found
    except (ValueError, RecursionError) as error:  # json raises both too
        raise DataError(f"{path}: {error}; {how_to_make}") from error


def rows_of_splits(spec: DatasetSpec, data_root: Path) -> dict[Split, int]:
    """Number of rows in the arrow file of each split, for the published drawing of missing tables.

    Raises:
        DataError: a file is missing or unreadable.
    """
    files = {split: data_root / spec.file_name(split) for split in SPLITS}
    absent = [path.name for path in files.values() if not path.is_file()]
    if absent:
        raise DataError(
            f"missing_tables=published: the tables of all splits are drawn in turn; expected {', '.join(absent)} in "
            f"{data_root}, found no such file"
        )
    return {split: open_table(path).num_rows for split, path in files.items()}
