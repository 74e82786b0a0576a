"""`run.py predict` and `run.py embed`: a trained model's predictions and features for samples."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from common.errors import ConfigError
from common.hashing import file_sha256
from common.text import counted
from config import Options
from engine.checkpoint import Checkpoint, check_classes, read_checkpoint
from engine.ensemble import merged_checkpoint, open_models
from engine.items import read_items
from engine.predict import Predictor, describe_predictions, joined, write_features, write_predictions
from runs.check_options import resolve
from runs.evaluation import backbone_choice
from runs.option_readers import PRECISIONS
from runs.targets import as_trained, check_agreement, taken_from_run
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset

T = TypeVar("T")


def predict_file(options: Options, given: set[str]) -> str:
    """Predicts the samples listed in `input` with load_path, writes the predictions to `output`, and shows a few.

    Args:
        options: the result of `read_prediction`.
        given: names of the options set on the command line.

    Raises:
        ConfigError, DataError, CheckpointError, BackboneError: an option, a sample or the model is invalid.
    """
    assert options.input is not None and options.output is not None
    checkpoints = [read_checkpoint(path) for path in options.load_paths]
    items = read_items(options.input, checkpoints[0].spec.dataset)
    predictor = _predictor(checkpoints, options, given)
    predictions = predictor.predict_items(items, batch_size=options.per_gpu_batchsize, workers=options.num_workers)
    first = write_predictions(options.output, items, _shown(predictions, len(items), "predicting"))
    decided = f"; classes above a probability of {predictor.threshold:.3f} count" if predictor.multilabel else ""
    written = f"{counted(len(items), 'prediction')}, written to {options.output}{decided}"
    return f"{describe_predictions(items, first, predictor.threshold)}\n\n  {written}"


def embed_file(config: Mapping[str, Any], options: Options, given: set[str]) -> str:
    """Writes load_path's features of the samples in `input`, or of a `split`, to `output`; returns a summary.

    Takes all options, not checked yet, as `config`; the other arguments and the errors are those of `predict_file`.
    """
    assert options.output is not None
    if len(options.load_paths) > 1:
        raise ConfigError(f"load_path: expected one checkpoint, found {len(options.load_paths)}")
    checkpoint = read_checkpoint(options.load_paths[0])
    items = read_items(options.input, checkpoint.spec.dataset) if options.input is not None else []
    predictor = _predictor([checkpoint], options, given)
    trained_on = ""
    if options.input is not None:
        samples, ids, known = predictor.samples(items), [item.id for item in items], {}
        if any(item.times for item in items):
            start_s, end_s = np.array([item.times or (math.nan, math.nan) for item in items]).T.copy()
            known = {"start_s": start_s, "end_s": end_s}
    else:
        dataset = _split(checkpoint, config, given, options.split, predictor)
        indices: Any = [(0, index) for index in range(len(dataset))]  # as in the first epoch
        samples = Subset(dataset, indices)
        ids = [dataset.sample_name(index) for index in range(len(dataset))]
        known = {"label": dataset.label_of_sample}
        if options.split == "train" and checkpoint.contents.get("data of train") == file_sha256(dataset.path):
            trained_on = "train"
    batch_size, workers = options.per_gpu_batchsize, options.num_workers
    batches = predictor.features(samples, batch_size=batch_size, workers=workers, split=trained_on)
    arrays = joined(_shown(batches, -(-len(ids) // batch_size), "embedding")) | known
    write_features(options.output, arrays, ids)
    lines = [f"  {name:<20} {value.dtype} {value.shape}" for name, value in arrays.items()]
    return "\n".join([*lines, f"\n  features of {counted(len(ids), 'sample')}, written to {options.output}"])


def _predictor(checkpoints: Sequence[Checkpoint], options: Options, given: set[str]) -> Predictor:
    of_task = checkpoints[0].spec.dataset.options.get("precision")  # the task's own default for training, if any
    if of_task is not None and "precision" not in given:
        options = replace(options, precision=PRECISIONS[str(of_task)])
    options = as_trained(options, checkpoints, given)
    classifier, inputs = open_models(checkpoints, backbone_choice(options, given), options.vit)
    device = torch.device("cuda" if options.num_gpus else "cpu")
    return Predictor(merged_checkpoint(checkpoints), classifier, inputs, device, options.precision)


def _shown(passes: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Shows a progress bar if standard error is a terminal."""
    return tqdm(passes, what, total, disable=not sys.stderr.isatty())


def _split(
    checkpoint: Checkpoint, config: Mapping[str, Any], given: set[str], split: Any, predictor: Predictor
) -> ArrowDataset:
    """Opens a split. Only naturally missing modalities are missing, unless `missing_ratio` or `test_ratio` is given."""
    _, taken = taken_from_run(checkpoint.path, config, given)
    whole = {} if "missing_ratio" in given else {"missing_ratio": 0.0}
    options = resolve({**config, **taken, **whole, "task": config["task"] or checkpoint.spec.task})
    check_agreement(options, checkpoint, given)
    if options.data_root is None:
        raise ConfigError("data_root: expected the folder of the arrow files that make_arrow.py wrote, found nothing")
    settings = replace(options.data_settings(), simulate_missing=False, modality_dropout=0.0, subsequence=1)
    dataset = MissingModalityData(settings, (split,), predictor.inputs).datasets[split]
    check_classes(checkpoint, dataset)
    return dataset
