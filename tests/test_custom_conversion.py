"""make_arrow.py --dataset custom: tables of every format, the resulting arrow files, and every fault of a table."""

import csv
import json
import re
from pathlib import Path

import pytest

from common.errors import DataError
from demo.data import write_task
from tests.conftest import Captured, Patch, error_line
from tests.custom_files import columns_of, convert, films_as_custom, make, png, read_arrow, write_jsonl, write_labelled
from tests.data_files import memes, write
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.custom import CustomData
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import SPLITS
from vilt.utils import arrow_writer, write_custom
from vilt.utils.names import normal

ROOT = Path(__file__).parents[1]
HEADER = ["image", "text", "label", "split"]
ROWS = [
    ["a.png", "one, two", "cat", "train"],
    ["b.png", 'says "miau"', "dog", "train"],
    ["a.png", "another\nline", "cat", "train"],
    ["b.png", "bark", "dog", "val"],
    ["a.png", "purr", " cat ", "test"],
]
RECORDS = [dict(zip(HEADER, row, strict=True)) for row in ROWS]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with two images and the table of ROWS."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(10))
    (folder / "b.png").write_bytes(png(20))
    write_table(folder / "table.csv", ROWS)
    return folder


def write_table(path: Path, rows: list[list[str]], header: list[str] = HEADER) -> None:
    """Writes CSV, TSV or JSONL, by the suffix of `path`."""
    if path.suffix == ".jsonl":
        write_jsonl(path, [dict(zip(header, row, strict=True)) for row in rows])
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel").writerows([header, *rows])


def with_labels(labels: list[str]) -> list[list[str]]:
    return [[*row[:2], label, row[3]] for row, label in zip(ROWS, labels, strict=True)]


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.jsonl", "TABLE.CSV"])
def test_every_table_format_is_converted(raw: Path, name: str, capsys: Captured) -> None:
    (raw / "table.csv").unlink()
    write_table(raw / name, ROWS)
    assert convert(raw, raw / "out", "--table", str(raw / name)) == 0
    assert sorted(path.name for path in (raw / "out").iterdir()) == [f"custom_{s}.arrow" for s in sorted(SPLITS)]
    assert columns_of(raw / "out") == {
        "image": [png(10), png(20), png(10)],
        "text": [["one, two"], ['says "miau"'], ["another\nline"]],
        "label": [0, 1, 0],
        "image_id": ["a.png", "b.png", "a.png"],
        "split": ["train"] * 3,
    }
    assert columns_of(raw / "out", "val")["label"] == [1] and columns_of(raw / "out", "test")["label"] == [0]
    assert f"{arrow_writer.IN_TRAINING}: train 0, val 1, test 1" in capsys.readouterr().out
    assert open_spec("custom", raw / "out", SPLITS).custom == CustomData("custom", "single", ("cat", "dog"), "accuracy")


def test_rows_that_leak_or_repeat_are_counted_by_content(raw: Path, capsys: Captured) -> None:
    (raw / "copy.png").write_bytes(png(10))
    (raw / "other.png").write_bytes(png(30))
    rows = [
        ["a.png", "purr", "cat", "train"],
        ["", "miau", "cat", "train"],
        ["b.png", "bark", "dog", "train"],
        ["copy.png", "purr", "cat", "train"],  # repeats
        ["copy.png", "purr", "dog", "train"],
        ["", "miau", "cat", "train"],  # repeats
        ["other.png", "purr", "cat", "val"],
        ["", "miau", "dog", "val"],  # leaks
        ["", "bark", "dog", "test"],
        ["copy.png", "growl", "dog", "test"],  # leaks
        ["b.png", "bark", "dog", "test"],  # leaks
        ["b.png", "bark", "dog", "test"],  # leaks and repeats
    ]
    write_table(raw / "table.csv", rows)
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv")) == 0
    said = capsys.readouterr().out
    assert f"{arrow_writer.IN_TRAINING}: train 0, val 1, test 3" in said
    assert f"{arrow_writer.REPEATED}: train 2, val 0, test 1" in said


