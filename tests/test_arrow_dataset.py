"""Arrow datasets: published files row by row, several plots per film, damaged files, token caches."""

import io
import json
import logging
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from common.arrow_file import open_table
from common.errors import DataError
from tests.conftest import Patch
from tests.data_files import CLIP_DATASETS, Tokenizer, as_npy, assert_equal, file_of, films, genres, memes, png, write
from vilt.datasets import kinds
from vilt.datasets.arrow_dataset import ArrowDataset, Sample
from vilt.datasets.kinds import TextKind, decode_image
from vilt.datasets.specs import DATASETS, SPLITS, Split

GOLDEN = Path(__file__).parent / "data" / "golden"
SIZE = 8
ARROW = "hatememes_train.arrow"


def open_films(folder: Path, table: pa.Table | None = None, split: Split = "train") -> ArrowDataset:
    if table is not None:
        write(folder / DATASETS["mmimdb"].file_name(split), table)
    return ArrowDataset(DATASETS["mmimdb"], folder, split, SIZE)


def open_memes(folder: Path, table: pa.Table | None = None, rows_per_batch: int | None = None) -> ArrowDataset:
    if table is not None:
        write(folder / ARROW, table, rows_per_batch)
    return ArrowDataset(DATASETS["hatememes"], folder, "train", SIZE)


def tokens_of(dataset: ArrowDataset) -> np.ndarray:
    texts = dataset.kinds["text"]
    assert isinstance(texts, TextKind) and texts.tokens is not None
    return texts.tokens


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_tokens_*.npy"))


@pytest.fixture
def decoded(monkeypatch: Patch) -> list[bytes]:
    """Images decoded so far."""
    found: list[bytes] = []

    def remember(data: bytes, size: int) -> torch.Tensor:
        found.append(data)
        return decode_image(data, size)

    monkeypatch.setattr(kinds, "decode_image", remember)
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CLIP_DATASETS)
def test_files_of_the_published_converters_are_read_row_by_row(golden_arrow, name, split):
    spec = DATASETS[name]
    dataset = ArrowDataset(spec, golden_arrow, split, 24)
    rows = open_table(golden_arrow / spec.file_name(split)).to_pylist()
    assert dataset.n_rows == len(rows) >= 2
    column = spec.modalities["text"].column
    expected = [(number, row) for number, row in enumerate(rows) for _ in row[column]]
    assert len(dataset) == len(expected)
    tokenizer = Tokenizer()
    dataset.tokenize(tokenizer, "f")
    assert tokenizer.calls == [[text for row in rows for text in row[column]]]
    tokens = torch.from_numpy(tokenizer(tokenizer.calls[0]))
    for index, (number, row) in enumerate(expected):
        label = torch.tensor(row["label"], dtype=torch.uint8 if name == "mmimdb" else torch.int64)
        inputs = {"image": decode_image(row["image"], 24), "text": tokens[index]}
        assert_equal(dataset[0, index], Sample(inputs, label, index))
        assert dataset.sample_name(index) == row.get("image_id", f"row {number}")


def test_class_names_come_from_the_spec_then_the_file_then_the_class_indices(tmp_path, golden_arrow):
    food = DATASETS["food101"]
    assert ArrowDataset(food, golden_arrow, "val", SIZE).class_names() == tuple(map(str, range(101)))
    for named in (2, 101):
        names = [f"dish {number}" for number in range(named)]
        write(tmp_path / "food101_test.arrow", memes().replace_schema_metadata({"class_names": json.dumps(names)}))
        assert ArrowDataset(food, tmp_path, "test", SIZE).class_names() == (*names, *map(str, range(named, 101)))
    assert open_memes(tmp_path, memes()).class_names() == ("not hateful", "hateful")


@pytest.mark.parametrize("rows_per_batch", [None, 2, 1])
def test_each_plot_of_a_film_is_a_sample_sharing_the_films_missing_type(tmp_path, rows_per_batch):
    write(tmp_path / "mmimdb_train.arrow", films([["a"], ["b", "c", "d"], ["e", "f"]]), rows_per_batch)
    dataset = open_films(tmp_path)
    assert (dataset.n_rows, len(dataset)) == (3, 6)
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.array([0, 2, 1], dtype=np.int8)
    assert dataset.missing_type_of_sample.tolist() == [0, 2, 2, 2, 1, 1]
    for index, (row, missing, text) in enumerate(zip([0, 1, 1, 1, 2, 2], [0, 2, 2, 2, 1, 1], "abcdef", strict=True)):
        inputs = {"image": decode_image(png(row), SIZE), "text": torch.from_numpy(Tokenizer()([text])[0])}
        if missing:
            del inputs["text" if missing == 1 else "image"]
        label = torch.tensor(genres(row, row + 1), dtype=torch.uint8)
        assert_equal(dataset[0, index], Sample(inputs, label, index))
        assert dataset.sample_name(index) == f"film{row}"


