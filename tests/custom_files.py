"""Custom datasets for tests: written as tables and converted; also the MM-IMDb films as a custom dataset."""

import io
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

import make_arrow
from vilt.datasets.specs import MMIMDB_GENRES

SPLIT_OF_FILM_LIST = {"train": "train", "dev": "val", "test": "test"}


def png(grey: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 16), (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make(dataset: str, raw: Path, target: Path, *options: str) -> int:
    """Exit status of make_arrow.py, run in this process without workers."""
    args = ["--dataset", dataset, "--root", str(raw), "--target", str(target), "--workers", "0"]
    return make_arrow.main([*args, *options])


convert = partial(make, "custom")


def read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def columns_of(folder: Path, split: str = "train") -> dict[str, list]:
    return read_arrow(folder / f"custom_{split}.arrow").to_pydict()


def write_labelled(raw: Path, rows: Mapping[str, int], labels: list[str], **spec: object) -> Path:
    """Writes a single-label dataset with `rows` per split, cycling through `labels`; returns its spec.yaml."""
    (raw / "pictures").mkdir(parents=True)
    records = []
    for split, count in rows.items():
        for number in range(count):
            file = f"pictures/{split}{number}.png"
            (raw / file).write_bytes(png(9 * number))
            label = labels[number % len(labels)]
            records.append({"image": file, "text": f"{label} no. {number}", "label": label, "split": split})
    write_jsonl(raw / "table.jsonl", records)
    (raw / "spec.yaml").write_text(json.dumps({"files": "table.jsonl", **spec}))  # JSON is valid YAML
    return raw / "spec.yaml"


def films_as_custom(raw: Path, folder: Path) -> Path:
    """Writes the MM-IMDb films in `raw` as FOLDER/films.jsonl with a spec; returns the spec's path."""
    folder.mkdir(parents=True)
    records = []
    for key, names in json.loads((raw / "split.json").read_text()).items():
        for name in names:
            film = json.loads((raw / "labels" / f"{name}.json").read_text())
            genres = [genre for genre in film["genres"] if genre in MMIMDB_GENRES]
            record = {"poster": f"images/{name}.jpeg", "plots": film["plot"], "genres": genres}
            records.append({**record, "part": SPLIT_OF_FILM_LIST[key]})
    table = write_jsonl(folder / "films.jsonl", records)
    classes = "\n".join(f"  - {genre}" for genre in MMIMDB_GENRES)
    columns = "{image: poster, text: plots, label: genres, split: part}"
    spec = folder / "spec.yaml"
    spec.write_text(f"name: films\nfiles: {table}\ncolumns: {columns}\nlabels: multi\nclasses:\n{classes}\n")
    return spec
