"""`run.py predict`: a table or folder of images and texts to a file of predictions."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from engine.checkpoint import read_checkpoint
from engine.open_model import open_model
from engine.predict import Predictor, describe_predictions, read_items, write_predictions
from runs.check_options import PREDICTION_OPTIONS, read_with_machine
from runs.evaluation import backbone_choice


def predict_file(config: Mapping[str, Any], given: set[str]) -> str:
    """Predicts what `input` names with load_path, writes it to `output`, and describes the first few predictions.

    Args:
        config: Sacred's configuration.
        given: names of the options that the command line sets.

    Raises:
        ConfigError, DataError, CheckpointError, BackboneError: an option, a sample or the model is not as expected.
    """
    options = read_with_machine(config, PREDICTION_OPTIONS)
    checkpoint = read_checkpoint(options["load_path"])
    items = read_items(options["input"], checkpoint.spec.dataset)
    classifier, inputs = open_model(checkpoint, backbone_choice(options, given), options["vit"])
    device = torch.device("cuda" if options["num_gpus"] else "cpu")
    predictor = Predictor(checkpoint, classifier, inputs, device, options["precision"])
    batch_size, workers = options["per_gpu_batchsize"], options["num_workers"]
    predictions = predictor.predict_items(items, batch_size=batch_size, workers=workers)
    shown = tqdm(predictions, "predicting", len(items), disable=not sys.stderr.isatty())
    first = write_predictions(options["output"], items, shown, predictor)
    decided = f"; a class counts above a probability of {predictor.threshold:.3f}" if predictor.multilabel else ""
    written = f"{len(items):,} predictions, written to {options['output']}{decided}"
    return f"{describe_predictions(items, first, predictor.threshold)}\n\n  {written}"
