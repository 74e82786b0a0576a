"""Predictions of a trained model for any images and texts.

from clip.predict import load_model

model = load_model("result/rep_seed0/version_0/best.ckpt")
for prediction in model.predict(images=["poster.jpg", None], texts=["Two friends rob a train.", "A ghost story."]):
    print(prediction.missing, prediction.labels, prediction.probabilities)
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip.checkpoint import Checkpoint, read_checkpoint
from clip.modules.classifier import MissingModalityClassifier
from clip.open_model import COMPUTE_TYPES, BackboneChoice, open_model
from clip.tokenizer import ClipTokenizer
from clip.training import model_input
from common.errors import ConfigError, DataError, reason_of
from common.files import atomic_path
from common.messages import listed, printable
from common.text import natural_key, per_cent, terminal_table
from vilt.datamodules import Batch, collate_for_evaluation
from vilt.datasets.arrow_dataset import Sample
from vilt.datasets.specs import DATASETS, custom_spec
from vilt.missing_tables import COMPLETE, IMAGE_MISSING, TEXT_MISSING, TYPE_NAMES
from vilt.transforms import decode_image
from vilt.utils.raw_data import MAX_FILE_BYTES
from vilt.utils.tables import DELIMITERS, table_rows

THRESHOLD = 0.5
"""Of the probability of a class, where a sample can have several."""
SHOWN = 5
"""Predictions that the terminal shows."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

