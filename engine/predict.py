"""Predictions of a trained model for any images and texts.

from engine.predict import load_model

model = load_model("result/rep_seed0/version_0/best.ckpt")
for prediction in model.predict(images=["poster.jpg", None], texts=["Two friends rob a train.", "A ghost story."]):
    print(prediction.missing, prediction.labels, prediction.probabilities)
"""

import csv
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import move_data_to_device
from torch.utils.data import DataLoader, Dataset

from clip.modules.classifier import MissingModalityClassifier
from common.errors import ConfigError, DataError, reason_of
from common.files import atomic_path
from common.messages import first_line, listed, printable
from common.text import natural_key, per_cent, terminal_table
from engine.checkpoint import Checkpoint, read_checkpoint
from engine.families import BackboneChoice
from engine.metrics import are_predicted
from engine.open_model import COMPUTE_TYPES, open_model
from engine.recordings import in_samples, named
from engine.training import model_input
from vilt.datamodules import Batch, collate
from vilt.datasets.arrow_dataset import Sample
from vilt.datasets.kinds import KINDS, InputFormat, kinds_of
from vilt.datasets.specs import DatasetSpec
from vilt.utils.array_files import SUFFIXES, samples_of_arrays
from vilt.utils.names import find_file, normal
from vilt.utils.tables import DELIMITERS, table_rows
from vilt.utils.write_custom import missing as is_missing

log = logging.getLogger("rep")

SHOWN = 5
"""Predictions that the terminal shows."""

