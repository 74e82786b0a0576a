"""make_arrow.py: the files it writes, the inputs it refuses, and what it leaves behind."""

import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

import make_arrow
from tests.conftest import Captured, Patch, read_json
from tests.custom_files import make, read_arrow
from tests.data_files import CLIP_DATASETS
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.utils import write_food101, write_hatememes, write_mmimdb

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
MODULES = {"mmimdb": write_mmimdb, "food101": write_food101, "hatememes": write_hatememes}
FILES = {name: sorted(spec.file_name(split) for split in spec.file_splits) for name, spec in CLIP_DATASETS.items()}
POSTER, FILM = "images/0000012.jpeg", "labels/0000012.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def published(file: str) -> list[dict]:
    return read_arrow(GOLDEN / "arrow" / file).to_pylist()


@dataclass
class Case:
    """A copy of one golden raw dataset, and a folder to convert it to."""

    dataset: str
    raw: Path
    out: Path
    capsys: Captured

    def run(self, *options: str, workers: int = 0) -> int:
        self.capsys.readouterr()
        name = DATASETS[self.dataset].make_arrow_name
        status = make(name, self.raw, self.out, "--workers", str(workers), *options)
        self.stdout, self.stderr = self.capsys.readouterr()
        return status

    def refused(self, *options: str, workers: int = 0, lines: int | None = None) -> str:
        """The error output of a conversion that must fail and write nothing."""
        before = contents(self.out)
        assert self.run(*options, workers=workers) == 2
        assert contents(self.out) == before
        assert lines is None or len(self.stderr.splitlines()) == lines, self.stderr
        return self.stderr

    def write(self, file: str, content: object) -> None:
        """Writes bytes, a text, or any other value as JSON; None removes the file."""
        path = self.raw / file
        if content is None:
            path.unlink()
            return
        path.parent.mkdir(exist_ok=True)
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    def edit(self, file: str, change: Callable[[dict], object]) -> None:
        value = read_json(self.raw / file)
        change(value)
        self.write(file, value)

    def edit_line(self, file: str, row: int, line: bytes) -> None:
        lines = (self.raw / file).read_bytes().splitlines()
        lines[row - 1] = line
        self.write(file, b"\n".join(lines) + b"\n")

    def table(self, split: str) -> pa.Table:
        return read_arrow(self.out / f"{self.dataset}_{split}.arrow")

    def report(self) -> list[dict[str, str]]:
        with (self.out / f"{self.dataset}_bad_samples.tsv").open(encoding="utf-8", newline="") as opened:
            return list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))

    def check_bad(self, reason: str, **expected: str) -> None:
        """Asserts that one bad sample ends the conversion, and is left out and listed with --skip-bad."""
        said = self.refused()
        assert all(fact in said for fact in (" samples cannot be used (", "; nothing was written", reason))
        assert self.run("--skip-bad") == 0
        (bad,) = self.report()
        assert {**bad, **expected, "reason": reason} == bad


MakeCase = Callable[[str], Case]


@pytest.fixture
def case(tmp_path: Path, capsys: Captured) -> MakeCase:
    def make(dataset: str) -> Case:
        shutil.copytree(GOLDEN / "raw" / dataset, tmp_path / "raw")
        return Case(dataset, tmp_path / "raw", tmp_path / "out", capsys)

    return make


@pytest.fixture
def films(case: MakeCase) -> Case:
    return case("mmimdb")


@pytest.fixture
def dishes(case: MakeCase) -> Case:
    return case("food101")


@pytest.fixture
def memes(case: MakeCase) -> Case:
    return case("hatememes")


