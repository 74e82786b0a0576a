"""Predicting with a trained model, for any images and texts.

from engine.predict import load_model

model = load_model("result/rep_seed0/version_0/best.ckpt")
for prediction in model.predict(images=["poster.jpg", None], texts=["Two friends rob a train.", "A ghost story."]):
    print(prediction.missing, prediction.labels, prediction.probabilities)
"""

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import move_data_to_device
from safetensors.numpy import save
from torch.utils.data import DataLoader, Dataset

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from common.errors import ConfigError, DataError
from common.files import atomic_path, writing
from common.messages import first_line, printable
from common.text import terminal_table
from engine.checkpoint import Checkpoint, read_checkpoint
from engine.ensemble import merged_checkpoint, open_models
from engine.families import BackboneChoice
from engine.items import ImageInput, Item, items_of_lists
from engine.metrics import are_predicted
from engine.open_model import COMPUTE_TYPES, precision_of
from engine.recordings import given_signals, split_recordings
from engine.training import model_input
from vilt.batches import collate
from vilt.datasets.arrow_dataset import Sample
from vilt.datasets.kinds import KINDS, InputFormat, kinds_of
from vilt.datasets.specs import DatasetSpec
from vilt.utils.write_vla import NOT_FINITE, finite

log = logging.getLogger("rep")

