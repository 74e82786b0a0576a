"""The dataset class: the published files row by row, several plots per film, damaged files, token caches."""

import io
import json
import logging
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import DataError
from vilt.datasets import arrow_dataset
from vilt.datasets.arrow_dataset import ArrowDataset, Sample
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES, SPLITS, Split
from vilt.transforms import decode_image

GOLDEN = Path(__file__).parent / "data" / "golden"
SIZE = 8


def png(seed: int, size: int = SIZE) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, table: pa.Table, rows_per_batch: int | None = None) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, rows_per_batch)


def genres(*ones: int) -> list[int]:
    return [int(genre in ones) for genre in range(23)]


def films(plots: Sequence[Sequence[str]]) -> pa.Table:
    return pa.table(
        {
            "image": [png(row) for row in range(len(plots))],
            "plots": [list(texts) for texts in plots],
            "label": [genres(row, row + 1) for row in range(len(plots))],
            "image_id": [f"film{row}" for row in range(len(plots))],
        }
    )


def memes(rows: int = 3) -> pa.Table:
    return pa.table(
        {
            "image": [png(row) for row in range(rows)],
            "text": [[f"meme {row}"] for row in range(rows)],
            "label": [row % 2 for row in range(rows)],
        }
    )


def open_films(folder: Path, split: Split = "train") -> ArrowDataset:
    return ArrowDataset(DATASETS["mmimdb"], folder, split, SIZE)


def open_memes(folder: Path, table: pa.Table, rows_per_batch: int | None = None) -> ArrowDataset:
    write(folder / "hatememes_train.arrow", table, rows_per_batch)
    return ArrowDataset(DATASETS["hatememes"], folder, "train", SIZE)