@pytest.mark.parametrize("dataset", CLIP_DATASETS)
def test_output_equals_the_published_converters_for_any_number_of_workers(case: MakeCase, dataset: str) -> None:
    made = case(dataset)
    assert made.run() == 0
    assert sorted(contents(made.out)) == FILES[dataset]
    for name in FILES[dataset]:
        assert read_arrow(made.out / name).schema.equals(read_arrow(GOLDEN / "arrow" / name).schema)
        assert read_arrow(made.out / name).to_pylist() == published(name)
    serial = contents(made.out)
    assert made.run(workers=3) == 0
    assert contents(made.out) == serial


def test_class_names_are_in_the_metadata_in_index_order(dishes: Case) -> None:
    dishes.write("class_idx.json", '{"apple_pie": 2, "pizza": 0, "baby_back_ribs": 1}')
    assert dishes.run() == 0
    assert json.loads(dishes.table("train").schema.metadata[b"class_names"]) == ["pizza", "baby_back_ribs", "apple_pie"]
    assert dishes.table("val")["label"].to_pylist() == [2, 1, 0]


def test_target_defaults_to_a_folder_in_the_working_directory(films: Case, monkeypatch: Patch) -> None:
    monkeypatch.chdir(films.raw.parent)
    before = contents(films.raw / "images")
    assert make_arrow.main(["--dataset", "mmimdb", "--root", str(films.raw)]) == 0
    assert sorted(contents(Path("datasets/mmimdb"))) == FILES["mmimdb"]
    assert contents(films.raw / "images") == before and not list(films.raw.glob("*.arrow"))


def test_summary_counts_samples_texts_labels_and_bytes(films: Case) -> None:
    films.edit(FILM, lambda film: film.update(genres=["News", "Adult"]))
    assert films.run() == 0
    assert films.table("dev").to_pylist()[0]["genres"] == ["News", "Adult"]
    assert films.table("dev").to_pylist()[0]["label"] == [0] * 23
    lines = [line.split() for line in films.stdout.splitlines()]
    for expected in (
        ["mmimdb_train.arrow", "4", "5"],
        ["total", "9", "10"],
        ["label", "train", "dev"],
        ["Comedy", "1"],
    ):
        assert expected in [line[: len(expected)] for line in lines]
    assert f"{sum(map(len, contents(films.out).values())) / 1000:.1f} kB" in films.stdout
    assert "none of the labels: train 0, dev 1, test 0" in films.stdout and "replaced" not in films.stdout
    assert "77 tokens" not in films.stdout
    films.edit(FILM, lambda film: film.update(plot=["a word " * 38, "a word " * 37, "&lt;" * 70, "a" * 200]))
    assert films.run() == 0
    assert films.stdout.count("replaced") == 3
    assert f"{make_arrow.LONG_TEXTS}: train 0, dev 1, test 0" in films.stdout, "76 words"


def test_dishes_without_text_are_left_out_and_counted_or_kept_on_request(dishes: Case) -> None:
    dishes.edit("text.json", lambda texts: texts.update({"pizza_2.jpg": "  ", "apple_pie_2.jpg": None}))
    assert dishes.run() == 0
    assert "left out, no text: train 1, val 2, test 0" in dishes.stdout
    assert dishes.table("val")["image_id"].to_pylist() == ["baby_back_ribs_2.jpg"]
    dishes.write("images/train/baby_back_ribs/baby_back_ribs_2.jpg", None)
    assert dishes.run("--allow-missing") == 0 and "left out" not in dishes.stdout
    val = dishes.table("val")
    assert val["image_id"].to_pylist() == [row["image_id"] for row in published("food101_val.arrow")]
    assert len(missing_in(val, "text")) == 2 and len(missing_in(val, "image")) == 1


def write_titles(dishes: Case, train: bytes, test: bytes = b"") -> None:
    """Writes the two files of titles in place of text.json."""
    dishes.write("text.json", None)
    dishes.write("texts/train_titles.csv", train)
    dishes.write("texts/test_titles.csv", test)


