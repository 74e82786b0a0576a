"""Converts UPMC Food-101: photographs from web pages about 101 dishes, each with the title of its page."""

import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import quoted
from common.strict_json import kind_of, read_json
from vilt.datasets.specs import DATASETS
from vilt.utils import raw_data
from vilt.utils.names import look_alikes, normal, whole
from vilt.utils.raw_data import BadSampleError, RawDataset, RawSplit, Row
from vilt.utils.tables import read_text

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


def read_dish(raw: Path, allow_missing: bool, folder: str, name: str, text: object, label: int | None) -> Row:
    """Columns image, text (a list of one), label (class number), image_id (file name). Raises BadSampleError."""
    file = f"{folder}/{class_of(name)}/{name}"
    raw_data.check_inside(file)
    if label is None:
        raise BadSampleError(raw_data.UNKNOWN_CLASS, file, f"{quoted(class_of(name))} is not in class_idx.json")
    texts = None if text is None else [raw_data.of_kind(str, text, file, "text")]
    return {"image": raw_data.read_image(raw, file, allow_missing), "text": texts, "label": label, "image_id": name}


def read_classes(path: Path, n_most: int) -> dict[str, int]:
    """Reads class_idx.json: class name -> number, checked to be 0 ... n-1 with n at most `n_most`. Raises DataError."""
    given = read_json(path)
    classes: dict[str, Any] = {normal(name): whole(number) for name, number in given.items()}
    if len(classes) < len(given) or look_alikes(classes):
        raise DataError(f"{path}: expected each class once, found two that look the same: {ascii(list(given))[:500]}")
    for name, number in classes.items():
        if type(number) is not int:
            raise DataError(f"{path}: expected a number under {quoted(name)}, found {kind_of(number)}")
    if sorted(classes.values()) != list(range(len(classes))) or not classes:
        found = quoted(sorted(classes.values()))
        raise DataError(f"{path}: expected class names and their numbers, from 0 without gaps, found {found}")
    if len(classes) > n_most:
        raise DataError(f"{path}: expected at most {n_most} classes, found {len(classes)}")
    return classes


def read_titles(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields row, file name and title of each line that is not blank.

    A title with commas may be quoted or not; a quote that is not closed on its line is an ordinary character. Raises
    DataError for a line that does not end with the class of its file, such as part of a title.
    """
    for row, line in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(",")
        title, comma, its_class = rest.rpartition(",")
        name = name.strip('"')
        if not comma or normal(its_class.strip('"')) != normal(class_of(name)):
            expected = f"FILE,TEXT,CLASS with the class {quoted(class_of(name))} of the file, on one line"
            raise DataError(f"{path}, row {row}: expected {expected}, found {quoted(line.rstrip())}")
        if re.fullmatch(r'"(?:[^"]|"")*"', title):
            title = title[1:-1].replace('""', '"')
        yield row, name, title


def read_texts(raw: Path) -> dict[str, Any]:
    """File name -> text, from text.json or, if that is absent, from the two titles files. Raises DataError."""
    if (raw / "text.json").is_file():
        return read_json(raw / "text.json")
    raw_data.require_layout(raw, TITLE_FILES, LAYOUT)
    texts: dict[str, str] = {}
    for path in (raw / file for file in TITLE_FILES):
        for row, name, text in read_titles(path):
            if texts.setdefault(name, text) != text:
                found = f"{quoted(texts[name])} and {quoted(text)}"
                raise DataError(f"{path}, row {row}: {quoted(name)} has two different texts: {found}")
    return texts


def open_raw(raw: Path, allow_missing: bool = False) -> RawDataset:
    """Opens UPMC Food-101 in `raw`: reads and checks its classes, splits and texts. Raises DataError.

    Args:
        allow_missing: keep dishes without text, which are otherwise left out, and those without image, which are
            otherwise bad samples.
    """
    spec = DATASETS["food101"]
    raw_data.require_layout(raw, ("class_idx.json", "split.json", "images/train", "images/test"), LAYOUT)
    classes = read_classes(raw / "class_idx.json", spec.n_classes)
    # A value of another type is kept here, and later reported as a bad sample.
    given = read_texts(raw).items()
    texts = {normal(name): text for name, text in given if text is not None and str(text).strip()}
    splits = []
    for split, names in raw_data.read_split_file(raw / "split.json", spec).items():
        folder = "images/test" if split == "test" else "images/train"
        samples = [
            (row, partial(read_dish, raw, allow_missing, folder, name, text, classes.get(normal(class_of(name)))))
            for row, name in enumerate(names, 1)
            for text in [texts.get(normal(name))]
            if text is not None or allow_missing
        ]
        splits.append(RawSplit(split, "split.json", samples, len(names) - len(samples)))
    return RawDataset(spec, tuple(sorted(classes, key=classes.__getitem__)), tuple(splits))
