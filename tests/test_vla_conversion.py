"""Conversion of feature pickles and of tables with `.npy` files; pickles that would run code are not opened."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.arrow_file import open_table
from tests.conftest import Captured
from tests.custom_files import make
from tests.vla_files import SIZES, mmsa_pickle, mult_pickle, vla_splits
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import DATASETS, SPLITS, Split
from vilt.utils.array_files import samples_of_arrays
from vilt.utils.pickled_arrays import PickledArray, read_pickle
from vilt.utils.write_vla import SPLIT_KEYS

NAMES = ("text", "audio", "vision")


def convert(raw: Path, out: Path, dataset: str = "mosi", *options: str) -> int:
    return make(dataset, raw, out, *options)


def samples(out: Path, dataset: str, split: Split) -> ArrowDataset:
    return ArrowDataset(open_spec(dataset, out, [split]), out, split)


@pytest.fixture
def content() -> dict[str, dict[str, Any]]:
    return vla_splits()


@pytest.mark.parametrize("layout", ["mult", "mmsa"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_both_layouts_give_the_same_samples(
    content: Any, tmp_path: Path, layout: str, protocol: int, capsys: Captured
) -> None:
    make = {"mult": mult_pickle, "mmsa": mmsa_pickle}[layout]
    (tmp_path / "any_name.pkl").write_bytes(pickle.dumps(make(content), protocol))
    assert convert(tmp_path, tmp_path / "out") == 0
    n_texts = str(sum(SIZES.values()))
    assert ["total", n_texts, n_texts] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    for split in SPLITS:
        given = content[SPLIT_KEYS[split]]
        dataset = samples(tmp_path / "out", "mosi", split)
        assert len(dataset) == SIZES[SPLIT_KEYS[split]]
        for row in range(len(dataset)):
            sample = dataset[0, row]
            assert float(sample.label) == given["labels"][row] and dataset.sample_name(row) == given["ids"][row]
            for name in NAMES:
                assert np.array_equal(sample.inputs[name].numpy(), given[name][row])
    table = open_table(tmp_path / "out" / "mosi_train.arrow")
    texts = content["train"]["texts"] if layout == "mmsa" else [""] * SIZES["train"]
    assert table["raw_text"].to_pylist() == [[text] for text in texts]


def test_the_token_mask_gives_the_length_of_a_text(content: Any, tmp_path: Path) -> None:
    layout = mmsa_pickle(content)
    layout["train"]["text"][0] = 1  # beyond the mask too
    layout["train"]["text_bert"] = np.zeros((SIZES["train"], 3, 5), dtype=np.float32)
    layout["train"]["text_bert"][:, 1, :2] = 1
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(layout))
    assert convert(tmp_path, tmp_path / "out") == 0
    assert samples(tmp_path / "out", "mosi", "train")[0, 0].inputs["text"].any(dim=1).tolist() == [0, 0, 0, 1, 1]


def test_non_finite_numbers_become_zero_and_are_counted(content, tmp_path, capsys):
    content["train"]["audio"][1, 3] = [np.nan, -np.inf, np.inf]
    content["test"]["vision"] = content["test"]["vision"].astype(np.float64)
    content["test"]["vision"][0, -1, 0] = 1e39  # overflows float32
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(mult_pickle(content)))
    assert convert(tmp_path, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "audio: numbers that were not finite, now 0: train 3, valid 0, test 0" in said.out
    assert "vision: numbers that were not finite, now 0: train 0, valid 0, test 1" in said.out
    assert samples(tmp_path / "out", "mosi", "train")[0, 1].inputs["audio"][3].tolist() == [0, 0, 0]
    assert "warning: f.pkl: SHA-256" in said.out and "not one of the published files" in said.out


def changed(content: Any, split: str, key: str, value: Any) -> Any:
    layout = mmsa_pickle(content)
    layout[split][key] = value(layout[split].get(key)) if callable(value) else value
    return layout


def without(key: str) -> Any:
    return lambda content: {
        split: {name: value for name, value in arrays.items() if name != key}
        for split, arrays in mmsa_pickle(content).items()
    }


def with_label(row: int, value: float) -> Any:
    def put(labels: np.ndarray) -> np.ndarray:
        labels[row] = value
        return labels

    return lambda content: changed(content, "valid", "regression_labels", put)


WRONG: list[tuple[Any, list[str]]] = [
    (lambda content: [1, 2], ["expected the splits train, valid and test", "[1, 2]"]),
    (lambda content: {"train": {}}, ["expected the splits train, valid and test", "'train'"]),
    (without("audio"), ["train: audio: expected numbers (rows, steps, width), found None"]),
    (without("regression_labels"), ["train: expected labels or regression_labels, found 'id'"]),
    (with_label(2, np.nan), ["valid, row 3: regression_labels: expected a number from -3 to 3, found nan"]),
    (with_label(0, 3.5), ["valid, row 1: regression_labels", "3.5"]),
    (lambda c: changed(c, "test", "id", lambda ids: ids[:-1]), ["test: id: expected 3 rows", "found 2"]),
    (lambda c: changed(c, "test", "vision", lambda x: x[:, :2]), ["test: vision: expected the shape (4, 4)", "(2, 4)"]),
    (lambda c: changed(c, "test", "audio", lambda x: x[:2]), ["test: audio: expected 3 rows", "found 2"]),
    (lambda c: changed(c, "train", "audio_lengths", lambda n: [*n[:-1], 9]), ["train, row 6: audio_lengths", "0 to 6"]),
    (lambda c: changed(c, "train", "vision_lengths", lambda n: n[:2]), ["train: vision_lengths: expected 6, found 2"]),
    (lambda c: changed(c, "train", "text_bert", np.zeros((6, 2, 5))), ["train: text_bert: expected the shape"]),
    (lambda c: changed(c, "train", "text", np.array(["a"] * 6)), ["train: text: expected numbers", "<U1"]),
]


@pytest.mark.parametrize(("make", "parts"), WRONG, ids=[parts[0][:40] for _, parts in WRONG])
def test_invalid_pickles_are_refused_in_one_line_with_file_and_row(content, tmp_path, capsys, make, parts):
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(make(content)))
    assert convert(tmp_path, tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "f.pkl" in said[0] and all(part in said[0] for part in parts), said
    assert not (tmp_path / "out").exists()


class RunsCode:
    """Leaves a file behind if its pickle is opened in the usual way."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "arguments"),
    [(os.system, ("touch left",)), (eval, ("open('left', 'w')",)), (np.load, ("left",)), (getattr, ("a", "upper"))],
    ids=["os.system", "eval", "numpy.load", "getattr"],
)
def test_a_pickle_that_runs_code_is_not_opened(call, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.pkl").write_bytes(pickle.dumps({"train": RunsCode(call, *arguments)}))
    assert convert(tmp_path / "f.pkl", tmp_path / "out") == 2
    assert "which might run code; not opened" in capsys.readouterr().err
    assert not (tmp_path / "left").exists()


ARRAYS = {
    "numbers": np.arange(24.0).reshape(2, 3, 4),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big end first": np.arange(3, dtype=">i4"),
    "bytes": np.array([[b"x"], [b"yy"]]),
    "texts": np.array(["x", "yy"]),
    "objects": np.array(["q", None], dtype=object),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_equal_those_read_by_pickle(tmp_path: Path, protocol: int) -> None:
    given = {**ARRAYS, "scalar": np.float32(2.5), "list": [1, "z"]}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(given, protocol))
    read = read_pickle(tmp_path / "f.pkl")
    for name, array in ARRAYS.items():
        assert isinstance(read[name], PickledArray) and np.array_equal(read[name][:], array)
        assert np.array_equal(read[name][1:], array[1:]) and read[name].shape == array.shape
    assert read["scalar"] == 2.5 and read["list"] == [1, "z"]


def test_the_pickle_that_fits_the_dataset_is_chosen_among_several(content, tmp_path, monkeypatch, capsys):
    sizes: dict[Split, tuple[int, ...]] = {split: (SIZES[SPLIT_KEYS[split]],) for split in SPLITS}
    for split, rows in sizes.items():
        monkeypatch.setitem(DATASETS["mosi"].published_rows, split, rows)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(mult_pickle(content)))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"train": 1, "valid": {"text": 1}}))
    assert convert(tmp_path, tmp_path / "out") == 0
    assert "a.pkl" in capsys.readouterr().out
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(mmsa_pickle(content)))
    assert convert(tmp_path, tmp_path / "out") == 2
    assert "found 2 that fits: a.pkl, c.pkl; give the file itself as --root" in capsys.readouterr().err
    assert convert(tmp_path / "c.pkl", tmp_path / "out") == 0


