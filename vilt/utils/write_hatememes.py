"""Converts Hateful Memes: images with their captions, hateful or not."""

from functools import partial
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import quoted
from vilt.datasets.specs import DATASETS, Split
from vilt.utils import raw_data
from vilt.utils.names import whole
from vilt.utils.raw_data import INCOMPLETE_JSON, UNKNOWN_CLASS, BadSampleError, RawDataset, RawSplit, Row

LAYOUT = """\
RAW/ or RAW/data/
  train.jsonl         {"id": ..., "img": "img/FILE.png", "label": 0 or 1, "text": TEXT} on each line
  dev.jsonl           or dev_seen.jsonl
  test.jsonl          or test_seen.jsonl, test_unseen.jsonl: choose with --test-split
  img/FILE.png
"""
TEST_SPLITS = ("test", "test_seen", "test_unseen")

Record = dict[str, Any] | BadSampleError
"""The content of a line, or the error that makes it a bad sample."""


def read_meme(folder: Path, allow_missing: bool, source: str, record: Record) -> Row:
    """Columns image, text (a list of one), label (1: hateful) for a record in the file `source`.

    Raises BadSampleError.
    """
    if isinstance(record, BadSampleError):
        raise record
    given = {key: record.get(key) for key in ("text", "img")}
    if allow_missing:
        given = {key: "" if value is None else value for key, value in given.items()}
    text, image = (raw_data.of_kind(str, value, source, repr(key)) for key, value in given.items())
    if not text.strip() and not allow_missing:
        raise BadSampleError(INCOMPLETE_JSON, source, "'text' is empty")
    label = whole(record.get("label"))
    if label is None:
        raise BadSampleError(INCOMPLETE_JSON, source, "no 'label'")
    if type(label) is not int or label not in (0, 1):
        raise BadSampleError(UNKNOWN_CLASS, source, f"'label': expected 0 or 1, found {quoted(label)}")
    found = raw_data.read_image(folder, image, allow_missing) if image or not allow_missing else None
    return {"image": found, "text": [text] if text.strip() else None, "label": label}


def read_records(path: Path) -> dict[int, Record]:
    """The records of a jsonl file, keyed by line from 1.

    Raises DataError if there are none, if an id occurs twice, or if none of the readable records has a label.
    """
    records: dict[int, Record] = {}
    for row, line in enumerate(raw_data.read_bytes(path).splitlines(), 1):
        if line.strip():
            try:
                records[row] = raw_data.read_record(line, path.name)
            except BadSampleError as bad:
                records[row] = bad
    if not records:
        raise DataError(f"{path} is empty")
    intact = {row: record for row, record in records.items() if isinstance(record, dict)}
    rows: dict[int | str, int] = {}
    for row, record in intact.items():
        name = whole(record.get("id"))
        # Unique only within a file: dev_seen and dev_unseen of the later release overlap by design.
        if isinstance(name, int | str) and rows.setdefault(name, row) != row:
            raise DataError(f"{path}: the id {quoted(name)} is listed twice, in rows {rows[name]} and {row}")
    if intact and all(record.get("label") is None for record in intact.values()):
        hint = "; choose another file with --test-split" if path.stem in TEST_SPLITS else ""
        raise DataError(f"{path}: expected a 'label' in its {len(records):,} rows, found none{hint}")
    return records


def open_raw(raw: Path, test_split: str = "test", allow_missing: bool = False) -> RawDataset:
    """Opens Hateful Memes in `raw` or `raw/data`; checks for labels and repeated ids. Raises DataError.

    Args:
        test_split: name of the jsonl file with the test split.
        allow_missing: keep memes without image or text, as naturally missing; otherwise they are bad samples.
    """
    spec = DATASETS["hatememes"]
    folder = raw / "data" if (raw / "data" / "train.jsonl").is_file() and not (raw / "train.jsonl").is_file() else raw
    dev = "dev_seen" if (folder / "dev_seen.jsonl").is_file() and not (folder / "dev.jsonl").is_file() else "dev"
    raw_data.require_layout(folder, ("train.jsonl", f"{dev}.jsonl", "img"), LAYOUT)
    if not (folder / f"{test_split}.jsonl").is_file():
        others = " or ".join(f"--test-split {name}" for name in TEST_SPLITS if (folder / f"{name}.jsonl").is_file())
        raise DataError(f"{test_split}.jsonl not found in {folder}" + (f"; try {others}" if others else ""))
    splits = []
    files: dict[Split, str] = {"train": "train", "val": dev, "test": test_split}
    for split, name in files.items():
        path = folder / f"{name}.jsonl"
        records = read_records(path)
        samples = [
            (row, partial(read_meme, folder, allow_missing, path.name, record)) for row, record in records.items()
        ]
        splits.append(RawSplit(split, path.name, samples))
    assert spec.class_names is not None
    return RawDataset(spec, spec.class_names, tuple(splits))
