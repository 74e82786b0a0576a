"""What the fuzz tests feed: every reader of files and options that come from others, with damaged and made-up input.

A target takes an input and either comes to a result or raises one of our own errors; whatever else is a finding.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from PIL import Image

from clip.backbone import load_backbone
from clip.modules.method import MethodOptions
from clip.tokenizer import ClipTokenizer, load_tokenizer
from common.errors import DataError, UserError
from common.strict_json import read_json
from config import DEFAULTS
from engine.checkpoint import ModelSpec, describe, kept_state, read_checkpoint, restore_classifier
from engine.items import read_items
from runs.check_options import read_options
from runs.report.results import read_report_runs
from runs.run_table import list_runs
from tests.archives import rewritten
from tests.custom_files import make
from tests.data_files import CLIP_DATASETS
from tests.models import TINY, tiny_classifier
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, load_missing_table
from vilt.utils.raw_data import BadSampleError, read_image

GOLDEN = Path(__file__).parent / "data" / "golden"
PATTERN = MissingPattern("both", 0.7, 0.5, 0)


class Damage(NamedTuple):
    """What happens to a file: bytes replaced at places, a piece repeated or cut out, the end cut off."""

    changes: list[tuple[float, int]]
    """(place from 0 to 1, new byte)."""
    inserted: bytes
    at: float
    cut: float
    """Share of the file that is left."""

    def apply(self, data: bytes) -> bytes:
        """The damaged content."""
        found = bytearray(data)
        for place, byte in self.changes if found else ():
            found[int(place * (len(found) - 1))] = byte
        middle = int(self.at * len(found))
        found[middle:middle] = self.inserted
        return bytes(found[: int(self.cut * len(found))])


PLACES = st.floats(0, 1)
DAMAGE = st.builds(
    Damage,
    st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=6),
    st.one_of(st.just(b""), st.binary(max_size=12), st.sampled_from([b"[" * 20_000, b"\0", b'"', b"\xff\xfe", b"\n"])),
    PLACES,
    st.one_of(st.just(1.0), PLACES),
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-(10**400), 10**400))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@dataclass(frozen=True)
class Target:
    """A reader under test."""

    inputs: st.SearchStrategy[Any]
    prepare: Callable[[Path], Any]
    """Makes what the inputs damage, once, in a folder of its own."""
    run: Callable[[Any, Path, Any], None]
    """(what was prepared, an empty folder, an input)."""


# Arrow files, images


def _open_arrow(_: None, folder: Path, given: tuple[str, Damage]) -> None:
    name, damage = given
    spec = DATASETS[name]
    path = GOLDEN / "arrow" / spec.file_name("train")
    (folder / path.name).write_bytes(damage.apply(path.read_bytes()))
    dataset = ArrowDataset(spec, folder, "train", 32)
    for index in range(min(len(dataset), 8)):
        sample = dataset[(0, index)]
        assert sample.inputs["image"].shape == (3, 32, 32)


IMAGE_KINDS = (
    *(("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG")),
    *(("P", "GIF"), ("RGB", "WEBP"), ("1", "TIFF"), ("L", "BMP")),
)


def _images(folder: Path) -> list[bytes]:
    made = []
    for mode, kind in IMAGE_KINDS:
        buffer = io.BytesIO()
        Image.new(mode, (37, 21), 1 if mode in ("1", "P", "L", "I;16") else None).save(buffer, kind)
        made.append(buffer.getvalue())
    return made


def _read_image(images: list[bytes], folder: Path, given: tuple[int, Damage]) -> None:
    (folder / "image").write_bytes(given[1].apply(images[given[0]]))
    try:
        read_image(folder, "image")
    except BadSampleError as error:
        raise DataError(str(error)) from error


# Raw datasets


def _raw(folder: Path) -> list[tuple[str, Path, Path]]:
    """(dataset, its raw folder, a file of it)."""
    roots = {spec.make_arrow_name: GOLDEN / "raw" / name for name, spec in CLIP_DATASETS.items()}
    files = [(dataset, root, path) for dataset, root in roots.items() for path in sorted(root.rglob("*"))]
    return [(dataset, root, path) for dataset, root, path in files if path.is_file()]


def _convert(raw: list[tuple[str, Path, Path]], folder: Path, given: tuple[int, Damage, bool]) -> None:
    dataset, root, path = raw[given[0] % len(raw)]
    shutil.copytree(root, folder / "raw")
    broken = folder / "raw" / path.relative_to(root)
    broken.write_bytes(given[1].apply(path.read_bytes()))
    _make(dataset, folder, *(["--skip-bad"] if given[2] else []))


def _make(dataset: str, folder: Path, *options: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = make(dataset, folder / "raw", folder / "out", *options)
    assert status in (0, 2), said.getvalue()
    if status == 2:
        assert not list((folder / "out").glob("*.arrow")), "an arrow file was left behind"
        raise DataError(said.getvalue())


TABLE = 'image,text,label,split\na.png,one,cat,train\na.png,"two, three",dog,val\na.png,five,dog,test\n'
RECORDS = "".join(
    json.dumps({"image": "a.png", "text": ["one", "two"], "label": ["x", "y"], "split": split}) + "\n"
    for split in ("train", "val", "test")
)
SPEC = "name: pets\nfiles: table.{}\nlabels: {}\nmetric: f1_macro\n"


def _convert_custom(images: list[bytes], folder: Path, given: tuple[str, Damage]) -> None:
    kind, damage = given
    layout = ("jsonl", "multi") if kind == "table.jsonl" else ("csv", "single")
    contents = {"table.csv": TABLE, "table.jsonl": RECORDS, "spec.yaml": SPEC.format(*layout)}
    (folder / "raw").mkdir()
    (folder / "raw" / "a.png").write_bytes(images[0])
    for name, content in contents.items():
        (folder / "raw" / name).write_bytes(damage.apply(content.encode()) if name == kind else content.encode())
    _make("custom", folder, *(["--table", str(folder / "raw" / kind)] if kind == "table.csv" else []))


# Checkpoints, backbones


def _checkpoints(folder: Path) -> list[bytes]:
    classifier = tiny_classifier()
    content = {
        "state_dict": kept_state(classifier),
        "rep": describe(ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY), "ViT-B/16", "ab" * 32),
    }
    torch.save(content, folder / "own.ckpt")
    return [(folder / "own.ckpt").read_bytes(), (GOLDEN / "published_style.ckpt").read_bytes()]


def _read_checkpoint(contents: list[bytes], folder: Path, given: tuple[int, Damage, bool]) -> None:
    """Damages the file, or what is pickled in it and so has the right checksum."""
    number, damage, within = given
    whole = contents[number]
    damaged = rewritten(whole, "data.pkl", damage.apply) if within else damage.apply(whole)
    (folder / "x.ckpt").write_bytes(damaged)
    checkpoint = read_checkpoint(folder / "x.ckpt")
    if checkpoint.published:
        restore_classifier(checkpoint, None)


def _backbone(folder: Path) -> Path:
    from tests.backbones import random_hf_clip

    random_hf_clip(folder / "clip")
    return folder / "clip"


def _load_backbone(source: Path, folder: Path, given: tuple[str, Damage]) -> None:
    shutil.copytree(source, folder / "clip")
    path = folder / "clip" / given[0]
    path.write_bytes(given[1].apply(path.read_bytes()))
    with contextlib.redirect_stderr(io.StringIO()):
        load_backbone(str(folder / "clip"))


# Small files


def _tables(folder: Path) -> list[tuple[str, bytes]]:
    load_missing_table(folder, "mmimdb", "train", PATTERN, 30)
    [own] = folder.glob("*.txt")
    torch.save(torch.zeros(30), folder / "published.pt")
    return [
        (own.name, own.read_bytes()),
        ("mmimdb_train_missing_both_07.pt", (folder / "published.pt").read_bytes()),
    ]


def _read_table(tables: list[tuple[str, bytes]], folder: Path, given: tuple[int, Damage]) -> None:
    name, content = tables[given[0]]
    (folder / name).write_bytes(given[1].apply(content))
    table = load_missing_table(folder, "mmimdb", "train", PATTERN, 30)
    assert table.shape == (30,) and set(table.tolist()) <= {0, 1, 2}


def _run(folder: Path) -> Path:
    from tests.report_files import write_run

    return write_run(folder / "run" / "version_0")


def _read_run(source: Path, folder: Path, given: tuple[str, Damage]) -> None:
    shutil.copytree(source, folder / "result" / "version_0")
    path = folder / "result" / "version_0" / given[0]
    path.write_bytes(given[1].apply(path.read_bytes()))
    list_runs(folder / "result")
    read_report_runs([folder / "result"])


def _read_json(_: None, folder: Path, given: Any) -> None:
    (folder / "x.json").write_text(json.dumps(given))
    read_json(folder / "x.json")


def _read_samples(_: None, folder: Path, given: tuple[str, Damage]) -> None:
    suffix, damage = given
    content = {
        ".csv": b'id,image,text\n1,a.jpg,"a, b"\n2,,c\n',
        ".tsv": b"image\ttext\na.jpg\tb\n",
        ".jsonl": b'{"image": "a.jpg", "text": "b", "id": 3}\n{"text": null, "image": "c"}\n',
    }[suffix]
    (folder / f"x{suffix}").write_bytes(damage.apply(content))
    assert read_items(folder / f"x{suffix}", DATASETS["mmimdb"])


# Options, texts


def _check_options(_: None, folder: Path, given: dict[str, Any]) -> None:
    read_options({**DEFAULTS, **given}, DEFAULTS)


def _tokenizer(folder: Path) -> ClipTokenizer:
    from demo.backbone import train_tokenizer

    train_tokenizer(["a ghost story", "two friends rob a train"] * 3, 600).save_pretrained(folder / "tokenizer")
    return load_tokenizer(str(folder / "tokenizer"))


def _tokenize(tokenizer: ClipTokenizer, folder: Path, given: str) -> None:
    ids = tokenizer([given])
    assert ids.shape == (1, 77) and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert (ids[0] == tokenizer.end_id).any()


def _nothing(folder: Path) -> None:
    return None


RUN_FILES = st.sampled_from(["config.json", "environment.json", "metrics.csv", "test_results.json"])
TARGETS = {
    "arrow files": Target(st.tuples(st.sampled_from(sorted(CLIP_DATASETS)), DAMAGE), _nothing, _open_arrow),
    "images": Target(st.tuples(st.integers(0, 7), DAMAGE), _images, _read_image),
    "raw datasets": Target(st.tuples(st.integers(0, 10**6), DAMAGE, st.booleans()), _raw, _convert),
    "custom datasets": Target(
        st.tuples(st.sampled_from(["table.csv", "table.jsonl", "spec.yaml"]), DAMAGE), _images, _convert_custom
    ),
    "checkpoints": Target(st.tuples(st.integers(0, 1), DAMAGE, st.booleans()), _checkpoints, _read_checkpoint),
    "backbones": Target(
        st.tuples(st.sampled_from(["model.safetensors", "config.json"]), DAMAGE), _backbone, _load_backbone
    ),
    "missing tables": Target(st.tuples(st.integers(0, 1), DAMAGE), _tables, _read_table),
    "run folders": Target(st.tuples(RUN_FILES, DAMAGE), _run, _read_run),
    "JSON of any shape": Target(JSON_VALUES, _nothing, _read_json),
    "samples to predict": Target(
        st.tuples(st.sampled_from([".csv", ".tsv", ".jsonl"]), DAMAGE), _nothing, _read_samples
    ),
    "options": Target(
        st.dictionaries(st.sampled_from(sorted(DEFAULTS)), JSON_VALUES, max_size=4), _nothing, _check_options
    ),
    "texts": Target(st.text(), _tokenizer, _tokenize),
}


def outcome_of(target: Target, prepared: Any, folder: Path, given: Any) -> str:
    """`result`, or the type of our own error; raises whatever else comes."""
    place = folder / "input"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        target.run(prepared, place, given)
    except UserError as error:
        return type(error).__name__
    return "result"