def test_titles_are_read_if_text_json_is_missing(dishes: Case) -> None:
    assert dishes.run() == 0
    expected = contents(dishes.out)
    texts = read_json(dishes.raw / "text.json")
    out = io.StringIO()
    csv.writer(out).writerows((name, text, write_food101.class_of(name)) for name, text in texts.items())
    write_titles(dishes, out.getvalue().encode())
    assert dishes.run() == 0
    assert contents(dishes.out) == expected


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'a_1.jpg,"Pie, ""the best"" of all",a', 'Pie, "the best" of all'),
        (b"a_1.jpg,Pie, the best,a", "Pie, the best"),
        (b'"a_1.jpg",Pie,"a"', "Pie"),
        (b'a_1.jpg,"Pie,a', '"Pie'),
        (b'a_1.jpg,"Pie" of the "year",a', '"Pie" of the "year"'),
        (b'a_1.jpg,Pie",a', 'Pie"'),
        ("a_1.jpg,Crème\u2028brûlée,a".encode(), "Crème\u2028brûlée"),
    ],
)
def test_titles_may_have_commas_and_quotes(dishes: Case, line: bytes, text: str) -> None:
    write_titles(dishes, b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    assert write_food101.read_texts(dishes.raw) == {"a_1.jpg": text}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"pizza_0.jpg,one,pizza\npizza_1.jpg,one\n", "train_titles.csv, row 2: expected FILE,TEXT,CLASS"),
        (b'pizza_0.jpg,"one, or\ntwo",pizza\n', "train_titles.csv, row 1: expected FILE,TEXT,CLASS"),
        (b"pizza_0.jpg,one,pie\n", "row 1: expected FILE,TEXT,CLASS with the class 'pizza'"),
        (b"pizza_0.jpg,\xff,pizza\n", "not valid UTF-8"),
        (b"pizza_0.jpg,one,pizza\n", "two different texts: 'one' and 'two'"),
    ],
)
def test_malformed_titles_are_an_error(dishes: Case, train: bytes, message: str) -> None:
    write_titles(dishes, train, b"pizza_0.jpg,two,pizza\n")
    assert message in dishes.refused(lines=1)


def test_images_that_the_published_code_reads_differently_are_counted(films: Case) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode, options in (("0000012", "RGBA", {"exif": exif}), ("0000005", "I;16", {}), ("0000013", "RGB", {})):
        out = io.BytesIO()
        Image.new(mode, (20, 16)).save(out, "PNG", **options)
        films.write(f"images/{name}.jpeg", out.getvalue())
    assert films.run() == 0
    for change, counts in (("with trans", "train 0, dev 1"), ("turned", "train 0, dev 1"), ("in 16", "train 1, dev 0")):
        assert re.search(rf"images {change}.*published code differs\): {counts}, test 0", films.stdout), films.stdout


NFD = functools.partial(unicodedata.normalize, "NFD")


def test_genres_are_recognised_in_any_spelling(films: Case) -> None:
    spelt = [" DRAMA", "drama ", "Sci\u2011Fi\u200b", "film-noir", "Comedy drama"]
    films.edit(FILM, lambda film: film.update(genres=spelt))
    assert films.run() == 0
    row = films.table("dev").to_pylist()[0]
    assert [MMIMDB_GENRES[n] for n, one in enumerate(row["label"]) if one] == ["Drama", "Sci-Fi", "Film-Noir"]
    assert row["genres"] == spelt


