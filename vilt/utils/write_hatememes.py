"""Hateful Memes: images with their caption, hateful or not."""

from functools import partial
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import quoted
from common.strict_json import parse_json
from vilt.datasets.specs import DATASETS, Split
from vilt.utils import raw_data
from vilt.utils.raw_data import INCOMPLETE_JSON, UNKNOWN_CLASS, BadSampleError, RawDataset, RawSplit, Row, Sample

LAYOUT = """\
RAW/ or RAW/data/
  train.jsonl         {"id": ..., "img": "img/FILE.png", "label": 0 or 1, "text": TEXT} on each line
  dev.jsonl           or dev_seen.jsonl
  test.jsonl          or test_seen.jsonl, test_unseen.jsonl: choose with --test-split
  img/FILE.png
"""
TEST_SPLITS = ("test", "test_seen", "test_unseen")


def read_meme(folder: Path, source: str, line: bytes) -> Row:
    """Columns image, text (a list of one), label (1: hateful), of a line of a jsonl file. Raises BadSampleError."""
    record = raw_data.read_record(line, source)
    for key in ("img", "text", "label"):
        if record.get(key) is None:
            raise BadSampleError(INCOMPLETE_JSON, source, f"no {key!r}")
    text = raw_data.check_text(record["text"], source, "'text'")
    if not text.strip():
        raise BadSampleError(INCOMPLETE_JSON, source, "'text' is empty")
    label = record["label"]
    if type(label) is not int or label not in (0, 1):
        raise BadSampleError(UNKNOWN_CLASS, source, f"'label': expected 0 or 1, found {quoted(label)}")
    image = raw_data.read_image(folder, raw_data.check_text(record["img"], source, "'img'"))
    return {"image": image, "text": [text], "label": label}


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a jsonl file that are not blank, with their number. Raises DataError if there are none."""
    lines = [(row, line) for row, line in enumerate(raw_data.read_bytes(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty.")
    return lines


def _has_labels(path: Path) -> bool:
    """False if `path` has intact rows, and none of them has a label. Raises DataError if an id comes twice."""
    rows: dict[int | str, int] = {}
    labels = []
    for row, line in _lines(path):
        try:
            record: Any = parse_json(line)
        except ValueError:  # reported with the bad samples
            continue
        if isinstance(record, dict):
            labels.append(record.get("label"))
            name = record.get("id")
            # Within a file only: dev_seen and dev_unseen of the later release overlap by design.
            if isinstance(name, int | str) and rows.setdefault(name, row) != row:
                raise DataError(f"{path}: the id {quoted(name)} is listed twice, in rows {rows[name]} and {row}.")
    return not labels or any(label is not None for label in labels)


def _choice(names: list[str]) -> str:
    return f"Usable here: {' or '.join(f'--test-split {name}' for name in names)}."


def open_raw(raw: Path, test_split: str = "test") -> RawDataset:
    """Hateful Memes in `raw` or `raw/data`, its jsonl files checked for labels and repeated ids. Raises DataError."""
    spec = DATASETS["hatememes"]
    folder = raw / "data" if (raw / "data" / "train.jsonl").is_file() and not (raw / "train.jsonl").is_file() else raw
    raw_data.require_layout(folder, ("train.jsonl", "img/"), LAYOUT)
    dev = "dev_seen" if (folder / "dev_seen.jsonl").is_file() and not (folder / "dev.jsonl").is_file() else "dev"
    raw_data.require_layout(folder, (f"{dev}.jsonl",), LAYOUT)
    tests = [name for name in TEST_SPLITS if (folder / f"{name}.jsonl").is_file()]
    if not tests:
        raw_data.require_layout(folder, (f"{test_split}.jsonl",), LAYOUT)
    if test_split not in tests:
        files = ", ".join(f"{name}.jsonl" for name in tests)
        raise DataError(f"{test_split}.jsonl not found in {folder}, which has {files}. {_choice(tests)}")

    splits = []
    names: dict[Split, str] = {"train": "train", "val": dev, "test": test_split}
    for split, name in names.items():
        path = folder / f"{name}.jsonl"
        lines = _lines(path)
        if not _has_labels(path):
            hint = ""
            if split == "test":
                others = [test for test in tests if test != name and _has_labels(folder / f"{test}.jsonl")]
                hint = " No test file here has labels: the later release of the dataset has."
                hint = f" {_choice(others)}" if others else hint
            message = f"{path}: none of its {len(lines):,} rows has a 'label', which the conversion needs."
            raise DataError(message + hint)
        samples = [
            Sample(row, f"{path.name}, row {row}", partial(read_meme, folder, path.name, line)) for row, line in lines
        ]
        splits.append(RawSplit(split, path.name, samples))
    assert spec.class_names is not None
    return RawDataset(spec, spec.class_names, tuple(splits))
