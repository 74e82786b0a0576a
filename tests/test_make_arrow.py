"""make_arrow.py: what it writes, what it refuses, and what it leaves behind."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

import make_arrow
from common.errors import DataError
from common.strict_json import parse_json
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.utils import arrow_writer, write_food101, write_hatememes, write_mmimdb
from vilt.utils.ordered_pool import IN_FLIGHT_PER_WORKER, read_in_order
from vilt.utils.raw_data import BadSampleError, Row, Sample, read_file

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = {"mmimdb": "mmimdb", "food101": "food101", "hateful_memes": "hatememes"}
FILES = {d: [f"{n}_{s}.arrow" for s in ("train", "val" if n == "food101" else "dev", "test")] for d, n in NAMES.items()}


def read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(path: Path, row: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines()
    lines[row - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")


def encoded(mode: str, file_format: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, file_format)
    return out.getvalue()


@dataclass
class Case:
    """A copy of one golden raw dataset, and a folder to convert it to."""

    dataset: str
    raw: Path
    out: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def folder(self) -> Path:
        return self.raw / "data" if self.dataset == "hateful_memes" else self.raw

    def run(self, *options: str, workers: int = 0) -> int:
        args = ["--dataset", self.dataset, "--root", str(self.raw), "--target", str(self.out)]
        self.capsys.readouterr()
        status = make_arrow.main([*args, "--workers", str(workers), *options])
        self.stdout, self.stderr = self.capsys.readouterr()
        return status

    def refused(self, *options: str, workers: int = 0) -> str:
        """What is said by a conversion that must fail, and write nothing."""
        before = contents(self.out)
        assert self.run(*options, workers=workers) == 2
        assert contents(self.out) == before
        return self.stderr

    def table(self, split: str) -> pa.Table:
        return read(self.out / f"{NAMES[self.dataset]}_{split}.arrow")

    def only_bad(self) -> dict[str, str]:
        """The one bad sample that is left out with --skip-bad."""
        assert self.run("--skip-bad") == 0
        (bad,) = self.report()
        return bad

    def report(self) -> list[dict[str, str]]:
        with (self.out / f"{NAMES[self.dataset]}_bad_samples.tsv").open(encoding="utf-8", newline="") as opened:
            return list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))


MakeCase = Callable[[str], Case]


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> MakeCase:
    def make(dataset: str) -> Case:
        shutil.copytree(GOLDEN / "raw" / NAMES[dataset], tmp_path / "raw")
        return Case(dataset, tmp_path / "raw", tmp_path / "out", capsys)

    return make


# ---- what is written


@pytest.mark.parametrize("dataset", NAMES)
def test_equals_what_the_published_converters_wrote_with_any_number_of_workers(case: MakeCase, dataset: str) -> None:
    made = case(dataset)
    assert made.run() == 0
    assert sorted(contents(made.out)) == sorted(FILES[dataset])
    for name in FILES[dataset]:
        ours, published = read(made.out / name), read(GOLDEN / "arrow" / name)
        assert ours.schema.equals(published.schema, check_metadata=False)
        assert ours.to_pylist() == published.to_pylist()
    serial = contents(made.out)
    assert made.run(workers=2) == 0
    assert contents(made.out) == serial


def test_class_names_are_in_the_metadata(case: MakeCase) -> None:
    made = case("food101")
    # Numbers against the alphabet: the order must come from the numbers, not from the file.
    (made.raw / "class_idx.json").write_text('{"apple_pie": 2, "pizza": 0, "baby_back_ribs": 1}')
    assert made.run() == 0
    assert json.loads(made.table("train").schema.metadata[b"class_names"]) == ["pizza", "baby_back_ribs", "apple_pie"]
    assert made.table("val")["label"].to_pylist() == [2, 1, 0]
    published = read(GOLDEN / "arrow" / "mmimdb_dev.arrow").schema
    schema = arrow_writer.arrow_schema(DATASETS["mmimdb"], MMIMDB_GENRES)
    assert schema.names == published.names
    assert json.loads(schema.metadata[b"class_names"]) == list(MMIMDB_GENRES)


def test_target_defaults_to_raw(case: MakeCase) -> None:
    made = case("mmimdb")
    assert make_arrow.main(["--dataset", "mmimdb", "--root", str(made.raw), "--workers", "0"]) == 0
    assert {path.name for path in made.raw.glob("*.arrow")} == set(FILES["mmimdb"])


def test_summary_counts_samples_texts_labels_bytes_and_time(case: MakeCase) -> None:
    made = case("mmimdb")
    assert made.run() == 0
    lines = [line.split() for line in made.stdout.splitlines()]
    assert ["mmimdb_train.arrow", "4", "5"] in [line[:3] for line in lines]
    assert ["total", "9", "10"] in [line[:3] for line in lines]
    assert ["label", "train", "dev", "test"] in lines
    assert ["Comedy", "1", "0", "1"] in lines
    size = sum(len(data) for data in contents(made.out).values())
    assert f"{size / 1000:.1f} kB" in made.stdout
    assert made.stdout.rstrip().endswith(" s")
    assert "replaced" not in made.stdout
    assert made.run() == 0
    assert made.stdout.count("replaced") == 3


def test_101_classes_are_shown_side_by_side_and_none_is_lost() -> None:
    split = arrow_writer.SplitSummary("train", Path("x"), False, 0)
    split.label_counts.update({100: 7, 0: 3})
    names = [f"class_{number}" for number in range(101)]
    lines = make_arrow.label_table([split], names)
    assert len(lines) == 1 + 51
    cells = " ".join(lines).split()
    assert sorted(cell for cell in cells if cell.startswith("class_")) == sorted(names)
    assert cells[cells.index("class_100") + 1] == "7"
    assert cells[cells.index("class_0") + 1] == "3"


def test_texts_left_out_of_food101_are_counted(case: MakeCase) -> None:
    made = case("food101")
    edit_json(made.raw / "text.json", lambda texts: texts.update({"pizza_2.jpg": "  ", "apple_pie_2.jpg": None}))
    assert made.run() == 0
    assert "left out, no text: train 1, val 2, test 0" in made.stdout
    assert made.table("val")["image_id"].to_pylist() == ["baby_back_ribs_2.jpg"]


def test_titles_serve_where_text_json_is_absent(case: MakeCase) -> None:
    made = case("food101")
    assert made.run() == 0
    expected = contents(made.out)
    texts = json.loads((made.raw / "text.json").read_text())
    (made.raw / "text.json").unlink()
    (made.raw / "texts").mkdir()
    for split in ("train", "test"):
        with (made.raw / "texts" / f"{split}_titles.csv").open("w", newline="", encoding="utf-8") as opened:
            names = [name for name in texts if (name.endswith("_3.jpg")) == (split == "test")]
            csv.writer(opened).writerows((name, texts[name], write_food101.class_of(name)) for name in names)
    assert made.run() == 0
    assert contents(made.out) == expected


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'a_1.jpg,"Pie, ""the best"" of all",a', 'Pie, "the best" of all'),
        (b"a_1.jpg,Pie, the best,a", "Pie, the best"),
        ("a_1.jpg,Crème brûlée,a".encode(), "Crème brûlée"),
    ],
)
def test_titles_with_commas_and_quotes(tmp_path: Path, line: bytes, text: str) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    assert list(write_food101.read_titles(tmp_path / "t.csv")) == [("a_1.jpg", text)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"pizza_0.jpg,one,pizza\npizza_1.jpg,one\n", "line 2: expected FILE,TEXT,CLASS"),
        (b"pizza_0.jpg,\xff,pizza\n", "not valid UTF-8"),
        (b"pizza_0.jpg,one,pizza\n", "two different texts: 'one' and 'two'"),
    ],
)
def test_wrong_titles_are_an_error(case: MakeCase, train: bytes, message: str) -> None:
    made = case("food101")
    (made.raw / "text.json").unlink()
    (made.raw / "texts").mkdir()
    (made.raw / "texts" / "train_titles.csv").write_bytes(train)
    (made.raw / "texts" / "test_titles.csv").write_text("pizza_0.jpg,two,pizza\n")
    assert message in made.refused()


def test_genres_outside_the_23_only(case: MakeCase) -> None:
    made = case("mmimdb")
    edit_json(made.raw / "labels" / "0000012.json", lambda film: film.update(genres=["News", "Adult"]))
    assert made.run() == 0
    row = made.table("dev").to_pylist()[0]
    assert row["genres"] == ["News", "Adult"]
    assert row["label"] == [0] * 23
    assert "none of the labels: train 0, dev 1, test 0" in made.stdout


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        *((mode, "PNG") for mode in ("L", "LA", "RGBA", "P", "1", "I;16")),
        ("CMYK", "JPEG"),
        ("P", "GIF"),
        ("RGB", "BMP"),
    ],
)
def test_images_of_all_modes_are_kept_as_they_are(case: MakeCase, mode: str, file_format: str) -> None:
    made, data = case("mmimdb"), encoded(mode, file_format)
    write_poster(made, data)
    assert made.run() == 0
    assert made.table("dev")["image"][0].as_py() == data


def test_a_linked_image_folder_is_followed(case: MakeCase, tmp_path: Path) -> None:
    made = case("mmimdb")
    (made.raw / "images").rename(tmp_path / "elsewhere")
    (made.raw / "images").symlink_to(tmp_path / "elsewhere")
    assert made.run() == 0
    assert made.table("train").num_rows == 4


# ---- bad samples

TRUNCATED = (GOLDEN / "raw/mmimdb/images/0000012.jpeg").read_bytes()[:-300]


def rename_film(made: Case, name: str) -> None:
    edit_json(made.raw / "split.json", lambda splits: splits["dev"].__setitem__(0, name))


def write_film(made: Case, data: bytes) -> None:
    (made.raw / "labels" / "0000012.json").write_bytes(data)


def write_poster(made: Case, data: bytes) -> None:
    (made.raw / "images" / "0000012.jpeg").write_bytes(data)


def folder_for_poster(made: Case) -> None:
    (made.raw / "images" / "0000012.jpeg").unlink()
    (made.raw / "images" / "0000012.jpeg").mkdir()


LABELS, POSTER = "labels/0000012.json", "images/0000012.jpeg"
BAD_FILMS: dict[str, tuple[Callable[[Case], object], str, str]] = {
    "no poster": (lambda c: (c.raw / POSTER).unlink(), "missing file", POSTER),
    "no label file": (lambda c: (c.raw / LABELS).unlink(), "missing file", LABELS),
    "folder": (folder_for_poster, "missing file", POSTER),
    "name too long": (lambda c: rename_film(c, "9" * 300), "unreadable file", f"labels/{'9' * 300}.json"),
    "NUL in the name": (lambda c: rename_film(c, "1\0"), "missing file", "labels/1\\x00.json"),
    "path": (lambda c: rename_film(c, "../../secret"), "path leaves RAW", "labels/../../secret.json"),
    **{
        name: (lambda c, data=data: write_poster(c, data), "undecodable image", POSTER)  # type: ignore[misc]
        for name, data in {
            "no image": b"<html>404</html>",
            "empty image": b"",
            "truncated image": TRUNCATED,
            "too many pixels": encoded("1", size=(30_000, 4_000)),
        }.items()
    },
    **{
        name: (lambda c, data=data: write_film(c, data), reason, LABELS)  # type: ignore[misc]
        for name, (data, reason) in {
            "broken JSON": (b'{"plot": ["a"], ', "broken JSON"),
            "bad UTF-8": (b'{"plot": ["\xff"]}', "broken JSON"),
            "half a pair": (b'{"plot": ["\\ud800"], "genres": []}', "broken JSON"),
            "deep JSON": (b"[" * 100_000, "broken JSON"),
            "repeated key": (b'{"plot": ["a"], "plot": ["b"], "genres": []}', "broken JSON"),
            "list": (b"[]", "incomplete JSON"),
            "no plot": (b'{"genres": ["Drama"]}', "incomplete JSON"),
            "empty plots": (b'{"plot": ["", " "], "genres": ["Drama"]}', "incomplete JSON"),
            "plot a string": (b'{"plot": "a", "genres": ["Drama"]}', "incomplete JSON"),
            "no genres": (b'{"plot": ["a"]}', "incomplete JSON"),
            "genre a number": (b'{"plot": ["a"], "genres": [1]}', "incomplete JSON"),
        }.items()
    },
}


@pytest.mark.parametrize("fault", BAD_FILMS)
def test_bad_film(case: MakeCase, fault: str) -> None:
    damage, reason, file = BAD_FILMS[fault]
    made = case("mmimdb")
    damage(made)
    said = made.refused()
    assert contents(made.out) == {}
    assert all(fact in said for fact in ("1 of 9 samples cannot be used; nothing was written", reason, file))
    bad = made.only_bad()
    assert (bad["split"], bad["listed_in"], bad["row"]) == ("dev", "split.json", "1")
    assert (bad["file"], bad["reason"]) == (file, reason)
    assert made.table("dev")["image_id"].to_pylist() == ["0000013"]
    assert made.table("train").to_pylist() == read(GOLDEN / "arrow/mmimdb_train.arrow").to_pylist()


MEME = {"id": 10005, "img": "img/10005.png", "label": 1, "text": "a"}


def meme(**changes: object) -> bytes:
    return json.dumps({k: v for k, v in {**MEME, **changes}.items() if v != "absent"}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": 10005, "img": ', "broken JSON"),
        (b'{"id": "\xff"}', "broken JSON"),
        (b"17", "incomplete JSON"),
        (meme(img="absent"), "incomplete JSON"),
        (meme(img=5), "incomplete JSON"),
        (meme(text="absent"), "incomplete JSON"),
        (meme(text=" "), "incomplete JSON"),
        (meme(text=["a"]), "incomplete JSON"),
        (meme(label="absent"), "incomplete JSON"),
        (meme(label=None), "incomplete JSON"),
        (meme(label=2), "unknown class"),
        (meme(label="1"), "unknown class"),
        (meme(label=True), "unknown class"),
        (meme(label=1.0), "unknown class"),
        (meme(label=10**400), "unknown class"),
        (meme(img="img/1.png"), "missing file"),
        (meme(img="train.jsonl"), "undecodable image"),
        (meme(img="../../../etc/passwd"), "path leaves RAW"),
        (meme(img="/etc/passwd"), "path leaves RAW"),
    ],
)
def test_bad_meme(case: MakeCase, line: bytes, reason: str) -> None:
    made = case("hateful_memes")
    edit_line(made.folder / "dev.jsonl", 2, line)
    assert reason in made.refused()
    bad = made.only_bad()
    assert (bad["split"], bad["listed_in"], bad["row"], bad["reason"]) == ("dev", "dev.jsonl", "2", reason)
    assert made.table("dev").num_rows == 1
    assert made.table("test").num_rows == 3


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("sushi_1.jpg", "a", "unknown class"),
        ("nounderscore.jpg", "a", "unknown class"),
        ("pizza_9.jpg", "a", "missing file"),
        ("pizza_9.jpg", 5, "incomplete JSON"),
        ("../pizza_9.jpg", "a", "path leaves RAW"),
    ],
)
def test_bad_dish(case: MakeCase, name: str, text: object, reason: str) -> None:
    made = case("food101")
    edit_json(made.raw / "split.json", lambda splits: splits["val"].insert(1, name))
    edit_json(made.raw / "text.json", lambda texts: texts.update({name: text}))
    assert reason in made.refused()
    bad = made.only_bad()
    assert (bad["split"], bad["row"], bad["reason"]) == ("val", "2", reason)
    assert made.table("val").to_pylist() == read(GOLDEN / "arrow/food101_val.arrow").to_pylist()


def test_a_validation_image_under_test_is_missing(case: MakeCase) -> None:
    made = case("food101")
    source = made.raw / "images" / "train" / "pizza" / "pizza_2.jpg"
    source.rename(made.raw / "images" / "test" / "pizza" / "pizza_2.jpg")
    assert "images/train/pizza/pizza_2.jpg" in made.refused()


def test_no_bad_sample_hides_another(case: MakeCase) -> None:
    made = case("mmimdb")
    edit_json(made.raw / "split.json", lambda splits: splits["train"].extend(f"none{n:02}" for n in range(30)))
    write_poster(made, b"")
    (made.raw / "labels" / "0000439.json").write_text("{")
    for workers in (0, 2):
        assert made.run(workers=workers) == 2
        lines = [line.split() for line in made.stderr.splitlines()]
        assert ["30", "missing", "file"] in lines
        assert ["1", "undecodable", "image"] in lines
        assert ["1", "broken", "JSON"] in lines
        assert sum(line[1:2] == ["split.json"] for line in lines) == make_arrow.N_SHOWN
        assert "... and 12 more" in made.stderr
    assert made.run("--skip-bad") == 0
    assert [bad["file"] for bad in made.report()] == [
        *(f"labels/none{n:02}.json" for n in range(30)),
        "images/0000012.jpeg",
        "labels/0000439.json",
    ]
    assert "left out, bad: train 30, dev 1, test 1" in made.stdout
    assert "mmimdb_bad_samples.tsv" in made.stdout


def test_control_characters_do_not_break_the_report(case: MakeCase) -> None:
    made = case("mmimdb")
    rename_film(made, "a\tb\n\x1b[31m")
    assert made.run("--skip-bad") == 0
    assert [bad["file"] for bad in made.report()] == [r"labels/a\tb\n\x1b[31m.json"]
    assert "\x1b[31m" not in made.stderr


def test_a_run_without_bad_samples_removes_an_old_report(case: MakeCase) -> None:
    made = case("mmimdb")
    poster = (made.raw / "images" / "0000012.jpeg").read_bytes()
    write_poster(made, b"")
    assert made.run("--skip-bad") == 0
    assert made.report()
    write_poster(made, poster)
    assert made.run() == 0
    assert sorted(contents(made.out)) == sorted(FILES["mmimdb"])


def test_a_split_with_no_sample_left_is_an_error_even_with_skip_bad(case: MakeCase) -> None:
    made = case("mmimdb")
    for name in ("0000012", "0000013"):
        (made.raw / "images" / f"{name}.jpeg").unlink()
    assert made.run("--skip-bad") == 2
    assert "no sample is left for mmimdb_dev.arrow: 2 are bad" in made.stderr
    assert "images/0000012.jpeg" in made.stderr
    assert contents(made.out) == {}


def test_a_file_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpeg").open("wb") as opened:
        opened.truncate(2**40)  # a hole: takes no space
    with pytest.raises(BadSampleError) as caught:
        read_file(tmp_path, "huge.jpeg")
    assert caught.value.reason == "unreadable file"


# ---- top-level files


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        *(("mmimdb", name) for name in ("split.json", "images", "labels")),
        *(("food101", name) for name in ("split.json", "class_idx.json", "text.json", "images/train", "images/test")),
        *(("hateful_memes", f"data/{name}") for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "img")),
    ],
)
def test_a_missing_top_level_file_shows_the_layout(case: MakeCase, dataset: str, name: str) -> None:
    made = case(dataset)
    (made.raw / name).rename(made.raw / "away")
    assert made.run() == 2
    layout = {"mmimdb": write_mmimdb, "food101": write_food101, "hateful_memes": write_hatememes}[dataset].LAYOUT
    assert layout.rstrip() in made.stderr
    assert ("titles.csv" if name == "text.json" else Path(name).name) in made.stderr.splitlines()[0]
    assert contents(made.out) == {}


def test_a_missing_raw_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_arrow.main(["--dataset", "mmimdb", "--root", str(tmp_path / "nowhere")]) == 2
    assert f"the raw folder {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_data_md_shows_the_layouts_that_the_errors_show() -> None:
    text = (ROOT / "DATA.md").read_text(encoding="utf-8")
    for module in (write_mmimdb, write_food101, write_hatememes):
        assert module.LAYOUT in text
    for spec in DATASETS.values():
        assert f"--dataset {spec.make_arrow_name} " in text
        for split in spec.file_splits:
            assert f"`{spec.file_name(split)}`" in text


SPLITS = {"train": ["0000005"], "dev": ["0000012"], "test": ["0000091"]}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("{", ["not valid JSON", "column 2"]),
        ("[]", ["expected an object", "found a list"]),
        (b'{"train": "\xff"}', ["not valid JSON in UTF-8"]),
        (json.dumps({"train": ["0000005"], "dev": ["0000012"]}), ["'test'", "found the keys 'train', 'dev'."]),
        (json.dumps({**SPLITS, "extra": ["1"]}), ["found the keys 'train', 'dev', 'test', 'extra'."]),
        (json.dumps({**SPLITS, "dev": {}}), ["list of strings under 'dev'", "found an object"]),
        (json.dumps({**SPLITS, "dev": []}), ["'dev'", "an empty list"]),
        (json.dumps({**SPLITS, "dev": ["0000012", 13]}), ["'dev', row 2", "13"]),
        (json.dumps({**SPLITS, "dev": ["0000005"]}), ["'0000005' is listed twice", "'train', row 1", "'dev', row 1"]),
        (json.dumps({**SPLITS, "dev": ["1", "1"]}), ["'1' is listed twice", "'dev', row 1", "'dev', row 2"]),
        ('{"train": ["1"], "train": ["2"]}', ["the key 'train' is repeated"]),
    ],
)
def test_a_wrong_split_file(case: MakeCase, content: str | bytes, messages: list[str]) -> None:
    made = case("mmimdb")
    (made.raw / "split.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert made.run("--skip-bad") == 2
    assert str(made.raw / "split.json") in made.stderr
    for message in messages:
        assert message in made.stderr
    assert len(made.stderr.splitlines()) == 1
    assert contents(made.out) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "found a list"),
        ("{}", "found the numbers []"),
        ('{"a": "0"}', "found a string under 'a'"),
        ('{"a": true}', "found true under 'a'"),
        ('{"a": null}', "found null under 'a'"),
        ('{"a": 0.5}', "found 0.5 under 'a'"),
        ('{"a": -1}', "found the numbers [-1]"),
        ('{"a": 0, "b": 2}', "found the numbers [0, 2]"),
        ('{"a": 0, "b": 0}', "found the numbers [0, 0]"),
        (json.dumps({str(n): n for n in range(102)}), "at most 101 classes, found 102"),
    ],
)
def test_a_wrong_class_file(case: MakeCase, content: str, message: str) -> None:
    made = case("food101")
    (made.raw / "class_idx.json").write_text(content)
    assert message in made.refused()


def test_a_byte_order_mark_and_surrogate_pairs_are_allowed() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_json(rb'"\ud83d\ude00"') == "\N{GRINNING FACE}"


# ---- Hateful Memes


def strip_labels(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))


def test_memes_directly_in_raw(case: MakeCase) -> None:
    made = case("hateful_memes")
    made.raw = made.raw / "data"
    assert made.run() == 0
    assert made.table("test").to_pylist() == read(GOLDEN / "arrow/hatememes_test.arrow").to_pylist()


@pytest.mark.parametrize("choice", ["test_seen", "test_unseen"])
def test_the_test_split_can_be_chosen(case: MakeCase, choice: str) -> None:
    made = case("hateful_memes")
    lines = (made.folder / "test.jsonl").read_text().splitlines()
    (made.folder / "test.jsonl").unlink()
    (made.folder / "test_seen.jsonl").write_text("\n".join(lines[:1]))
    (made.folder / "test_unseen.jsonl").write_text("\n\n".join(lines[1:]))
    (made.folder / "dev.jsonl").rename(made.folder / "dev_seen.jsonl")

    assert made.run() == 2
    assert "test.jsonl not found" in made.stderr
    assert "--test-split test_seen or --test-split test_unseen" in made.stderr

    assert made.run("--test-split", choice) == 0
    published = read(GOLDEN / "arrow/hatememes_test.arrow").to_pylist()
    assert made.table("test").to_pylist() == (published[:1] if choice == "test_seen" else published[1:])
    assert made.table("dev").num_rows == 2


def test_a_test_split_without_labels_names_those_with(case: MakeCase) -> None:
    made = case("hateful_memes")
    shutil.copy(made.folder / "test.jsonl", made.folder / "test_seen.jsonl")
    strip_labels(made.folder / "test.jsonl")
    assert made.run("--skip-bad") == 2
    assert "test.jsonl: none of its 3 rows has a 'label'" in made.stderr
    assert "--test-split test_seen." in made.stderr
    assert len(made.stderr.splitlines()) == 1
    strip_labels(made.folder / "test_seen.jsonl")
    assert "No test file here has labels" in made.refused()


def test_a_dev_split_without_labels(case: MakeCase) -> None:
    made = case("hateful_memes")
    strip_labels(made.folder / "dev.jsonl")
    assert made.run() == 2
    assert "dev.jsonl: none of its 2 rows has a 'label'" in made.stderr
    assert "--test-split" not in made.stderr


def test_a_file_of_broken_rows_is_not_taken_for_one_without_labels(case: MakeCase) -> None:
    made = case("hateful_memes")
    (made.folder / "dev.jsonl").write_text("{\n{\n")
    assert made.run() == 2
    assert ["2", "broken", "JSON"] in [line.split() for line in made.stderr.splitlines()]


def test_ids_may_repeat_between_files_but_not_within_one(case: MakeCase) -> None:
    made = case("hateful_memes")
    lines = (made.folder / "dev.jsonl").read_bytes().splitlines()
    edit_line(made.folder / "test.jsonl", 1, lines[0])
    assert made.run() == 0
    edit_line(made.folder / "test.jsonl", 3, lines[0])
    assert "test.jsonl: the id 10004 is listed twice, in rows 1 and 3" in made.refused()


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_jsonl_is_an_error(case: MakeCase, content: bytes) -> None:
    made = case("hateful_memes")
    (made.folder / "dev.jsonl").write_bytes(content)
    assert "dev.jsonl is empty" in made.refused()


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "imagenet", "--root", "x"], "invalid choice: 'imagenet'"),
        (["--dataset", "mmimdb"], "--root"),
        (["--dataset", "mmimdb", "--root", "x", "--workers", "-1"], "expected 0 or more, found -1"),
        (["--dataset", "mmimdb", "--root", "x", "--test-split", "test_seen"], "--test-split belongs to"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        make_arrow.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# ---- nothing half-written


def test_a_failed_run_leaves_older_files_as_they_are(case: MakeCase) -> None:
    made = case("mmimdb")
    made.out.mkdir()
    for name in FILES["mmimdb"]:
        (made.out / name).write_text(f"old {name}")
    before = contents(made.out)
    (made.raw / "images" / "0000439.jpeg").unlink()  # the last sample of the last split
    for workers in (0, 2):
        assert made.run(workers=workers) == 2
        assert contents(made.out) == before


def test_a_file_in_the_place_of_the_target_is_an_error(case: MakeCase) -> None:
    made = case("mmimdb")
    made.out.write_text("mine")
    assert made.run() == 2
    assert f"cannot write to {made.out}" in made.stderr
    assert made.out.read_text() == "mine"


def test_a_folder_in_the_place_of_an_arrow_file_is_an_error(case: MakeCase) -> None:
    made = case("mmimdb")
    (made.out / "mmimdb_test.arrow").mkdir(parents=True)
    assert made.run() == 2
    assert "mmimdb_test.arrow is a folder" in made.stderr
    assert [path.name for path in made.out.iterdir()] == ["mmimdb_test.arrow"]


def command(raw: Path, out: Path, workers: int = 0) -> list[str]:
    options = ["--dataset", "mmimdb", "--root", raw, "--target", out, "--workers", workers]
    return [sys.executable, str(ROOT / "make_arrow.py"), *map(str, options)]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import make_arrow
sys.exit(make_arrow.main(sys.argv[1:]))
"""


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(case: MakeCase) -> None:
    made = case("mmimdb")
    # A limit on the size of files fails in the same place, and with the same kind of error, as a full disk.
    args = [sys.executable, "-c", LIMITED, *command(made.raw, made.out)[2:]]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"error: cannot write to {made.out}" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(made.out) == {}


