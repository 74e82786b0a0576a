"""Loaders for the splits, with an order fixed by the seed that survives interruptions and spans several processes."""

import ctypes
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from common.errors import ConfigError, DataError
from common.signals import STOP_SIGNALS
from common.text import counted, per_cent
from vilt.batches import collate
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import InputFormat, kinds_of
from vilt.datasets.open_spec import open_spec, rows_of_splits
from vilt.datasets.specs import DatasetSpec, Split
from vilt.datasets.subsequences import subsequences
from vilt.missing_tables import NESTED, MissingPattern, counts_text, load_missing_table, published_patterns, type_counts

log = logging.getLogger(__name__)

LEAST_SUBSEQUENCES = 2
"""Fewest subsequences in a batch: a single one would have nothing to be compared with."""


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields the keys (epoch, index) of one process's share of the samples.

    In training the order is drawn from (seed, epoch), and padded with samples from its start so that all processes get
    the same number. In evaluation nothing is shuffled or padded: every sample occurs exactly once.

    Args:
        seed: None for evaluation.
        order: order of the samples in evaluation; None means that of the dataset.
        together: groups (A, L) of samples to keep together, in place of single samples.
        per_batch: groups in a batch; a last batch of fewer than LEAST_SUBSEQUENCES is left out.
    """

    def __init__(
        self,
        samples: int,
        *,
        seed: int | None,
        rank: int,
        world_size: int,
        order: np.ndarray | None = None,
        together: np.ndarray | None = None,
        per_batch: int = 1,
    ) -> None:
        self.samples = samples
        self.units_AL = np.arange(samples)[:, None] if together is None else together
        self.per_batch = per_batch
        self.seed = seed
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip: tuple[int, int] | None = None
        """(epoch, n): skip the first n samples of the share in this epoch, because they were seen before a resume.

        A checkpoint need not save more than this position, since the order follows from (seed, epoch). The loaders,
        which prefetch, have no state worth saving.
        """

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._share() * self.units_AL.shape[1]

    def _share(self) -> int:
        """Number of groups for this process."""
        units = len(self.units_AL)
        share = len(range(self.rank, units, self.world_size)) if self.seed is None else -(-units // self.world_size)
        rest = share % self.per_batch
        return share - rest if rest < LEAST_SUBSEQUENCES else share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        share = self._share()
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            drawn = torch.randperm(len(self.units_AL), generator=generator).numpy()
            order = np.resize(drawn, share * self.world_size)
        else:
            order = np.arange(len(self.units_AL)) if self.order is None else self.order
        indices = self.units_AL[order[self.rank :: self.world_size][:share]].flatten().tolist()
        if self.skip is not None and self.skip[0] == self.epoch:
            indices = indices[self.skip[1] :]
        return iter([(self.epoch, index) for index in indices])


class TimedLoader(DataLoader[Any]):
    """A loader that measures how long its consumer waits for batches."""

    waited = 0.0
    """Seconds waited since the consumer last reset this to 0."""
    _begun: Iterator[Any] | None = None

    def begin(self) -> None:
        """Starts the next pass early: any workers load its first batches in the meantime."""
        self._begun = super().__iter__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares its own iterator class
        batches, self._begun = self._begun or super().__iter__(), None
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


PR_SET_PDEATHSIG = 1


def leave_group(_: int) -> None:
    """Takes a worker out of the process group: Ctrl-C goes to the whole group, and the checkpoint needs its batches."""
    os.setpgrp()
    # Die with the parent: a worker that outlives it keeps its connections open, which the other processes watch.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def dead_worker(error: Exception) -> re.Match[str] | None:
    """Matches torch's error about workers that died: group 1 has their process ids, group 2 how they died."""
    return re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))


@dataclass(frozen=True)
class DataSettings:
    """The part of the configuration that the loaders need."""

    dataset: str
    data_root: Path
    missing_table_root: Path
    patterns: dict[Split, MissingPattern]
    simulate_missing: bool
    per_gpu_batchsize: int
    num_workers: int
    image_cache: bool
    seed: int
    order_seed: int
    """Seed of the order of training samples."""
    subsequence: int = 1
    """Number of consecutive samples of a recording that stay together in a batch; above 1 only for pretraining."""
    modality_dropout: float = 0.0
    label_ratio: float = 1.0