def test_one_table_per_split_with_renamed_columns(raw: Path) -> None:
    for split, rows in (("train", ROWS[:3]), ("val", ROWS[3:4])):
        cells = [[row[2], "x", row[0], row[1]] for row in rows]
        write_table(raw / f"{split}.csv", cells, ["kind", "n", "file", "says"])
    write_jsonl(raw / "test.jsonl", [{"file": "a.png", "says": ["purr", " "], "kind": "cat"}])
    (raw / "about.yaml").write_text(
        "name: Pets-1\nfiles: {train: train.csv, val: val.csv, test: test.jsonl}\n"
        "columns: {image: file, text: says, label: kind}\nclasses: [fish, dog, cat]\nmetric: f1_macro\n"
    )
    assert convert(raw, raw / "out", "--spec", str(raw / "about.yaml")) == 0
    assert columns_of(raw / "out")["label"] == [2, 1, 2]
    assert columns_of(raw / "out", "test")["text"] == [["purr", " "]]
    spec = open_spec("custom", raw / "out", SPLITS)
    assert spec.custom == CustomData("Pets-1", "single", ("fish", "dog", "cat"), "f1_macro")
    assert (spec.n_classes, spec.multilabel, spec.class_names) == (3, False, ("fish", "dog", "cat"))


def test_a_label_that_looks_like_several_gives_a_warning(raw: Path, capsys: Captured) -> None:
    write_table(raw / "table.csv", with_labels(["red|blue", "green", "green", "green", "red|blue"]))
    (raw / "spec.yaml").write_text("files: table.csv\n")
    assert convert(raw, raw / "out") == 0
    assert "warning: 'red|blue' is one class; with `labels: multi`" in capsys.readouterr().out


