"""`vilt.convert.convert` turns DataFrames, Hugging Face Datasets and dictionaries into arrow files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import DataError
from tests.custom_files import columns_of, png
from vilt.convert import convert
from vilt.datasets.custom import CustomData
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import SPLITS
from vilt.images import open_rgb
from vilt.utils.arrow_writer import BadSamplesError


def frame(images: list[Any], **columns: Any) -> pd.DataFrame:
    count = len(images)
    given = {"text": [f"text {n}" for n in range(count)], "label": ["cat", "dog"] * (count // 2)}
    return pd.DataFrame({"image": images, **given, "split": [*["train"] * (count - 2), "val", "test"], **columns})


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "Pillow", "array", "dictionary", "path in a dictionary"])
def test_images_of_every_kind_are_converted(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    image: Any = {
        "path": Path("a.png"),
        "text": "A.PNG",
        "bytes": png(7),
        "Pillow": Image.open(tmp_path / "a.png"),
        "array": np.asarray(Image.open(tmp_path / "a.png")),
        "dictionary": {"bytes": png(7), "path": "b.png"},
        "path in a dictionary": {"bytes": None, "path": str(tmp_path / "a.png")},
    }[kind]
    summary = convert(frame([image] * 4), tmp_path / "out", root=tmp_path)
    assert [split.n_samples for split in summary] == [2, 1, 1]
    found = columns_of(tmp_path / "out")
    assert found["text"] == [["text 0"], ["text 1"]] and found["label"] == [0, 1]
    if kind in ("Pillow", "array"):
        assert [open_rgb(data).tobytes() for data in found["image"]] == [open_rgb(png(7)).tobytes()] * 2
    else:
        assert found["image"] == [png(7)] * 2
    names = {"path": "a.png", "text": "A.PNG", "dictionary": "b.png", "path in a dictionary": str(tmp_path / "a.png")}
    assert found["image_id"] == [names.get(kind, "row 1"), names.get(kind, "row 2")]


def test_empty_cells_are_missing_and_numbers_may_be_labels(tmp_path: Path) -> None:
    data = frame(
        [png(1), None, float("nan"), pd.NA, png(2), png(3)],
        text=[None, "a", "b", ["c", "d"], pd.NA, np.nan],
        label=pd.Series([1, 0, 1, 0, 0, None]).fillna(1),
    )
    convert(data, tmp_path, metric="f1_macro", name="pets", classes=[1, 0])
    assert columns_of(tmp_path)["image"] == [png(1), None, None, None]
    assert columns_of(tmp_path)["text"] == [None, ["a"], ["b"], ["c", "d"]]
    assert columns_of(tmp_path)["label"] == [0, 1, 0, 1]
    assert open_spec("custom", tmp_path, SPLITS).custom == CustomData("pets", "single", ("1", "0"), "f1_macro")


def test_lists_of_labels_are_multi_label_and_absent_splits_are_drawn(tmp_path: Path) -> None:
    tags = [["a", "b"], ("b",), []]
    rows = [{"photo": png(n), "caption": str(n), "tags": tags[n % 3], "split": None} for n in range(30)]
    columns = {"image": "photo", "text": "caption", "label": "tags"}
    summary = convert(rows, tmp_path / "a", columns=columns, split_seed=3)
    assert [split.n_samples for split in summary] == [21, 3, 6]
    assert open_spec("custom", tmp_path / "a", SPLITS).custom == CustomData("custom", "multi", ("a", "b"), "f1_macro")
    convert(pd.DataFrame(rows).drop(columns="split"), tmp_path / "b", columns=columns, split_seed=3)
    assert columns_of(tmp_path / "a") == columns_of(tmp_path / "b")


# Stand-ins for Hugging Face's library, which tests do not install, with the parts of its interface that we use.


@dataclass(frozen=True)
class ImageFeature:
    decode: bool = True


@dataclass(frozen=True)
class ClassLabel:
    names: list[str]


class Dataset:
    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features, self.column_names = columns, features, list(columns)

    def __len__(self) -> int:
        return len(self.columns["text"])

    def __getitem__(self, name: str) -> Iterator[Any]:
        if name == "image" and self.features["image"].decode:
            raise AssertionError("decoded")
        return iter(self.columns[name])

    def cast_column(self, name: str, feature: Any) -> "Dataset":
        return Dataset(self.columns, {**self.features, name: feature})


def test_hugging_face_splits_keep_their_class_names(tmp_path: Path) -> None:
    features = {"image": ImageFeature(), "text": None, "label": ClassLabel(["dog", "cat"])}
    images = [{"bytes": png(n), "path": None} for n in range(2)]
    columns: dict[str, list[Any]] = {"image": images, "text": ["a", None], "label": [1, 0]}
    convert({split: Dataset(columns, features) for split in ("train", "validation", "test")}, tmp_path)
    for split in SPLITS:
        found = columns_of(tmp_path, split)
        assert (found["image"], found["text"], found["label"]) == ([png(0), png(1)], [["a"], None], [1, 0])
    assert open_spec("custom", tmp_path, SPLITS).class_names == ("dog", "cat")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"image": ["nowhere.png"] * 4}, "missing file"),
        ({"image": [b"no image"] * 4}, "undecodable image"),
        ({"image": [3.5] * 4}, "image: expected a path, bytes, a Pillow image or an array"),
        ({"image": [np.zeros((2, 2, 2, 2))] * 4}, "undecodable image"),
        ({"image": [np.zeros((9, 9, 3))] * 4}, "expected an array (H, W, 3) of uint8, found float64 (9, 9, 3)"),
        ({"image": ["http://there/a.png"] * 4}, "expected a file, found a URL"),
        ({"image": ["a" * 300] * 4}, "unreadable file"),
        ({"label": ["cat", "dog", b"cat", "cat"]}, "label: expected a name, found"),
        ({"image": [None] * 4, "text": [""] * 4}, "no image and no text"),
        ({"label": ["cat", "dog", True, "cat"]}, "label: expected a name, found true"),
    ],
)
def test_unusable_rows_are_refused(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadSamplesError) as caught:
        convert(frame([png(n) for n in range(4)], **change), tmp_path)
    assert any(fact in " ".join(bad.cells()) for bad in caught.value.bad)
    assert not list(tmp_path.iterdir())


def test_wrong_columns_and_options_are_refused(tmp_path: Path) -> None:
    data = frame([png(n) for n in range(4)])
    twice = pd.concat([data, data["text"]], axis=1)
    for wrong, options, fact in (
        (data, {"columns": {"text": "caption"}}, "expected the columns caption, found image, text, label, split"),
        (twice, {}, "the column 'text' is repeated"),
        (data, {"columns": {"texts": "text"}}, "columns: expected image, text, label, split, found texts"),
        (data, {"classes": {"cat", "dog"}}, "classes: expected a list"),
        (data.assign(split="eval"), {}, "row 1: split: expected train or val or test, found 'eval'"),
        ({"train": data, "val": data}, {}, "expected rows with split test, found none"),
        (data, {"metric": "auc"}, "metric: expected accuracy or f1_macro or auroc"),
        (data, {"labels": "both"}, "labels: expected single or multi, found 'both'"),
    ):
        with pytest.raises(DataError) as caught:
            convert(wrong, tmp_path, **options)
        assert fact in str(caught.value)
