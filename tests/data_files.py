"""Small arrow files and a fake tokenizer for tests of the code that reads them."""

import io
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from vilt.batches import Batch
from vilt.datamodules import DataSettings
from vilt.datasets.specs import CLIP, DATASETS, SPLITS
from vilt.missing_tables import MissingPattern


def png(seed: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, table: pa.Table, rows_per_batch: int | None = None) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, rows_per_batch)


def file_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def genres(*ones: int) -> list[int]:
    return [int(genre in ones) for genre in range(23)]


def films(plots: Sequence[Sequence[str]]) -> pa.Table:
    rows = range(len(plots))
    return pa.table(
        {
            "image": [png(row) for row in rows],
            "plots": [list(texts) for texts in plots],
            "label": [genres(row, row + 1) for row in rows],
            "image_id": [f"film{row}" for row in rows],
        }
    )


def memes(rows: int = 3, images: Mapping[int, bytes] | None = None, text: str = "meme {}") -> pa.Table:
    return pa.table(
        {
            "image": [(images or {}).get(row, png(row)) for row in range(rows)],
            "text": [[text.format(row)] for row in range(rows)],
            "label": [row % 2 for row in range(rows)],
        }
    )


def as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def data_settings(dataset: str, folder: Path, pattern: MissingPattern, **changes: Any) -> DataSettings:
    """Settings for batches of two, with one pattern for all splits and nothing simulated or cached."""
    settings: dict[str, Any] = {"dataset": dataset, "data_root": folder, "missing_table_root": folder / "tables"}
    settings |= {"patterns": dict.fromkeys(SPLITS, pattern), "simulate_missing": False, "image_cache": False}
    return DataSettings(**{**settings, "per_gpu_batchsize": 2, "num_workers": 0, "seed": 0, "order_seed": 0, **changes})


class Tokenizer:
    """Records its calls; encodes a text as its length and first characters, or as windows of five characters each."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str], windows: int = 1) -> np.ndarray:
        if windows > 1:
            parts = [self([text[5 * window :][:5] for text in texts]) for window in range(windows)]
            return np.stack(parts, axis=1)
        self.calls.append(list(texts))
        ids = np.zeros((len(texts), 77), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : min(77, len(text) + 1)] = [len(text), *map(ord, text)][:77]
        return ids


CLIP_DATASETS = {name: spec for name, spec in DATASETS.items() if spec.family == CLIP}
TYPE_NAMES = DATASETS["mmimdb"].type_names
LOGIT_COLUMNS = [f"logits_{name.replace(' ', '_')}" for name in TYPE_NAMES]


def types_of(batch: Batch) -> list[int]:
    """Missing types of the samples of a batch of images and texts."""
    return ((~batch.present_BM).long() @ torch.tensor([2, 1])).tolist()


def assert_equal(one: Any, other: Any) -> None:
    """Samples or batches agree in all values, dtypes and shapes."""
    assert len(one) == len(other)
    for key in one if isinstance(one, dict) else range(len(one)):
        left, right = one[key], other[key]
        if isinstance(left, dict):
            assert_equal(left, right)
        elif isinstance(left, torch.Tensor):
            assert isinstance(right, torch.Tensor)
            assert left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        else:
            assert left == right


FORK = multiprocessing.get_context("fork")


def at_once(count: int, act: Callable[[], None]) -> None:
    """Runs `act` in `count` processes that start together; none may fail."""
    barrier = FORK.Barrier(count)

    def run() -> None:
        barrier.wait(60)
        act()

    processes = [FORK.Process(target=run, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count