def test_evaluation_order_goes_from_long_to_short_texts_and_keeps_films_together(tmp_path):
    def tokenize(texts: Sequence[str]) -> np.ndarray:
        return np.array([[9 * (place == int(text)) for place in range(77)] for text in texts])

    dataset = open_films(tmp_path, films([["3"], ["5", "70"], ["76"], ["6", "2"], ["3"]]))
    assert dataset.evaluation_order().tolist() == list(range(7)), "without tokens, samples stay in order"
    dataset.tokenize(tokenize, "numbers")
    assert dataset.evaluation_order().tolist() == [3, 1, 2, 4, 5, 0, 6]
    dataset.missing_table = np.array([0, 0, 1, 2, 0], dtype=np.int8)  # the third has no text
    assert dataset.evaluation_order().tolist() == [1, 2, 4, 5, 0, 6, 3]


def test_an_image_is_decoded_once_per_batch_and_not_at_all_if_missing(tmp_path, decoded):
    dataset = open_films(tmp_path, films([["a"], ["b", "c"], ["d", "e"]]))
    dataset.missing_table = np.array([1, 0, 2], dtype=np.int8)
    batch = dataset.__getitems__([(0, 2), (0, 0), (0, 1), (0, 3)])
    assert [sample.number for sample in batch] == [2, 0, 1, 3]
    assert batch[0].inputs["image"] is batch[2].inputs["image"] and "image" not in batch[3].inputs
    assert decoded == [png(1), png(0)]
    for sample in batch:
        assert_equal(sample, dataset[0, sample.number])


def test_opening_a_dataset_reads_no_images(tmp_path):
    """A file as long as MM-IMDb's: it is memory-mapped, and a damaged image is noticed only when it is decoded."""
    n_rows, image = 15_552, b"not an image".ljust(2000, b".")
    columns = {"image": [image] * n_rows, "plots": [[f"plot {row}"] for row in range(n_rows)]}
    table = pa.table({**columns, "label": [genres(row % 23) for row in range(n_rows)]})
    write(tmp_path / "mmimdb_train.arrow", table, 4096)
    del table
    before = pa.total_allocated_bytes()
    dataset = open_films(tmp_path)
    dataset.tokenize(lambda texts: np.ones((len(texts), 77), dtype=np.int64), "f")
    assert len(dataset) == n_rows
    assert pa.total_allocated_bytes() - before < 8_000_000, "the images alone are 31 MB"
    with pytest.raises(DataError, match="row 9999: the image cannot be decoded"):
        dataset[0, 9999]


def type_in(dataset: ArrowDataset, epoch: int, index: int) -> int:
    return [["image", "text"], ["image"], ["text"]].index(list(dataset[epoch, index].inputs))


@pytest.fixture
def simulated(tmp_path: Path) -> ArrowDataset:
    dataset = open_films(tmp_path, films([["a"], ["b", "c"]] * 10))
    dataset.tokenize(Tokenizer(), "f")
    dataset.simulate_seed = 5
    return dataset


def test_simulated_missing_types_depend_only_on_seed_epoch_and_sample(simulated):
    def types(seed: int, epoch: int) -> list[int]:
        simulated.simulate_seed = seed
        return [type_in(simulated, epoch, index) for index in range(30)]

    assert "".join(map(str, types(5, 0)[:20] + types(5, 1)[:20])) == "2202002002210200002002112022220122112210"
    expected = [int(np.random.default_rng([5, 1, index]).integers(3)) for index in range(30)]
    assert types(5, 1) == expected
    np.random.seed(3)
    torch.manual_seed(3)
    assert [type_in(simulated, 1, index) for index in reversed(range(30))] == expected[::-1]
    assert len({tuple(types(seed, epoch)) for seed in (5, 6) for epoch in range(5)}) == 10, "every epoch draws afresh"
    assert any(expected[i] != expected[i + 1] for i in range(1, 30, 3)), "each plot of a film is drawn separately"


