"""Every reader of users' files and options, given damaged and made-up input.

It must return a result or raise an error of ours that names the file; `make fuzz` tries more inputs.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip.backbone import load_backbone
from clip.modules.method import MethodOptions
from clip.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError, UserError
from config import DEFAULTS
from engine.checkpoint import ModelSpec, describe, read_checkpoint, restore_classifier, saved_state
from engine.items import read_items
from runs.check_options import read_options
from runs.report.parts import configurations
from runs.report.results import read_report_runs
from runs.run_table import list_runs
from tests.archives import rewritten
from tests.conftest import GOLDEN_ARROW, Workspace
from tests.custom_files import make, write_labelled
from tests.data_files import CLIP_DATASETS
from tests.models import TINY, tiny_classifier
from tests.report_files import TestSet, write_run
from tests.sensor_files import write_set
from tests.vla_files import mult_pickle, vla_splits
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS, EVERY_DATASET, SPLITS
from vilt.missing_tables import MissingPattern, load_missing_table
from vilt.utils.raw_data import BadSampleError, read_image

GOLDEN = Path(__file__).parent / "data" / "golden"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
"""Damaged versions of each file, in addition to ODD_FILES."""
PATTERN = MissingPattern("both", 0.7, 0.5, 0)
TABLE = 'image,text,label,split\na.png,one,cat,train\na.png,"two, three",dog,val\na.png,five,dog,test\n'

ODD_FILES = (
    b"", b"\0", b"null", b"[", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"NaN", b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00", b"\r\r\r", b"\n" * 100, b'{"a": 1, "a": 2}', b'"\\ud800"', b"<svg/>",
    b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP",
    b"ARROW1\0\0", b"\x93NUMPY\x01\x00", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueq\x85R.",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 10**400, 0.5, float("nan"), "", "\0", "0.5", "x" * 100_000, [], [[]], {}, {"": None}, [None] * 3,
)  # fmt: skip
INSERTED = (b"", b"", b"\0", b"\n", b'"', b"\xff\xfe", b"[" * 20_000)


@dataclass(frozen=True)
class Reader:
    """A reader and its files, each of which is damaged in turn."""

    prepare: Callable[[Path, Workspace], object]
    """Writes the intact files to a folder."""
    read: Callable[[Path, Path], object]
    """Reads the folder (first path), in which the second path is the damaged file."""
    files: tuple[str, ...]
    entry: str = ""
    """Archive entry to damage, with checksums kept valid; if empty, the file itself is damaged."""


def convert(dataset: str, folder: Path, path: Path) -> None:
    """A refused conversion leaves no files, and the loader reads everything the converter accepts."""
    spec, out, said = EVERY_DATASET[dataset], folder.with_name("out"), io.StringIO()
    shutil.rmtree(out, ignore_errors=True)
    table = ["--table", str(path)] if path.name == "alone.csv" else []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = make(spec.make_arrow_name, folder, out, *table)
    assert status in (0, 2) and "Traceback" not in said.getvalue(), said.getvalue()
    if status == 2:
        assert not list(out.glob("*.arrow")), "an arrow file was left behind"
        raise DataError(said.getvalue())
    for split in SPLITS if dataset in CLIP_DATASETS else ():
        read_samples(ArrowDataset(spec, out, split, 8))


def read_samples(data: ArrowDataset) -> None:
    for index in range(min(8, len(data))):
        assert data[0, index].inputs["image"].shape == (3, 8, 8)


def open_arrow(folder: Path, path: Path) -> None:
    spec = next(spec for spec in CLIP_DATASETS.values() if path.name == spec.file_name("train"))
    read_samples(ArrowDataset(spec, folder, "train", 8))


def write_custom(folder: Path, _: Workspace) -> None:
    write_labelled(folder, dict.fromkeys(SPLITS, 2), ["cat", "dog"])
    shutil.copy(folder / "pictures" / "train0.png", folder / "a.png")
    (folder / "alone.csv").write_text(TABLE)


def write_images(folder: Path, _: Workspace) -> None:
    for name in IMAGES:
        mode, kind = name.split(".")
        Image.new(mode.replace("_", ";"), (37, 21)).save(folder / name, kind)


def read_an_image(folder: Path, path: Path) -> None:
    try:
        read_image(folder, path.name)
    except BadSampleError as error:
        raise DataError(str(error)) from error


def write_checkpoints(folder: Path, _: Workspace) -> None:
    spec, classifier = ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY), tiny_classifier()
    content = {"state_dict": saved_state(classifier), "rep": describe(spec, "ViT-B/16", "ab" * 32)}
    torch.save(content, folder / "own.ckpt")
    torch.save({"state_dict": classifier.state_dict()}, folder / "published.ckpt")


def read_a_checkpoint(folder: Path, path: Path) -> None:
    checkpoint = read_checkpoint(path)
    if checkpoint.published:
        restore_classifier(checkpoint, None)


def read_weights(folder: Path, path: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        (load_tokenizer if path.name == "tokenizer.json" else load_backbone)(str(folder))


def write_tables(folder: Path, _: Workspace) -> None:
    load_missing_table(folder, "mmimdb", "train", PATTERN, 30)
    torch.save(torch.zeros(30), folder / PUBLISHED)


def read_a_table(folder: Path, path: Path) -> None:
    kept = (folder / PUBLISHED).read_bytes()
    if path.name != PUBLISHED:
        (folder / PUBLISHED).unlink()
    try:
        assert set(load_missing_table(folder, "mmimdb", "train", PATTERN, 30).tolist()) <= {0, 1, 2}
    finally:
        (folder / PUBLISHED).write_bytes(kept)


def write_a_run(folder: Path, _: Workspace) -> None:
    TestSet().write(write_run(folder / "version_0"))


def read_runs(folder: Path, path: Path) -> None:
    assert all(len(row.note) < 1000 for row in list_runs(folder))
    for run in read_report_runs([folder]):
        _ = run.title, configurations([run]), run.command, run.curve("val/f1_macro")


def raw(name: str, *files: str) -> Reader:
    """The conversion of a golden raw dataset."""
    source = GOLDEN / "raw" / name
    return Reader(lambda to, _: shutil.copytree(source, to, dirs_exist_ok=True), partial(convert, name), files)


IMAGES = ("RGB.JPEG", "CMYK.JPEG", "RGBA.PNG", "I_16.PNG", "P.GIF", "RGB.WEBP", "1.TIFF", "L.BMP")
OWN_TABLE, PUBLISHED = (
    "mmimdb_train_missing_both_0.7_both_ratio_0.5_seed_0_of_30.txt",
    "mmimdb_train_missing_both_07.pt",
)
RUN_FILES = (
    *("config.json", "environment.json", "metrics.csv", "test_results.json"),
    *("robustness/robustness.json", "robustness/logits.arrow"),
)
CHECKPOINTS = Reader(write_checkpoints, read_a_checkpoint, ("own.ckpt", "published.ckpt"))
READERS = {
    "arrow files": Reader(
        lambda folder, _: shutil.copytree(GOLDEN_ARROW, folder, dirs_exist_ok=True),
        open_arrow,
        tuple(spec.file_name("train") for spec in CLIP_DATASETS.values()),
    ),
    "images": Reader(write_images, read_an_image, IMAGES),
    "films": raw("mmimdb", "split.json", "labels/0000012.json", "images/0000012.jpeg"),
    "dishes": raw("food101", "split.json", "class_idx.json", "text.json", "images/train/pizza/pizza_2.jpg"),
    "memes": raw("hatememes", "data/train.jsonl", "data/test.jsonl", "data/img/10005.png"),
    "custom datasets": Reader(write_custom, partial(convert, "custom"), ("table.jsonl", "spec.yaml", "alone.csv")),
    "sensors": Reader(
        lambda folder, _: write_set(folder),
        partial(convert, "sensors"),
        ("signals.npy", "channels.csv", "labels.npy", "classes.txt", "recordings.csv", "spec.yaml"),
    ),
    "segments": Reader(
        lambda folder, _: (folder / "f.pkl").write_bytes(pickle.dumps(mult_pickle(vla_splits()), 2)),
        partial(convert, "mosi"),
        ("f.pkl",),
    ),
    "samples to predict": Reader(
        write_custom, lambda _, path: read_items(path, DATASETS["mmimdb"]), ("table.jsonl", "alone.csv")
    ),
    "checkpoints": CHECKPOINTS,
    "pickles in checkpoints": replace(CHECKPOINTS, entry="data.pkl"),
    "weights": Reader(
        lambda folder, workspace: shutil.copytree(workspace.backbone, folder, dirs_exist_ok=True),
        read_weights,
        ("model.safetensors", "config.json", "tokenizer.json"),
    ),
    "missing tables": Reader(write_tables, read_a_table, (OWN_TABLE, PUBLISHED)),
    "runs": Reader(write_a_run, read_runs, tuple(f"version_0/{name}" for name in RUN_FILES)),
}


def damaged(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yields `count` copies with a few bits flipped; every other one also has bytes inserted or its end cut off."""
    draw = random.Random(seed)
    for number in range(count):
        content = bytearray(whole)
        for _ in range(1 + number % 3):
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        if number % 2:
            place = draw.randrange(len(whole))
            content[place:place] = draw.choice(INSERTED)
            content = content[: draw.choice([len(content), draw.randrange(len(whole))])]
        yield bytes(content)


