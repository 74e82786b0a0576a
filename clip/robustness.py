"""The robustness results of one checkpoint: every pattern of missing modalities, from stored logits alone.

Fractions throughout; only matrix.csv gives what is available in per cent.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip.logit_store import SplitLogits
from clip.metrics import auroc_and_accuracy
from clip.run_folder import write_csv, write_json
from clip.sample_statistics import LEVEL, class_figures, confidence, confusions, roc
from clip.tasks import Task
from common.errors import DataError, reason_of
from common.text import Estimate, estimate
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
    line: dict[str, Any] = field(default_factory=dict)
    """The options in which runs of one line agree; none where there is no record."""


@dataclass(frozen=True)
class Cell:
    """One pattern, with a missing table per seed."""

    missing_type: str
    ratio: float
    both_ratio: float
    image_available: float
    """Mean over the tables of the share of their rows that keep the image; likewise the text."""
    text_available: float
    values: dict[str, list[float]]
    """Metric to one value per seed."""

    def estimate(self, metric: str) -> Estimate:
        """Of `metric`, over the seeds."""
        found = estimate(self.values[metric])
        assert found is not None
        return found


@dataclass(frozen=True)
class Robustness:
    """The results of one subject."""

    subject: Subject
    samples: int
    seeds: tuple[int, ...]
    """Of the missing tables."""
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


def measure(
    subject: Subject, logits: SplitLogits, patterns: Sequence[Sequence[MissingPattern]], resamples: int
) -> Robustness:
    """Everything that the logits of a test split say.

    Args:
        patterns: of each cell, its pattern with every seed.
        resamples: behind the confidence intervals; 0 for none.

    Raises:
        DataError: a missing table in `subject.missing_table_root` does not fit the split.
    """
    task, labels, names = subject.task, logits.labels, subject.class_names
    multilabel, binary = labels.ndim == 2, task.n_classes == 2
    of_type = dict(zip(TYPE_NAMES, logits.logits_TNC, strict=True))
    with _each_message_once(missing_tables.log):
        cells = tuple(_cell(subject, logits, of_cell) for of_cell in patterns)
    intervals = confidence(task, list(logits.logits_TNC), labels, resamples) if resamples else [{} for _ in TYPE_NAMES]
    by_type = {name: task.metrics(logits_NC, labels) for name, logits_NC in of_type.items()}
    curves = {name: roc(of_type[name], labels) for name in TYPE_NAMES} if binary and not multilabel else {}
    return Robustness(
        subject=subject,
        samples=len(labels),
        seeds=tuple(pattern.seed for pattern in patterns[0]),
        cells=cells,
        by_type=by_type,
        intervals=dict(zip(TYPE_NAMES, intervals, strict=True)),
        resamples=resamples,
        per_class=[
            {"type": type_name, "class": class_name, **figures}
            for type_name, logits_NC in of_type.items()
            for class_name, figures in zip(names, class_figures(logits_NC, labels), strict=True)
        ],
        confusions=[
            {"type": type_name, **pair}
            for type_name, logits_NC in of_type.items()
            if not multilabel and not binary
            for pair in confusions(logits_NC, labels, names)
        ],
        roc={
            name: {**curve, "auroc": auroc_and_accuracy(of_type[name], labels)["auroc"]}
            for name, curve in curves.items()
            if curve is not None
        },
    )


def write_results(found: Robustness, folder: Path) -> list[str]:
    """Writes the tables and, last, robustness.json beside the logits; returns their names.

    Of each file a reader finds the old one or the new one.

    Raises:
        DataError: the folder cannot be written.
    """
    tables = {"cells.csv": _cells_table(found), "matrix.csv": _matrix_table(found)}
    tables["per_class.csv"] = _table(found.per_class, type="type_name")
    if found.confusions:
        tables["confusions.csv"] = _table(found.confusions, type="type_name")
    if found.roc:
        points = [
            (name, *point)
            for name, curve in found.roc.items()
            for point in zip(curve["fpr"], curve["tpr"], curve["threshold"], strict=True)
        ]
        tables["roc.csv"] = [("type_name", "fpr", "tpr", "threshold"), *points]
    try:
        for name in set(RESULTS) - {"robustness.json", *tables}:  # of another dataset
            (folder / name).unlink(missing_ok=True)
        for name, (header, *rows) in tables.items():
            write_csv(folder / name, header, rows)
        write_json(folder / "robustness.json", _as_json(found))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {reason_of(error)}") from error
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
        image_available=statistics.mean([float(np.mean(table != IMAGE_MISSING)) for table in tables]),
        text_available=statistics.mean([float(np.mean(table != TEXT_MISSING)) for table in tables]),
        values={metric: [result[metric] for result in results] for metric in results[0]},
    )


def _table(entries: Sequence[dict[str, Any]], **renamed: str) -> list[Sequence[Any]]:
    return [[renamed.get(name, name) for name in entries[0]], *(list(entry.values()) for entry in entries)]


def _cells_table(found: Robustness) -> list[Sequence[Any]]:
    rows = [
        [cell.missing_type, cell.ratio, cell.both_ratio, seed, found.samples, *values]
        for cell in found.cells
        for seed, *values in zip(found.seeds, *cell.values.values(), strict=True)
    ]
    return [["missing_type", "ratio", "both_ratio", "table_seed", "samples", *found.metrics], *rows]


def _matrix_table(found: Robustness) -> list[Sequence[Any]]:
    header = ["missing_type", "ratio", "both_ratio", "image_available", "text_available"]
    header += [f"{metric}_{figure}" for metric in found.metrics for figure in ("mean", "std")]
    rows = []
    for cell in found.cells:
        row = [cell.missing_type, cell.ratio, cell.both_ratio]
        row += [round(100 * share, 6) for share in (cell.image_available, cell.text_available)]
        row += [figure for metric in found.metrics for figure in cell.estimate(metric)[:2]]
        rows.append([*row, len(found.seeds)])
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
                    metric: {"mean": cell.estimate(metric).mean, "std": cell.estimate(metric).std, "values": values}
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
def _each_message_once(logger: logging.Logger) -> Iterator[None]:
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
