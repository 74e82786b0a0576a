"""The robustness picture of one checkpoint: every pattern of missing modalities, from stored logits alone.

Fractions throughout; only matrix.csv gives what is available in per cent.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip.logit_store import LogitStore, SplitLogits
from clip.metrics import auroc_and_accuracy
from clip.run_folder import write_csv, write_json
from clip.sample_statistics import LEVEL, class_figures, confidence, confusions, roc
from clip.tasks import Task
from vilt import missing_tables
from vilt.missing_tables import IMAGE_MISSING, TEXT_MISSING, TYPE_NAMES, MissingPattern, load_missing_table

FORMAT = 1
RESULTS = ("robustness.json", "cells.csv", "matrix.csv", "per_class.csv", "confusions.csv", "roc.csv")
"""All files that `write_results` may write; which of them depends on the dataset."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and how."""

    checkpoint: Path
    checkpoint_sha256: str
    method: str
    exp_name: str
    train_seed: int | None
    """None where there is no record of the training (published checkpoints), like the pattern."""
    train_pattern: dict[str, Any] | None
    precision: str
    task: Task
    class_names: tuple[str, ...]
    missing_table_root: Path


@dataclass(frozen=True)
class Cell:
    """One pattern, with a missing table per seed."""

    missing_type: str
    ratio: float
    both_ratio: float
    seeds: tuple[int, ...]
    image_available: float
    """Mean over the tables of the share of their rows that keep the image; likewise the text."""
    text_available: float
    values: dict[str, list[float]]
    """Metric to one value per seed."""

    def mean(self, metric: str) -> float:
        """Of `metric`, over the seeds."""
        return mean(self.values[metric])

    def std(self, metric: str) -> float:
        """Of `metric`, over the seeds."""
        return std(self.values[metric])