@pytest.mark.parametrize(("listed", "on_disk"), [("é", NFD("é")), (NFD("é"), "é"), ("e", "E")])
def test_names_match_in_another_unicode_form_or_case(dishes: Case, listed: str, on_disk: str) -> None:
    """Another file system may change the names of files and folders, against those in lists, texts and class names."""

    def renamed(name: str, spelling: str) -> str:
        return name.replace("pizza", f"pizz{spelling}")

    files = (dishes.raw / f"{name}.json" for name in ("class_idx", "text", "split"))
    classes, texts, splits = (read_json(path) for path in files)
    dishes.write("class_idx.json", {renamed(name, listed): number for name, number in classes.items()})
    dishes.write("text.json", {renamed(name, on_disk if len(on_disk) > 1 else listed): t for name, t in texts.items()})
    dishes.write("split.json", {key: [renamed(name, listed) for name in names] for key, names in splits.items()})
    for folder in dishes.raw.glob("images/*/pizza"):
        for path in folder.iterdir():
            path.rename(path.with_name(renamed(path.name, on_disk)))
        folder.rename(folder.with_name(renamed(folder.name, on_disk)))
    assert dishes.run() == 0
    assert dishes.table("train")["label"].to_pylist() == [row["label"] for row in published("food101_train.arrow")]


def test_a_name_that_matches_two_files_counts_as_missing(films: Case) -> None:
    (films.raw / POSTER).rename(films.raw / POSTER.upper().replace("IMAGES/", "images/"))
    assert films.run() == 0
    other = Path(shutil.copy(films.raw / "images/0000013.jpeg", films.raw / "images/0000012.Jpeg"))
    films.check_bad("missing file", file=POSTER)
    other.unlink()
    assert films.run() == 0 and sorted(contents(films.out)) == FILES["mmimdb"], "the list of bad samples is gone"


def missing_in(table: pa.Table, column: str) -> list[int]:
    return [row for row, cell in enumerate(table[column].to_pylist()) if cell is None]


def test_films_without_poster_or_plot_are_kept_with_allow_missing(films: Case) -> None:
    films.write(POSTER, None)
    films.edit("labels/0000013.json", lambda film: film.update(plot=[" "]))
    films.edit("labels/0000005.json", lambda film: film.pop("plot"))
    assert films.run("--allow-missing") == 0
    assert "image missing: train 0, dev 1, test 0" in films.stdout
    assert "text missing: train 1, dev 1, test 0" in films.stdout
    dev = films.table("dev")
    assert (missing_in(dev, "image"), missing_in(dev, "plots")) == ([0], [1])
    assert missing_in(films.table("train"), "plots") == [0]
    films.edit(FILM, lambda film: film.update(plot=[]))
    assert "nothing left" in films.refused("--allow-missing") and "no image and no text" in films.stderr


def test_memes_without_image_or_text_are_kept_with_allow_missing(memes: Case) -> None:
    memes.edit_line("data/dev.jsonl", 1, meme(text=" ", id=1))
    memes.edit_line("data/dev.jsonl", 2, meme(img=None))
    memes.write("data/img/10000.png", None)
    assert memes.run("--allow-missing") == 0
    assert (missing_in(memes.table("dev"), "image"), missing_in(memes.table("dev"), "text")) == ([1], [0])
    assert missing_in(memes.table("train"), "image") == [0]
    memes.edit_line("data/dev.jsonl", 2, meme(img=5))
    assert "incomplete JSON" in memes.refused("--allow-missing")


def test_a_linked_image_folder_is_followed(films: Case, tmp_path: Path) -> None:
    (films.raw / "images").rename(tmp_path / "elsewhere")
    (films.raw / "images").symlink_to(tmp_path / "elsewhere")
    assert films.run() == 0
    assert films.table("train").num_rows == 4


TRUNCATED = (GOLDEN / "raw/mmimdb" / POSTER).read_bytes()[:-300]
BAD_FILES: list[tuple[str, object, str]] = [
    (POSTER, None, "missing file"),
    (POSTER, b"<html>404</html>", "undecodable image"),
    (POSTER, TRUNCATED, "undecodable image"),
    (FILM, '{"plot": ["a"], ', "broken JSON"),
    (FILM, b'{"plot": ["\\ud800"], "genres": []}', "broken JSON"),
    (FILM, {"plot": ["", " "], "genres": ["Drama"]}, "incomplete JSON"),
    (FILM, {"plot": "a", "genres": ["Drama"]}, "incomplete JSON"),
    (FILM, {"plot": ["a"], "genres": [1]}, "incomplete JSON"),
    (FILM, b" " * (2**24 + 1), "unreadable file"),
]


