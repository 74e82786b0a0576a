"""A robustness matrix: 33 cells from three encodings, as `run.py robustness` has them, and one by one, as published."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.baseline import PublishedAlgorithm
from benchmarks.loading import load_whole, write_films
from clip.checkpoint import ModelSpec
from clip.logit_store import LogitModule, LogitStore, Origin, SplitLogits, encode
from clip.modules.classifier import MissingModalityClassifier
from clip.robustness import Results, Subject, measure
from clip.tasks import TASKS
from clip.training import FinetuneModule
from vilt.datamodules import DataSettings, MissingModalityData
from vilt.datasets.specs import SPLITS
from vilt.missing_tables import COMPLETE, MISSING_TYPES, TYPE_NAMES, MissingPattern, draw_missing_table

CELLS = [MissingPattern(kind, tenths / 10, 0.5, 0) for kind in MISSING_TYPES for tenths in range(11)]
SAMPLED_CELLS = [cell for cell in CELLS if cell.ratio == 0.7]
"""Those that the published side is timed at. It encodes everything in both towers: all cells cost it the same."""
SAMPLED_BATCHES = 2
"""Of each."""


class Matrix:
    """A made-up test split of MM-IMDb's, one plot a film, and both ways to the matrix of a model, on a CPU or GPU.

    Args:
        folder: an empty one, for the split and the results.
        films: of the split, a multiple of `batch`.
    """

    def __init__(
        self,
        folder: Path,
        classifier: MissingModalityClassifier,
        spec: ModelSpec,
        device: torch.device,
        films: int,
        batch: int,
    ) -> None:
        self.folder, self.spec, self.device, self.films, self.batch = folder, spec, device, films, batch
        self.tokenizer = write_films(folder, "test", films)
        settings = DataSettings(
            dataset=spec.task,
            data_root=folder,
            missing_table_root=folder / "missing_tables",
            patterns=dict.fromkeys(SPLITS, MissingPattern("both", 0, 0.5, 0)),
            simulate_missing=False,
            per_gpu_batchsize=batch,
            num_workers=0,
            image_cache=False,
            seed=0,
        )
        size = spec.architecture.image_size
        self.data = MissingModalityData(settings, ("test",), size, self.tokenizer, self.tokenizer.fingerprint)
        self.dataset = self.data.datasets["test"]
        published = PublishedAlgorithm(
            classifier, spec.architecture, spec.method.memory_length, spec.method.memory_depth
        )
        self.published = published.to(device).eval().requires_grad_(False)  # nothing here trains
        self.classifier = classifier
        self.trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="32-true",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    @property
    def share_sampled(self) -> float:
        """How much of the published side's work `sampled_cells` is."""
        return len(SAMPLED_CELLS) * SAMPLED_BATCHES * self.batch / (len(CELLS) * self.films)

    def sampled_cells(self) -> list[tuple[MissingPattern, range, Tensor]]:
        """The published way, for a few batches at a few cells: of each its cell, its rows, and their logits (B, C)."""
        results = []
        for cell in SAMPLED_CELLS:
            table = draw_missing_table(self.spec.task, "test", cell, self.films)
            for number in range(SAMPLED_BATCHES):
                rows = range(number * self.batch, (number + 1) * self.batch)
                inputs = load_whole(self.dataset, self.tokenizer, rows, table)
                with torch.inference_mode():
                    logits = self.published(*(tensor.to(self.device) for tensor in inputs)).cpu()
                results.append((cell, rows, logits))
        return results

    def whole(self) -> Results:
        """Our way to all cells."""
        subject = Subject(
            checkpoint=self.folder / "best.ckpt",
            checkpoint_sha256="",
            method="rep",
            exp_name="benchmark",
            train_seed=None,
            train_pattern=None,
            precision="32-true",
            task=TASKS[self.spec.task],
            class_names=self.dataset.class_names(),
            missing_table_root=self.data.settings.missing_table_root,
        )
        return measure(subject, self.encodings(), [[cell] for cell in CELLS], resamples=0)

    def encodings(self) -> SplitLogits:
        """The three encodings alone, stored and read again."""
        with TemporaryDirectory(dir=self.folder) as place:
            origin = Origin(self.spec.task, "", self.dataset.path.name, "", "32-true", None)
            store = LogitStore(Path(place), origin, self.dataset, configuration={})
            every_type = range(len(TYPE_NAMES))
            encode(store, every_type, LogitModule(self.classifier, self.spec), self.trainer, self.data)
            return store.load()

    def evaluation(self) -> dict[str, float]:
        """Metrics of one evaluation of the complete split, as of `test_only=True test_ratio=0`."""
        self.dataset.missing_table = np.full(self.films, COMPLETE, dtype=np.int8)
        module = FinetuneModule(self.classifier, self.spec)
        self.trainer.test(module, datamodule=self.data, verbose=False)
        return module.test_metrics


@contextmanager
def made_up_matrix(
    classifier: MissingModalityClassifier, spec: ModelSpec, device: torch.device, films: int, batch: int
) -> Iterator[Matrix]:
    """In a temporary folder."""
    with TemporaryDirectory() as folder:
        yield Matrix(Path(folder), classifier, spec, device, films, batch)
