"""Hostile and broken data: arrow files, images, and the files of raw datasets. A result, or an error of ours."""

import json
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import make_arrow
from common.arrow_file import open_table
from common.errors import DataError
from tests.custom_files import convert as convert_own
from tests.custom_files import write_labelled
from tests.data_files import file_of, memes, write
from tests.test_transforms import noise, saved, to_hwc
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.images import MAX_SIDE, open_rgb
from vilt.transforms import decode_image
from vilt.utils.raw_data import MAX_RECORD_BYTES

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"

# Arrow files

READ_EACH = """
import random, sys
from pathlib import Path
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from common.errors import DataError

path = Path(sys.argv[1])
whole = path.read_bytes()
draw = random.Random(0)
sizes = [len(whole) * part // 30 for part in range(30)]
flips = [draw.randrange(len(whole)) for _ in range(200)]
outcomes = []
for number in range(230):
    content = bytearray(whole[: sizes[number]] if number < 30 else whole)
    if number >= 30:
        content[flips[number - 30]] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    try:
        dataset = ArrowDataset(DATASETS["mmimdb"], path.parent, "test", 8)
        dataset.class_names()
        dataset.__getitems__([(0, index) for index in range(len(dataset))])
        outcomes.append("read")
    except DataError as error:
        assert str(path) in str(error), error
        outcomes.append("refused")
print(" ".join(outcomes))
"""