@pytest.mark.parametrize("separator", [None, ", ", " "])
def test_multi_label_tables_are_converted(raw: Path, separator: str | None, capsys: Captured) -> None:
    mark = separator or "|"
    write_table(raw / "table.csv", with_labels(["red", "", "green", "blue", "red"]))
    (raw / "spec.yaml").write_text("files: table.csv\nlabels: multi\n")
    assert convert(raw, raw / "out") == 0 and "no row has several labels" in capsys.readouterr().out
    labels = [f"red{mark}green", "", f"green{mark}{mark} blue ", "blue", f"red{mark}red"]
    write_table(raw / "table.csv", with_labels(labels))
    given = f'separator: "{separator}"\n' if separator else ""
    (raw / "spec.yaml").write_text(f"files: table.csv\nlabels: multi\n{given}")
    assert convert(raw, raw / "out") == 0
    assert "kept, but with none of the labels: train 1, val 0, test 0" in capsys.readouterr().out
    assert columns_of(raw / "out")["label"] == [[0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert set(columns_of(raw / "out")) == {"image", "text", "label", "image_id", "split"}
    spec = open_spec("custom", raw / "out", SPLITS)
    assert spec.custom == CustomData("custom", "multi", ("blue", "green", "red"), "f1_macro") and spec.multilabel


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_ignored(raw: Path, encoding: str) -> None:
    (raw / "spec.yaml").write_text("name: caf-1\nfiles: Table.CSV\nclasses: [cat, dog]\n", encoding)
    (raw / "table.csv").write_bytes(b"\xef\xbb\xbf" + (raw / "table.csv").read_bytes())
    assert convert(raw, raw / "out") == 0
    assert columns_of(raw / "out")["label"] == [0, 1, 0]


def test_numbers_are_class_names_in_json_and_yaml(raw: Path) -> None:
    """Whole numbers, even if written as floats, are named without a decimal point."""
    write_jsonl(raw / "table.jsonl", [{**row, "label": (n % 2, float(n % 2))[n < 3]} for n, row in enumerate(RECORDS)])
    for classes, names, labels in (("", ("0", "1"), [0, 1, 0]), ("classes: [1, 0]", ("1", "0"), [1, 0, 1])):
        (raw / "spec.yaml").write_text(f"files: table.jsonl\nmetric: auroc\n{classes}\n")
        assert convert(raw, raw / "out") == 0
        assert columns_of(raw / "out")["label"] == labels
        assert open_spec("custom", raw / "out", SPLITS).class_names == names


def test_names_in_yaml_are_taken_literally(raw: Path) -> None:
    """YAML would otherwise read them as numbers, truth values, times or dates."""
    names = ["007", "1.10", "no", "12:30", "1_000"]
    write_table(raw / "table.csv", with_labels(names))
    (raw / "spec.yaml").write_text(f"name: 2024_11\nfiles: table.csv\nclasses: [{', '.join(names)}]\n")
    assert convert(raw, raw / "out") == 0
    spec = open_spec("custom", raw / "out", SPLITS)
    assert spec.class_names == tuple(names) and spec.custom is not None and spec.custom.name == "2024_11"


def test_films_convert_as_with_the_mmimdb_converter(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_task(raw, films=20, seed=3)
    assert make("mmimdb", raw, tmp_path / "films") == 0
    assert convert(raw, tmp_path / "own", "--spec", str(films_as_custom(raw, tmp_path / "table"))) == 0
    for split, called in (("train", "train"), ("val", "dev"), ("test", "test")):
        theirs = read_arrow(tmp_path / "films" / f"mmimdb_{called}.arrow")
        ours = read_arrow(tmp_path / "own" / f"custom_{split}.arrow")
        assert ours["image"].equals(theirs["image"]) and ours["label"].equals(theirs["label"])
        assert ours["text"].equals(theirs["plots"]) and ours.num_rows > 2
        assert ours.schema.metadata[b"class_names"] == theirs.schema.metadata[b"class_names"]


SPECS = {
    "": "files: expected a table",
    "[a]": "the file: expected a dictionary",
    "files: [": "is not valid YAML: while parsing a flow node",
    "files: a.csv\nfiles: b.csv": "the key 'files' is repeated",
    "files: 2001-13-45": "files: expected a table",
    "name: x": "files: expected a table",
    "file: a.csv": "unknown key file; expected name, files,",
    "files: 3": "files: expected a table",
    "files: table.txt": "a table whose name ends in .csv or .tsv or .jsonl, found 'table.txt'",
    "files: {train: a.csv, dev: b.csv}": "unknown key files.dev; expected train, val, test",
    "files: {train: a.csv, val: b.csv}": "files.test: expected a table whose name ends in",
    "files: {train: t.csv, val: t.csv, test: t.csv}\ncolumns: {split: split}": "columns.split: contradicts files",
    "files: {train: t.csv, val: t.csv, test: u.csv}": "files: expected a different table for each split",
    "!!python/object/apply:os.system ['touch marker']": "the file: expected a dictionary",
    "? [a, b]\n: 1": "found unhashable key",
    **{
        f"files: table.csv\n{rest}": message
        for rest, message in {
            "columns: image": "columns: expected a dictionary",
            "columns: {picture: a}": "unknown key columns.picture; expected image, text, label, split",
            "name: a b": "name: expected letters, digits, - and _, found 'a b'",
            f"name: {'n' * 100_000}.": "name: expected letters, digits, - and _, found 'nnn",
            "labels: both": "labels: expected single or multi, found 'both'",
            "labels: [single]": "labels: expected single or multi, found ['single']",
            "separator: ';'": "separator: only for labels: multi, found labels: single",
            "labels: multi\nseparator: ''": "separator: expected a name",
            "classes: [cat, [dog]]": "classes: expected a name",
            "classes: [cat, dog, cat]": "classes: expected each value once, found cat twice",
            "classes: [cat, '']": "classes: expected a name",
            "classes: []": "classes: expected at least one value",
            "classes: [cat]": "classes: expected at least 2, found 1 ('cat')",
            "metric: f1": "metric: expected accuracy or f1_macro or auroc with labels: single, found 'f1'",
            "labels: multi\nmetric: auroc": "metric: expected f1_macro with labels: multi, found 'auroc'",
            "classes: [cat, dog, cow]\nmetric: auroc": "metric: auroc needs 2 classes, found 3",
        }.items()
    },
}


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_a_wrong_spec_is_refused(raw: Path, spec: str, capsys: Captured, monkeypatch: Patch) -> None:
    monkeypatch.chdir(raw)
    (raw / "spec.yaml").write_text(spec)
    assert convert(raw, raw / "out", "--skip-bad") == 2
    said = error_line(capsys)
    assert SPECS[spec] in said and str(raw / "spec.yaml") in said and len(said) < 1000
    assert not list(raw.glob("out/*")) and not (raw / "marker").exists()


def test_a_missing_spec_or_table_is_refused(raw: Path, tmp_path: Path, capsys: Captured) -> None:
    assert convert(raw, raw / "out") == 2
    said = capsys.readouterr().err
    assert f"spec.yaml not found in {raw}" in said and write_custom.LAYOUT.rstrip() in said
    assert convert(tmp_path / "nowhere", raw / "out", "--table", str(raw / "table.csv")) == 2
    assert f"the raw folder {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err
    (raw / "spec.yaml").write_text("files: nowhere.csv")
    write_jsonl(raw / "val.jsonl", [])
    write_jsonl(raw / "test.jsonl", [{"image": "a.png", "text": "x", "label": "cat"}])
    (raw / "val.yaml").write_text("files: {train: table.csv, val: val.jsonl, test: test.jsonl}")
    for options, fact in (
        (["--spec", str(raw / "no.yaml")], "no.yaml cannot be read"),
        (["--table", str(raw)], f"{raw}: files: expected a table"),
        ([], f"{raw / 'nowhere.csv'} cannot be read: No such file"),
        (["--spec", str(raw / "val.yaml")], f"{raw / 'val.jsonl'}: expected rows, found none"),
    ):
        assert convert(raw, raw / "out", *options) == 2 and fact in error_line(capsys)


GOOD = "image,text,label,split\na.png,x,cat,train\na.png,x,cat,val\na.png,x,dog,test\n"
ALL = "'image', 'text', 'label'"
TABLES: list[tuple[str, str | bytes, str]] = [
    ("csv", "", f"row 1: expected the columns {ALL}, found nothing"),
    ("csv", "image,text,lab,split\n", "row 1: expected the columns 'label', found 'image', 'text', 'lab', 'split'"),
    ("tsv", GOOD, f"row 1: expected the columns {ALL}, found 'image,text,label,split'"),
    ("csv", "image,text,label,split,text\n", "row 1: the column 'text' is repeated"),
    ("csv", GOOD + "a.png,x,cat\n", "row 5: expected 4 values, as in the header, found 3"),
    ("csv", GOOD + "\na.png,x,y,cat,train\n", "row 6: expected 4 values, as in the header, found 5"),
    ("csv", GOOD + 'a.png,"x,cat,train\n', "row 5: unexpected end of data; a quote is not closed"),
    ("csv", GOOD + 'a.png,"x" y,cat,train\n', "row 5: ',' expected after '\"'"),
    ("csv", GOOD.replace("cat", "caf\xe9").encode("latin-1"), "is not valid UTF-8"),
    ("csv", GOOD.encode("utf-16"), "is not valid UTF-8"),
    ("csv", GOOD + "a.png,x,cat,dev\n", "row 5: split: expected train or val or test, found 'dev'"),
    ("csv", GOOD + f"a.png,{'word ' * 40_000},cat,val\n", "row 5: field larger than field limit"),
    ("jsonl", '{"label": "a"}\n{"label": "a", "split": "val"}\n', "row 1: split: expected train or val or "),
    ("csv", GOOD.replace("val", ""), "row 3: split: expected train or val or test, found ''"),
    ("csv", GOOD + 'a.png,"x,cat,train\na.png,y",cat,train\n', "row 5: a quote is not closed; the cell includes row 6"),
    ("csv", GOOD + ',"x,cat,train\n,y",cat,train\n', "row 5: a quote is not closed; the cell includes row 6"),
    ("csv", GOOD + 'a.png,"x,cat,train\n' + 9000 * "a.png,text,cat,train\n", "(131072); maybe a quote is not closed"),
    (
        "csv",
        "image,text,label\na.png,x,cat\nb.png,x,dog\n",
        "expected enough rows to draw three splits from; of 2, with those of an image kept together, none is left for",
    ),
    ("jsonl", '{"split": "train", "label": true}\n' * 2 + '{"split": "val"}\n{"split": "test"}', "row 1: label: "),
    ("csv", GOOD.replace("dog", "c\u0430t"), r"the labels 'cat' and 'c\u0430t' look the same"),
    ("csv", GOOD.replace("dog", "\uff43at"), r"the labels 'cat' and '\uff43at' look the same"),
    ("csv", GOOD.replace("dog", "c\u200dat"), r"the labels 'cat' and 'c\u200dat' look the same"),
    ("jsonl", '\n{"split": 1}\n', "row 2: split: expected train or val or test, found 1"),
    ("csv", GOOD.replace("val", "train"), "expected rows with split val, found none"),
    ("csv", "image,text,label,split\n", "expected rows with split train, found none"),
    ("jsonl", '{"split": "train"}\n{"spl', "row 2: not valid JSON in UTF-8: Unterminated string"),
    ("jsonl", "[1]\n", "row 1: expected an object, found a list"),
    ("jsonl", '{"split": "train", "split": "val"}', "row 1: not valid JSON in UTF-8: the key 'split' is "),
    ("csv", GOOD.replace("dog", "cat"), "classes: expected at least 2, found 1 ('cat')"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), TABLES, ids=range(len(TABLES)))
def test_a_wrong_table_is_refused(raw: Path, suffix: str, content: str | bytes, message: str, capsys: Captured) -> None:
    path = raw / f"wrong.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert convert(raw, raw / "out", "--skip-bad", "--table", str(path)) == 2
    said = error_line(capsys)
    assert f"error: {path}" in said and message in said
    assert not list(raw.glob("out/*"))


def damage(raw: Path) -> None:
    """Adds faulty image files and links."""
    (raw / "folder").mkdir()
    (raw / "damaged.png").write_bytes(png()[:50])
    (raw / "._a.png").write_bytes(b"\0\5\x16\7")
    (raw / "circle.png").symlink_to(raw / "circle.png")
    (raw.parent / "secret.png").write_bytes(png())
    (raw / "link.png").symlink_to(raw.parent / "secret.png")


BAD: list[tuple[str, object, str, str]] = [
    ("image", ["a.png"], "incomplete row", "image: expected a path, found a list"),
    ("image", "no.png", "missing file", ""),
    ("image", "folder", "unreadable file", "expected a file, found a folder"),
    ("image", "https://there/a.png", "unreadable file", "expected a file, found a URL"),
    ("image", "../secret.png", "path leaves RAW", ""),
    ("image", "link.png", "path leaves RAW", "by a link; --follow-links allows that"),
    ("image", r"..\secret.png", "path leaves RAW", ""),
    ("image", "._a.png", "undecodable image", "macOS"),
    ("image", "circle.png", "missing file", ""),
    ("image", "a\0.png", "missing file", ""),
    ("image", "damaged.png", "undecodable image", ""),
    ("text", 5, "incomplete row", "text: expected a string or a list, found 5"),
    ("image, text", None, "nothing left", "no image and no text"),
    ("label", 1.5, "incomplete row", "label: expected a name, found 1.5"),
    ("label", float("nan"), "incomplete row", "label: expected a name, found NaN"),
    ("label", "d\u043eg", "unknown class", r"d\u043eg', which looks like one of them"),
    ("label", None, "incomplete row", "label: expected a name, found none"),
    ("label", True, "incomplete row", "label: expected a name, found true"),
    ("label", "cow", "unknown class", "'cow' is not in classes"),
    ("label", "cat|dog", "unknown class", "'cat|dog' is not in classes"),
    ("label", ["cat", "dog"], "incomplete row", "label: expected a name, found a list"),
    ("labels", "cat", "incomplete row", "label: expected a list, found 'cat'"),
    ("labels", ["cat", ""], "incomplete row", "label: expected a name, found ''"),
    ("labels", ["cat", "pink"], "unknown class", "'pink' is not in classes"),
]


@pytest.mark.parametrize(("column", "value", "reason", "detail"), BAD)
def test_a_bad_sample_is_reported_and_can_be_skipped(raw, column, value, reason, detail, capsys):
    damage(raw)
    several = column == "labels"
    rows = [{**row, **({"label": ["cat"]} if several else {})} for row in RECORDS]
    write_jsonl(raw / "table.jsonl", [*rows, {**rows[0], **dict.fromkeys(column.rstrip("s").split(", "), value)}])
    kind = "multi" if several else "single"
    (raw / "spec.yaml").write_text(f"files: table.jsonl\nclasses: [cat, dog]\nlabels: {kind}\n")
    assert convert(raw, raw / "out") == 2
    assert "1 of 6 samples cannot be used (" in capsys.readouterr().err
    assert not list(raw.glob("out/*"))
    assert convert(raw, raw / "out", "--skip-bad") == 0
    with (raw / "out" / "custom_bad_samples.tsv").open(encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert (line["split"], line["listed_in"], line["row"], line["reason"]) == ("train", "table.jsonl", "6", reason)
    assert detail in line["detail"]
    assert len(columns_of(raw / "out")["label"]) == 3


def test_links_out_of_the_folder_are_followed_only_on_request(raw: Path) -> None:
    damage(raw)
    write_table(raw / "table.csv", [["link.png", *row[1:]] for row in ROWS])
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv")) == 2
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv"), "--follow-links") == 0
    assert columns_of(raw / "out")["image"] == [png()] * 3


@pytest.mark.parametrize("listed", [r"img\A.PNG", "IMG/a.png", " img/a.png ", "img/a.Png", r".\img\a.png"])
def test_a_file_is_found_despite_differences_in_spelling_of_its_path(raw: Path, listed: str) -> None:
    (raw / "img").mkdir()
    (raw / "a.png").rename(raw / "img" / "a.png")
    rows = [[listed if row[0] == "a.png" else row[0], *row[1:]] for row in ROWS]
    write_table(raw / "table.csv", rows)
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv")) == 0
    assert columns_of(raw / "out")["image_id"] == [listed, "b.png", listed]
    assert columns_of(raw / "out")["image"][0] == png(10)


@pytest.mark.parametrize(
    "typed",
    [
        ["caf\u00e9", "cafe\u0301", " caf\u00e9", "caf\u00e9\u200b", "caf\u00e9\u00a0"],
        ["ice  tea", "ice tea", "ice\u00a0tea", "ice\ttea", "\ufeffice tea"],
        ["1", "1.0", "1.00", " 1", "1.0 "],
    ],
)
def test_labels_match_despite_differences_in_spelling(raw: Path, typed: list[str]) -> None:
    splits = ["train", "train", "train", "val", "test"]
    rows = [[*ROWS[0][:2], label, split] for label, split in zip(typed, splits, strict=True)]
    write_table(raw / "table.csv", [*rows, [*ROWS[0][:2], "dog", "train"]])
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv")) == 0
    names = open_spec("custom", raw / "out", SPLITS).class_names
    assert names is not None and names == tuple(sorted({normal(typed[0]), "dog"}))
    assert columns_of(raw / "out")["label"] == [names.index(normal(typed[0]))] * 3 + [names.index("dog")]
    (raw / "spec.yaml").write_text(json.dumps({"files": "table.csv", "classes": ["dog", typed[1]]}))
    assert convert(raw, raw / "out") == 0
    assert columns_of(raw / "out")["label"] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "header", [["Image", " TEXT", "label ", "Split"], ["\u0456mage", "text", "l\u0430bel", "\u0455plit"]]
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_columns_match_despite_differences_in_spelling(raw: Path, header: list[str], suffix: str) -> None:
    write_table(raw / f"typed.{suffix}", ROWS, header)
    assert convert(raw, raw / "out", "--table", str(raw / f"typed.{suffix}")) == 0
    assert columns_of(raw / "out")["text"] == [["one, two"], ['says "miau"'], ["another\nline"]]


def test_class_names_match_in_either_unicode_form() -> None:
    composed, decomposed, cyrillic = (
        CustomData("a", "single", (name, "dog"), "accuracy") for name in ("caf\u00e9", "cafe\u0301", "c\u0430f\u00e9")
    )
    assert composed.difference(decomposed) is None
    assert composed.difference(cyrillic) == r"expected 'caf\xe9' as class 0, found 'c\u0430f\xe9'"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_blank_cells_are_naturally_missing(raw: Path, suffix: str, capsys: Captured) -> None:
    rows = [["", *ROWS[0][1:]], ["b.png", " ", *ROWS[1][2:]], *ROWS[2:]]
    path = raw / f"holes.{suffix}"
    if suffix == "csv":
        write_table(path, rows)
    else:
        write_jsonl(path, [{**RECORDS[0], "image": None}, {**RECORDS[1], "text": ["", " "]}, *RECORDS[2:]])
    assert convert(raw, raw / "out", "--table", str(path)) == 0
    assert columns_of(raw / "out")["image"] == [None, png(20), png(10)]
    assert columns_of(raw / "out")["text"] == [["one, two"], None, ["another\nline"]]
    said = capsys.readouterr().out
    assert "image missing: train 1, val 0, test 0" in said and "text missing: train 1, val 0, test 0" in said
    data = ArrowDataset(open_spec("custom", raw / "out", SPLITS), raw / "out", "train", 8)
    assert data.natural.tolist() == [2, 1, 0]


def test_an_absent_image_file_counts_as_missing_only_on_request(raw: Path) -> None:
    (raw / "b.png").unlink()
    options = ["--table", str(raw / "table.csv")]
    assert convert(raw, raw / "out", *options) == 2
    assert convert(raw, raw / "out", *options, "--allow-missing") == 0
    assert columns_of(raw / "out")["image"] == [png(10), None, png(10)]


def drawn(raw: Path, seed: int | None = None, rows: int = 100) -> tuple[dict[str, list], list[str]]:
    """Converts `rows` rows, a tenth of class c, pairs sharing an image; returns labels by split and train's images."""
    for number in range(0, rows, 2):
        (raw / f"{number}.png").write_bytes(png(number))
    lines = [[f"{n - n % 2}.png", f"text {n}", "c" if n % 20 < 2 else "ab"[n % 4 // 2]] for n in range(rows)]
    write_table(raw / "table.csv", lines, HEADER[:3])
    options = [] if seed is None else ["--split-seed", str(seed)]
    assert convert(raw, raw / "out", "--table", str(raw / "table.csv"), *options) == 0
    found = {split: columns_of(raw / "out", split) for split in SPLITS}
    images = [set(columns["image_id"]) for columns in found.values()]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    return {split: columns["label"] for split, columns in found.items()}, found["train"]["image_id"]


def test_unspecified_splits_are_drawn_by_label_and_seed(raw: Path, capsys: Captured) -> None:
    labels, images = drawn(raw)
    assert {split: len(found) for split, found in labels.items()} == {"train": 70, "val": 10, "test": 20}
    assert images == sorted(images, key=lambda name: int(name.removesuffix(".png"))), "in the table's order"
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        for number, count in enumerate((40, 50, 10)):
            assert abs(labels[split].count(number) - share * count) <= 2, (split, number)
    assert "no column split: splits drawn by label with seed 0: train 70, val 10, test 20" in capsys.readouterr().out
    assert drawn(raw) == drawn(raw, 0) == (labels, images)
    assert drawn(raw, 1)[1] != images
    capsys.readouterr()
    write_table(raw / "table.csv", ROWS)
    status = convert(raw, raw / "out", "--table", str(raw / "table.csv"), "--split-seed", "1")
    assert status == 2 and "split_seed" in error_line(capsys)


@pytest.mark.parametrize(
    ("labels", "spec", "message"),
    [
        (["a", "b", "c"], {}, "expected 2 classes, found 3"),
        (["a", "c"], {}, "expected 'b' as class 1, found 'c'"),
        (["a", "b"], {"classes": ["b", "a"]}, "expected 'a' as class 0, found 'b'"),
        (["a", "b"], {"name": "pets"}, "expected the name custom and metric accuracy, found pets and accuracy"),
        (["a", "b"], {"metric": "auroc"}, "expected the name custom and metric accuracy, found custom and auroc"),
    ],
)
def test_splits_of_different_datasets_are_refused(
    tmp_path: Path, labels: list[str], spec: dict[str, object], message: str
) -> None:
    for name, names, more in (("first", ["a", "b"], {}), ("second", labels, spec)):
        write_labelled(tmp_path / name, dict.fromkeys(SPLITS, len(names)), names, **more)
        assert convert(tmp_path / name, tmp_path / name / "arrow") == 0
    arrow = tmp_path / "first" / "arrow"
    (tmp_path / "second" / "arrow" / "custom_val.arrow").replace(arrow / "custom_val.arrow")
    with pytest.raises(DataError, match=re.escape(message)) as error:
        open_spec("custom", arrow, SPLITS)
    assert str(arrow / "custom_val.arrow") in str(error.value) and "custom_train.arrow" in str(error.value)


DESCRIPTION = {"name": "pets", "labels": "single", "metric": "accuracy"}


@pytest.mark.parametrize(
    ("custom", "class_names", "found"),
    [
        (None, ["a", "b"], "expected metadata with class names, labels and metric, found none"),
        ("{", ["a", "b"], "Expecting property name"),
        ("[" * 100_000, ["a", "b"], "recursion"),
        (b"\xff", ["a", "b"], "utf-8"),
        ([], ["a", "b"], "expected an object, found []"),
        ({}, ["a", "b"], "expected the values name, labels, class_names, metric of a dataset, found "),
        ({**DESCRIPTION, "classes": 2}, ["a", "b"], "expected the values name, labels, class_names, metric"),
        ({**DESCRIPTION, "name": [1]}, ["a", "b"], "name: expected letters, digits, - and _, found [1]"),
        (DESCRIPTION, ["a", "a"], "classes: 'a' is listed twice, in rows 1 and 2"),
        (DESCRIPTION, "ab", "class_names: expected a list, found 'ab'"),
        (DESCRIPTION, ["a", ["b"]], "classes: expected a name in row 2, found ['b']"),
    ],
)
def test_a_damaged_dataset_description_is_refused(tmp_path, custom, class_names, found):
    path = tmp_path / "custom_test.arrow"
    written = custom if isinstance(custom, (str, bytes)) else json.dumps(custom)
    metadata = {"class_names": json.dumps(class_names), **({} if custom is None else {"custom": written})}
    write(path, memes().replace_schema_metadata(metadata))
    with pytest.raises(DataError) as refusal:
        open_spec("custom", tmp_path, ("test",))
    said = str(refusal.value)
    assert found in said and str(path) in said and "--dataset custom" in said and len(said) < 1000


def test_data_md_shows_the_layout_and_its_example_works(tmp_path: Path) -> None:
    text = (ROOT / "DATA.md").read_text(encoding="utf-8")
    assert write_custom.LAYOUT in text and "--dataset custom " in text
    section = text[text.index("## Your own data") : text.index("## Output files")]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["csv", "yaml", "json"]
    for kind, name in (("csv", "birds.csv"), ("yaml", "spec.yaml"), ("json", "birds.jsonl")):
        (tmp_path / name).write_text(dict(blocks)[kind])
    for name in set(re.findall(r"photos/\w+\.jpg", section)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    assert convert(tmp_path, tmp_path / "arrow") == 0
    found = open_spec("custom", tmp_path / "arrow", SPLITS).custom
    assert found is not None and found.name == "birds" and found.labels == "multi"
    as_csv = {split: columns_of(tmp_path / "arrow", split) for split in SPLITS}
    (tmp_path / "spec.yaml").write_text(dict(blocks)["yaml"].replace("birds.csv", "birds.jsonl"))
    assert convert(tmp_path, tmp_path / "arrow") == 0
    as_json = {split: columns_of(tmp_path / "arrow", split) for split in SPLITS}
    for split in SPLITS:
        assert as_json[split]["label"] == as_csv[split]["label"]
    assert json.dumps(as_csv["val"]["text"]) == json.dumps(as_json["val"]["text"])