@pytest.mark.parametrize(("file", "content", "reason"), BAD_FILES)
def test_a_bad_film_is_reported(films: Case, file: str, content: object, reason: str) -> None:
    films.write(file, content)
    films.check_bad(reason, split="dev", listed_in="split.json", row="1", file=file)
    assert films.table("dev")["image_id"].to_pylist() == ["0000013"]
    assert films.table("train").to_pylist() == published("mmimdb_train.arrow")


@pytest.mark.parametrize(
    ("name", "reason", "file"),
    [
        ("9" * 300, "unreadable file", f"labels/{'9' * 300}.json"),
        ("1\0", "missing file", r"labels/1\x00.json"),
        ("a\tb\n\x1b[31m", "missing file", r"labels/a\tb\n\x1b[31m.json"),
        ("../../secret", "path leaves RAW", "labels/../../secret.json"),
    ],
)
def test_film_names_that_are_not_file_names_are_reported(films: Case, name: str, reason: str, file: str) -> None:
    films.edit("split.json", lambda splits: splits["dev"].__setitem__(0, name))
    films.check_bad(reason, file=file)
    assert "\x1b[31m" not in films.stderr


def meme(**changes: object) -> bytes:
    """A line of the JSON file; fields that are None are left out."""
    record = {"id": 10005, "img": "img/10005.png", "label": 1, "text": "a", **changes}
    return json.dumps({key: value for key, value in record.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": 10005, "img": ', "broken JSON"),
        (meme(img=5), "incomplete JSON"),
        (meme(text=None), "incomplete JSON"),
        (meme(text=["a"]), "incomplete JSON"),
        (meme(label=None), "incomplete JSON"),
        (meme(label=2), "unknown class"),
        (meme(label=True), "unknown class"),
        (meme(img="img/1.png"), "missing file"),
        (meme(img="train.jsonl"), "undecodable image"),
        (meme(img="../../../etc/passwd"), "path leaves RAW"),
        (meme(img=r"C:\img\10005.png"), "path leaves RAW"),
    ],
)
def test_a_bad_meme_is_reported(memes: Case, line: bytes, reason: str) -> None:
    memes.edit_line("data/dev.jsonl", 2, line)
    memes.check_bad(reason, split="dev", listed_in="dev.jsonl", row="2")
    assert (memes.table("dev").num_rows, memes.table("test").num_rows) == (1, 3)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("sushi_1.jpg", "a", "unknown class"),
        ("pizza_9.jpg", "a", "missing file"),
        ("pizza_9.jpg", 5, "incomplete JSON"),
        ("../pizza_9.jpg", "a", "path leaves RAW"),
        ("pizza_3.jpg", "a", "missing file"),  # among the test images only
    ],
)
def test_a_bad_dish_is_reported(dishes: Case, name: str, text: object, reason: str) -> None:
    splits = read_json(dishes.raw / "split.json")
    splits["test"] = [other for other in splits["test"] if other != name]
    splits["val"].insert(1, name)
    dishes.write("split.json", splits)
    dishes.edit("text.json", lambda texts: texts.update({name: text}))
    dishes.check_bad(reason, split="val", row="2")
    assert dishes.table("val").to_pylist() == published("food101_val.arrow")


def test_all_bad_samples_are_counted_and_listed(films: Case) -> None:
    films.edit("split.json", lambda splits: splits["train"].extend(f"none{n:02}" for n in range(30)))
    films.write(POSTER, b"")
    films.write("labels/0000439.json", "{")
    for workers in (0, 2):
        said = films.refused(workers=workers)
        lines = [line.split() for line in said.splitlines()]
        assert all(line in lines for line in (["30", "missing", "file"], ["1", "undecodable", "image"]))
        assert sum(line[1:2] == ["split.json"] for line in lines) == make_arrow.N_SHOWN
        assert "... and 12 more" in said
    assert films.run("--skip-bad") == 0
    files = [*(f"labels/none{n:02}.json" for n in range(30)), POSTER, "labels/0000439.json"]
    assert [bad["file"] for bad in films.report()] == files
    assert "left out, bad: train 30, dev 1, test 1" in films.stdout and "mmimdb_bad_samples.tsv" in films.stderr