def test_cut_and_flipped_arrow_files_are_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own, which pyarrow would take along. A flipped letter of a text cannot be noticed."""
    shutil.copy(GOLDEN / "arrow" / "mmimdb_test.arrow", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ_EACH, str(tmp_path / "mmimdb_test.arrow")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = done.stdout.splitlines()[-1].split()
    assert outcomes[:30] == ["refused"] * 30
    assert len(outcomes[30:]) == 200 and set(outcomes[30:]) == {"read", "refused"}


def with_ids(ids: list[str]) -> pa.Table:
    return memes().append_column("image_id", pa.array(ids))


def test_a_damaged_column_that_nothing_needs_is_refused(tmp_path: Path) -> None:
    """pyarrow ends the whole process on such a one when it is read."""
    content = file_of(with_ids(["first", "second", "third"]))
    offsets = np.array([0, 5, 11, 16], dtype="<i4").tobytes()
    assert content.count(offsets) == 1
    path = tmp_path / "hatememes_train.arrow"
    path.write_bytes(content.replace(offsets, np.array([0, 2**30, 11, 16], dtype="<i4").tobytes()))
    with pytest.raises(DataError, match=r"hatememes_train\.arrow: column image_id: damaged"):
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", 8)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_files_are_refused(tmp_path: Path, compression: str) -> None:
    """Each process would hold all of such a file in memory."""
    table = pa.table({"image": ["a" * 10**6] * 5})
    for options in (pa.ipc.IpcWriteOptions(compression=compression), None):
        with pa.ipc.new_file(str(tmp_path / "x"), table.schema, options=options) as writer:
            writer.write_table(table)
        if options is not None:
            with pytest.raises(DataError, match=r"x: not readable as an arrow file: it is compressed"):
                open_table(tmp_path / "x")
    assert open_table(tmp_path / "x").equals(table)


def test_columns_of_one_name_and_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    table = memes()
    path = tmp_path / "hatememes_train.arrow"
    write(path, pa.table([*table.columns, table["label"]], [*table.column_names, "label"]))
    with pytest.raises(DataError, match=r"train\.arrow: expected each column once, found label twice"):
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", 8)
    path.write_bytes(file_of(with_ids(["a", "b", "c"])).replace(b"image_id", b"image\xffid"))
    with pytest.raises(DataError, match=r"train\.arrow: not readable as an arrow file: .*utf-8"):
        ArrowDataset(DATASETS["hatememes"], tmp_path, "train", 8)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("{}", "found something else"),
        ('["a", 1]', "found something else"),
        (json.dumps(["a"] * 102), "found something else"),
        (b"\xff", "utf-8"),
    ],
)
def test_damaged_class_names_are_an_error(tmp_path: Path, written: str | bytes, found: str) -> None:
    write(tmp_path / "food101_test.arrow", memes().replace_schema_metadata({"class_names": written}))
    dataset = ArrowDataset(DATASETS["food101"], tmp_path, "test", 8)
    with pytest.raises(DataError, match=rf"food101_test\.arrow: metadata class_names: expected .*101 names.*{found}"):
        dataset.class_names()


def test_classes_without_a_name_have_their_number(tmp_path: Path) -> None:
    table = memes().replace_schema_metadata({"class_names": json.dumps(["apple_pie", "pizza"])})
    write(tmp_path / "food101_test.arrow", table)
    names = ArrowDataset(DATASETS["food101"], tmp_path, "test", 8).class_names()
    assert names[:3] == ("apple_pie", "pizza", "2") and len(names) == 101 and names[100] == "100"


OWN = {"name": "pets", "labels": "single", "metric": "accuracy"}


@pytest.mark.parametrize(
    ("custom", "class_names", "found"),
    [
        ("[" * 100_000, ["cat", "dog"], "recursion"),
        (b"\xff", ["cat", "dog"], "utf-8"),
        ([], ["cat", "dog"], "expected an object, found []"),
        ({**OWN, "name": [1]}, ["cat", "dog"], "name: expected letters, digits, - and _, found [1]"),
        ({**OWN, "labels": {}}, ["cat", "dog"], "labels: expected single or multi, found {}"),
        ({**OWN, "metric": 5}, ["cat", "dog"], "metric: expected accuracy or f1_macro or auroc with labels: single"),
        ({**OWN, "classes": 2}, ["cat", "dog"], "expected the values name, labels, class_names, metric"),
        (OWN, {"cat": "dog"}, "class_names: expected a list, found {'cat': 'dog'}"),
        (OWN, ["cat", None], "classes: expected a name in row 2, found None"),
        (OWN, ["cat", ["dog"]], "classes: expected a name in row 2, found ['dog']"),
    ],
)
def test_a_description_of_a_custom_dataset_that_is_none(
    tmp_path: Path, custom: Any, class_names: object, found: str
) -> None:
    written = custom if isinstance(custom, (str, bytes)) else json.dumps(custom)
    metadata = {"custom": written, "class_names": json.dumps(class_names)}
    write(tmp_path / "custom_train.arrow", memes().replace_schema_metadata(metadata))
    with pytest.raises(DataError, match=r"custom_train\.arrow: ") as refusal:
        open_spec("custom", tmp_path, ("train",))
    assert found in str(refusal.value) and len(str(refusal.value)) < 1000


# Images


def photo(file_format: str, **options: object) -> bytes:
    return saved(Image.fromarray(noise(40, 30)), file_format, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def announced(width: int, height: int) -> bytes:
    """The head of a PNG of that size."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of the kinds BMP, GIF, JPEG, PNG, WEBP"),
        (photo("TIFF"), "not an image of the kinds"),
        (photo("EPS"), "not an image of the kinds"),
        (announced(30_000, 4_000), "30000 × 4000 pixels; at most 89,478,485 are read, and 100,000 to a side"),
        (announced(MAX_SIDE + 1, 1), "100001 × 1 pixels"),
        (announced(1, MAX_SIDE + 1), "1 × 100001 pixels"),
        (announced(2**31 - 1, 2**31 - 1), "exceeds limit"),
    ],
    ids=["svg", "tiff", "eps", "many pixels", "wide", "high", "any size"],
)
def test_what_is_no_image_to_read(data: bytes, found: str) -> None:
    with pytest.raises(Exception, match=found):
        open_rgb(data)


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for file_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert to_hwc(decode_image(data, 2)).tolist() == [[[255, 0, 0]] * 2] * 2, file_format


def test_a_palette_with_several_transparencies_and_16_bit_grey() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putdata([0, 1])
    assert open_rgb(saved(image, transparency=b"\0\x80")).tobytes() == bytes([9, 8, 7, 200, 100, 50])
    grey = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert open_rgb(saved(grey)).size == (4, 1)


# Raw datasets

