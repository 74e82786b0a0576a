"""Loading of synthetic films with realistic posters and plots: reading, decoding, transforming, tokenising."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from benchmarks.baseline import load_image
from clip.tokenizer import load_tokenizer
from demo.backbone import train_tokenizer
from vilt.batches import collate
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import kinds_of
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, draw_missing_table

FILMS, BATCH, POSTER, WORDS, SIZE = 192, 32, (300, 440), 110, 224


class Loading:
    """A training split of synthetic films in `folder`, one plot each, 70 % without image, and two ways to load it."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(0)
        words = ["".join(draw.choice(list("abcdefghijklmnop"), draw.integers(2, 9))) for _ in range(2000)]
        plots = [" ".join(draw.choice(words, WORDS)) for _ in range(FILMS)]
        images = [_poster(draw) for _ in range(FILMS)]
        table = pa.table({"image": images, "plots": [[plot] for plot in plots], "label": [[1] + [0] * 22] * FILMS})
        with pa.ipc.new_file(str(folder / DATASETS["mmimdb"].file_name("train")), table.schema) as writer:
            writer.write_table(table)
        train_tokenizer(plots).save_pretrained(folder)
        self.tokenizer = load_tokenizer(str(folder))
        self.dataset = ArrowDataset(DATASETS["mmimdb"], folder, "train", SIZE)
        self.kinds = kinds_of(self.dataset.spec)
        self.dataset.tokenize(self.tokenizer, self.tokenizer.fingerprint)
        pattern = MissingPattern("image", 0.7, 0.5, 0)
        self.dataset.missing_table = draw_missing_table("mmimdb", "train", pattern, FILMS)

    def ours(self) -> None:
        """Loads an epoch in batches."""
        for start in range(0, FILMS, BATCH):
            collate(self.kinds, self.dataset.__getitems__([(0, index) for index in range(start, start + BATCH)]))

    def theirs(self) -> None:
        """Loads an epoch in batches as published: decodes and tokenises all, then sets missing images to ones."""
        for start in range(0, FILMS, BATCH):
            torch.stack([self._load(row) for row in range(start, start + BATCH)])

    def _load(self, row: int) -> Tensor:
        image = load_image(self.dataset.table["image"][row].as_py(), SIZE)
        torch.from_numpy(self.tokenizer(self.dataset.table["plots"][row].as_py())[0])
        return torch.ones_like(image) if self.dataset.missing_table[row] == 2 else image


def _poster(draw: np.random.Generator) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (55, 38, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize(POSTER, Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()