class Tokenizer:
    """Says what it was asked: a text becomes its length and its first characters."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        ids = np.zeros((len(texts), 77), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : min(77, len(text) + 1)] = [len(text), *map(ord, text)][:77]
        return ids


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_tokens_*.npy"))


# ---- files of the published converters


def raw_rows(dataset: str, split: str) -> list[tuple[bytes, list[str], list[int] | int, str | None]]:
    """Image, texts, label and id of every row, from the raw files alone."""
    raw = GOLDEN / "raw" / dataset
    if dataset == "hatememes":
        records = [json.loads(line) for line in (raw / "data" / f"{split}.jsonl").read_text().splitlines()]
        return [((raw / "data" / r["img"]).read_bytes(), [r["text"]], r["label"], None) for r in records]
    names = json.loads((raw / "split.json").read_text())[split]
    if dataset == "food101":
        texts = json.loads((raw / "text.json").read_text())
        numbers = json.loads((raw / "class_idx.json").read_text())
        folder = raw / "images" / ("test" if split == "test" else "train")
        classes = {name: name.rpartition("_")[0] for name in names}
        return [
            ((folder / classes[name] / name).read_bytes(), [texts[name]], numbers[classes[name]], name)
            for name in names
            if name in texts
        ]
    labels = {name: json.loads((raw / "labels" / f"{name}.json").read_text()) for name in names}
    return [
        (
            (raw / "images" / f"{name}.jpeg").read_bytes(),
            labels[name]["plot"],
            [int(genre in labels[name]["genres"]) for genre in MMIMDB_GENRES],
            name,
        )
        for name in names
    ]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", DATASETS)
def test_files_of_the_published_converters_are_read_row_by_row(tmp_path, name, split):
    spec = DATASETS[name]
    shutil.copy(GOLDEN / "arrow" / spec.file_name(split), tmp_path)
    dataset = ArrowDataset(spec, tmp_path, split, 24)
    rows = raw_rows(name, spec.file_splits[split])
    assert dataset.n_rows == len(rows) >= 2
    expected = [(row, *rest) for row, rest in enumerate(rows) for _ in rest[1]]
    assert len(dataset) == len(expected)
    tokenizer = Tokenizer()
    dataset.tokenize(tokenizer, "f")
    assert tokenizer.calls == [[text for _, texts, _, _ in rows for text in texts]]
    for index, (row, image, _, label, name_of_row) in enumerate(expected):
        sample = dataset[0, index]
        assert sample.image_3RR is not None
        assert torch.equal(sample.image_3RR, decode_image(image, 24))
        assert sample.label.tolist() == label
        assert sample.label.dtype == (torch.uint8 if name == "mmimdb" else torch.int64)
        assert sample.tokens_L is not None
        assert sample.tokens_L.dtype == torch.int64
        assert sample.tokens_L.tolist() == tokenizer(tokenizer.calls[0])[index].tolist()
        assert (sample.missing_type, sample.number) == (0, index)
        assert dataset.sample_name(index) == (name_of_row or f"row {row}")


def test_class_names_come_from_the_table_then_the_file_then_the_numbers(tmp_path):
    food = DATASETS["food101"]
    shutil.copy(GOLDEN / "arrow" / "food101_val.arrow", tmp_path)
    assert ArrowDataset(food, tmp_path, "val", SIZE).class_names() == tuple(map(str, range(101)))
    table = memes().append_column("split", [["test"] * 3])
    names = [f"dish {number}" for number in range(101)]
    write(tmp_path / "food101_test.arrow", table.replace_schema_metadata({"class_names": json.dumps(names)}))
    assert ArrowDataset(food, tmp_path, "test", SIZE).class_names() == tuple(names)
    assert open_memes(tmp_path, memes()).class_names() == ("not hateful", "hateful")


# ---- several plots


@pytest.mark.parametrize("rows_per_batch", [None, 2, 1])
def test_a_film_with_several_plots_is_several_samples_with_one_missing_entry(tmp_path, rows_per_batch):
    table = films([["a"], ["b", "c", "d"], ["e", "f"]])
    write(tmp_path / "mmimdb_train.arrow", table, rows_per_batch)
    dataset = open_films(tmp_path)
    assert (dataset.n_rows, len(dataset)) == (3, 6)
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.array([0, 2, 1], dtype=np.int8)
    assert dataset.missing_type_of_sample.tolist() == [0, 2, 2, 2, 1, 1]
    samples = [dataset[0, index] for index in range(6)]
    assert [sample.missing_type for sample in samples] == [0, 2, 2, 2, 1, 1]
    assert [sample.number for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert [sample.image_3RR is None for sample in samples] == [False, True, True, True, False, False]
    texts = [None if sample.tokens_L is None else chr(int(sample.tokens_L[1])) for sample in samples]
    assert texts == ["a", "b", "c", "d", None, None]
    for sample, row in zip(samples, [0, 1, 1, 1, 2, 2], strict=True):
        assert sample.label.tolist() == genres(row, row + 1)
        assert dataset.sample_name(sample.number) == f"film{row}"
        if sample.image_3RR is not None:
            assert torch.equal(sample.image_3RR, decode_image(png(row), SIZE))


# ---- images are read one by one


def test_evaluation_goes_from_long_to_short_texts_and_keeps_films_together(tmp_path):
    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = np.zeros((len(texts), 77), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, int(text)] = 9
        return ids

    write(tmp_path / "mmimdb_train.arrow", films([["3"], ["5", "70"], ["76"], ["6", "2"], ["3"]]))
    dataset = open_films(tmp_path)
    assert dataset.evaluation_order().tolist() == list(range(7)), "no tokens: as they are"
    dataset.tokenize(tokenize, "numbers")
    assert dataset.evaluation_order().tolist() == [3, 1, 2, 4, 5, 0, 6]
    dataset.missing_table = np.array([0, 0, 1, 2, 0], dtype=np.int8)  # the third has no text
    assert dataset.evaluation_order().tolist() == [1, 2, 4, 5, 0, 6, 3]


def test_samples_of_a_film_in_one_batch_share_its_image(tmp_path, monkeypatch):
    write(tmp_path / "mmimdb_train.arrow", films([["a"], ["b", "c"], ["d", "e"]]))
    dataset = open_films(tmp_path)
    dataset.missing_table = np.array([0, 0, 2], dtype=np.int8)
    decoded = []

    def counting(data: bytes, size: int) -> torch.Tensor:
        decoded.append(data)
        return decode_image(data, size)

    monkeypatch.setattr(arrow_dataset, "decode_image", counting)
    batch = dataset.__getitems__([(0, 2), (0, 0), (0, 1), (0, 3)])
    assert [sample.number for sample in batch] == [2, 0, 1, 3]
    assert batch[0].image_3RR is batch[2].image_3RR and batch[3].image_3RR is None
    assert len(decoded) == 2
    for sample in batch:
        assert_equal(sample, dataset[0, sample.number])


def test_opening_reads_no_image(tmp_path):
    """A file of MM-IMDb's length: its bytes are mapped, and what an image holds shows only when it is asked for."""
    n_rows = 15_552
    marker = b"not an image, and %06d is its number".ljust(2000, b".")
    table = pa.table(
        {
            "image": [marker.replace(b"%06d", b"%06d" % row) for row in range(n_rows)],
            "plots": [[f"plot {row}"] for row in range(n_rows)],
            "label": [genres(row % 23) for row in range(n_rows)],
        }
    )
    path = tmp_path / "mmimdb_train.arrow"
    write(path, table, 4096)
    del table
    before = pa.total_allocated_bytes()
    dataset = open_films(tmp_path)
    dataset.tokenize(lambda texts: np.ones((len(texts), 77), dtype=np.int64), "f")
    assert len(dataset) == n_rows
    assert pa.total_allocated_bytes() - before < 8_000_000, "the images alone are 31 MB"
    with pytest.raises(DataError, match="row 9999: the image cannot be decoded"):
        dataset[0, 9999]
    # What is written into the file now can only be seen by a dataset that has not loaded it.
    image = png(5)
    place = path.read_bytes().index(b"not an image, and 009999 is its number")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(image)
    shown = dataset[0, 9999].image_3RR
    assert shown is not None
    assert torch.equal(shown, decode_image(image, SIZE))