NAMES = {"mmimdb": "mmimdb", "food101": "food101", "hatememes": "hateful_memes"}
Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Converts a copy of a golden raw dataset after files of it were replaced; gives status and messages."""

    def run(name: str, files: dict[str, bytes], *options: str) -> tuple[int, str]:
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        shutil.copytree(GOLDEN / "raw" / name, tmp_path / "raw")
        for file, content in files.items():
            (tmp_path / "raw" / file).write_bytes(content)
        arguments = ["--dataset", NAMES[name], "--root", str(tmp_path / "raw"), "--target", str(tmp_path / "out")]
        status = make_arrow.main([*arguments, "--workers", "0", *options])
        return status, capsys.readouterr().err

    return run


ODD_FILES = (
    b"", b"\0", b"null", b"[", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"NaN", b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00", b"\r\r\r", b"\n" * 100, b'{"a": 1, "a": 2}', b'"\\ud800"', b"<svg/>",
    b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP",
    b"ARROW1\0\0", b"\x93NUMPY\x01\x00", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueq\x85R.",
)  # fmt: skip
FILES = {
    "mmimdb": ("split.json", "labels/0000012.json", "images/0000012.jpeg"),
    "food101": ("split.json", "class_idx.json", "text.json", "images/train/pizza/pizza_2.jpg"),
    "hatememes": ("data/train.jsonl", "data/dev.jsonl", "data/test.jsonl", "data/img/10005.png"),
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_file_of_something_else_ends_in_an_error_that_names_it(convert: Convert, name: str, file: str) -> None:
    assert (GOLDEN / "raw" / name / file).is_file()
    for content in ODD_FILES:
        status, said = convert(name, {file: content})
        assert status == 2, content[:50]
        nothing_left = "no sample is left" in said and content.endswith(b"{}")  # texts of no dish at all
        assert Path(file).name in said or nothing_left, said[:500]
        assert "Traceback" not in said
        assert len(said) < 10_000


FILM = {"plot": ["a"], "genres": ["Drama"]}


def film(**changes: object) -> bytes:
    return json.dumps({**FILM, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (film(plot=None), "'plot': expected a list, found null"),
        (film(plot={"a": "b"}), "'plot': expected a list, found an object"),
        (film(plot=[["a"]]), "'plot': expected a string, found a list"),
        (film(genres=10**400), "'genres': expected a list, found 1000"),
        (film(genres=[True]), "'genres': expected a string, found true"),
        (film(plot=[float("nan")]), "'plot': expected a string, found NaN"),
        (b'{"plot": ["a\0b"], "genres": []}', "Invalid control character"),
        (film(year=1)[:-1] + b', "year": ' + b"1" * 5000 + b"}", "4300 digits"),
        (b" " * (MAX_RECORD_BYTES + 1), "larger than 16,777,216 bytes"),
        ("{}".encode("utf-16"), "can't decode"),
    ],
    ids=["null", "object", "lists in it", "large number", "truth value", "NaN", "NUL", "digits", "spaces", "UTF-16"],
)
def test_films_with_wrong_values(convert: Convert, content: bytes, found: str) -> None:
    status, said = convert("mmimdb", {"labels/0000012.json": content})
    assert status == 2 and "labels/0000012.json" in said and found in said
    assert len(said) < 5000
    assert convert("mmimdb", {"labels/0000012.json": content}, "--skip-bad")[0] == 0


def test_what_reads_as_usual(convert: Convert, tmp_path: Path) -> None:
    """A byte order mark, CR line ends, NaN that nobody asks for, a NUL that is spelt out, and 10 MB of text."""
    mark = b"\xef\xbb\xbf"
    lines = (GOLDEN / "raw/hatememes/data/dev.jsonl").read_bytes().splitlines()
    assert convert("hatememes", {"data/dev.jsonl": mark + b"\r".join(lines)})[0] == 0
    assert open_table(tmp_path / "out" / "hatememes_dev.arrow").num_rows == len(lines)
    text = "word " * 2_000_000
    for content in (mark + film(year=float("nan")), film(plot=["a\0b"]), film(plot=[text])):
        assert convert("mmimdb", {"labels/0000012.json": content})[0] == 0
    dataset = ArrowDataset(DATASETS["mmimdb"], tmp_path / "out", "val", 8)
    assert dataset.table["plots"][0].as_py() == [text]


def test_a_loop_of_links_is_a_missing_file(tmp_path: Path, convert: Convert) -> None:
    assert convert("mmimdb", {})[0] == 0
    image = tmp_path / "raw" / "images" / "0000012.jpeg"
    image.unlink()
    image.symlink_to(image)
    arguments = ["--dataset", "mmimdb", "--root", str(tmp_path / "raw"), "--target", str(tmp_path / "out2")]
    assert make_arrow.main([*arguments, "--workers", "0", "--skip-bad"]) == 0
    assert "missing file" in (tmp_path / "out2" / "mmimdb_bad_samples.tsv").read_text()


def test_hostile_names_do_not_flood_the_terminal(convert: Convert) -> None:
    name = "x" * 1_000_000
    splits = json.loads((GOLDEN / "raw/mmimdb/split.json").read_text())
    for split in (
        {**splits, "dev": [name, name]},
        {**splits, "dev": [[[[[]]]] * 1000]},
        {**splits, name: ["a"]},
        {**splits, "dev": [*splits["dev"], name]},
    ):
        status, said = convert("mmimdb", {"split.json": json.dumps(split).encode()})
        assert status == 2 and len(said) < 20_000, len(said)
    repeated = '{"' + '": 1, "'.join(map(str, range(100_000))) + '": 1, "99999": 2}'
    status, said = convert("mmimdb", {"split.json": repeated.encode()})
    assert status == 2 and "the key '99999' is repeated" in said


def test_every_split_is_read_after_a_conversion_of_damaged_images(convert: Convert, tmp_path: Path) -> None:
    """What the converter lets pass, the loader can read."""
    whole = (GOLDEN / "raw/mmimdb/images/0000012.jpeg").read_bytes()
    draw = random.Random(3)
    converted = 0
    for _ in range(30):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        if convert("mmimdb", {"images/0000012.jpeg": bytes(content)})[0] == 0:
            converted += 1
            for split in SPLITS:
                dataset = ArrowDataset(DATASETS["mmimdb"], tmp_path / "out", split, 8)
                assert all("image" in dataset[0, index].inputs for index in range(len(dataset)))
    assert converted > 5


# Custom datasets


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The raw folder of a dataset that converts: table.jsonl, spec.yaml, pictures/."""
    write_labelled(tmp_path / "own", {"train": 2, "val": 2, "test": 2}, ["cat", "dog"])
    return tmp_path / "own"