def test_a_split_left_empty_is_an_error_even_with_skip_bad(films: Case) -> None:
    for name in ("0000012", "0000013"):
        films.write(f"images/{name}.jpeg", None)
    said = films.refused("--skip-bad")
    assert "no sample is left for mmimdb_dev.arrow: 2 are bad" in said and POSTER in said


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        *(("mmimdb", name) for name in ("split.json", "images", "labels")),
        *(("food101", name) for name in ("split.json", "class_idx.json", "text.json", "images/train", "images/test")),
        *(("hatememes", f"data/{name}") for name in ("train.jsonl", "dev.jsonl", "img")),
    ],
)
def test_a_missing_top_level_file_shows_the_layout(case: MakeCase, dataset: str, name: str) -> None:
    made = case(dataset)
    (made.raw / name).rename(made.raw / "away")
    said = made.refused()
    assert MODULES[dataset].LAYOUT.rstrip() in said
    assert ("titles.csv" if name == "text.json" else Path(name).name) in said.splitlines()[0]


def test_data_md_shows_the_layouts_that_the_errors_show() -> None:
    text = (ROOT / "DATA.md").read_text(encoding="utf-8")
    for name, spec in CLIP_DATASETS.items():
        assert MODULES[name].LAYOUT in text and f"--dataset {spec.make_arrow_name} " in text
        assert all(f"`{file}`" in text for file in FILES[name])


SPLITS = {"train": ["0000005"], "dev": ["0000012"], "test": ["0000091"]}
WRONG_FILES: list[tuple[str, object, list[str]]] = [
    ("split.json", "{", ["not readable as JSON", "column 2"]),
    ("split.json", {"train": ["0000005"], "dev": ["0000012"]}, ["'test'", "found the keys 'train', 'dev'"]),
    ("split.json", {**SPLITS, "extra": ["1"]}, ["found the keys 'train', 'dev', 'test', 'extra'"]),
    ("split.json", {**SPLITS, "dev": {}}, ["list of strings under 'dev'", "found an object"]),
    ("split.json", {**SPLITS, "dev": []}, ["'dev'", "an empty list"]),
    ("split.json", {**SPLITS, "dev": ["0000012", 13]}, ["'dev', row 2", "13"]),
    ("split.json", {**SPLITS, "dev": ["0000005"]}, ["'0000005' is listed twice", "'train', row 1", "'dev', row 1"]),
    ("split.json", {**SPLITS, "dev": ["\u00e9", "e\u0301"]}, ["is listed twice", "'dev', row 1", "'dev', row 2"]),
    ("class_idx.json", [], ["found a list"]),
    ("class_idx.json", {}, ["found []"]),
    ("class_idx.json", {"a": "0"}, ["under 'a'", "found a string"]),
    ("class_idx.json", {"a": True}, ["under 'a'", "found true"]),
    ("class_idx.json", {"a": 0, "b": 2}, ["found [0, 2]"]),
    ("class_idx.json", {"pie": 0, "pie ": 1}, ["look the same", "'pie '"]),
    ("class_idx.json", {"caf\u00e9": 0, "cafe\u0301": 1}, ["look the same", r"caf\xe9", r"cafe\u0301"]),
    ("class_idx.json", {str(n): n for n in range(102)}, ["at most 101 classes, found 102"]),
    ("data/dev.jsonl", "\n\n", ["is empty"]),
]


