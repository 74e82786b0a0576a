"""The robustness results of one checkpoint: every pattern of missing modalities, from stored logits alone.

Fractions throughout; only matrix.csv gives what is available in per cent.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, reason_of
from common.files import write_csv
from common.strict_json import write_json
from common.text import estimate
from engine.logit_store import SplitLogits
from engine.metrics import auroc_and_accuracy
from engine.sample_statistics import LEVEL, class_figures, confidence, confusions, roc
from engine.tasks import Task
from vilt.missing_tables import MissingPattern, load_missing_table
from vilt.missing_types import AVAILABLE, is_missing, type_names

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
    modalities: tuple[str, ...]
    class_names: tuple[str, ...]
    missing_table_root: Path
    line: dict[str, Any] = field(default_factory=dict)
    """The options in which runs of one line agree; none where there is no record."""


Results = dict[str, Any]
"""What robustness.json holds, and the thresholds of the ROC curves."""


def measure(
    subject: Subject, logits: SplitLogits, patterns: Sequence[Sequence[MissingPattern]], resamples: int
) -> Results:
    """Everything that the logits of a test split say.

    Args:
        patterns: of each cell, its pattern with every seed.
        resamples: behind the confidence intervals; 0 for none.

    Raises:
        DataError: a missing table in `subject.missing_table_root` does not fit the split.
    """
    task, labels, names = subject.task, logits.labels, subject.class_names
    multilabel, binary = labels.ndim == 2, task.n_classes == 2
    types = type_names(subject.modalities)
    of_type = dict(zip(types, logits.logits_TNC, strict=True))
    cells = [_cell(subject, logits, of_cell) for of_cell in patterns]
    intervals = confidence(task, list(logits.logits_TNC), labels, resamples) if resamples else [{} for _ in types]
    by_type = {name: task.metrics(logits_NC, labels) for name, logits_NC in of_type.items()}
    curves = {name: roc(of_type[name], labels) for name in types} if binary and not multilabel else {}
    return {
        "format": FORMAT,
        "task": task.name,
        "split": "test",
        "samples": len(labels),
        **{name: getattr(subject, name) for name in ("method", "exp_name", "train_seed", "train_pattern")},
        "checkpoint": subject.checkpoint.name,
        "checkpoint_sha256": subject.checkpoint_sha256,
        "precision": subject.precision,
        "metric": task.monitor,
        "metrics": list(by_type[types[0]]),
        "table_seeds": [pattern.seed for pattern in patterns[0]],
        "class_names": list(names),
        "cells": cells,
        "by_type": by_type,
        "confidence": {"level": LEVEL, "resamples": resamples, **dict(zip(types, intervals, strict=True))},
        "per_class": [
            {"type": type_name, "class": class_name, **figures}
            for type_name, logits_NC in of_type.items()
            for class_name, figures in zip(names, class_figures(logits_NC, labels), strict=True)
        ],
        "confusions": [
            {"type": type_name, **pair}
            for type_name, logits_NC in of_type.items()
            if not multilabel and not binary
            for pair in confusions(logits_NC, labels, names)
        ],
        "roc": {
            name: {**curve, "auroc": auroc_and_accuracy(of_type[name], labels)["auroc"]}
            for name, curve in curves.items()
            if curve is not None
        },
    }


def write_results(found: Results, folder: Path) -> list[str]:
    """Writes the tables and, last, robustness.json beside the logits; returns their names.

    Of each file a reader finds the old one or the new one.

    Raises:
        DataError: the folder cannot be written.
    """
    tables: dict[str, list[Sequence[Any]]] = {"cells.csv": _cells_table(found), "matrix.csv": _matrix_table(found)}
    for name in ("per_class", "confusions"):
        if entries := found[name]:
            header = ["type_name", *list(entries[0])[1:]]
            tables[f"{name}.csv"] = [header, *(list(entry.values()) for entry in entries)]
    if found["roc"]:
        columns = ("fpr", "tpr", "threshold")
        points = [
            (name, *point)
            for name, curve in found["roc"].items()
            for point in zip(*(curve[column] for column in columns), strict=True)
        ]
        tables["roc.csv"] = [("type_name", *columns), *points]
    # The first threshold is no JSON number.
    curves = {name: {key: curve[key] for key in ("fpr", "tpr", "auroc")} for name, curve in found["roc"].items()}
    try:
        for name in set(RESULTS) - {"robustness.json", *tables}:  # of another dataset
            (folder / name).unlink(missing_ok=True)
        for name, lines in tables.items():
            write_csv(folder / name, lines[0], lines[1:])
        write_json(folder / "robustness.json", {**found, "roc": curves})
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {reason_of(error)}") from error
    return ["robustness.json", *tables]


def _cell(subject: Subject, logits: SplitLogits, patterns: Sequence[MissingPattern]) -> dict[str, Any]:
    """One pattern, with a missing table per seed. What is available: the mean over the tables of the share of rows."""
    task, first = subject.task, patterns[0]
    root, rows = subject.missing_table_root, logits.table_rows
    tables = [load_missing_table(root, task.name, "test", pattern, rows) for pattern in patterns]
    available = {
        f"{name}{AVAILABLE}": statistics.mean(float(np.mean(~is_missing(subject.modalities, name, t))) for t in tables)
        for name in subject.modalities
    }
    results = [task.metrics(logits.at(table), logits.labels) for table in tables]
    metrics = {}
    for metric in results[0]:
        values = [result[metric] for result in results]
        found = estimate(values)
        assert found is not None
        metrics[metric] = {"mean": found.mean, "std": found.std, "values": values}
    return {
        "missing_type": first.missing_type,
        "ratio": first.ratio,
        "both_ratio": first.both_ratio,
        **available,
        "metrics": metrics,
    }


PATTERN = ("missing_type", "ratio", "both_ratio")


def _cells_table(found: Results) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [[*PATTERN, "table_seed", "samples", *found["metrics"]]]
    for cell in found["cells"]:
        for place, seed in enumerate(found["table_seeds"]):
            values = [figures["values"][place] for figures in cell["metrics"].values()]
            rows.append([*(cell[name] for name in PATTERN), seed, found["samples"], *values])
    return rows


def _matrix_table(found: Results) -> list[Sequence[Any]]:
    shares = [name for name in found["cells"][0] if name.endswith(AVAILABLE)]
    of_metrics = [(metric, figure) for metric in found["metrics"] for figure in ("mean", "std")]
    rows: list[Sequence[Any]] = [[*PATTERN, *shares, *("_".join(names) for names in of_metrics), "n_seeds"]]
    for cell in found["cells"]:
        available = [round(100 * cell[name], 6) for name in shares]
        figures = [cell["metrics"][metric][figure] for metric, figure in of_metrics]
        rows.append([*(cell[name] for name in PATTERN), *available, *figures, len(found["table_seeds"])])
    return rows
