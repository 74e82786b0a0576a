"""How well the features of a pretraining separate the classes: FOCAL's 5-nearest-neighbour accuracy."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.interfaces import Backbone
from engine.cached_features import ROWS
from vilt.datasets.arrow_dataset import ArrowDataset

EPOCHS, NEIGHBOURS = 10, 5


class NeighbourAccuracy(pl.Callback):
    """Logs `val/neighbour_accuracy` in every tenth epoch and the last."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every process computes the features of its share of the samples."""
        epoch = trainer.current_epoch + 1
        if epoch % EPOCHS and epoch != trainer.max_epochs:
            return
        module: Any = pl_module
        found = []
        for split in ("train", "val"):
            dataset: ArrowDataset = trainer.datamodule.datasets[split]  # type: ignore[attr-defined]
            own = range(trainer.global_rank, len(dataset), trainer.world_size)
            features = _features(module.classifier.model, dataset, own, pl_module.device)
            found.append((trainer.strategy.reduce(features, reduce_op="sum").cpu(), torch.from_numpy(dataset.labels)))
        pl_module.log("val/neighbour_accuracy", neighbour_accuracy(*found), rank_zero_only=False)


@torch.no_grad()
def _features(model: Backbone, dataset: ArrowDataset, own: range, device: torch.device) -> Tensor:
    """Concatenated features (N, ME) of all modalities, not projected; 0 for samples that are not among `own`."""
    found = torch.zeros(len(dataset), len(model.places) * model.embed_dim, device=device)
    for start in range(0, len(own), ROWS):
        indices = own[start : start + ROWS]
        samples = dataset.__getitems__([(0, index) for index in indices])
        features = [
            tower(torch.stack([sample.inputs[name] for sample in samples]).to(device))
            for name, tower in model.towers.items()
        ]
        found[list(indices)] = torch.cat(features, dim=1).float()
    return found


def neighbour_accuracy(known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a majority vote of the nearest neighbours; the lowest label wins a tie.

    Args:
        known: features (N, E) and labels (N,) to search; samples labelled -1 have no label and are left out.
        asked: features and labels of the samples to classify, all labelled.
    """
    labelled = known[1] >= 0
    distances = torch.cdist(asked[0], known[0][labelled])
    nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
    votes = F.one_hot(known[1][labelled][nearest]).sum(dim=1)
    return float((votes.argmax(dim=1) == asked[1]).double().mean())
