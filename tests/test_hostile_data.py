"""Hostile and broken data: arrow files, images, and the files of raw datasets. A result, or an error of ours."""

import json
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
from tests.custom_files import make
from tests.data_files import file_of, memes, write
from tests.test_transforms import noise, saved, to_hwc
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import decode_image
from vilt.datasets.specs import DATASETS
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