def split_patterns(
    patterns: Mapping[Split, MissingPattern], spec: DatasetSpec, data_root: Path
) -> dict[Split, MissingPattern]:
    """The patterns of all splits; for the published drawing, each with the draws that precede it. Raises DataError."""
    if all(pattern.drawing == NESTED for pattern in patterns.values()):
        return dict(patterns)
    return published_patterns(patterns, rows_of_splits(spec, data_root))


class MissingModalityData(pl.LightningDataModule):
    """The loaders of one dataset.

    Args:
        splits: the splits to open.
        given: the input format of the model.

    Raises:
        DataError: an arrow file or a missing table cannot be used.
    """

    def __init__(self, settings: DataSettings, splits: Sequence[Split], given: InputFormat) -> None:
        super().__init__()
        self.settings = settings
        self.spec = open_spec(settings.dataset, settings.data_root, splits)
        self.patterns = split_patterns(settings.patterns, self.spec, settings.data_root)
        self.datasets: dict[Split, ArrowDataset] = {}
        for split in splits:
            source = (self.spec, settings.data_root, split, given.image_size)
            pretraining = settings.subsequence > 1
            dataset = ArrowDataset(*source, pretraining=pretraining, group_texts=given.group_texts)
            if given.tokenize is not None:
                dataset.tokenize(given.tokenize, given.fingerprint, given.text_windows)
            if settings.image_cache:
                dataset.cache_images(settings.num_workers)
            dataset.missing_table = load_missing_table(
                settings.missing_table_root, self.spec.table_name, split, self.patterns[split], dataset.n_rows
            )
            if split == "train":
                self._draw_in_training(dataset)
                if settings.label_ratio < 1:
                    dataset.choose(settings.label_ratio, settings.seed)
            self.datasets[split] = dataset
        self._resume: tuple[int, int] | None = None

    def _draw_in_training(self, dataset: ArrowDataset) -> None:
        settings = self.settings
        dataset.modality_dropout = settings.modality_dropout, settings.seed
        if not settings.simulate_missing:
            return
        if self.spec.redrawn:
            dataset.redrawn = self.patterns["train"], settings.seed
            dataset.missing_table = np.zeros(dataset.n_rows, dtype=np.int8)
        else:
            dataset.simulate_seed = settings.seed

    @property
    def training_missing(self) -> str:
        """How training samples lose modalities (fixed or redrawn), for log and results."""
        pattern, dropout = self.patterns["train"], self.settings.modality_dropout
        described = "fixed by a missing table"
        if self.settings.simulate_missing and self.spec.redrawn:
            how = f"{per_cent(pattern.ratio)} {pattern.missing_type}; simulate_missing=False fixes it"
            described = f"redrawn in each epoch ({how})"
        elif self.settings.simulate_missing:
            described += "; complete samples lose a modality at random in each epoch"
        return described + (f"; modality dropout {dropout:g}" if dropout else "")

    def describe(self) -> str:
        """One line per split: samples, rows, and the number of rows of each missing type."""
        lines = []
        for split, dataset in self.datasets.items():
            counts = ", ".join(counts_text(type_counts(dataset.missing_table, self.spec.type_names)))
            rows = "" if len(dataset) == dataset.n_rows else f" of {counted(dataset.n_rows, 'row')}"
            natural_counts = type_counts(dataset.natural, self.spec.type_names)
            listed = [f"{count:,} {name}" for name, count in list(natural_counts.items())[1:] if count]
            natural = f"; naturally {', '.join(listed)}" if listed else ""
            lines.append(f"  {split:<6}{counted(len(dataset), 'sample'):>16}{rows} ({counts}{natural})")
        if (ratio := self.settings.label_ratio) < 1 and "train" in self.datasets:
            samples = counted(len(self.datasets["train"].chosen), "sample")
            lines.append(f"  label_ratio={ratio:g}: training uses {samples} of the training split")
        if "train" in self.datasets and (self.spec.redrawn or self.settings.modality_dropout):
            lines.append(f"  missing modalities in training: {self.training_missing}")
        return "\n".join(lines)

    def steps_per_epoch(self, world_size: int) -> int:
        """Number of batches that each process trains on in an epoch."""
        return -(-len(self._sampler("train", 0, world_size)) // self.settings.per_gpu_batchsize)

    def _sampler(self, split: Split, rank: int, world_size: int) -> EpochSampler:
        dataset, settings, training = self.datasets[split], self.settings, split == "train"
        seed = settings.order_seed if training else None
        order = None if training else dataset.evaluation_order()
        if (length := settings.subsequence) == 1:
            chosen = dataset.chosen[:, None] if training else None
            shared: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
            return EpochSampler(len(dataset), **shared, order=order, together=chosen)
        rows = subsequences(dataset.table, length)
        if len(rows) < LEAST_SUBSEQUENCES * world_size:
            raise DataError(
                f"{dataset.path}: expected at least {LEAST_SUBSEQUENCES} subsequences of {length} samples for each "
                f"process, to compare with each other, found {len(rows)}"
            )
        units: dict[str, Any] = {"together": rows, "per_batch": settings.per_gpu_batchsize // length}
        return EpochSampler(len(dataset), seed=seed, rank=rank, world_size=world_size, **units)

    @contextmanager
    def report_dead_workers(self) -> Iterator[None]:
        """Turns the death of a worker within the block into an error of one line that names the sample being read.

        Raises:
            DataError: a worker was killed, most often because memory ran out.
        """
        try:
            yield
        except RuntimeError as error:  # torch raises it at whatever point the main process has reached
            ended = dead_worker(error)
            if ended is None:
                raise
            places = [
                f"{dataset.path}: sample {dataset.sample_name(number)}"
                for dataset in self.datasets.values()
                for pid, number in (dataset.reading.tolist() if dataset.reading is not None else [])
                if str(pid) in ended[1].split(", ")
            ]
            raise DataError(
                f"{'; '.join(places) or 'before its first sample'}: the loader worker that was reading it "
                f"{ended[2].rstrip('. ')}; if memory is short, try fewer num_workers"
            ) from error

    def _loader(self, split: Split) -> TimedLoader:
        settings, trainer, training = self.settings, self.trainer, split == "train"
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler = self._sampler(split, rank, world_size)
        if training and self._resume is not None:
            epoch, batches = self._resume
            sampler.skip = (epoch, batches * settings.per_gpu_batchsize)
        dataset, cached = self.datasets[split], self.datasets[split].cached is not None
        once, workers = not training and settings.subsequence == 1, 0 if cached else settings.num_workers
        dataset.reading = torch.full((workers, 2), -1).share_memory_()
        return TimedLoader(
            dataset,
            batch_size=settings.per_gpu_batchsize,
            sampler=sampler,
            collate_fn=partial(collate, kinds_of(self.spec), once=once, cached=cached),
            num_workers=workers,
            worker_init_fn=leave_group,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> TimedLoader:
        return self._loader("train")

    def val_dataloader(self) -> TimedLoader:
        return self._loader("val")

    def test_dataloader(self) -> TimedLoader:
        return self._loader("test")

    def state_dict(self) -> dict[str, int]:
        """The position of the training in its data, for the checkpoint."""
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        epochs: Any = fit_loop.epoch_progress.current
        batches = fit_loop.epoch_loop.batch_progress.current.completed
        return {
            "epoch": epochs.processed,
            # Lightning does not reset the count of a finished epoch until the next one starts.
            "batches": batches if epochs.ready > epochs.processed else 0,
            **self._order(),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resumes at the checkpoint's position.

        Raises:
            ConfigError: the batch size, the dataset or its order differ from the checkpoint's, so that its position
                means nothing here.
        """
        for name, value in self._order().items():
            if state_dict.get(name) != value:
                raise ConfigError(
                    f"resume_from: the checkpoint was trained with {name.replace('_', ' ')} = {state_dict.get(name)}, "
                    f"now it is {value}; resume with the same per_gpu_batchsize, processes, data and seeds"
                )
        self._resume = (state_dict["epoch"], state_dict["batches"])

    def _order(self) -> dict[str, int]:
        """Everything that determines which samples each batch holds."""
        assert self.trainer is not None
        return {
            "samples_per_batch": self.settings.per_gpu_batchsize * self.trainer.world_size,
            "samples": len(self.datasets["train"].chosen),
            "seed": self.settings.seed,
            "order_seed": self.settings.order_seed,
        }