@pytest.mark.parametrize(("file", "content", "facts"), WRONG_FILES)
def test_a_malformed_top_level_file_is_an_error(case: MakeCase, file: str, content: object, facts: list[str]) -> None:
    made = case({"split.json": "mmimdb", "class_idx.json": "food101"}.get(file, "hatememes"))
    made.write(file, content)
    said = made.refused("--skip-bad", lines=1)
    assert all(fact in said for fact in (str(made.raw / file), *facts)), said


def test_unusual_but_valid_files_are_read(case: MakeCase) -> None:
    """A byte order mark, CR line ends, NaN in an unused field, escaped NUL and surrogate pairs, 2 MB of text."""
    mark, text = b"\xef\xbb\xbf", "word " * 400_000
    memes = case("hatememes")
    lines = (memes.raw / "data/dev.jsonl").read_bytes().splitlines()
    memes.write("data/dev.jsonl", mark + b"\r".join(lines))
    assert memes.run() == 0 and memes.table("dev").num_rows == len(lines)
    shutil.rmtree(memes.raw)
    plots = ["a\0b", "\N{GRINNING FACE}", text]
    films, film = case("mmimdb"), {"plot": plots, "genres": ["Drama"], "year": float("nan")}
    films.write(FILM, mark + json.dumps(film).encode())
    assert films.run() == 0 and films.table("dev")["plots"][0].as_py() == plots


def test_hostile_names_do_not_flood_the_terminal(films: Case) -> None:
    name = "x" * 1_000_000
    splits = read_json(films.raw / "split.json")
    changes: list[dict[str, Any]] = [{"dev": [name, name]}, {"dev": [[[[[]]]] * 1000]}, {name: ["a"]}]
    for change in changes:
        films.write("split.json", {**splits, **change})
        assert len(films.refused()) < 20_000


def strip_labels(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))


def test_memes_may_lie_directly_in_raw(memes: Case) -> None:
    memes.raw = memes.raw / "data"
    assert memes.run() == 0
    assert memes.table("test").to_pylist() == published("hatememes_test.arrow")


def test_the_test_split_can_be_chosen(memes: Case) -> None:
    folder = memes.raw / "data"
    lines = (folder / "test.jsonl").read_text().splitlines()
    memes.write("data/test.jsonl", None)
    memes.write("data/test_seen.jsonl", "\n".join(lines[:1]))
    memes.write("data/test_unseen.jsonl", "\n\n".join(lines[1:]))
    (folder / "dev.jsonl").rename(folder / "dev_seen.jsonl")
    said = memes.refused(lines=1)
    assert "test.jsonl not found" in said and "--test-split test_seen or --test-split test_unseen" in said
    expected = published("hatememes_test.arrow")
    for choice, rows in (("test_seen", expected[:1]), ("test_unseen", expected[1:])):
        assert memes.run("--test-split", choice) == 0
        assert memes.table("test").to_pylist() == rows and memes.table("dev").num_rows == 2


@pytest.mark.parametrize(("name", "rows"), [("test", 3), ("dev", 2)])
def test_a_split_without_labels_is_refused(memes: Case, name: str, rows: int) -> None:
    strip_labels(memes.raw / "data" / f"{name}.jsonl")
    said = memes.refused("--skip-bad", lines=1)
    assert f"{name}.jsonl: expected a 'label' in its {rows} rows, found none" in said
    assert ("--test-split" in said) == (name == "test")


def test_a_file_of_broken_rows_is_not_mistaken_for_an_unlabelled_one(memes: Case) -> None:
    memes.write("data/dev.jsonl", "{\n{\n")
    assert ["2", "broken", "JSON"] in [line.split() for line in memes.refused().splitlines()]