def test_the_image_of_a_sample_that_lacks_it_is_not_decoded(tmp_path, monkeypatch):
    dataset = open_memes(tmp_path, memes(3))
    dataset.missing_table = np.array([0, 1, 2], dtype=np.int8)
    decoded = []

    def remember(data: bytes, size: int) -> torch.Tensor:
        decoded.append(data)
        return decode_image(data, size)

    monkeypatch.setattr(arrow_dataset, "decode_image", remember)
    for index in range(3):
        dataset[0, index]
    assert decoded == [png(0), png(1)]


# ---- simulate_missing


def type_in(dataset: ArrowDataset, epoch: int, index: int) -> int:
    sample = dataset[epoch, index]
    assert (sample.image_3RR is None) == (sample.missing_type == 2)
    assert (sample.tokens_L is None) == (sample.missing_type == 1)
    return sample.missing_type


@pytest.fixture
def simulated(tmp_path: Path) -> ArrowDataset:
    write(tmp_path / "mmimdb_train.arrow", films([["a"], ["b", "c"]] * 10))
    dataset = open_films(tmp_path)
    dataset.tokenize(Tokenizer(), "f")
    dataset.simulate_seed = 5
    return dataset


def test_simulated_types_follow_from_seed_epoch_and_sample(simulated):
    def types(seed: int, epoch: int) -> list[int]:
        simulated.simulate_seed = seed
        return [type_in(simulated, epoch, index) for index in range(30)]

    expected = [int(np.random.default_rng([5, 1, index]).integers(3)) for index in range(30)]
    assert types(5, 1) == expected
    np.random.seed(3)
    torch.manual_seed(3)
    assert [type_in(simulated, 1, index) for index in reversed(range(30))] == expected[::-1]
    assert len({tuple(types(seed, epoch)) for seed in (5, 6) for epoch in range(5)}) == 10, "anew in each epoch"
    assert any(expected[i] != expected[i + 1] for i in range(1, 30, 3)), "each plot of a film draws for itself"


