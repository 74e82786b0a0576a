"""Robustness results of one checkpoint at every pattern of missing modalities, computed from stored logits.

All values are fractions, except that matrix.csv gives availability in per cent. Values that the test samples leave
undefined are NaN: null in robustness.json, empty in the tables.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import write_csv, writing
from common.strict_json import write_json
from common.text import estimate
from engine.baselines import baselines
from engine.decision import with_offset
from engine.metrics import auroc_and_accuracy
from engine.sample_statistics import LEVEL, bootstrap, class_figures, confusions, interval, roc
from engine.stored_logits import SplitLogits
from engine.tasks import Task
from vilt.missing_tables import MissingPattern, load_missing_table
from vilt.missing_types import AVAILABLE, is_missing, type_names, with_natural

FORMAT = 1


@dataclass(frozen=True)
class Subject:
    """The evaluated model, and how it was evaluated."""

    checkpoint: Path
    checkpoint_sha256: str
    method: str
    exp_name: str
    train_seed: int | None  # None, like the pattern, if the training is not recorded (published checkpoints)
    train_pattern: dict[str, Any] | None
    precision: str
    task: Task
    modalities: tuple[str, ...]
    class_names: tuple[str, ...]
    missing_table_root: Path
    table_name: str  # see `DatasetSpec.table_name`
    offset: float | None = None  # the checkpoint's, see `engine/decision.py`
    other_input: tuple[str, ...] = ()  # options that give it more input than published models get, as `option=value`


Results = dict[str, Any]
"""The content of robustness.json, plus the thresholds of the ROC curves."""


def measure(
    subject: Subject, logits: SplitLogits, patterns: Sequence[Sequence[MissingPattern]], resamples: int
) -> Results:
    """Computes all results from the logits of a test split.

    Args:
        patterns: for each cell, its pattern with every table seed.
        resamples: number for the confidence intervals; 0 for none.

    Raises:
        DataError: a missing table in `subject.missing_table_root` does not fit the split.
    """
    task, labels, names = with_offset(subject.task, subject.offset), logits.labels, subject.class_names
    multilabel, binary, regression = labels.ndim == 2, task.n_classes == 2, labels.is_floating_point()
    logits_by_type = dict(zip(type_names(subject.modalities), logits.logits_TNC, strict=True))
    by_type = {name: task.metrics(logits_NC, labels) for name, logits_NC in logits_by_type.items()}
    natural_N = np.broadcast_to(logits.natural, logits.table_rows)[logits.row_of_sample_N]
    cells = [_cell(subject, task, logits, cell_patterns, resamples) for cell_patterns in patterns]
    curves = {name: roc(logits_NC, labels) for name, logits_NC in logits_by_type.items() if binary and not multilabel}
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
        "metrics": list(task.metrics.measures),
        "offset": subject.offset,
        "other_input": list(subject.other_input),
        "missing_tables": patterns[0][0].drawing,
        "rows_before": [rows for *_, rows in patterns[0][0].after],
        "table_seeds": [pattern.seed for pattern in patterns[0]],
        "class_names": list(names),
        "cells": cells,
        "by_type": by_type,
        "natural": by_missing_type(task, list(logits_by_type), natural_N, logits.logits_TNC[0], labels),
        "baselines": baselines(subject.task, labels, names),
        "confidence": {"level": LEVEL, "resamples": resamples, **_confidence(task, logits, by_type, resamples)},
        "per_class": [
            {"type": type_name, "class": class_name, **figures}
            for type_name, logits_NC in logits_by_type.items()
            if not regression
            for class_name, figures in zip(names, class_figures(logits_NC, labels), strict=True)
        ],
        "confusions": [
            {"type": type_name, **pair}
            for type_name, logits_NC in logits_by_type.items()
            if not multilabel and not binary and not regression
            for pair in confusions(logits_NC, labels, names)
        ],
        "roc": {
            name: {**curve, "auroc": auroc_and_accuracy(logits_by_type[name], labels)["auroc"]}
            for name, curve in curves.items()
            if curve is not None
        },
    }


def by_missing_type(
    task: Task, names: Sequence[str], types_N: np.ndarray, logits_NC: Tensor, labels: Tensor
) -> dict[str, dict[str, Any]]:
    """Number of samples and metrics for each missing type that occurs; `names` names all types."""
    masks = {names[code]: torch.from_numpy(types_N == code) for code in np.unique(types_N)}
    return {name: {"samples": int(m.sum()), **task.metrics(logits_NC[m], labels[m])} for name, m in masks.items()}


def write_results(found: Results, folder: Path) -> list[str]:
    """Writes the tables and, last, robustness.json to the folder with the logits; returns the names of the files.

    Each file is replaced atomically.

    Raises:
        DataError: the folder cannot be written.
    """
    tables = {"cells.csv": _cells_table(found), "matrix.csv": _matrix_table(found)}
    for name in ("per_class", "confusions"):
        tables[f"{name}.csv"] = [{"type_name": entry["type"], **_without(entry, "type")} for entry in found[name]]
    columns = ("fpr", "tpr", "threshold")
    tables["roc.csv"] = [
        {"type_name": name, **dict(zip(columns, point, strict=True))}
        for name, curve in found["roc"].items()
        for point in zip(*(curve[column] for column in columns), strict=True)
    ]
    # The first threshold is infinite, which JSON cannot represent.
    curves = {name: _without(curve, "threshold") for name, curve in found["roc"].items()}
    for name, rows in tables.items():
        with writing(folder / name):
            if rows:
                write_csv(folder / name, rows)
            else:  # an old one may be from another dataset
                (folder / name).unlink(missing_ok=True)
    with writing(folder / "robustness.json"):
        write_json(folder / "robustness.json", {**found, "roc": curves})
    return ["robustness.json", *(name for name, rows in tables.items() if rows)]


def _without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}


def _confidence(
    task: Task, logits: SplitLogits, by_type: dict[str, dict[str, float]], resamples: int
) -> dict[str, dict[str, Any]]:
    """[low, high] of each metric with every sample at one missing type, and how many resamples left it undefined."""
    found: dict[str, dict[str, Any]] = {name: {} for name in by_type}
    left_out: dict[str, dict[str, int]] = {}
    tables = [np.full(logits.table_rows, code) for code in range(len(by_type))]
    for metric, measure in task.metrics.measures.items() if resamples else ():
        values_TR = bootstrap(measure, logits, tables, resamples)
        for (name, values), values_R in zip(by_type.items(), values_TR, strict=True):
            low, high, undefined = interval(values[metric], values_R, logits.units)
            found[name][metric] = [low, high]
            if undefined:
                left_out.setdefault(name, {})[metric] = undefined
    return {**found, "undefined_resamples": left_out}


def _cell(
    subject: Subject, task: Task, logits: SplitLogits, patterns: Sequence[MissingPattern], resamples: int
) -> dict[str, Any]:
    """Results of one pattern, with a missing table per seed; availability is the mean share of rows over the tables."""
    first, root, rows = patterns[0], subject.missing_table_root, logits.table_rows
    drawn = [load_missing_table(root, subject.table_name, "test", pattern, rows) for pattern in patterns]
    tables = [with_natural(subject.modalities, logits.natural, table) for table in drawn]
    available = {
        f"{name}{AVAILABLE}": statistics.mean(float(np.mean(~is_missing(subject.modalities, name, t))) for t in tables)
        for name in subject.modalities
    }
    results = [task.metrics(logits.at(table), logits.labels) for table in tables]
    metrics = {}
    for metric in results[0]:
        values = [result[metric] for result in results]
        over_tables = estimate(values)
        assert over_tables is not None
        metrics[metric] = {**over_tables._asdict(), "values": values}
    cell = {"missing_type": first.missing_type, "ratio": first.ratio, "both_ratio": first.both_ratio}
    if resamples:
        different, place_S = np.unique(np.stack(tables), axis=0, return_inverse=True)
        values_KR = bootstrap(task.metrics.measures[task.monitor], logits, list(different), resamples)
        found = interval(metrics[task.monitor]["mean"], values_KR[place_S].nanmean(0), logits.units)
        cell["interval"] = found._asdict()
    return {**cell, **available, "metrics": metrics}


PATTERN = ("missing_type", "ratio", "both_ratio")


def _cells_table(found: Results) -> list[dict[str, Any]]:
    return [
        {
            **{name: cell[name] for name in PATTERN},
            **{"table_seed": seed, "samples": found["samples"]},
            **{metric: figures["values"][place] for metric, figures in cell["metrics"].items()},
        }
        for cell in found["cells"]
        for place, seed in enumerate(found["table_seeds"])
    ]


def _matrix_table(found: Results) -> list[dict[str, Any]]:
    metric = found["metric"]
    return [
        {
            **{name: cell[name] for name in PATTERN},
            **{name: round(100 * share, 6) for name, share in cell.items() if name.endswith(AVAILABLE)},
            **{f"{name}_{stat}": cell["metrics"][name][stat] for name in found["metrics"] for stat in ("mean", "std")},
            **{f"{metric}_{end}": cell["interval"][end] for end in ("low", "high") if "interval" in cell},
            "n_seeds": len(found["table_seeds"]),
        }
        for cell in found["cells"]
    ]
