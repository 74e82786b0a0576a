"""Hostile and broken data: arrow files, images, and the files of raw datasets. A result, or an error of ours."""

import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common.arrow_file import open_table
from common.errors import DataError
from tests.custom_files import convert as convert_own
from tests.custom_files import make, write_labelled
from tests.data_files import file_of, memes, write
from tests.test_transforms import noise, saved, to_hwc
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import decode_image
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.images import MAX_SIDE, open_rgb

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"

# Arrow files


def test_damaged_columns_that_nothing_needs_are_refused(tmp_path: Path) -> None:
    """pyarrow ends the whole process on some when they are read."""
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
def test_compressed_files_are_refused(tmp_path: Path, compression: str) -> None:
    """Each process would hold all of such a file in memory."""
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
    ],
)
def test_damaged_class_names_are_an_error(tmp_path: Path, written: str | bytes, found: str) -> None:
    write(tmp_path / "food101_test.arrow", memes().replace_schema_metadata({"class_names": written}))
    dataset = ArrowDataset(DATASETS["food101"], tmp_path, "test", 8)
    with pytest.raises(DataError, match=rf"food101_test\.arrow: metadata class_names: expected .*101 names.*{found}"):
        dataset.class_names()


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
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of the kinds BMP, GIF, JPEG, PNG, TIFF, WEBP"),
        (photo("EPS"), "not an image of the kinds"),
        (announced(30_000, 4_000), "30000 × 4000 pixels; at most 89,478,485 are read, and 100,000 to a side"),
        (announced(MAX_SIDE + 1, 1), "100001 × 1 pixels"),
        (announced(1, MAX_SIDE + 1), "1 × 100001 pixels"),
        (announced(2**31 - 1, 2**31 - 1), "exceeds limit"),
    ],
    ids=["svg", "eps", "many pixels", "wide", "high", "any size"],
)
def test_what_is_no_image_to_read(data: bytes, found: str) -> None:
    with pytest.raises(Exception, match=found):
        open_rgb(data)


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for file_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert to_hwc(decode_image(data, 2)).tolist() == [[[255, 0, 0]] * 2] * 2, file_format


# Raw datasets

Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Converts a copy of a golden raw dataset after files of it were replaced; gives status and messages."""

    def run(name: str, files: dict[str, bytes], *options: str) -> tuple[int, str]:
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        shutil.copytree(GOLDEN / "raw" / name, tmp_path / "raw")
        for file, content in files.items():
            (tmp_path / "raw" / file).write_bytes(content)
        status = make(DATASETS[name].make_arrow_name, tmp_path / "raw", tmp_path / "out", *options)
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


def test_what_reads_as_usual(convert: Convert, tmp_path: Path) -> None:
    """A byte order mark, CR line ends, NaN that nobody asks for, a NUL that is spelt out, and 10 MB of text."""
    mark, text = b"\xef\xbb\xbf", "word " * 2_000_000
    lines = (GOLDEN / "raw/hatememes/data/dev.jsonl").read_bytes().splitlines()
    assert convert("hatememes", {"data/dev.jsonl": mark + b"\r".join(lines)})[0] == 0
    assert open_table(tmp_path / "out" / "hatememes_dev.arrow").num_rows == len(lines)
    film = {"plot": ["a\0b", text], "genres": ["Drama"], "year": float("nan")}
    assert convert("mmimdb", {"labels/0000012.json": mark + json.dumps(film).encode()})[0] == 0
    assert open_table(tmp_path / "out" / "mmimdb_dev.arrow")["plots"][0].as_py() == ["a\0b", text]


def test_hostile_names_do_not_flood_the_terminal(convert: Convert) -> None:
    name = "x" * 1_000_000
    splits = json.loads((GOLDEN / "raw/mmimdb/split.json").read_text())
    changes: list[dict[str, Any]] = [
        {"dev": [name, name]},
        {"dev": [[[[[]]]] * 1000]},
        {name: ["a"]},
        {"dev": [*splits["dev"], name]},
    ]
    for change in changes:
        status, said = convert("mmimdb", {"split.json": json.dumps({**splits, **change}).encode()})
        assert status == 2 and len(said) < 20_000, len(said)


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