def test_simulated_types_are_those_that_were_written_down(simulated):
    types = "".join(str(type_in(simulated, epoch, index)) for epoch in (0, 1) for index in range(20))
    assert types == "2202002002210200002002112022220122112210"


def test_simulated_types_are_uniform(simulated):
    types = [type_in(simulated, epoch, index) for epoch in range(60) for index in range(30)]
    for value in range(3):
        assert abs(types.count(value) - 600) < 5 * np.sqrt(1800 * 2 / 9), "five standard deviations"


def test_simulation_leaves_what_is_missing_by_the_table(simulated):
    simulated.missing_table = np.array([1, 2] * 9 + [0, 0], dtype=np.int8)
    for epoch in range(10):
        assert [type_in(simulated, epoch, index) for index in range(27)] == [1, 2, 2] * 9
    assert {type_in(simulated, epoch, index) for epoch in range(10) for index in (27, 28, 29)} == {0, 1, 2}


def test_without_simulation_complete_samples_stay_complete(simulated):
    simulated.simulate_seed = None
    assert {type_in(simulated, epoch, index) for epoch in range(5) for index in range(30)} == {0}


# ---- what is refused


def changed(column: str, values: pa.Array | list) -> pa.Table:
    table = memes()
    return table.set_column(table.column_names.index(column), column, pa.chunked_array([values]))


def changed_films(labels: pa.Array) -> pa.Table:
    table = films([["a"], ["b"], ["c"]])
    return table.set_column(2, "label", labels)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (memes().drop(["label"]), "expected the columns image, label, text; found image, text"),
        (memes().drop(["image", "text"]), "expected the columns image, label, text; found label"),
        (memes().rename_columns(["image", "plots", "label"]), "found image, plots, label"),
        (memes().slice(0, 0), "expected samples, found 0 rows and no text"),
        (changed("text", [[]] * 3), "column text: expected lists of texts, found list<item: null>"),
        (changed("text", pa.array([[]] * 3, pa.list_(pa.string()))), "expected samples, found 3 rows and no text"),
        (changed("text", ["a", "b", "c"]), "column text: expected lists of texts, found string"),
        (changed("text", [[1], [2], [3]]), "column text: expected lists of texts, found list<item: int64>"),
        (changed("text", [["a"], None, ["c"]]), "row 1: column text is empty (null) (1 such rows)"),
        (changed("text", [["a", "b"], ["c"], ["d", None]]), "row 2: column text: a text is empty (null)"),
        (changed("image", [png(0), None, None]), "row 1: column image is empty (null) (2 such rows)"),
        (changed("image", ["a", "b", "c"]), "column image: expected the bytes of image files, found string"),
        (changed("image", [1, 2, 3]), "column image: expected the bytes of image files, found int64"),
        (changed("label", [0, 1, None]), "row 2: column label is empty"),
        (changed("label", [0, 2, 2]), "row 1: label 2 is outside 0 to 1 (2 such rows)"),
        (changed("label", [-1, 0, 1]), "row 0: label -1 is outside 0 to 1 (1 such rows)"),
        (changed("label", [0.0, 1.0, 1.0]), "column label: expected class numbers, found double"),
        (changed("label", ["0", "1", "1"]), "column label: expected class numbers, found string"),
        (changed("label", [[0], [1], [1]]), "column label: expected class numbers, found list"),
    ],
)
@pytest.mark.parametrize("rows_per_batch", [None, 1])
def test_a_file_that_is_not_the_dataset_is_refused_when_it_is_opened(tmp_path, table, message, rows_per_batch):
    with pytest.raises(DataError) as raised:
        open_memes(tmp_path, table, rows_per_batch)
    assert str(raised.value).startswith(f"{tmp_path / 'hatememes_train.arrow'}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([genres(1), genres(1)[:-1], genres(1)], "row 1: column label: expected lists of 23 zeros and ones"),
        ([genres(1), genres(), [*genres(2), 0]], "row 2: column label: expected lists of 23 zeros and ones"),
        ([[], genres(1), genres(1)], "row 0: column label: expected lists of 23 zeros and ones"),
        ([genres(1), genres(), [*genres(2)[:-1], 2]], "row 2: .* 23 zeros and ones, found 2"),
        ([[-1, *genres()[1:]], genres(1), genres(1)], "row 0: .* 23 zeros and ones, found -1"),
        ([genres(1), [None, *genres()[1:]], genres(1)], "row 1: .* 23 zeros and ones, found None"),
        ([genres(1), [0.5, *genres()[1:]], genres(1)], "row 1: .* 23 zeros and ones, found 0.5"),
        ([genres(1), None, genres(1)], "row 1: column label is empty"),
        ([1, 0, 1], "column label: expected lists of 23 zeros and ones"),
        ([list("0" * 23)] * 3, "row 0: .* 23 zeros and ones, found '0'"),
    ],
)
def test_label_vectors_that_are_not_the_datasets_are_refused(tmp_path, labels, message):
    if any(isinstance(value, float) for label in labels if isinstance(label, list) for value in label):
        labels = pa.array([[float(value) for value in label] for label in labels])
    write(tmp_path / "mmimdb_train.arrow", changed_films(pa.array(labels)))
    with pytest.raises(DataError) as raised:
        open_films(tmp_path)
    assert re.match(rf"{tmp_path / 'mmimdb_train.arrow'}: {message}", str(raised.value))


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError) as raised:
        open_films(tmp_path, "val")
    assert str(raised.value) == (
        f"{tmp_path}/mmimdb_dev.arrow: no such file; "
        f"make it with `python make_arrow.py --dataset mmimdb --root RAW --target {tmp_path}`"
    )


def stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def file_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ARROW1",
        b"id,label\n1,0\n" * 100,
        stream_of(memes()),
        file_of(memes())[:-1],
        file_of(memes())[: len(file_of(memes())) // 2],
        file_of(memes())[8:],
    ],
    ids=["empty", "only the start", "a CSV file", "a stream", "a byte short", "half of it", "start cut off"],
)
def test_a_file_that_is_no_whole_arrow_file_is_refused(tmp_path, content):
    path = tmp_path / "hatememes_train.arrow"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", SIZE)
    assert str(raised.value).startswith(f"{path}: not readable as an arrow file: ")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "hatememes_train.arrow").mkdir()
    with pytest.raises(DataError, match=r"hatememes_train\.arrow: not readable as an arrow file"):
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", SIZE)


@pytest.mark.parametrize(("column", "old", "new"), [("text", b"meme 1", b"meme \xff"), ("image", None, None)])
def test_a_damaged_column_is_refused(tmp_path, column, old, new):
    content = file_of(memes())
    if old is None:  # the offsets of the images point far behind the end of the file
        ends = np.cumsum([len(png(row)) for row in range(3)]).astype("<i4")
        old, new = ends.tobytes(), np.array([*ends[:2], 2_000_000_000], dtype="<i4").tobytes()
    assert content.count(old) == 1
    (tmp_path / "hatememes_train.arrow").write_bytes(content.replace(old, new))
    with pytest.raises(DataError, match=rf"hatememes_train\.arrow: column {column}: damaged"):
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", SIZE)


def truncated_jpeg() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "JPEG")
    return out.getvalue()[:-500]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", png(1)[:40], png(1)[:-60], truncated_jpeg(), png(1).replace(b"IDAT", b"IDAX")],
    ids=["empty", "a web page", "cut in its header", "cut PNG", "cut JPEG", "damaged PNG"],
)
def test_an_undecodable_image_is_an_error_that_names_file_and_row(tmp_path, data):
    dataset = open_memes(tmp_path, changed("image", [png(0), png(1), data]))
    assert dataset[0, 1].image_3RR is not None
    with pytest.raises(DataError) as raised:
        dataset[0, 2]
    assert str(raised.value).startswith(f"{tmp_path / 'hatememes_train.arrow'}: row 2: the image cannot be decoded: ")