def test_simulation_keeps_the_missing_types_of_the_table(simulated):
    simulated.missing_table = np.array([1, 2] * 9 + [0, 0], dtype=np.int8)
    for epoch in range(10):
        assert [type_in(simulated, epoch, index) for index in range(27)] == [1, 2, 2] * 9
    assert {type_in(simulated, epoch, index) for epoch in range(10) for index in (27, 28, 29)} == {0, 1, 2}
    simulated.simulate_seed = None
    assert {type_in(simulated, epoch, index) for epoch in range(5) for index in (27, 28, 29)} == {0}


def holes(no_image: Sequence[int], no_text: Sequence[int], rows: int = 3) -> pa.Table:
    """Memes that lack images or texts in the given rows."""
    table = memes(rows)
    for column, empty in (("image", no_image), ("text", no_text)):
        cells = [None if row in empty else cell for row, cell in enumerate(table[column].to_pylist())]
        table = changed(column, pa.array(cells, table[column].type), table)
    return table


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rows_per_batch", [None, 1])
def test_rows_without_an_image_or_text_are_naturally_missing_it(tmp_path, rows_per_batch, cached):
    dataset = open_memes(tmp_path, holes([1], [0, 3], 5), rows_per_batch)
    tokenizer = Tokenizer()
    dataset.tokenize(tokenizer, "f")
    assert tokenizer.calls == [["meme 1", "meme 2", "meme 4"]]
    if cached:
        dataset.cache_images(0)
    assert dataset.natural.tolist() == dataset.missing_type_of_sample.tolist() == [1, 2, 0, 1, 0]
    tokens = tokenizer(tokenizer.calls[0])
    expected = [{"image": 0}, {"text": 0}, {"image": 2, "text": 1}, {"image": 3}, {"image": 4, "text": 2}]
    for index, places in enumerate(expected):
        inputs = {
            name: decode_image(png(place), SIZE) if name == "image" else torch.from_numpy(tokens[place])
            for name, place in places.items()
        }
        assert_equal(dataset[0, index], Sample(inputs, torch.tensor(index % 2), index))
    assert [dataset.given("text", index) for index in range(5)] == [None, "meme 1", "meme 2", None, "meme 4"]
    assert dataset.given("image", 1) is None and dataset.given("image", 2) == png(2)
    assert dataset.evaluation_order().tolist() == [1, 2, 4, 0, 3]


def test_missing_tables_add_to_naturally_missing_inputs_but_leave_one_modality(tmp_path):
    dataset = open_memes(tmp_path, holes([1, 4], [0, 3], 6))
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.array([1, 1, 1, 2, 0, 2], dtype=np.int8)
    assert dataset.missing_table.tolist() == [1, 2, 1, 1, 2, 2]
    dataset.simulate_seed = 3
    dataset.missing_table = np.zeros(6, dtype=np.int8)
    seen = {(index, type_in(dataset, epoch, index)) for epoch in range(20) for index in range(6)}
    assert seen == {(0, 1), (1, 2), (3, 1), (4, 2), *((index, kind) for index in (2, 5) for kind in range(3))}


def test_a_split_may_lack_all_texts(tmp_path):
    dataset = open_memes(tmp_path, holes([], range(3)))
    dataset.tokenize(Tokenizer(), "f")
    assert [list(dataset[0, index].inputs) for index in range(3)] == [["image"]] * 3
    assert dataset.evaluation_order().tolist() == [0, 1, 2]


def changed(column: str, values: pa.Array | list, table: pa.Table | None = None) -> pa.Table:
    table = memes() if table is None else table
    return table.set_column(table.column_names.index(column), column, pa.chunked_array([values]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (memes().drop(["label"]), "expected the columns image, label, text; found image, text"),
        (memes().slice(0, 0), "expected samples, found no rows"),
        (memes().append_column("split", [["dev"] * 3]), "column split: expected ['train'], found ['dev']"),
        (changed("text", [[]] * 3), "column text: expected lists of texts, found list<item: null>"),
        (changed("text", ["a", "b", "c"]), "column text: expected lists of texts, found string"),
        (changed("text", [[1], [2], [3]]), "column text: expected lists of texts, found list<item: int64>"),
        (holes([0], [0, 2]), "row 0: expected image or text, found all columns empty (1 such rows)"),
        (changed("text", [["a", "b"], ["c"], ["d", None]]), "row 2: column text: a text is empty (null)"),
        (changed("image", ["a", "b", "c"]), "column image: expected the bytes of image files, found string"),
        (changed("label", [0, 1, None]), "row 2: column label is empty"),
        (changed("label", [0, 2, 2]), "row 1: label 2 is outside 0 to 1 (2 such rows)"),
        (changed("label", [-1, 0, 1]), "row 0: label -1 is outside 0 to 1 (1 such rows)"),
        (changed("label", [0.0, 1.0, 1.0]), "column label: expected class numbers, found double"),
        (changed("label", [[0], [1], [1]]), "column label: expected class numbers, found list"),
    ],
)
@pytest.mark.parametrize("rows_per_batch", [None, 1])
def test_a_file_that_does_not_fit_the_dataset_is_refused_on_opening(tmp_path, table, message, rows_per_batch):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / ARROW}: {message}")):
        open_memes(tmp_path, table, rows_per_batch)