ImageInput = str | Path | Image.Image | None


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample."""

    missing: str
    """`complete`, or the modalities that are missing, as in `text missing`."""
    labels: tuple[str, ...]
    """The most probable class, or all those above `Predictor.threshold` where a sample can have several."""
    probabilities: dict[str, float]
    """Of every class, by its name."""
    value: float | None = None
    """Of a model of numbers, which has no classes."""


class Item(NamedTuple):
    """One sample."""

    id: str
    inputs: dict[str, Any]
    """By modality, of those that it has, what `Kind.read_given` takes."""
    place: str
    """How messages call it."""
    times: tuple[float, float] | None = None
    """Of a sample of a recording: from and to, in seconds."""


class Predictor:
    """A trained model that predicts; made by `load_model`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        classifier: MissingModalityClassifier,
        inputs: InputFormat,
        device: torch.device,
        precision: str,
    ) -> None:
        self.dataset = dataset = checkpoint.spec.dataset
        names = checkpoint.class_names or dataset.class_names
        self.class_names = names or tuple(f"class {number}" for number in range(dataset.n_classes))
        self.multilabel = dataset.multilabel
        self.offset = checkpoint.offset or 0.0
        self.inputs = inputs
        self.device = device
        self.dtype = COMPUTE_TYPES[precision]
        classifier.compute(self.dtype)
        self._classifier = classifier.to(device).eval()

    @property
    def threshold(self) -> float:
        """Above which probability a class is predicted, where a sample can have several: the one that validation chose
        (`engine/decision.py`), else 0.5."""
        return 1 / (1 + math.exp(self.offset))

    def predict(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """A prediction per sample, by a model of images and texts.

        Args:
            images: paths or Pillow images; None, NaN or a blank for a sample without one. Left out: no sample has one.
            texts: likewise.

        Raises:
            DataError: the two are not of one length, a sample has neither, or an image cannot be read.
        """
        for name, values in {"images": images, "texts": texts}.items():
            if isinstance(values, str | Path | Image.Image):
                raise DataError(f"{name}: expected a list, found {type(values).__name__}; of one sample a list of one")
        count = len(images if images is not None else texts if texts is not None else [])
        images = [None] * count if images is None else images
        texts = [None] * count if texts is None else texts
        if len(images) != len(texts):
            raise DataError(f"expected as many images as texts, found {len(images)} and {len(texts)}")
        pairs = zip(images, texts, strict=True)
        items = [
            Item(str(n), {name: value for name, value in given.items() if not is_missing(value)}, f"sample {n}")
            for n, given in enumerate({"image": image, "text": text} for image, text in pairs)
        ]
        return list(self.predict_items(items, batch_size=batch_size))

    def predict_recording(
        self, signals: Mapping[str, np.ndarray | str | Path | None], *, batch_size: int = 32
    ) -> list[tuple[float, float, Prediction]]:
        """A prediction for each sample of a recording of sensors, with its times in seconds.

        Args:
            signals: by modality, (values, channels) at its rate, or a .npy file with them; without those missing.

        Raises:
            DataError: a signal cannot be read, is shorter than a sample, or of another number of channels.
        """
        items = in_samples([Item("", named(signals, self.dataset), "the recording")], self.dataset)
        found = self.predict_items(items, batch_size=batch_size)
        return [(*(item.times or (0.0, 0.0)), one) for item, one in zip(items, found, strict=True)]

    def predict_items(self, items: Sequence[Item], *, batch_size: int, workers: int = 0) -> Iterator[Prediction]:
        """A prediction per item, in order; inputs are read by `workers` processes as they are needed.

        Raises:
            DataError: an item has no input, or one that cannot be read; names it.
        """
        loader = DataLoader(
            _Items(items, self.dataset, self.inputs),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=partial(collate, kinds_of(self.dataset), once=True),
        )
        for batch in loader:
            yield from self._predictions(batch)

    @torch.inference_mode()
    def _predictions(self, batch: Batch) -> list[Prediction]:
        moved = move_data_to_device(batch, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits_BC = self._classifier(model_input(moved)).float().cpu()
        missing_of = [self.dataset.type_names[code] for code in model_input(batch).missing_type_B.tolist()]
        if self.dataset.label_range is not None:
            return [
                Prediction(missing, (), {}, x) for missing, x in zip(missing_of, logits_BC[:, 0].tolist(), strict=True)
            ]
        probability_BC = logits_BC.sigmoid() if self.multilabel else logits_BC.softmax(dim=-1)
        above_BC = are_predicted(logits_BC, self.offset).tolist()
        predictions = []
        for missing, probability_C, above_C in zip(missing_of, probability_BC.tolist(), above_BC, strict=True):
            named = dict(zip(self.class_names, probability_C, strict=True))
            labels = [name for name, is_above in zip(self.class_names, above_C, strict=True) if is_above]
            if not self.multilabel:
                labels = [self.class_names[int(np.argmax(probability_C))]]
            predictions.append(Prediction(missing, tuple(labels), named))
        return predictions


class _Items(Dataset[Sample]):
    """The samples behind items; what they lack is missing."""

    def __init__(self, items: Sequence[Item], dataset: DatasetSpec, inputs: InputFormat) -> None:
        self._items, self._dataset, self._inputs = items, dataset, inputs
        for item in items:
            if not item.inputs:
                names = " or ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in dataset.modalities)
                raise DataError(f"{item.place}: expected {names}, found neither")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Sample:
        read, item = {}, self._items[number]
        for name, value in item.inputs.items():
            modality = self._dataset.modalities[name]
            try:
                read[name] = KINDS[modality.kind].read_given(value, modality, self._inputs)
            except Exception as error:  # Pillow's decoders raise whatever the damage leads to
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                file = f" {value}" if isinstance(value, str | Path) else ""
                raise DataError(f"{item.place}: {name}{file}: cannot be read: {reason}") from error
        return Sample(read, torch.tensor(0), number)


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
        ConfigError: there is no such precision or device.
        CheckpointError, BackboneError: checkpoint, frozen weights or tokenizer are not found, not readable, or do not
            fit each other.
    """
    if str(precision) not in COMPUTE_TYPES:
        raise ConfigError(f"precision: expected 32, 16 or bf16, found {precision!r}")
    checkpoint = read_checkpoint(Path(path))
    choice = BackboneChoice(vit, vit_activation, tokenizer, trust_backbone, published_seed)
    classifier, found = open_model(checkpoint, choice, published_vit=vit or "ViT-B/16")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        raise ConfigError(f"device: expected one that is here, as cpu, found {name!r}: {first_line(error)}") from error
    return Predictor(checkpoint, classifier, found, where, str(precision))


def read_items(source: Path, dataset: DatasetSpec) -> list[Item]:
    """The samples in a CSV, TSV or JSONL with a column for each modality and maybe `id`, or in a folder.

    Of arrays a `.npz` or a pickle holds (N, …) by modality, and maybe `id`; a modality that it lacks is missing.
    Texts stand in the table, for other inputs the path of a file, relative to the table. In a folder, files of one name
    are one sample: a text for `NAME.jpg` is in `NAME.txt` beside it. Files are taken in the order of their names,
    folders within it too. A recording of sensors is as many samples as it holds.

    Raises:
        DataError: it is not there or holds nothing, or a row is not as expected; names file and row.
    """
    if source.suffix.lower() in (".npz", *SUFFIXES):
        items = [
            Item(name, inputs, place) for name, inputs, place in samples_of_arrays(source, list(dataset.modalities))
        ]
    else:
        items = _items_of_folder(source, dataset) if source.is_dir() else _items_of_table(source, dataset)
    if not items:
        raise DataError(f"input={source}: expected at least one sample, found none")
    return in_samples(items, dataset)


def _items_of_table(source: Path, dataset: DatasetSpec) -> list[Item]:
    if source.suffix.lower() not in (*DELIMITERS, ".jsonl"):
        there = "another file" if source.exists() else "nothing there"
        raise DataError(f"input={source}: expected a folder of images, or a file .csv, .tsv or .jsonl, found {there}")
    items, kinds = [], kinds_of(dataset)
    for row, values in table_rows(source, [*kinds, "id"], [], [name for name, kind in kinds.items() if kind.in_file]):
        place = f"{source}, row {row}"
        if not kinds.keys() & values.keys():
            names = f"{', '.join(map(repr, kinds))} or {'both' if len(kinds) == 2 else 'some of them'}"
            raise DataError(f"{place}: expected the columns {names}, found {listed(list(values))}")
        cells = {name: _cell(values.get(name), name, place) for name in kinds}
        inputs: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
        for name in inputs.keys() & {name for name, kind in kinds.items() if kind.in_file}:
            inputs[name] = _file(source.parent, inputs[name], place)
        items.append(Item(str(row if values.get("id") is None else values["id"]), inputs, place))
    return items


def _cell(value: object, name: str, place: str) -> str | None:
    """A text; None where it is absent or blank."""
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: {name}: expected a text, found {json.dumps(value)[:80]}")
    return value


def _file(folder: Path, name: str, place: str) -> Path:
    try:
        return find_file(folder, name)
    except OSError as error:
        raise DataError(f"{place}: {name}: cannot be read: {reason_of(error)}") from error


def _items_of_folder(source: Path, dataset: DatasetSpec) -> list[Item]:
    kinds = kinds_of(dataset)
    name_of = {suffix: name for name, kind in kinds.items() for suffix in kind.suffixes}
    if len(set(kinds.values())) < len(kinds):
        raise DataError(f"input={source}: expected a table, as several of {', '.join(kinds)} are files of one kind")
    inputs_of: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    for path in sorted((path for path in source.rglob("*") if path.is_file()), key=natural_key):
        # Hidden files are none of the user's: macOS keeps attributes of NAME.jpg in ._NAME.jpg.
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if hidden:
            continue
        if (name := name_of.get(path.suffix.lower())) is None:
            others.append(path.relative_to(source).as_posix())
            continue
        stem = normal(str(path.relative_to(source).with_suffix("")))
        if (other := inputs_of.setdefault(stem, {}).setdefault(name, path)) is not path:
            raise DataError(f"{path}: expected one file of this name, found {other.name} too")
    if others:
        log.warning(
            "input=%s: left out, as files of other kinds than %s: %s", source, " ".join(name_of), listed(others)
        )
    items = []
    for stem, inputs in sorted(inputs_of.items(), key=lambda item: natural_key(item[0])):
        for name, path in list(inputs.items()):
            if not kinds[name].in_file:
                try:
                    inputs[name] = path.read_text("utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}: not readable as text in UTF-8: {error}") from error
        given = {name: value for name, value in inputs.items() if str(value).strip()}
        items.append(Item(stem, given, str(source / stem)))
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
            times = ("start_s", "end_s") if any(item.times for item in items) else ()
            if path.suffix == ".csv":
                columns = ["labels", *(f"p({name})" for name in predictor.class_names)]
                numbers = predictor.dataset.label_range is not None
                writer.writerow(["id", *times, "missing", *(["value"] if numbers else columns)])
            for item, prediction in zip(items, predictions, strict=True):
                if path.suffix == ".csv":
                    at = item.times or [""] * len(times)
                    if prediction.value is not None:
                        found: list[Any] = [prediction.value]
                    else:
                        found = ["|".join(prediction.labels), *prediction.probabilities.values()]
                    writer.writerow([item.id, *at, prediction.missing, *found])
                else:
                    of_item = dict(zip(times, item.times or (), strict=False))
                    file.write(json.dumps({"id": item.id, **of_item, **_plain(prediction)}, ensure_ascii=False) + "\n")
                if len(first) < SHOWN:
                    first.append(prediction)
    except OSError as error:
        raise DataError(f"output={path}: cannot be written: {reason_of(error)}") from error
    return first


def _plain(prediction: Prediction) -> dict[str, Any]:
    """What a line of JSONL has of it."""
    unused = ("value",) if prediction.value is None else ("labels", "probabilities")
    return {name: value for name, value in asdict(prediction).items() if name not in unused}


def describe_predictions(items: Sequence[Item], first: Sequence[Prediction], threshold: float) -> str:
    """The first predictions, as a table for the terminal."""
    rows = []
    for item, prediction in zip(items, first, strict=False):
        if prediction.value is not None:
            said = f"{prediction.value:.3f}"
        else:
            shown = [f"{name} {per_cent(round(prediction.probabilities[name], 3))}" for name in prediction.labels]
            said = printable(", ".join(shown)) or f"none above {per_cent(round(threshold, 3))}"
        rows.append([printable(item.id), prediction.missing, said])
    return terminal_table(("id", "missing", "prediction"), rows, "<<<")