def odd_records(value: Any) -> Iterator[Any]:
    """Yields copies of a JSON value with an odd value in one place each; in lists, only in the first two."""
    if not isinstance(value, (dict, list)):
        return
    for number, key in enumerate(value if isinstance(value, dict) else range(min(len(value), 2))):
        for odd in (ODD_VALUES[number % len(ODD_VALUES)], *odd_records(value[key])):
            changed = copy.copy(value)
            changed[key] = odd
            yield changed


def contents(path: Path, entry: str) -> Iterator[bytes]:
    whole = path.read_bytes()
    if not entry:
        yield from (*ODD_FILES, *damaged(whole, EXAMPLES))
        if "version_0" in path.parts:
            records = odd_records(json.loads(whole)) if path.suffix == ".json" else ()
            yield from (json.dumps(record).encode() for record in records)
        return
    with zipfile.ZipFile(path) as archive:
        inner = next(archive.read(name) for name in archive.namelist() if name.endswith(entry))
    for content in (*ODD_FILES, *damaged(inner, EXAMPLES)):
        yield rewritten(whole, entry, lambda _: content)  # noqa: B023 - called at once


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_naming_the_file(name: str, workspace: Workspace, tmp_path: Path) -> None:
    reader, folder, outcomes = READERS[name], tmp_path / "folder", Counter[str]()
    folder.mkdir()
    reader.prepare(folder, workspace)
    for file in reader.files:
        path = folder / file
        reader.read(folder, path)
        whole = path.read_bytes()
        for number, content in enumerate(contents(path, reader.entry)):
            path.write_bytes(content)
            try:
                reader.read(folder, path)
                outcomes["read"] += 1
            except UserError as error:
                said = str(error)
                assert str(folder) in said or path.name in said or "no sample is left" in said, said[:500]
                assert len(said) < 10_000
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{file}, content {number}: {content[:50]!r}") from error
        path.write_bytes(whole)
    print(f"{name}: {dict(outcomes)}")
    assert outcomes["refused"], "nothing was refused, whatever the content"


def test_any_value_of_an_option_is_read_or_refused() -> None:
    read = refused = 0
    for option in DEFAULTS:
        for odd in ODD_VALUES:
            try:
                read_options({**DEFAULTS, option: odd}, DEFAULTS)
                read += 1
            except ConfigError as error:
                assert option.partition(".")[0] in str(error) and len(str(error)) < 2000
                refused += 1
    assert read and refused