@pytest.mark.parametrize(
    ("labels", "row", "found"),
    [
        ([genres(1), genres(1)[:-1], genres(1)], 1, "22 values"),
        ([genres(1), genres(), [*genres(2)[:-1], 2]], 2, "2"),
        ([genres(1), [None, *genres()[1:]], genres(1)], 1, "None"),
        (pa.array([[0.0] * 23, [0.5] * 23, [0.0] * 23]), 1, "0.5"),
        ([1, 0, 1], None, "int64"),
        ([list("0" * 23)] * 3, 0, "'0'"),
    ],
)
def test_malformed_label_vectors_are_refused(tmp_path, labels, row, found):
    table = films([["a"], ["b"], ["c"]]).set_column(2, "label", pa.array(labels))
    at = "" if row is None else f"row {row}: "
    with pytest.raises(
        DataError, match=rf"/mmimdb_train.arrow: {at}column label: .* 23 zeros and ones, found {found}$"
    ):
        open_films(tmp_path, table)


def test_the_error_for_a_missing_file_says_how_to_create_it(tmp_path):
    with pytest.raises(DataError) as raised:
        open_films(tmp_path, split="val")
    facts = (f"{tmp_path}/mmimdb_dev.arrow: no such file", "make_arrow.py --dataset mmimdb", f"--target {tmp_path}")
    assert all(fact in str(raised.value) for fact in facts)


def test_damaged_unused_columns_are_refused(tmp_path):
    """Reading some of them would make pyarrow abort the whole process."""
    table = memes()
    content = file_of(table.append_column("image_id", pa.array(["first", "second", "third"])))
    offsets, others = (np.array(values, dtype="<i4").tobytes() for values in ([0, 5, 11, 16], [0, 2**30, 11, 16]))
    assert content.count(offsets) == 1
    path = tmp_path / "hatememes_train.arrow"
    for damaged, fault in (
        (content.replace(offsets, others), "column image_id: damaged"),
        (content.replace(b"image_id", b"image\xffid"), "not readable as an arrow file: .*utf-8"),
        (file_of(pa.table([*table.columns, table["label"]], [*table.column_names, "label"])), "found label twice"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"hatememes_train\.arrow: .*{fault}"):
            ArrowDataset(DATASETS["hatememes"], tmp_path, "train")


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_files_are_refused(tmp_path, compression):
    """Every process would have to hold the whole file in memory."""
    table = pa.table({"image": ["a" * 10**6] * 5})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(tmp_path / "x"), table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"x: not readable as an arrow file: it is compressed"):
        open_table(tmp_path / "x")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("{}", "found something else"),
        ('["a", 1]', "found something else"),
        (json.dumps(["a"] * 102), "found something else"),
        (b"\xff", "utf-8"),
        ('["a", "b", "a"]', "found 'a' twice"),
        ('["3"]', "found '3' twice"),  # the fourth class is unnamed and so called '3'
    ],
)
def test_damaged_class_names_are_an_error(tmp_path, written, found):
    write(tmp_path / "food101_test.arrow", memes().replace_schema_metadata({"class_names": written}))
    dataset = ArrowDataset(DATASETS["food101"], tmp_path, "test", 8)
    with pytest.raises(DataError, match=rf"food101_test\.arrow: metadata class_names: expected .*101 names.*{found}"):
        dataset.class_names()


def test_an_undecodable_image_is_an_error_that_names_file_and_row(tmp_path):
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    for data in (b"<html>", png(1)[:-60], jpeg.getvalue()[:-500]):
        dataset = open_memes(tmp_path, memes(3, {2: data}))
        assert dataset[0, 1].inputs["image"] is not None
        with pytest.raises(DataError, match=f"^{tmp_path / ARROW}: row 2: the image cannot be decoded: "):
            dataset[0, 2]
    table = films([["a", "b", "c"], ["d"]])
    with pytest.raises(DataError, match=r"row 1: the image"):  # the film's row, not the plot's
        open_films(tmp_path, table.set_column(0, "image", [[png(0), data]]))[0, 3]


