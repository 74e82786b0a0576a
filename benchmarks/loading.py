"""Loading samples: reading, decoding, transforming, token ids."""

import io
from collections.abc import Iterator
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
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, draw_missing_table

FILMS, POSTER, WORDS = 192, (300, 440), 110
PATTERN = MissingPattern("image", 0.7, 0.5, 0)


class Loading:
    """Made-up films with posters and plots of the usual size, and both ways to load them."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(0)
        words = ["".join(draw.choice(list("abcdefghijklmnop"), draw.integers(2, 9))) for _ in range(2000)]
        plots = [" ".join(draw.choice(words, WORDS)) for _ in range(FILMS)]
        spec = DATASETS["mmimdb"]
        table = pa.table(
            {
                "image": [_poster(draw) for _ in range(FILMS)],
                "plots": [[plot] for plot in plots],
                "label": [[1] + [0] * 22] * FILMS,
                "image_id": [str(film) for film in range(FILMS)],
            }
        )
        with pa.ipc.new_file(str(folder / spec.file_name("train")), table.schema) as writer:
            writer.write_table(table)
        train_tokenizer(plots).save_pretrained(folder)
        self.tokenizer: ClipTokenizer = load_tokenizer(str(folder))
        self.dataset = ArrowDataset(spec, folder, "train", 224)
        self.dataset.tokenize(self.tokenizer, self.tokenizer.fingerprint)
        self.dataset.missing_table = draw_missing_table("mmimdb", "train", PATTERN, FILMS)

    def ours(self) -> None:
        """An epoch in batches of 32."""
        for start in range(0, FILMS, 32):
            collate(self.dataset.__getitems__([(0, index) for index in range(start, start + 32)]))

    def theirs(self) -> None:
        """An epoch in batches of 32: everything is decoded and tokenised, then a missing image becomes ones."""
        for start in range(0, FILMS, 32):
            images: list[Tensor] = []
            tokens: list[Tensor] = []
            for row in range(start, start + 32):
                image = load_image(self.dataset.table["image"][row].as_py(), 224)
                text = self.dataset.table["plots"][row].as_py()[0]
                missing = int(self.dataset.missing_table[row])
                images.append(torch.ones_like(image) if missing == 2 else image)
                tokens.append(torch.from_numpy(self.tokenizer(["" if missing == 1 else text])[0]))
            torch.stack(images), torch.stack(tokens)


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