SHOWN = 5
"""Number of predictions shown on the terminal."""


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one sample."""

    missing: str  # `complete`, or the missing modalities, as in `text missing`
    labels: tuple[str, ...]
    """The most probable class; for a multi-label model, all classes above `Predictor.threshold`."""
    probabilities: dict[str, float]  # of all classes, keyed by class name
    value: float | None = None  # prediction of a regression model, which has no classes


class Predictor:
    """A trained model ready to predict; created by `load_model`."""

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
        """Probability above which a multi-label model predicts a class: chosen on validation (`engine/decision.py`),
        else 0.5."""
        return torch.tensor(-self.offset, dtype=torch.float64).sigmoid().item()

    def predict(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """Predicts from images and texts, one prediction per sample.

        Args:
            images: paths or Pillow images; None, NaN or blank for a sample without one. Omitted if no sample has one.
            texts: the same for texts.

        Raises:
            DataError: the two lists differ in length, a sample has neither, or an image cannot be read.
        """
        return list(self.predict_items(items_of_lists(images, texts), batch_size=batch_size))

    def embed(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        batch_size: int = 32,
    ) -> dict[str, np.ndarray]:
        """Computes features of samples; takes the same arguments as `predict` and raises the same errors.

        Returns:
            `features/MODALITY` float32 (N, E), zero where a sample lacks the modality; `fused` float32 (N, F), the
            input of the head; `present/MODALITY` bool (N,).
        """
        return joined(self.features(self.samples(items_of_lists(images, texts)), batch_size=batch_size))

    def predict_recording(
        self, signals: Mapping[str, np.ndarray | str | Path | None], *, batch_size: int = 32
    ) -> list[tuple[float, float, Prediction]]:
        """Predicts each sample of a sensor recording; returns (start, end, prediction) with times in seconds.

        Args:
            signals: arrays (values, channels) at the modality's rate, or .npy files with them, keyed by modality;
                missing ones are None or left out.

        Raises:
            DataError: a signal cannot be read, is shorter than a sample, or has the wrong number of channels.
        """
        items = split_recordings([Item("", given_signals(signals, self.dataset), "the recording")], self.dataset)
        if items[0].inputs and items[0].times is None:
            raise DataError("the recording: expected signals (values, channels), found other shapes")
        found = self.predict_items(items, batch_size=batch_size)
        return [(*(item.times or (0.0, 0.0)), one) for item, one in zip(items, found, strict=True)]

    def predict_items(self, items: Sequence[Item], *, batch_size: int, workers: int = 0) -> Iterator[Prediction]:
        """Yields a prediction per item, in order; `workers` processes read the inputs as needed.

        Raises:
            DataError: an item has no input, or one that cannot be read; names the item.
        """
        for batch in self._batches(self.samples(items), batch_size, workers):
            yield from self._predictions(batch)

    def samples(self, items: Sequence[Item]) -> Dataset[Sample]:
        """The items as a dataset of samples. Raises DataError if an item has no input."""
        return _Items(items, self.dataset, self.inputs)

    def features(
        self, samples: Dataset[Sample], *, batch_size: int, workers: int = 0, split: str = ""
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the features of batches of samples, in order; see `embed`.

        Args:
            split: `train` if the model was trained on these samples: none may then be its own neighbour.
        """
        for batch in self._batches(samples, batch_size, workers):
            batch = batch._replace(split=split)
            with torch.inference_mode(), self._autocast():
                features, _ = self._classifier.features(batch)
                batch = batch.joined()
                fused_BF, _ = self._classifier.fused(features, batch)
            found = {"fused": fused_BF.float()}
            for name, present_B in zip(self.dataset.modalities, batch.present_BM.unbind(dim=1), strict=True):
                found |= {f"features/{name}": features[name].float() * present_B[:, None], f"present/{name}": present_B}
            yield {name: tensor.cpu().numpy() for name, tensor in found.items()}

    def _batches(self, samples: Dataset[Sample], batch_size: int, workers: int) -> Iterator[ModelInput]:
        collate_fn = partial(collate, kinds_of(self.dataset), once=True)
        for batch in DataLoader(samples, batch_size=batch_size, num_workers=workers, collate_fn=collate_fn):
            yield model_input(move_data_to_device(batch, self.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    @torch.inference_mode()
    def _predictions(self, batch: ModelInput) -> list[Prediction]:
        with self._autocast():
            logits_BC = self._classifier(batch).cpu()
        missing_of = [self.dataset.type_names[code] for code in batch.joined().missing_type_B.tolist()]
        if self.dataset.label_range is not None:
            return [
                Prediction(missing, (), {}, x) for missing, x in zip(missing_of, logits_BC[:, 0].tolist(), strict=True)
            ]
        # Decided by the logits, as in testing: probabilities of close logits may round to the same number.
        if self.multilabel:
            probability_BC, predicted_BC = logits_BC.sigmoid(), are_predicted(logits_BC, self.offset)
        else:
            probability_BC = logits_BC.softmax(dim=-1)
            predicted_BC = F.one_hot(logits_BC.argmax(dim=-1), logits_BC.shape[1])
        predictions = []
        for missing, probability_C, is_C in zip(
            missing_of, probability_BC.tolist(), predicted_BC.tolist(), strict=True
        ):
            labels = tuple(compress(self.class_names, is_C))
            predictions.append(Prediction(missing, labels, dict(zip(self.class_names, probability_C, strict=True))))
        return predictions


def joined(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the arrays of batches."""
    parts = list(batches)
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


class _Items(Dataset[Sample]):
    """Items as samples; the modalities that an item lacks are missing."""

    def __init__(self, items: Sequence[Item], dataset: DatasetSpec, inputs: InputFormat) -> None:
        self._items, self._dataset, self._inputs = items, dataset, inputs
        replaced: Counter[str] = Counter()
        for item in items:
            if others := [name for name in item.inputs if name not in dataset.modalities]:
                raise DataError(f"{item.place}: expected {' or '.join(dataset.modalities)}, found {others[0]}")
            if not item.inputs:
                raise DataError(f"{item.place}: expected {' or '.join(dataset.modalities)}, found none of them")
            for name, value in item.inputs.items():
                if dataset.modalities[name].padded and isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    replaced[name] += finite(value)[1]
        for name, count in (+replaced).items():
            log.warning("%s: %s: %d", name, NOT_FINITE, count)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        read, item = {}, self._items[index]
        for name, value in item.inputs.items():
            modality = self._dataset.modalities[name]
            try:
                read[name] = KINDS[modality.kind].read_given(value, modality, self._inputs)
            except Exception as error:  # Pillow's decoders raise many types on damaged files
                reason = getattr(error, "strerror", None) or first_line(error)
                file = f" {value}" if isinstance(value, str | Path) else ""
                raise DataError(f"{item.place}: {name}{file}: cannot be read: {reason}") from error
        return Sample(read, torch.tensor(0), index)


def load_model(
    path: str | Path | Sequence[str | Path],
    *,
    vit: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: str | int | None = None,
    trust_backbone: bool = False,
    vit_activation: str | None = None,
    published_seed: int = 0,
) -> Predictor:
    """Loads the trained model of a checkpoint, ready to predict.

    Args:
        path: a checkpoint, ours or a published one; several form an ensemble, whose logits are the mean of theirs.
        vit, tokenizer, trust_backbone, vit_activation, published_seed: like the options of `run.py`; None: as the
            checkpoint says.
        device: a torch device; None: the first GPU, else the CPU.
        precision: `32`, `16` or `bf16`, also in Lightning's spelling; None: the precision of the training, or `32` if
            the checkpoint does not record it.

    Raises:
        ConfigError: the precision or device does not exist.
        CheckpointError, BackboneError: checkpoint, frozen weights or tokenizer are missing, not readable, or do not fit
            together.
    """
    if precision is not None and str(precision) not in COMPUTE_TYPES:
        raise ConfigError(f"precision: expected 32, 16 or bf16, found {precision!r}")
    paths = [path] if isinstance(path, str | Path) else path
    checkpoints = [read_checkpoint(Path(one)) for one in paths]
    choice = BackboneChoice(vit, vit_activation, tokenizer, trust_backbone, published_seed)
    classifier, found = open_models(checkpoints, choice, published_vit=vit or "ViT-B/16")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        reason = first_line(error)
        raise ConfigError(f"device: expected an available one, such as cpu, found {name!r}: {reason}") from error
    precision = precision_of(checkpoints, "32-true", on_gpu=where.type == "cuda") if precision is None else precision
    return Predictor(merged_checkpoint(checkpoints), classifier, found, where, str(precision))


def write_features(path: Path, arrays: Mapping[str, np.ndarray], ids: Sequence[str]) -> None:
    """Writes a `.npz` with the ids as `id`, or a `.safetensors` with them as JSON in its metadata; all or nothing.

    Raises:
        DataError: the file cannot be written.
    """
    with_ids: dict[str, Any] = {"id": np.array(ids), **arrays}
    with writing(f"output={path}"), atomic_path(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, **with_ids)
        else:
            file.write(save(dict(arrays), {"id": json.dumps(list(ids))}))


def write_predictions(path: Path, items: Sequence[Item], predictions: Iterable[Prediction]) -> list[Prediction]:
    """Writes a line per sample as CSV or JSONL, completely or not at all; returns the first few.

    In a CSV, labels are separated by `|`, and the probability of class X is in column `p(X)`.

    Raises:
        DataError: the file cannot be written, or an error of `predict_items`.
    """
    first: list[Prediction] = []
    times = ("start_s", "end_s") if any(item.times for item in items) else ()
    with writing(f"output={path}"), atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for item, prediction in zip(items, predictions, strict=True):
            row = {"id": item.id, **dict.fromkeys(times), **dict(zip(times, item.times or (), strict=False))}
            row |= {"missing": prediction.missing}
            if prediction.value is not None:
                row |= {"value": prediction.value}
            elif path.suffix == ".csv":
                row |= {"labels": "|".join(prediction.labels)}
                row |= {f"p({name})": probability for name, probability in prediction.probabilities.items()}
            else:
                row |= {"labels": prediction.labels, "probabilities": prediction.probabilities}
            if path.suffix == ".csv":
                writer.writerows([row, row.values()] if not first else [row.values()])
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(first) < SHOWN:
                first.append(prediction)
    return first


def describe_predictions(items: Sequence[Item], first: Sequence[Prediction], threshold: float) -> str:
    """The first predictions, as a table for the terminal."""
    rows = []
    for item, prediction in zip(items, first, strict=False):
        if prediction.value is not None:
            said = f"{prediction.value:.3f}"
        else:
            shown = [f"{name} {100 * prediction.probabilities[name]:.1f} %" for name in prediction.labels]
            said = printable(", ".join(shown)) or f"none above {100 * threshold:.1f} %"
        rows.append([printable(item.id), prediction.missing, said])
    return terminal_table(("id", "missing", "prediction"), rows, "<<<")