def test_pickling_leaves_out_the_file_and_its_table(tmp_path):
    rows = 400
    dataset = open_memes(tmp_path, memes(rows, {row: png(row, 64) for row in range(rows)}))
    dataset.tokenize(Tokenizer(), "f")
    dataset.missing_table = np.arange(rows, dtype=np.int8) % 3
    opened = dataset.table
    pickled = pickle.dumps(dataset)
    assert dataset.table is opened, "the original keeps its table"
    assert len(pickled) < 200_000 < 4_000_000 < (tmp_path / ARROW).stat().st_size
    copy = pickle.loads(pickled)
    assert vars(copy)["_table"] is None
    for index in (0, 1, 2, rows - 1):
        assert_equal(copy[0, index], dataset[0, index])


def test_different_texts_or_tokenizers_have_separate_caches(tmp_path):
    first, tokenizer = open_memes(tmp_path, memes()), Tokenizer()
    first.tokenize(tokenizer, "f")
    first.__getitems__([(epoch, index) for epoch in range(3) for index in range(3)])
    assert tokenizer.calls == [["meme 0", "meme 1", "meme 2"]], "tokenized once"
    (cache,) = caches(tmp_path)
    assert cache.name.startswith("hatememes_train_tokens_")
    assert {path.name for path in tmp_path.iterdir()} == {ARROW, cache.name}, "no other files"
    texts = [["meme 0"], ["meme 1"], ["another"]]
    reordered = [["meme 1"], ["meme 0"], ["meme 2"]]
    cases = [(changed("text", texts), "f"), (memes(), "g"), (changed("text", texts), "g"), (memes(4), "f")]
    for seen, (table, fingerprint) in enumerate([*cases, (changed("text", reordered), "f")], start=2):
        dataset, tokenizer = open_memes(tmp_path, table), Tokenizer()
        dataset.tokenize(tokenizer, fingerprint)
        assert tokenizer.calls == [[text for row in table["text"].to_pylist() for text in row]]
        assert tokens_of(dataset).tolist() == tokenizer(tokenizer.calls[0]).tolist()
        assert len(caches(tmp_path)) == seen
    again, tokenizer = open_memes(tmp_path, memes()), Tokenizer()
    again.tokenize(tokenizer, "f")
    assert tokenizer.calls == [], "cache reused"
    for index in range(3):
        assert_equal(again[0, index], first[0, index])
        assert_equal([again[0, index].inputs["text"]], [torch.from_numpy(Tokenizer()([f"meme {index}"])[0])])
    for split in SPLITS[:2]:
        open_films(tmp_path, films([["a", "b"], ["c"]]), split).tokenize(Tokenizer(), "f")
    assert [path.name.partition("_tokens_")[0] for path in caches(tmp_path)[-2:]] == ["mmimdb_dev", "mmimdb_train"]


@pytest.mark.parametrize("content", [b"", as_npy(np.zeros((2, 77), np.int32))], ids=["empty", "one row short"])
def test_a_damaged_cache_is_rebuilt(tmp_path, caplog, content):
    open_memes(tmp_path, memes()).tokenize(Tokenizer(), "f")
    (cache,) = caches(tmp_path)
    intact = cache.read_bytes()
    cache.write_bytes(content)
    dataset, tokenizer = open_memes(tmp_path), Tokenizer()
    with caplog.at_level(logging.WARNING):
        dataset.tokenize(tokenizer, "f")
    assert len(tokenizer.calls) == 1 and tokens_of(dataset).tolist() == tokenizer(tokenizer.calls[0]).tolist()
    assert [str(cache) in record.getMessage() for record in caplog.records] == [True]
    assert caches(tmp_path) == [cache] and cache.read_bytes() == intact


def test_a_read_only_folder_works_without_a_cache(tmp_path, caplog, monkeypatch):
    dataset, tokenizer = open_memes(tmp_path, memes()), Tokenizer()

    def refuse(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kinds.np, "save", refuse)
    with caplog.at_level(logging.INFO):
        dataset.tokenize(tokenizer, "f")
    assert [path.name for path in tmp_path.iterdir()] == [ARROW]
    assert "Permission denied" in caplog.text
    readers: tuple[Any, ...] = (dataset, pickle.loads(pickle.dumps(dataset)))
    for reader in readers:
        assert tokens_of(reader).tolist() == tokenizer(tokenizer.calls[0]).tolist()
        assert_equal(reader[0, 2], dataset[0, 2])