def write_own_data(folder: Path, content: Any) -> Path:
    lines = ["id,split,label,text"]
    for split, arrays in content.items():
        for row, name in enumerate(arrays["ids"]):
            lines.append(f"{name},{split},{arrays['labels'][row]},{arrays['texts'][row]}")
            for modality in NAMES:
                (folder / modality).mkdir(parents=True, exist_ok=True)
                np.save(folder / modality / f"{name}.npy", arrays[modality][row][row % 3 :])
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


def test_a_table_with_files_is_converted(content: Any, tmp_path: Path) -> None:
    raw = write_own_data(tmp_path / "raw", content)
    assert convert(raw, tmp_path / "out", "vla") == 0
    dataset = samples(tmp_path / "out", "vla", "train")
    for row in range(len(dataset)):
        for name in NAMES:
            expected = content["train"][name][row].copy()
            expected[: row % 3] = 0
            assert np.array_equal(dataset[0, row].inputs[name].numpy(), expected)
    assert (tmp_path / "raw" / "table.csv").rename(tmp_path / "t.csv")
    assert convert(raw, tmp_path / "out", "vla", "--table", str(tmp_path / "t.csv")) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",train,", ",all,", "row 2: split: expected train or valid or test"),
        ("train_1,", "train_0,", "row 3: id: 'train_0' is also in row 2"),
        ("train_1,", "no_such,", "row 3: expected its features in"),
        ("train_1,", "../a,", "row 3: id: expected a name, found '../a'"),
        ("id,split,label", "id,split,score", "row 1: expected the columns 'label'"),
    ],
)
def test_an_invalid_table(content: Any, tmp_path: Path, capsys: Captured, old: str, new: str, message: str) -> None:
    raw = write_own_data(tmp_path / "raw", content)
    table = raw / "table.csv"
    table.write_text(table.read_text().replace(old, new))
    assert convert(raw, tmp_path / "out", "vla") == 2
    assert f"table.csv, {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 9), dtype=np.float32), "expected the width 3, as in train_0.npy, found 9"),
        (np.zeros(3), "expected numbers (steps, width), found float64 (3,)"),
        (np.array([["a"]]), "expected numbers (steps, width), found <U1"),
        (np.array([[{}]]), "Python objects in dtype"),
    ],
)
def test_invalid_array_files(content: Any, tmp_path: Path, capsys: Captured, array: np.ndarray, message: str) -> None:
    raw = write_own_data(tmp_path / "raw", content)
    np.save(raw / "audio" / "train_2.npy", array)
    assert convert(raw, tmp_path / "out", "vla") == 2
    said = capsys.readouterr().err
    assert "table.csv, row 4" in said and "train_2.npy" in said
    assert message in said