@pytest.fixture
def large_raw(tmp_path: Path) -> Iterator[Path]:
    """MM-IMDb with 2,400 posters of 100 kB (240 MB to write), hard links of one that decodes quickly."""
    raw = tmp_path / "large"
    (raw / "images").mkdir(parents=True)
    (raw / "labels").mkdir()
    poster = (GOLDEN / "raw/mmimdb/images/0000012.jpeg").read_bytes()
    (raw / "poster").write_bytes(poster + bytes(100_000 - len(poster)))
    (raw / "film").write_text('{"plot": ["A plot."], "genres": ["Drama"]}')
    names = [f"{n:07}" for n in range(2400)]
    for name in names:
        os.link(raw / "poster", raw / "images" / f"{name}.jpeg")
        os.link(raw / "film", raw / "labels" / f"{name}.json")
    splits = {"train": names[:2000], "dev": names[2000:2200], "test": names[2200:]}
    (raw / "split.json").write_text(json.dumps(splits))
    yield raw
    shutil.rmtree(raw)


MEASURED = """
import sys
import make_arrow
status = make_arrow.main(sys.argv[1:])
with open("/proc/self/status") as opened:
    print(next(line for line in opened if line.startswith("VmHWM")))
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded(large_raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = [sys.executable, "-c", MEASURED, *command(large_raw, out)[2:]]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(path.stat().st_size for path in out.iterdir()) > 240_000_000
    shutil.rmtree(out)
    peak_kib = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak_kib < 192 * 1024


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(large_raw: Path, tmp_path: Path, sent: int, status: int) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(large_raw, out, workers=1), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not any(path.stat().st_size > 10**7 for path in contents_of_parts(out)):
        time.sleep(0.01)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)  # as Ctrl-C, and as kill
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert contents(out) == {}


def contents_of_parts(out: Path) -> list[Path]:
    return list(out.glob(".*.part")) if out.exists() else []


# ---- the pool


def read_numbered(number: int, fatal: int | None = None) -> Row:
    """Returns the number, sometimes late; or ends the process."""
    if number == fatal:
        os._exit(1)
    time.sleep(0.02 if number % 4 == 0 else 0)
    return {"number": number}


def test_results_come_in_order_and_samples_are_taken_only_a_few_ahead() -> None:
    taken = 0

    def samples() -> Iterator[Sample]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield Sample(number, "", partial(read_numbered, number))

    results: list[tuple[int, Row | BadSampleError]] = []
    for row, result in read_in_order(samples(), 2):
        assert taken - len(results) <= 2 * IN_FLIGHT_PER_WORKER + 1
        results.append((row, result))
    assert results == [(number, {"number": number}) for number in range(60)]


def test_a_worker_that_dies_is_a_clear_error() -> None:
    samples = (Sample(number, f"sample {number}", partial(read_numbered, number, 3)) for number in range(20))
    with pytest.raises(DataError, match=r"A worker process died near sample \d"):
        list(read_in_order(samples, 1))


def test_workers_stay_small() -> None:
    # They import make_arrow.py: what it imports at its top, each of them holds in memory.
    code = "import sys, make_arrow; print([m for m in ('pyarrow', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- as a program


def test_as_a_program(case: MakeCase) -> None:
    made = case("mmimdb")
    done = subprocess.run(command(made.raw, made.out, workers=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "9/9" in done.stderr
    assert "samples/s" in done.stderr
    assert sorted(contents(made.out)) == sorted(FILES["mmimdb"])
    assert made.table("train").num_rows == 4