@dataclass(frozen=True)
class Robustness:
    """The results of one subject."""

    subject: Subject
    samples: int
    cells: tuple[Cell, ...]
    by_type: dict[str, dict[str, float]]
    """Name of a missing type to the metrics where every sample is of that type."""
    intervals: dict[str, dict[str, list[float]]]
    """Likewise to the confidence interval [low, high] of each metric; no metric without resamples."""
    resamples: int
    per_class: list[dict[str, Any]]
    confusions: list[dict[str, Any]]
    roc: dict[str, dict[str, Any]]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.by_type[TYPE_NAMES[0]])

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the missing tables."""
        return self.cells[0].seeds


def mean(values: Sequence[float]) -> float:
    """Exact before rounding, so that the mean of equal values is that value."""
    return statistics.mean(values)


def std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value, and exactly 0 of equal ones."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure(
    subject: Subject, logits: SplitLogits, patterns: Sequence[Sequence[MissingPattern]], resamples: int
) -> Robustness:
    """Everything that the logits of a test split tell.

    Args:
        patterns: of each cell, its pattern with every seed.
        resamples: behind the confidence intervals; 0 for none.

    Raises:
        DataError: a missing table in `subject.missing_table_root` does not fit the split.
    """
    task, labels = subject.task, logits.labels
    multilabel, binary = labels.ndim == 2, task.n_classes == 2
    with _said_once(missing_tables.log):
        cells = tuple(_cell(subject, logits, of_cell) for of_cell in patterns)
    intervals = confidence(task, list(logits.logits_TNC), labels, resamples) if resamples else [{} for _ in TYPE_NAMES]
    of_type = dict(zip(TYPE_NAMES, logits.logits_TNC, strict=True))
    return Robustness(
        subject=subject,
        samples=len(labels),
        cells=cells,
        by_type={name: task.metrics(logits_NC, labels) for name, logits_NC in of_type.items()},
        intervals=dict(zip(TYPE_NAMES, intervals, strict=True)),
        resamples=resamples,
        per_class=[
            {"type": type_name, "class": class_name, **asdict(figures)}
            for type_name, logits_NC in of_type.items()
            for class_name, figures in zip(subject.class_names, class_figures(logits_NC, labels), strict=True)
        ],
        confusions=_confusions(subject, logits) if not multilabel and not binary else [],
        roc=_rocs(subject, logits) if not multilabel and binary else {},
    )


def write_results(found: Robustness, store: LogitStore) -> list[str]:
    """Writes robustness.json and the tables beside the logits, all of them or none; returns their names.

    Raises:
        DataError: the folder cannot be written.
    """
    tables = {"cells.csv": _cells_table(found), "matrix.csv": _matrix_table(found)}
    figures = ("precision", "recall", "f1", "support")
    tables["per_class.csv"] = [
        ["type_name", "class", *figures],
        *([row["type"], row["class"], *(row[name] for name in figures)] for row in found.per_class),
    ]
    if found.confusions:
        tables["confusions.csv"] = [
            ["type_name", "true", "predicted", "count", "share"],
            *(list(row.values()) for row in found.confusions),
        ]
    if found.roc:
        tables["roc.csv"] = [["type_name", "fpr", "tpr", "threshold"], *_roc_rows(found)]
    with store.renewed(RESULTS) as folder:
        for name, (header, *rows) in tables.items():
            write_csv(folder / name, header, rows)
        write_json(folder / "robustness.json", _as_json(found))
    return ["robustness.json", *tables]


def _cell(subject: Subject, logits: SplitLogits, patterns: Sequence[MissingPattern]) -> Cell:
    task, first = subject.task, patterns[0]
    tables = [
        load_missing_table(subject.missing_table_root, task.name, "test", pattern, logits.table_rows)
        for pattern in patterns
    ]
    results = [task.metrics(logits.at(table), logits.labels) for table in tables]
    return Cell(
        missing_type=first.missing_type,
        ratio=first.ratio,
        both_ratio=first.both_ratio,
        seeds=tuple(pattern.seed for pattern in patterns),
        image_available=mean([float(np.mean(table != IMAGE_MISSING)) for table in tables]),
        text_available=mean([float(np.mean(table != TEXT_MISSING)) for table in tables]),
        values={metric: [result[metric] for result in results] for metric in results[0]},
    )


def _confusions(subject: Subject, logits: SplitLogits) -> list[dict[str, Any]]:
    names = subject.class_names
    return [
        {
            "type": type_name,
            "true": names[pair.true],
            "predicted": names[pair.predicted],
            "count": pair.count,
            "share": pair.share,
        }
        for type_name, logits_NC in zip(TYPE_NAMES, logits.logits_TNC, strict=True)
        for pair in confusions(logits_NC, logits.labels)
    ]


def _rocs(subject: Subject, logits: SplitLogits) -> dict[str, dict[str, Any]]:
    rocs = {}
    for type_name, logits_NC in zip(TYPE_NAMES, logits.logits_TNC, strict=True):
        curve = roc(logits_NC, logits.labels)
        if curve is not None:
            rocs[type_name] = {**asdict(curve), "auroc": auroc_and_accuracy(logits_NC, logits.labels)["auroc"]}
    return rocs


def _roc_rows(found: Robustness) -> Iterator[list[Any]]:
    for type_name, curve in found.roc.items():
        for point in zip(curve["fpr"], curve["tpr"], curve["threshold"], strict=True):
            yield [type_name, *point]


def _cells_table(found: Robustness) -> list[list[Any]]:
    rows = [
        [cell.missing_type, cell.ratio, cell.both_ratio, seed, found.samples, *values]
        for cell in found.cells
        for seed, *values in zip(cell.seeds, *cell.values.values(), strict=True)
    ]
    return [["missing_type", "ratio", "both_ratio", "table_seed", "samples", *found.metrics], *rows]


def _matrix_table(found: Robustness) -> list[list[Any]]:
    header = ["missing_type", "ratio", "both_ratio", "image_available", "text_available"]
    header += [f"{metric}_{figure}" for metric in found.metrics for figure in ("mean", "std")]
    rows = []
    for cell in found.cells:
        row = [cell.missing_type, cell.ratio, cell.both_ratio]
        row += [round(100 * share, 6) for share in (cell.image_available, cell.text_available)]
        row += [figure for metric in found.metrics for figure in (cell.mean(metric), cell.std(metric))]
        rows.append([*row, len(cell.seeds)])
    return [[*header, "n_seeds"], *rows]


def _as_json(found: Robustness) -> dict[str, Any]:
    subject = found.subject
    return {
        "format": FORMAT,
        "task": subject.task.name,
        "split": "test",
        "samples": found.samples,
        "method": subject.method,
        "exp_name": subject.exp_name,
        "train_seed": subject.train_seed,
        "train_pattern": subject.train_pattern,
        "checkpoint": subject.checkpoint.name,
        "checkpoint_sha256": subject.checkpoint_sha256,
        "precision": subject.precision,
        "metric": subject.task.monitor,
        "metrics": found.metrics,
        "table_seeds": list(found.seeds),
        "class_names": list(subject.class_names),
        "cells": [
            {
                "missing_type": cell.missing_type,
                "ratio": cell.ratio,
                "both_ratio": cell.both_ratio,
                "image_available": cell.image_available,
                "text_available": cell.text_available,
                "metrics": {
                    metric: {"mean": cell.mean(metric), "std": cell.std(metric), "values": values}
                    for metric, values in cell.values.items()
                },
            }
            for cell in found.cells
        ],
        "by_type": found.by_type,
        "confidence": {"level": LEVEL, "resamples": found.resamples, **found.intervals},
        "per_class": found.per_class,
        "confusions": found.confusions,
        "roc": {
            name: {key: curve[key] for key in ("fpr", "tpr", "auroc")}  # the first threshold is no JSON number
            for name, curve in found.roc.items()
        },
    }


@contextmanager
def _said_once(logger: logging.Logger) -> Iterator[None]:
    """Drops what `logger` has said before: a published table is found again for every seed."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