def test_tables_and_specs_of_something_else_end_in_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("table.jsonl", "spec.yaml", "table.csv"):
        whole = (own / name).read_bytes() if name != "table.csv" else b""
        for content in ODD_FILES:
            (own / name).write_bytes(content)
            table = ["--table", str(own / "table.csv")] if name == "table.csv" else []
            assert convert_own(own, own / "out", *table) == 2, (name, content[:50])
            said = capsys.readouterr().err
            assert said.startswith(f"error: {own / name}") and len(said.splitlines()) == 1 and len(said) < 2000, said
        (own / name).write_bytes(whole)
    assert convert_own(own, own / "out") == 0


def write_samples(path: Path, texts: tuple[str, str]) -> None:
    """A table with the two texts in each split, classes `a` and `b`."""
    header = ["image", "text", "label", "split"]
    rows = [
        ["pictures/train0.png", text, name, split] for split in SPLITS for text, name in zip(texts, "ab", strict=True)
    ]
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    if path.suffix == ".csv":
        lines = [",".join(row) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("suffix", "texts"),
    [("jsonl", ("word " * 2_000_000, "a\0b")), ("csv", ("word " * 20_000, "a\0b"))],
    ids=["jsonl", "csv"],
)
def test_long_texts_and_a_nul_in_a_table(own: Path, suffix: str, texts: tuple[str, str]) -> None:
    write_samples(own / f"long.{suffix}", texts)
    assert convert_own(own, own / "out", "--table", str(own / f"long.{suffix}")) == 0
    assert open_table(own / "out" / "custom_val.arrow")["text"].to_pylist() == [[text] for text in texts]


def test_a_text_of_10_mb_in_a_csv_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As from a quotation mark that is never closed."""
    write_samples(own / "long.csv", ("a", "word " * 2_000_000))
    assert convert_own(own, own / "out", "--table", str(own / "long.csv")) == 2
    assert capsys.readouterr().err == f"error: {own / 'long.csv'}, row 3: field larger than field limit (131072)\n"


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("? [a, b]\n: 1\n", "found unhashable key"),
        ("".join(f"k{number}: 1\n" for number in range(5000)) + "k17: 1\n", "the key 'k17' is repeated"),
        (f"? {'k' * 100_000}\n: 1\n", "unknown key kkk"),
        (f"files: table.jsonl\nname: {'n' * 100_000}.\n", "name: expected letters, digits, - and _, found 'nnn"),
        (f"files: table.jsonl\nlabels: {[['x'] * 10_000] * 10}\n", "labels: expected single or multi, found [["),
        ("!!python/object/apply:os.system ['touch marker']\n", "could not determine a constructor"),
    ],
    ids=["list as key", "many keys", "long key", "long name", "long list", "code"],
)
def test_specs_that_would_grow_or_run(
    own: Path, spec: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    (own / "spec.yaml").write_text(spec)
    assert convert_own(own, own / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {own / 'spec.yaml'}") and found in said and len(said) < 1000
    assert not (own / "marker").exists()
