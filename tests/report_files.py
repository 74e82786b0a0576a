"""Made-up run folders, and robustness results from logits in their plainest form, in the formats that run.py writes."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from engine.tasks import TASKS
from tests.data_files import TYPE_NAMES
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, draw_missing_table

RATIOS = tuple(step / 10 for step in range(11))
STARTED = 1_790_000_000
"""Modification time of the made-up runs' config.json."""


def write_run(folder: Path, task: str = "mmimdb", tested: float | None = 0.5, **options: Any) -> Path:
    """A finished run of made-up numbers: `options` differ from the defaults, `tested` is its test result."""
    from config import DEFAULTS

    config = json.loads(json.dumps(DEFAULTS))
    config |= {"task": task, "data_root": "data", **options}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    os.utime(folder / "config.json", (STARTED, STARTED))
    environment = {
        "command": ["/home/somebody/code/run.py", "with", f"task_finetune_{task}", "data_root=/home/somebody/films"],
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "machine": {"platform": "Linux-6.1", "cores": 2, "gpus": ["NVIDIA H100"]},
        "git": {"commit": "0123456789abcdef0123", "changed": [" M run.py"]},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    monitor = f"val/{TASKS[task].monitor}"
    lines = [f"epoch,step,train/loss,{monitor}"]
    lines += [line for step in range(4) for line in (f"0,{step},{1 / (step + 1)},", f"0,{step},,{0.1 * (step + 1)}")]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    torch.save({"score": 0.4, "state_dict": {}, "made_for": str(folder)}, folder / "best.ckpt")
    if tested is not None:
        pattern = {
            "missing_type": config["missing_type"]["test"],
            "ratio": config["missing_ratio"]["test"],
            "both_ratio": config["both_ratio"],
            "seed": config["seed"],
        }
        results = {"task": task, "samples": 30, "missing_pattern": pattern, "metrics": {TASKS[task].monitor: tested}}
        (folder / "test_results.json").write_text(json.dumps(results))
    return folder


def at(missing_type: str, ratio: float) -> dict[str, Any]:
    """The options of a run that is trained, validated and tested at one pattern."""
    return {
        "missing_type": dict.fromkeys(("train", "val", "test"), missing_type),
        "missing_ratio": dict.fromkeys(("train", "val", "test"), ratio),
    }


def write_films(folder: Path, plots: list[list[str]], labels: np.ndarray, first_id: int = 0) -> None:
    """FOLDER/mmimdb_test.arrow: film `number` is `tt{first_id + number}`, its picture is of the grey `8 * number`."""
    images = []
    for number in range(len(plots)):
        file = io.BytesIO()
        Image.new("RGB", (100, 200), (8 * number,) * 3).save(file, "PNG")
        images.append(file.getvalue())
    columns = {
        "image": pa.array(images, pa.binary()),
        "plots": pa.array(plots, pa.list_(pa.string())),
        "label": pa.array(labels.tolist(), pa.list_(pa.int64())),
        "image_id": pa.array([f"tt{first_id + number}" for number in range(len(plots))]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.OSFile(str(folder / "mmimdb_test.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@dataclass(frozen=True)
class TestSet:
    """Samples of a made-up test set: film 3 has two plots and is two samples."""

    __test__ = False

    task: str = "mmimdb"
    films: int = 29

    @property
    def rows(self) -> list[int]:
        return sorted([*range(self.films), 3])

    @property
    def ids(self) -> list[str]:
        return [f"tt{row}" if self.task != "hatememes" else f"row {row}" for row in self.rows]

    @property
    def labels(self) -> np.ndarray:
        """Of the samples: (N, C) for MM-IMDb, whose last genre has no film, else (N,)."""
        rng = np.random.default_rng(0)
        n_classes = TASKS[self.task].n_classes
        if self.task == "mmimdb":
            genres_of_film = (rng.random((self.films, n_classes)) < 0.2).astype(np.uint8)
            genres_of_film[:, -1] = 0
            return genres_of_film[self.rows]
        return rng.integers(min(n_classes, 5), size=self.films)[self.rows]

    def logits(self, seed: int) -> dict[str, np.ndarray]:
        """Better than chance, the less so the more is missing."""
        rng = np.random.default_rng(seed + 1)
        labels, n_classes = self.labels, TASKS[self.task].n_classes
        target = labels if labels.ndim == 2 else np.eye(n_classes)[labels]
        return {
            name: (strength * (2.0 * target - 1) + rng.normal(size=target.shape)).astype(np.float32)
            for name, strength in zip(TYPE_NAMES, (2.0, 1.0, 0.6), strict=True)
        }

    def write(self, run: Path, seed: int = 0, **settings: Any) -> dict[str, Any]:
        """RUN/robustness for the logits of `seed`; returns what robustness.json holds."""
        return write_robustness(run, self.ids, self.rows, self.labels, self.logits(seed), **settings)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_robustness(
    run: Path,
    ids: list[str],
    rows: list[int],
    labels: np.ndarray,
    logits: dict[str, np.ndarray],
    ratios: tuple[float, ...] = RATIOS,
    table_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> dict[str, Any]:
    """Writes RUN/robustness for logits (N, C) by name of missing type; returns what robustness.json holds."""
    config = json.loads((run / "config.json").read_text())
    task = TASKS[config["task"]]
    classes = DATASETS[task.name].class_names or tuple(f"dish {number:03}" for number in range(task.n_classes))
    logits_TNC = torch.from_numpy(np.stack([logits[name] for name in TYPE_NAMES])).float()
    target = torch.from_numpy(labels)
    sha256 = sha256_of(run / "best.ckpt")
    row_of_sample = np.array(rows)

    def metrics_at(table_R: np.ndarray) -> dict[str, float]:
        type_N = torch.from_numpy(table_R[row_of_sample]).long()
        return task.metrics(logits_TNC[type_N, torch.arange(len(rows))], target)

    cells = []
    for missing_type in ("text", "image", "both"):
        for ratio in ratios:
            per_seed = []
            for seed in table_seeds:
                pattern = MissingPattern(missing_type, ratio, 0.5, seed)
                per_seed.append(metrics_at(draw_missing_table(task.name, "test", pattern, max(rows) + 1)))
            values = {metric: [found[metric] for found in per_seed] for metric in per_seed[0]}
            lost = {"text": (0, ratio), "image": (ratio, 0), "both": (ratio / 2, ratio / 2)}[missing_type]
            cells.append(
                {
                    "missing_type": missing_type,
                    "ratio": ratio,
                    "both_ratio": 0.5,
                    "image_available": 1 - lost[0],
                    "text_available": 1 - lost[1],
                    "metrics": {
                        metric: {
                            "mean": float(np.mean(found)),
                            "std": float(np.std(found, ddof=1)) if len(found) > 1 else 0.0,
                            "values": found,
                        }
                        for metric, found in values.items()
                    },
                }
            )
    by_type = {name: task.metrics(logits_TNC[number], target) for number, name in enumerate(TYPE_NAMES)}
    content: dict[str, Any] = {
        "format": 1,
        "task": task.name,
        "split": "test",
        "samples": len(rows),
        "method": config["prompt_type"],
        "exp_name": config["exp_name"],
        "train_seed": config["seed"],
        "train_pattern": {
            "missing_type": config["missing_type"]["train"],
            "ratio": config["missing_ratio"]["train"],
            "both_ratio": config["both_ratio"],
        },
        "checkpoint": "best.ckpt",
        "checkpoint_sha256": sha256,
        "precision": "32-true",
        "metric": task.monitor,
        "metrics": list(by_type["complete"]),
        "table_seeds": list(table_seeds),
        "class_names": list(classes),
        "cells": cells,
        "by_type": by_type,
        "confidence": {
            "level": 0.95,
            "resamples": 1000,
            **{
                name: {metric: [value - 0.03, value + 0.02] for metric, value in found.items()}
                for name, found in by_type.items()
            },
        },
        "per_class": _per_class(logits_TNC, target, classes) if task.name == "mmimdb" else [],
        "confusions": _confusions(logits_TNC, target, classes) if task.name == "food101" else [],
        "roc": _roc(logits_TNC, target, by_type) if task.name == "hatememes" else {},
    }
    folder = run / "robustness"
    folder.mkdir(exist_ok=True)
    (folder / "robustness.json").write_text(json.dumps(content))
    write_logits(folder / "logits.arrow", task.name, sha256, ids, rows, labels, logits)
    return content


def write_logits(
    path: Path,
    task: str,
    sha256: str,
    ids: list[str],
    rows: list[int],
    labels: np.ndarray,
    logits: dict[str, np.ndarray],
) -> None:
    """Writes a logits.arrow."""
    numbers = [rows[:place].count(row) for place, row in enumerate(rows)]
    multilabel = DATASETS[task].multilabel
    columns: dict[str, pa.Array] = {
        "sample": pa.array(range(len(rows)), pa.int64()),
        "row": pa.array(rows, pa.int64()),
        "id": pa.array(ids, pa.string()),
        "text_number": pa.array(numbers, pa.int64()),
        "label": pa.array(labels.tolist(), pa.list_(pa.uint8()) if multilabel else pa.int64()),
    }
    for name in TYPE_NAMES:
        columns[f"logits_{name.replace(' ', '_')}"] = pa.array(logits[name].tolist(), pa.list_(pa.float32()))
    described = {"format": 1, "task": task, "checkpoint_sha256": sha256}
    table = pa.table(columns).replace_schema_metadata({"rep": json.dumps(described)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _per_class(logits_TNC: torch.Tensor, target: torch.Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = []
    for type_name, logits_NC in zip(TYPE_NAMES, logits_TNC, strict=True):
        predicted = logits_NC > 0
        for number, name in enumerate(classes):
            hits = int((predicted[:, number] & (target[:, number] > 0)).sum())
            n_predicted, support = int(predicted[:, number].sum()), int(target[:, number].sum())
            entries.append(
                {
                    "type": type_name,
                    "class": name,
                    "precision": hits / max(1, n_predicted),
                    "recall": hits / max(1, support),
                    "f1": 2 * hits / max(1, n_predicted + support),
                    "support": support,
                }
            )
    return entries


def _confusions(logits_TNC: torch.Tensor, target: torch.Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = []
    for type_name, logits_NC in zip(TYPE_NAMES, logits_TNC, strict=True):
        counts: dict[tuple[int, int], int] = {}
        for true, predicted in zip(target.tolist(), logits_NC.argmax(-1).tolist(), strict=True):
            if true != predicted:
                counts[true, predicted] = counts.get((true, predicted), 0) + 1
        for (true, predicted), count in sorted(counts.items(), key=lambda item: -item[1])[:50]:
            share = count / int((target == true).sum())
            entries.append(
                {
                    "type": type_name,
                    "true": classes[true],
                    "predicted": classes[predicted],
                    "count": count,
                    "share": share,
                }
            )
    return entries


def _roc(logits_TNC: torch.Tensor, target: torch.Tensor, by_type: dict[str, dict[str, float]]) -> dict[str, Any]:
    found = {}
    for type_name, logits_NC in zip(TYPE_NAMES, logits_TNC, strict=True):
        scores = logits_NC.softmax(-1)[:, 1]
        thresholds = [2.0, *sorted(set(scores.tolist()), reverse=True)]
        found[type_name] = {
            "fpr": [float((scores[target == 0] >= threshold).float().mean()) for threshold in thresholds],
            "tpr": [float((scores[target == 1] >= threshold).float().mean()) for threshold in thresholds],
            "auroc": by_type[type_name]["auroc"],
        }
    return found