def test_an_image_of_too_many_pixels_is_an_error_that_names_file_and_row(tmp_path, monkeypatch):
    dataset = open_memes(tmp_path, memes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow refuses twice as many
    with pytest.raises(DataError, match=r"hatememes_train\.arrow: row 1: the image cannot be decoded: Image size \(64"):
        dataset[0, 1]


def test_the_row_that_is_named_is_that_of_the_film_not_of_the_plot(tmp_path):
    table = films([["a", "b", "c"], ["d"]])
    write(tmp_path / "mmimdb_train.arrow", table.set_column(0, "image", [[png(0), b"broken"]]))
    with pytest.raises(DataError, match=r"mmimdb_train\.arrow: row 1: the image"):
        open_films(tmp_path)[0, 3]


# ---- worker processes


def test_pickling_carries_neither_the_file_nor_its_table(tmp_path):
    rows = 400
    table = memes(rows).set_column(0, "image", [[png(row, 64) for row in range(rows)]])
    dataset = open_memes(tmp_path, table)
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.arange(rows, dtype=np.int8) % 3
    opened = dataset.table
    pickled = pickle.dumps(dataset)
    assert dataset.table is opened, "the original keeps its own"
    assert len(pickled) < 200_000 < 4_000_000 < (tmp_path / "hatememes_train.arrow").stat().st_size
    copy = pickle.loads(pickled)
    assert vars(copy)["_table"] is None
    for index in (0, 1, 2, rows - 1):
        assert_equal(copy[0, index], dataset[0, index])


def test_a_spawned_worker_reads_the_same(tmp_path):
    dataset = open_memes(tmp_path, memes(4), 2)
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.array([0, 1, 2, 0], dtype=np.int8)
    keys = [(0, index) for index in range(4)]
    loader: DataLoader[Sample] = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    samples = list(loader)
    assert len(samples) == 4
    for sample, key in zip(samples, keys, strict=True):
        assert_equal(sample, dataset[key])


def assert_equal(one: Sample, other: Sample) -> None:
    assert (one.missing_type, one.number) == (other.missing_type, other.number)
    for mine, theirs in zip(one[:3], other[:3], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


# ---- tokens


def must_not_be_called(texts: Sequence[str]) -> np.ndarray:
    raise AssertionError(f"tokenized again: {texts}")


def test_tokens_are_made_once_and_found_again(tmp_path):
    first = open_memes(tmp_path, memes())
    tokenizer = Tokenizer()
    first.tokenize(tokenizer, "f")
    assert tokenizer.calls == [["meme 0", "meme 1", "meme 2"]]
    (cache,) = caches(tmp_path)
    assert cache.name.startswith("hatememes_train_tokens_")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hatememes_train.arrow", cache.name], "nothing else"
    made = [first[0, index].tokens_L for index in range(3)]
    again = ArrowDataset(DATASETS["hatememes"], tmp_path, "train", SIZE)
    again.tokenize(must_not_be_called, "f")
    for index, tokens in enumerate(made):
        found = again[0, index].tokens_L
        assert tokens is not None
        assert found is not None
        assert found.dtype == tokens.dtype == torch.int64
        assert found.tolist() == tokens.tolist() == Tokenizer()([f"meme {index}"])[0].tolist()


def test_reading_samples_does_not_tokenize(tmp_path):
    dataset = open_memes(tmp_path, memes())
    tokenizer = Tokenizer()
    dataset.tokenize(tokenizer, "f")
    for epoch in range(3):
        for index in range(3):
            dataset[epoch, index]
    assert len(tokenizer.calls) == 1


def test_other_texts_or_another_tokenizer_have_their_own_cache(tmp_path):
    open_memes(tmp_path, memes()).tokenize(Tokenizer(), "f")
    texts = [["meme 0"], ["meme 1"], ["another"]]
    cases = [(changed("text", texts), "f"), (memes(), "g"), (changed("text", texts), "g"), (memes(4), "f")]
    for seen, (table, fingerprint) in enumerate(cases, start=2):
        dataset, tokenizer = open_memes(tmp_path, table), Tokenizer()
        dataset.tokenize(tokenizer, fingerprint)
        assert tokenizer.calls == [[text for row in table["text"].to_pylist() for text in row]]
        assert dataset.tokens is not None
        assert dataset.tokens.tolist() == tokenizer(tokenizer.calls[0]).tolist()
        assert len(caches(tmp_path)) == seen
    open_memes(tmp_path, memes()).tokenize(must_not_be_called, "f")


def test_splits_and_the_order_of_texts_are_told_apart(tmp_path):
    write(tmp_path / "mmimdb_train.arrow", films([["a", "b"], ["c"]]))
    write(tmp_path / "mmimdb_dev.arrow", films([["a", "b"], ["c"]]))
    open_films(tmp_path).tokenize(Tokenizer(), "f")
    open_films(tmp_path, "val").tokenize(Tokenizer(), "f")
    assert [path.name.partition("_tokens_")[0] for path in caches(tmp_path)] == ["mmimdb_dev", "mmimdb_train"]
    write(tmp_path / "mmimdb_train.arrow", films([["c", "b"], ["a"]]))
    dataset = open_films(tmp_path)
    dataset.tokenize(Tokenizer(), "f")
    assert [chr(int(tokens[1])) for tokens in np.asarray(dataset.tokens)] == ["c", "b", "a"]


def as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"garbage",
        b"\x93NUMPY\x01\x00\x04\x00((((((",
        as_npy(np.zeros((3, 77), np.int32))[:-4],
        as_npy(np.zeros((2, 77), np.int32)),
        as_npy(np.zeros(3, np.int32)),
        as_npy(np.zeros((3, 77))),
        as_npy(np.array([None] * 3)),
    ],
    ids=["empty", "zip", "garbage", "bad header", "truncated", "a row short", "one-dimensional", "floats", "objects"],
)
def test_a_damaged_cache_is_made_anew(tmp_path, caplog, content):
    open_memes(tmp_path, memes()).tokenize(Tokenizer(), "f")
    (cache,) = caches(tmp_path)
    whole = cache.read_bytes()
    cache.write_bytes(content)
    dataset, tokenizer = open_memes(tmp_path, memes()), Tokenizer()
    with caplog.at_level(logging.WARNING):
        dataset.tokenize(tokenizer, "f")
    assert len(tokenizer.calls) == 1
    assert dataset.tokens is not None
    assert dataset.tokens.tolist() == tokenizer(tokenizer.calls[0]).tolist()
    assert [str(cache) in record.getMessage() for record in caplog.records] == [True]
    assert caches(tmp_path) == [cache]
    assert cache.read_bytes() == whole


def test_a_folder_that_cannot_be_written_works_without_a_cache(tmp_path, caplog, monkeypatch):
    dataset, tokenizer = open_memes(tmp_path, memes()), Tokenizer()

    def refuse(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(arrow_dataset.np, "save", refuse)
    with caplog.at_level(logging.INFO):
        dataset.tokenize(tokenizer, "f")
    assert [path.name for path in tmp_path.iterdir()] == ["hatememes_train.arrow"]
    assert "Permission denied" in caplog.text
    assert dataset.tokens is not None
    assert dataset.tokens.tolist() == tokenizer(tokenizer.calls[0]).tolist()
    assert dataset[0, 2].tokens_L is not None


def test_the_cache_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    dataset = open_memes(tmp_path, memes())

    def half(file: io.BufferedWriter, array: np.ndarray) -> None:
        file.write(array.tobytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(arrow_dataset.np, "save", half)
    with pytest.raises(KeyboardInterrupt):
        dataset.tokenize(Tokenizer(), "f")
    assert [path.name for path in tmp_path.iterdir()] == ["hatememes_train.arrow"]