def test_ids_may_repeat_between_files_but_not_within_one(memes: Case) -> None:
    line = (memes.raw / "data" / "dev.jsonl").read_bytes().splitlines()[0]
    memes.edit_line("data/test.jsonl", 1, line)
    assert memes.run() == 0
    memes.edit_line("data/test.jsonl", 3, line)
    assert "test.jsonl: the id 10004 is listed twice, in rows 1 and 3" in memes.refused(lines=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["imagenet", "--root", "x"], "invalid choice: 'imagenet'"),
        (["mmimdb"], "--root"),
        (["mmimdb", "--root", "x", "--workers", "-1"], "expected 0 or more, found -1"),
        (["mmimdb", "--root", "x", "--test-split", "test_seen"], "--test-split belongs to --dataset hateful_memes"),
        (["mmimdb", "--root", "x", "--spec", "a"], "--spec belongs to --dataset sensors or custom, not mmimdb"),
        (
            ["mosi", "--root", "x", "--skip-bad"],
            "--skip-bad: only for datasets with images; mosi is converted",
        ),
        (["food101", "--root", "x", "--table", "a"], "--table belongs to --dataset vla or custom, not food101"),
        (["custom", "--root", "x", "--spec", "a", "--table", "b"], "not allowed with argument --spec"),
    ],
)
def test_invalid_options_are_refused(capsys: Captured, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        make_arrow.main(["--dataset", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_or_folder_in_the_way_of_the_output_is_an_error(films: Case) -> None:
    films.out.write_text("mine")
    assert films.run() == 2
    assert f"cannot write to {films.out}" in films.stderr and films.out.read_text() == "mine"
    films.out.unlink()
    (films.out / "mmimdb_test.arrow").mkdir(parents=True)
    assert films.run() == 2
    assert "mmimdb_test.arrow is a folder" in films.stderr
    assert [path.name for path in films.out.iterdir()] == ["mmimdb_test.arrow"]


def command(raw: Path, out: Path, *python: str) -> list[str]:
    options = ["--dataset", "mmimdb", "--root", str(raw), "--target", str(out), "--workers", "2"]
    return [sys.executable, *(python or [str(ROOT / "make_arrow.py")]), *options]


@pytest.fixture(scope="module")
def large_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MM-IMDb with 2,400 posters of 100 kB (240 MB to write), hard links of one that decodes quickly."""
    raw = tmp_path_factory.mktemp("large")
    for folder in ("images", "labels"):
        (raw / folder).mkdir(parents=True)
    poster = (GOLDEN / "raw/mmimdb" / POSTER).read_bytes()
    (raw / "poster").write_bytes(poster + bytes(100_000 - len(poster)))
    (raw / "film").write_text('{"plot": ["A plot."], "genres": ["Drama"]}')
    names = [f"{n:07}" for n in range(2400)]
    for name in names:
        os.link(raw / "poster", raw / "images" / f"{name}.jpeg")
        os.link(raw / "film", raw / "labels" / f"{name}.json")
    splits = {"train": names[:2000], "dev": names[2000:2200], "test": names[2200:]}
    (raw / "split.json").write_text(json.dumps(splits))
    return raw


MEASURED = """
import sys
import make_arrow
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
imported = peak()
status = make_arrow.main(sys.argv[1:])
print("grown by", peak() - imported)
sys.exit(status)
"""


def test_memory_is_bounded(large_raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(command(large_raw, out, "-c", MEASURED), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2400/2400" in done.stderr and "samples/s" in done.stderr
    assert sum(path.stat().st_size for path in out.iterdir()) > 240_000_000
    shutil.rmtree(out)
    assert int(done.stdout.split("grown by")[1]) < 80 * 1024, "kB"


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(large_raw: Path, tmp_path: Path, sent: int, status: int) -> None:
    out = tmp_path / "out"
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell lets background commands ignore Ctrl-C
    process = subprocess.Popen(command(large_raw, out), stderr=subprocess.PIPE, text=True, preexec_fn=reset)
    while process.poll() is None and not any(path.stat().st_size > 10**7 for path in out.glob(".*.part")):
        time.sleep(0.01)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert contents(out) == {}
