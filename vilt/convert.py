"""Converts a pandas DataFrame, a Hugging Face Dataset or a list of dictionaries to the arrow files of a custom dataset.

from vilt.convert import convert

convert(frame, "datasets/birds", columns={"image": "photo", "text": "caption"})
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from common.errors import DataError
from common.messages import quoted
from vilt.datasets.custom import CUSTOM, CUSTOM_METRICS
from vilt.datasets.specs import VALIDATION
from vilt.images import open_rgb
from vilt.utils import raw_data
from vilt.utils.arrow_writer import SplitSummary
from vilt.utils.arrow_writer import convert as write_arrow
from vilt.utils.custom_layout import COLUMNS, Layout
from vilt.utils.names import label_name, normal
from vilt.utils.write_custom import Listed, assemble, incomplete

LOADING = Lock()
"""Held while a Pillow image reads its file, on first use: rows in different threads may share the image."""


def convert(
    data: Any,
    target: str | Path,
    *,
    name: str = CUSTOM,
    columns: Mapping[str, str] | None = None,
    labels: str | None = None,
    classes: Sequence[str | float] | None = None,
    separator: str = "|",
    metric: str | None = None,
    root: str | Path = ".",
    split_seed: int | None = None,
    skip_bad: bool = False,
    workers: int = 4,
) -> list[SplitSummary]:
    """Writes the arrow files of a custom dataset into the folder `target`; DATA.md describes their content.

    Args:
        data: a pandas DataFrame, a Hugging Face Dataset, a list of dictionaries, or one of these for each split, keyed
            by the split's name as in a DatasetDict. Images are paths, bytes of image files, Pillow images, arrays
            (H, W, 3) of uint8, or dictionaries with `bytes` or `path`; images and texts that are None or blank are
            missing.
        columns: the names in `data` of `image`, `text`, `label` and `split`, if they differ from these.
        labels, classes, separator, metric, name: as in spec.yaml. If None: labels are `multi` if they are lists, else
            `single`; classes are those of the Dataset, if it names them; metric is the default.
        root: folder that relative paths start from.
        split_seed: seed of the splits if `data` has none; None means 0.
        skip_bad, workers: as the options of make_arrow.py.

    Returns:
        A summary of each split.

    Raises:
        DataError: a column is missing, values are not as expected, or files cannot be read or written.
    """
    if unknown := [name for name in columns or {} if name not in COLUMNS]:
        raise DataError(f"columns: expected {', '.join(COLUMNS)}, found {unknown[0]}")
    if isinstance(classes, str | set | frozenset):
        raise DataError(f"classes: expected a list, in the order of class numbers, found a {type(classes).__name__}")
    named = {column: (columns or {}).get(column, column) for column in COLUMNS}
    parts = data if isinstance(data, Mapping) else {None: data}
    rows: list[Listed] = []
    for key, part in parts.items():
        read, class_names = _columns(part, named)
        classes = classes or class_names
        of_rows = zip(*(read[column] for column in COLUMNS), strict=True)
        for row, (image, text, label, own) in enumerate(of_rows, 1):
            split = own if key is None else key
            split = VALIDATION.get(normal(split).lower(), split) if isinstance(split, str) else split
            rows.append(Listed(Path(str(key or "data")), row, image, text, _label(label, class_names), split))
    if labels is None:
        labels = "multi" if any(isinstance(listed.label, list) for listed in rows) else "single"
    layout = Layout(
        source=Path("data"),
        tables=(),
        columns=named,
        labels=labels,
        separator=separator,
        classes=tuple(map(label_name, classes)) if classes else None,
        name=name,
        metric=metric or next(iter(CUSTOM_METRICS.get(labels, {"": ""}))),
    )

    def read_image(listed: Listed) -> tuple[bytes | None, str]:
        return _image(listed, Path(root))

    return write_arrow(assemble(layout, rows, read_image, split_seed), Path(target), workers, skip_bad)


def _columns(data: Any, named: Mapping[str, str]) -> tuple[dict[str, Iterable[Any]], list[str] | None]:
    """The values of each column, and the class names if `data` has them."""
    features: Mapping[str, Any] = getattr(data, "features", None) or {}
    if features:  # a Hugging Face Dataset
        for column, feature in features.items():
            if getattr(feature, "decode", False) is True:  # keep the bytes of image files unchanged
                data = data.cast_column(column, replace(feature, decode=False))
        found: Any = {column: data[column] for column in data.column_names if column in named.values()}
        present, count = list(data.column_names), len(data)
    else:
        frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data))
        present, count = list(frame.columns), len(frame)
        found = {column: map(_plain, frame[column]) for column in named.values() if present.count(column) == 1}
    if repeated := [name for name in named.values() if present.count(name) > 1]:
        raise DataError(f"data: the column {quoted(repeated[0])} is repeated")
    if missing := [name for column, name in named.items() if column != "split" and name not in present]:
        raise DataError(f"data: expected the columns {', '.join(missing)}, found {', '.join(map(str, present))}")
    label = features.get(named["label"])
    class_names = getattr(label, "names", None) or getattr(getattr(label, "feature", None), "names", None)
    return {column: found.get(name, [None] * count) for column, name in named.items()}, class_names


def _plain(cell: Any) -> Any:
    """A cell as plain Python: None, lists and numbers in place of pandas' and NumPy's forms of them."""
    if isinstance(cell, np.ndarray):
        return cell if cell.ndim > 1 else cell.tolist()
    if isinstance(cell, tuple | set):
        return list(cell)
    if isinstance(cell, np.generic):
        return cell.item()
    return None if pd.api.types.is_scalar(cell) and pd.isna(cell) else cell


def _label(label: Any, class_names: Sequence[str] | None) -> Any:
    """The label with class numbers replaced by names, if the Dataset names its classes."""
    if isinstance(label, list):
        return [_label(one, class_names) for one in label]
    return class_names[label] if class_names and type(label) is int and 0 <= label < len(class_names) else label


def _image(listed: Listed, root: Path) -> tuple[bytes | None, str]:
    """The bytes of a row's image file, and its path, or else its row, for messages. Raises BadSampleError."""
    image, name = listed.image, f"row {listed.row}"
    if isinstance(image, Mapping):
        name = str(image.get("path") or name)
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | Path):
        return raw_data.read_image(root, str(image), anywhere=True), str(image)
    try:
        if isinstance(image, np.ndarray):
            try:
                image = Image.fromarray(image)
            except TypeError:  # a dtype or shape that Pillow does not know
                raise ValueError(f"expected an array (H, W, 3) of uint8, found {image.dtype} {image.shape}") from None
        if isinstance(image, Image.Image):
            with LOADING:
                image.load()
            file = io.BytesIO()
            open_rgb(image).save(file, "PNG")  # as displayed, lossless
            image = file.getvalue()
    except Exception as error:  # Pillow's decoders raise anything
        raise raw_data.BadSampleError(raw_data.UNDECODABLE_IMAGE, name, str(error) or type(error).__name__) from None
    if not isinstance(image, bytes):
        raise incomplete(listed, f"image: expected a path, bytes, a Pillow image or an array, found {type(image)}")
    return raw_data.checked_image(image, name), name
