"""Features that a training would compute again and again, computed once: of frozen towers without slots."""

import logging

import numpy as np
import torch

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.no_prompts import NoPrompts
from vilt.datamodules import MissingModalityData

log = logging.getLogger("rep")

ROWS = 64
"""Of a pass, whatever the batches of the training are, so that a resumed run has the same bits."""


def are_constant(classifier: MissingModalityClassifier) -> bool:
    """Whether an input has the same features at every step, and the backbone takes them in its place."""
    towers = classifier.model.towers.values() if classifier.model.takes_features else ()
    frozen = all(not parameter.requires_grad for tower in towers for parameter in tower.parameters())
    return classifier.model.takes_features and type(classifier.method) is NoPrompts and frozen


@torch.no_grad()
def keep_features(classifier: MissingModalityClassifier, data: MissingModalityData, device: torch.device) -> None:
    """Gives the datasets the features of all their inputs, which they then have instead; one pass over the data.

    Raises:
        DataError: an input cannot be read.
    """
    model = classifier.model.to(device).eval()
    for split, dataset in data.datasets.items():
        kept = {}
        for name, kind in dataset.kinds.items():
            rows = np.flatnonzero(~kind.absent())
            features = torch.zeros(dataset.n_rows, classifier.model.embed_dim)
            for start in range(0, len(rows), ROWS):
                of_pass = rows[start : start + ROWS].tolist()
                inputs = [kind.read(row, row) for row in of_pass]
                assert all(read is not None for read in inputs)
                input_b = kind.collate([read for read in inputs if read is not None]).input_b
                features[of_pass] = model.towers[name](input_b.to(device)).float().cpu()
            kept[name] = features
        dataset.kept = kept
        log.info("%s: features of %d samples computed once, for all epochs", split, dataset.n_rows)
