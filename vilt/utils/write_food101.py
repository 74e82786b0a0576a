"""UPMC Food-101: photographs from web pages about 101 dishes, each with the title of its page."""

from functools import partial
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import quoted
from common.strict_json import kind_of, read_json
from vilt.datasets.specs import DATASETS
from vilt.utils import raw_data
from vilt.utils.raw_data import BadSampleError, RawDataset, RawSplit, Row
from vilt.utils.tables import csv_fields

LAYOUT = """\
RAW/
  class_idx.json                  {CLASS: NUMBER, ...}, numbers from 0 without gaps
  split.json                      {"train": [FILE, ...], "val": [FILE, ...], "test": [FILE, ...]}
  text.json                       {FILE: TEXT, ...}; or instead of it
  texts/train_titles.csv          FILE,TEXT,CLASS on each line, no header
  texts/test_titles.csv
  images/train/CLASS/FILE         training and validation images
  images/test/CLASS/FILE          FILE is CLASS_NUMBER.jpg
"""
TITLE_FILES = ("texts/train_titles.csv", "texts/test_titles.csv")


def class_of(name: str) -> str:
    """The class in a file name: `apple_pie` in `apple_pie_12.jpg`; empty if there is no `_`."""
    return name.rpartition("_")[0]


def read_dish(raw: Path, folder: str, name: str, text: object, label: int | None) -> Row:
    """Columns image, text (a list of one), label (class number), image_id (file name). Raises BadSampleError."""
    file = f"{folder}/{class_of(name)}/{name}"
    raw_data.check_inside(file)
    if label is None:
        raise BadSampleError(raw_data.UNKNOWN_CLASS, file, f"{quoted(class_of(name))} is not in class_idx.json")
    texts = [raw_data.of_kind(str, text, file, "text")]
    return {"image": raw_data.read_image(raw, file), "text": texts, "label": label, "image_id": name}


def read_classes(path: Path, n_most: int) -> dict[str, int]:
    """class_idx.json: class name -> number, checked to be 0 ... n-1, n at most `n_most`. Raises DataError."""
    classes = read_json(path)
    for name, number in classes.items():
        if type(number) is not int:
            raise DataError(f"{path}: expected a number under {quoted(name)}, found {kind_of(number)}")
    if sorted(classes.values()) != list(range(len(classes))) or not classes:
        found = quoted(sorted(classes.values()))
        raise DataError(f"{path}: expected class names and their numbers, from 0 without gaps, found {found}")
    if len(classes) > n_most:
        raise DataError(f"{path}: expected at most {n_most} classes, found {len(classes)}")
    return classes


def read_texts(raw: Path) -> dict[str, Any]:
    """File name -> text, from text.json or, where that is absent, from the two titles files. Raises DataError."""
    if (raw / "text.json").is_file():
        return read_json(raw / "text.json")
    raw_data.require_layout(raw, TITLE_FILES, LAYOUT)
    texts: dict[str, str] = {}
    for path in (raw / file for file in TITLE_FILES):
        for row, fields in csv_fields(path, strict=False):
            if len(fields) < 3:
                raise DataError(f"{path}, row {row}: expected FILE,TEXT,CLASS, found {len(fields)} field(s)")
            # A title with a comma and no quotes around it falls apart into several fields.
            name, text = fields[0], ",".join(fields[1:-1])
            if texts.setdefault(name, text) != text:
                found = f"{quoted(texts[name])} and {quoted(text)}"
                raise DataError(f"{path}, row {row}: {quoted(name)} has two different texts: {found}")
    return texts


def open_raw(raw: Path) -> RawDataset:
    """UPMC Food-101 in `raw`, with its classes, splits and texts read and checked. Raises DataError."""
    spec = DATASETS["food101"]
    raw_data.require_layout(raw, ("class_idx.json", "split.json", "images/train", "images/test"), LAYOUT)
    classes = read_classes(raw / "class_idx.json", spec.n_classes)
    # A value of another type is kept, to be reported as a bad sample.
    texts = {name: text for name, text in read_texts(raw).items() if text is not None and str(text).strip()}
    splits = []
    for split, names in raw_data.read_split_file(raw / "split.json", spec).items():
        folder = "images/test" if split == "test" else "images/train"
        samples = [
            (row, partial(read_dish, raw, folder, name, texts[name], classes.get(class_of(name))))
            for row, name in enumerate(names, 1)
            if name in texts
        ]
        splits.append(RawSplit(split, "split.json", samples, len(names) - len(samples)))
    return RawDataset(spec, tuple(sorted(classes, key=classes.__getitem__)), tuple(splits))