ImageInput = str | Path | Image.Image | None


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample."""

    missing: str
    """`complete`, `text missing` or `image missing`."""
    labels: tuple[str, ...]
    """The most probable class, or all those above 0.5 where a sample can have several."""
    probabilities: dict[str, float]
    """Of every class, by its name."""


class Item(NamedTuple):
    """One input. `place` is how messages call it."""

    id: str
    image: ImageInput
    text: str | None
    place: str


class Predictor:
    """A trained model that predicts; made by `load_model`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        classifier: MissingModalityClassifier,
        tokenizer: ClipTokenizer,
        device: torch.device,
        precision: str,
    ) -> None:
        custom = checkpoint.spec.custom
        dataset = DATASETS[checkpoint.spec.task] if custom is None else custom_spec(custom)
        names = checkpoint.class_names or dataset.class_names
        self.class_names = names or tuple(f"class {number}" for number in range(dataset.n_classes))
        self.multilabel = dataset.multilabel
        self.image_size = checkpoint.spec.architecture.image_size
        self.device = device
        self.dtype = COMPUTE_TYPES[precision]
        self._tokenizer = tokenizer
        classifier.compute(self.dtype)
        self._classifier = classifier.to(device).eval()

    def predict(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """A prediction per sample.

        Args:
            images: paths or Pillow images; None for a sample without one. Left out: no sample has one.
            texts: likewise.

        Raises:
            DataError: the two are not of one length, a sample has neither, or an image cannot be read.
        """
        count = len(images if images is not None else texts if texts is not None else [])
        images = [None] * count if images is None else images
        texts = [None] * count if texts is None else texts
        if len(images) != len(texts):
            raise DataError(f"expected as many images as texts, found {len(images)} and {len(texts)}")
        pairs = zip(images, texts, strict=True)
        items = [Item(str(n), image, text, f"sample {n}") for n, (image, text) in enumerate(pairs)]
        return list(self.predict_items(items, batch_size=batch_size))

    def predict_items(self, items: Sequence[Item], *, batch_size: int, workers: int = 0) -> Iterator[Prediction]:
        """A prediction per item, in order; images are read by `workers` processes as they are needed.

        Raises:
            DataError: an item has neither image nor text, or its image cannot be read; names it.
        """
        loader = DataLoader(
            _Items(items, self._tokenizer, self.image_size),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate_for_evaluation,
        )
        for batch in loader:
            yield from self._predictions(batch)

    @torch.inference_mode()
    def _predictions(self, batch: Batch) -> list[Prediction]:
        moved = move_data_to_device(batch, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits_BC = self._classifier(model_input(moved)).float().cpu()
        probability_BC = logits_BC.sigmoid() if self.multilabel else logits_BC.softmax(dim=-1)
        predictions = []
        for missing_type, probability_C in zip(batch.missing_type_B.tolist(), probability_BC.tolist(), strict=True):
            named = dict(zip(self.class_names, probability_C, strict=True))
            labels = [name for name, value in named.items() if value > THRESHOLD]
            if not self.multilabel:
                labels = [self.class_names[int(np.argmax(probability_C))]]
            predictions.append(Prediction(TYPE_NAMES[missing_type], tuple(labels), named))
        return predictions


class _Items(Dataset[Sample]):
    """The samples behind items; what they lack is missing."""

    def __init__(self, items: Sequence[Item], tokenizer: ClipTokenizer, image_size: int) -> None:
        self._items = items
        self._image_size = image_size
        for item in items:
            if item.image is None and item.text is None:
                raise DataError(f"{item.place}: expected an image or a text, found neither")
        self._tokens = tokenizer([item.text or "" for item in items]) if items else np.zeros((0, 0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Sample:
        item = self._items[number]
        image = None if item.image is None else self._image(item.image, item.place)
        tokens = None if item.text is None else torch.from_numpy(self._tokens[number])
        missing_type = IMAGE_MISSING if image is None else TEXT_MISSING if tokens is None else COMPLETE
        return Sample(image, tokens, torch.tensor(0), missing_type, number)

    def _image(self, image: str | Path | Image.Image, place: str) -> Tensor:
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")  # without loss
            return decode_image(buffer.getvalue(), self._image_size)
        try:
            path = Path(image)
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise ValueError(f"{size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
            return decode_image(path.read_bytes(), self._image_size)
        except Exception as error:  # Pillow's decoders raise whatever the damage leads to
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{place}: image {image}: cannot be read: {reason}") from error


def load_model(
    path: str | Path,
    *,
    vit: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: str | int = "32",
    trust_backbone: bool = False,
    vit_activation: str | None = None,
    published_seed: int = 0,
) -> Predictor:
    """The trained model of a checkpoint, ready to predict.

    Args:
        path: a checkpoint, ours or a published one.
        vit, tokenizer, trust_backbone, vit_activation, published_seed: as the options of `run.py`; None: what the
            checkpoint says.
        device: as torch names it; None: the first GPU, else the CPU.
        precision: `32`, `16` or `bf16`, also in Lightning's spelling.

    Raises:
        ConfigError: there is no such precision.
        CheckpointError, BackboneError: checkpoint, frozen weights or tokenizer are not found, not readable, or do not
            fit each other.
    """
    if str(precision) not in COMPUTE_TYPES:
        raise ConfigError(f"precision: expected 32, 16 or bf16, found {precision!r}")
    checkpoint = read_checkpoint(Path(path))
    choice = BackboneChoice(vit, vit_activation, tokenizer, trust_backbone, published_seed)
    classifier, found = open_model(checkpoint, choice, published_vit=vit or "ViT-B/16")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Predictor(checkpoint, classifier, found, where, str(precision))


def read_items(source: Path) -> list[Item]:
    """The inputs in a CSV, TSV or JSONL with columns `image`, `text` and maybe `id`, or in a folder of images.

    Image paths are relative to the table. In a folder, a text for `NAME.jpg` is in `NAME.txt` beside it; texts without
    an image count too. Files are taken in the order of their names, folders within it too.

    Raises:
        DataError: it is not there or holds nothing, or a row is not as expected; names file and row.
    """
    items = _items_of_folder(source) if source.is_dir() else _items_of_table(source)
    if not items:
        raise DataError(f"input={source}: expected at least one sample, found none")
    return items


def _items_of_table(source: Path) -> list[Item]:
    if source.suffix.lower() not in (*DELIMITERS, ".jsonl"):
        raise DataError(f"input={source}: expected a folder of images, or a file .csv, .tsv or .jsonl")
    items = []
    for row, values in table_rows(source, needed=[]):
        place = f"{source}, row {row}"
        if not {"image", "text"} & values.keys():
            raise DataError(f"{place}: expected the columns 'image', 'text' or both, found {listed(list(values))}")
        image, text = (_cell(values.get(name), name, place) for name in ("image", "text"))
        path = None if image is None else source.parent / image
        items.append(Item(str(row if values.get("id") is None else values["id"]), path, text, place))
    return items


def _cell(value: object, name: str, place: str) -> str | None:
    """A text; None where it is absent or blank."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {name}: expected a text, found {json.dumps(value)[:80]}")
    return value if value is not None and value.strip() else None


def _items_of_folder(source: Path) -> list[Item]:
    images: dict[Path, Path] = {}
    texts: dict[Path, Path] = {}
    for path in sorted((path for path in source.rglob("*") if path.is_file()), key=natural_key):
        of_kind = images if path.suffix.lower() in IMAGE_SUFFIXES else texts if path.suffix.lower() == ".txt" else None
        if of_kind is not None and (other := of_kind.setdefault(path.with_suffix(""), path)) is not path:
            raise DataError(f"{path}: expected one file of this name, found {other.name} too")
    items = []
    for stem in sorted({*images, *texts}, key=natural_key):
        text = None
        if stem in texts:
            try:
                text = texts[stem].read_text("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{texts[stem]}: not readable as text in UTF-8: {error}") from error
        items.append(Item(str(stem.relative_to(source)), images.get(stem), text or None, str(stem)))
    return items


def write_predictions(
    path: Path, items: Sequence[Item], predictions: Iterable[Prediction], predictor: Predictor
) -> list[Prediction]:
    """Writes a line per sample as CSV or JSONL, completely or not at all; returns the first few.

    In a CSV several labels are separated by `|`, and the probability of class X is in the column `p(X)`.

    Raises:
        DataError: as `predict_items`, or the file cannot be written.
    """
    first: list[Prediction] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if path.suffix == ".csv":
                writer.writerow(["id", "missing", "labels", *(f"p({name})" for name in predictor.class_names)])
            for item, prediction in zip(items, predictions, strict=True):
                if path.suffix == ".csv":
                    probabilities = prediction.probabilities.values()
                    writer.writerow([item.id, prediction.missing, "|".join(prediction.labels), *probabilities])
                else:
                    file.write(json.dumps({"id": item.id, **asdict(prediction)}, ensure_ascii=False) + "\n")
                if len(first) < SHOWN:
                    first.append(prediction)
    except OSError as error:
        raise DataError(f"output={path}: cannot be written: {reason_of(error)}") from error
    return first


def describe_predictions(items: Sequence[Item], first: Sequence[Prediction]) -> str:
    """The first predictions, as a table for the terminal."""
    rows = []
    for item, prediction in zip(items, first, strict=False):
        shown = [f"{name} {per_cent(round(prediction.probabilities[name], 3))}" for name in prediction.labels]
        rows.append([printable(item.id), prediction.missing, printable(", ".join(shown)) or "none above 50 %"])
    return terminal_table(("id", "missing", "prediction"), rows, "<<<")