MEASURE = """
import resource, sys
import numpy, pyarrow, torch, tqdm
import make_arrow
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = make_arrow.main(["--dataset", "mosi", "--root", sys.argv[1], "--target", sys.argv[2], "--workers", "1"])
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2])
def test_memory_is_at_most_one_and_a_half_times_the_file(tmp_path: Path, protocol: int) -> None:
    draw = np.random.default_rng(0)
    content = {
        key: {
            "text": draw.normal(size=(rows, 50, 300)),
            "audio": draw.normal(size=(rows, 50, 74)),
            "vision": draw.normal(size=(rows, 50, 35)),
            "labels": np.zeros((rows, 1, 1), dtype=np.float32),
        }
        for key, rows in {"train": 250, "valid": 50, "test": 20}.items()
    }
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    _, grown, status = said.splitlines()[-1].split()
    assert int(status) == 0 and int(grown) * 1024 < 1.5 * path.stat().st_size + 40e6, (grown, path.stat().st_size)


def test_files_are_read_alike_in_prediction_and_conversion(tmp_path: Path) -> None:
    splits, found = vla_splits(), []
    for name, layout in (("mult", mult_pickle), ("mmsa", mmsa_pickle)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(layout(splits)))
        found.append(samples_of_arrays(tmp_path / f"{name}.pkl", NAMES))
    for (name, ours, _), (other, theirs, _) in zip(*found, strict=True):
        assert name == other and name.startswith("test_")  # a str, not bytes
        for modality in NAMES:  # MMSA's padding is at the end
            np.testing.assert_array_equal(ours[modality].astype(np.float32), theirs[modality])
