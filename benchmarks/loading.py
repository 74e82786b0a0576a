"""Made-up films with posters and plots of the usual size, and loading them: reading, decoding, transforming, tokens."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from benchmarks.baseline import load_image
from clip.tokenizer import ClipTokenizer, load_tokenizer
from demo.backbone import train_tokenizer
from vilt.datamodules import collate
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS, Split
from vilt.missing_tables import IMAGE_MISSING, TEXT_MISSING, MissingPattern, draw_missing_table

FILMS, POSTER, WORDS = 192, (300, 440), 110
PATTERN = MissingPattern("image", 0.7, 0.5, 0)


class Loading:
    """A training split of made-up films, and both ways to load it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = write_films(folder, "train", FILMS)
        self.dataset = ArrowDataset(DATASETS["mmimdb"], folder, "train", 224)
        self.dataset.tokenize(self.tokenizer, self.tokenizer.fingerprint)
        self.dataset.missing_table = draw_missing_table("mmimdb", "train", PATTERN, FILMS)

    def ours(self) -> None:
        """An epoch in batches of 32."""
        for start in range(0, FILMS, 32):
            collate(self.dataset.__getitems__([(0, index) for index in range(start, start + 32)]))

    def theirs(self) -> None:
        """An epoch in batches of 32."""
        for start in range(0, FILMS, 32):
            load_whole(self.dataset, self.tokenizer, range(start, start + 32), self.dataset.missing_table)


def load_whole(
    dataset: ArrowDataset, tokenizer: ClipTokenizer, rows: Sequence[int], missing_table: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the published code loads it: everything is decoded and tokenised, then a missing image becomes ones.

    Returns:
        Normalised images (B, 3, R, R), token ids (B, 77) and missing types (B,), the input of the baseline.
    """
    images: list[Tensor] = []
    tokens: list[Tensor] = []
    for row in rows:
        image = load_image(dataset.table["image"][row].as_py(), dataset.image_size)
        text = dataset.table["plots"][row].as_py()[0]
        missing = int(missing_table[row])
        images.append(torch.ones_like(image) if missing == IMAGE_MISSING else image)
        tokens.append(torch.from_numpy(tokenizer(["" if missing == TEXT_MISSING else text])[0]))
    return torch.stack(images), torch.stack(tokens), torch.from_numpy(missing_table[list(rows)].astype(np.int64))


def write_films(folder: Path, split: Split, films: int) -> ClipTokenizer:
    """Writes the arrow file of a split of MM-IMDb's, one plot a film, and a tokenizer for the plots; returns that."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnop"), draw.integers(2, 9))) for _ in range(2000)]
    plots = [" ".join(draw.choice(words, WORDS)) for _ in range(films)]
    table = pa.table(
        {
            "image": [_poster(draw) for _ in range(films)],
            "plots": [[plot] for plot in plots],
            "label": [[1] + [0] * 22] * films,
            "image_id": [str(film) for film in range(films)],
        }
    )
    with pa.ipc.new_file(str(folder / DATASETS["mmimdb"].file_name(split)), table.schema) as writer:
        writer.write_table(table)
    train_tokenizer(plots).save_pretrained(folder)
    return load_tokenizer(str(folder))


@contextmanager
def made_up_films() -> Iterator[Loading]:
    """In a temporary folder."""
    with TemporaryDirectory() as folder:
        yield Loading(Path(folder))


def _poster(draw: np.random.Generator) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (22, 15, 3), dtype=np.uint8))
    noise = draw.integers(-12, 13, (POSTER[1], POSTER[0], 3))
    pixels = np.asarray(coarse.resize(POSTER, Image.Resampling.BICUBIC)).astype(int) + noise
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()
