"""The part `heads`: `none` on cached features at the sizes of published datasets, compared with running the towers."""

import logging
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch

from benchmarks import sides
from clip.backbone import FrozenWeights
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipBackbone
from config import DEFAULTS
from engine.checkpoint import ModelSpec, build_classifier
from runs.check_options import check
from runs.training import Opened, train_from
from vilt.datamodules import MissingModalityData
from vilt.datasets.kinds import InputFormat
from vilt.datasets.specs import DATASETS, SPLITS

ROWS = {
    name: {split: rows[0] for split, rows in DATASETS[name].published_rows.items()}
    for name in ("mmimdb", "food101", "hatememes")
}
EPOCHS, VALIDATIONS, CELLS, SAMPLES = 20, 5, 9, 8
HEADS = {"linear": {}, "linear, ends trained": {"train_ends": True}}


class Stopwatch(pl.Callback):
    """Records the CPU time at the start of each epoch, to time epochs with their validations, logs and checkpoints."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began.append(time.process_time())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began.append(time.process_time())


def write(folder: Path, name: str) -> None:
    """Writes arrow files of the published sizes, without images and with one short text per row."""
    spec, rng = DATASETS[name], np.random.default_rng(0)
    for split in SPLITS:
        n = ROWS[name][split]
        labels = rng.integers(0, 2, (n, spec.n_classes)).tolist() if spec.multilabel else np.arange(n) % spec.n_classes
        columns = {"image": [b""] * n, spec.modalities["text"].column: [["text"]] * n, "label": labels}
        table = pa.table(columns)
        with pa.ipc.new_file(str(folder / spec.file_name(split)), table.schema) as file:
            file.write_table(table)


def seconds_of_epoch(folder: Path, name: str, **head: Any) -> float:
    """CPU seconds of an epoch of run.py's own loop, on random features."""
    places = dict.fromkeys(("data_root", "vit", "log_dir", "missing_table_root"), str(folder))
    options = check(
        {**DEFAULTS, **DATASETS[name].options, **places, **head}
        | {"task": name, "prompt_type": "none", "max_epoch": 2, "val_check_interval": 1 / VALIDATIONS}
        | {"test_after_fit": False, "num_gpus": 0, "precision": "32"}
    )
    small = replace(sides.VIT_B16, vision_layers=1, text_layers=1)  # the towers are not run
    torch.manual_seed(0)
    backbone = FrozenWeights("random", small, ClipBackbone(small).state_dict())
    inputs = InputFormat(224, lambda texts: np.ones((len(texts), 77), dtype=np.int64), "ones")
    data = MissingModalityData(options.data_settings(), options.splits, inputs)

    def cached(*_: Any) -> None:
        for dataset in data.datasets.values():
            widths = {"image": small.vision_width, "text": small.text_width}
            dataset.cached = {name: torch.randn(dataset.n_rows, width) for name, width in widths.items()}

    stopwatch = Stopwatch()
    patches = patch("runs.training.cache_features", cached), patch("engine.families.ClipFamily.start_embeddings")
    with patches[0], patches[1], redirect_stdout(StringIO()):
        train_from(options, "timed", stopwatch, opened=Opened(options, None, backbone, inputs, data, {}))
    return stopwatch.began[-1] - stopwatch.began[-2]


def seconds_of_towers() -> tuple[float, float]:
    """CPU seconds for one sample through ViT-B/16: on average at 70 % both, and complete."""
    classifier = build_classifier(ModelSpec("mmimdb", MethodOptions("none"), sides.VIT_B16)).eval()
    found = []
    # At 70 % both, 13 of 20 samples have an image and 13 a text: about 5 of 8.
    for types in ([0, 0, 1, 1, 1, 2, 2, 2], [0] * SAMPLES):
        batch = sides.Data(types, [77] * SAMPLES, torch.device("cpu"))
        began = time.process_time()
        with torch.no_grad():
            classifier(batch.present())
        found.append((time.process_time() - began) / SAMPLES)
    return found[0], found[1]


def table() -> Iterator[str]:
    """Yields the lines of the Markdown table."""
    logging.disable(logging.INFO)
    drawn, complete = seconds_of_towers()
    yield f"One sample through both towers, float32: {drawn:.3f} s at 70 % both, {complete:.3f} s complete.\n"
    names = "dataset, head", "an epoch on cached features", "through the towers", "ratio", "required"
    yield from sides.header(*names, f"{EPOCHS} epochs", f"{CELLS} cells", "features, once")
    for name, rows in ROWS.items():
        with TemporaryDirectory() as folder:
            write(Path(folder), name)
            for title, head in HEADS.items():
                took = seconds_of_epoch(Path(folder), name, **head)
                towers = drawn * (rows["train"] + VALIDATIONS * rows["val"])
                ratio, epochs = f"{towers / 60:.0f} min", f"{EPOCHS * took / 60:.1f} min"
                cells, once = CELLS * EPOCHS * took / 60, complete * sum(rows.values()) / 60
                figures = (f"{took:.1f} s", ratio, f"{towers / took:.0f}", "≥ 100", epochs)
                yield sides.row(f"{DATASETS[name].title}, {title}", *figures, f"{cells:.0f} min", f"{once:.0f} min")
    logging.disable(logging.NOTSET)
