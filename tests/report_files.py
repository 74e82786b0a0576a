"""Made-up run folders, with robustness results from made-up logits, in the formats that run.py writes."""

import hashlib
import html
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from engine.robustness import Subject, measure, write_results
from engine.stored_logits import SplitLogits
from engine.tasks import TASKS
from tests.data_files import TYPE_NAMES
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern

RATIOS = (0.0, 0.5, 0.7, 1.0)
VIT_B16 = {"image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "text_layers": 12}
STARTED = 1_790_000_000
"""Modification time of the made-up runs' config.json."""


def write_run(
    folder: Path, task: str = "mmimdb", tested: float | None = 0.5, rows: int | None = None, **options: Any
) -> Path:
    """Writes a finished run with made-up numbers: `options` override defaults; test result `tested` on `rows` rows."""
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
        "machine": {"host": "secret", "platform": "Linux-6.1", "cores": 2, "gpus": ["NVIDIA H100"]},
        "git": {"commit": "0123456789abcdef0123", "changed": [" M run.py"]},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    monitor = f"val/{TASKS[task].monitor}"
    lines = [f"epoch,step,train/loss,{monitor}"]
    lines += [f"0,{step},{1 / (step + 1)},{0.1 * (step + 1)}" for step in range(4)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    described = {"architecture": VIT_B16, "backbone": {"name": config["vit"]}}
    torch.save({"score": 0.4, "state_dict": {}, "made_for": str(folder), "rep": described}, folder / "best.ckpt")
    if tested is not None:
        pattern = {
            "missing_type": config["missing_type"]["test"],
            "ratio": config["missing_ratio"]["test"],
            "both_ratio": config["both_ratio"],
            "seed": config["seed"],
        }
        results = {"task": task, "samples": 30, "missing_pattern": pattern, "metrics": {TASKS[task].monitor: tested}}
        results |= {} if rows is None else {"rows": rows}
        (folder / "test_results.json").write_text(json.dumps(results))
    return folder


def at(missing_type: str, ratio: float) -> dict[str, Any]:
    """Options of a run that is trained, validated and tested at one pattern."""
    return {
        "missing_type": dict.fromkeys(("train", "val", "test"), missing_type),
        "missing_ratio": dict.fromkeys(("train", "val", "test"), ratio),
    }


@dataclass(frozen=True)
class TestSet:
    """Samples of a made-up test set; film 3 has two plots and so counts as two samples."""

    __test__ = False

    task: str = "mmimdb"
    films: int = 29
    first_id: int = 0

    @property
    def rows(self) -> list[int]:
        return sorted([*range(self.films), 3])

    @property
    def ids(self) -> list[str]:
        return [f"tt{self.first_id + row}" if self.task != "hatememes" else f"row {row}" for row in self.rows]

    @property
    def labels(self) -> np.ndarray:
        """Labels of the samples: (N, C) for MM-IMDb, whose last genre has no film, else (N,)."""
        rng = np.random.default_rng(0)
        n_classes = TASKS[self.task].n_classes
        if self.task == "mmimdb":
            genres_of_film = (rng.random((self.films, n_classes)) < 0.2).astype(np.uint8)
            genres_of_film[:, -1] = 0
            return genres_of_film[self.rows]
        return rng.integers(min(n_classes, 5), size=self.films)[self.rows]

    def logits(self, seed: int) -> dict[str, np.ndarray]:
        """Logits better than chance, the less so the more is missing."""
        rng = np.random.default_rng(seed + 1)
        labels, n_classes = self.labels, TASKS[self.task].n_classes
        target = labels if labels.ndim == 2 else np.eye(n_classes)[labels]
        return {
            name: (strength * (2.0 * target - 1) + rng.normal(size=target.shape)).astype(np.float32)
            for name, strength in zip(TYPE_NAMES, (2.0, 1.0, 0.6), strict=True)
        }

    def write(
        self, run: Path, seed: int = 0, logits: dict[str, np.ndarray] | None = None, offset: float | None = None
    ) -> dict[str, Any]:
        """Writes RUN/robustness for `logits`, (N, C) keyed by missing type; returns the content of robustness.json."""
        found, rows = logits or self.logits(seed), self.rows
        logits_TNC = torch.from_numpy(np.stack([found[name] for name in TYPE_NAMES])).float()
        split = SplitLogits(np.array(rows), max(rows) + 1, torch.from_numpy(self.labels), logits_TNC)
        classes = DATASETS[self.task].class_names or [f"dish {number:03}" for number in range(logits_TNC.shape[-1])]
        content = write_measured(run, split, classes, ("text", "image", "both"), RATIOS, ("image", "text"), offset)
        self.write_logits(run, found)
        return content

    def write_logits(self, run: Path, logits: dict[str, np.ndarray], sha256: str = "") -> None:
        """Writes RUN/robustness/logits.arrow for the checkpoint with digest `sha256`, by default RUN/best.ckpt."""
        rows = self.rows
        columns: dict[str, pa.Array] = {
            "sample": pa.array(range(len(rows)), pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "id": pa.array(self.ids, pa.string()),
            "text_number": pa.array([rows[:place].count(row) for place, row in enumerate(rows)], pa.int64()),
            "label": pa.array(self.labels.tolist(), pa.list_(pa.uint8()) if self.labels.ndim == 2 else pa.int64()),
        }
        for name in TYPE_NAMES:
            columns[f"logits_{name.replace(' ', '_')}"] = pa.array(logits[name].tolist(), pa.list_(pa.float32()))
        described = {"format": 1, "task": self.task, "checkpoint_sha256": sha256 or sha256_of(run / "best.ckpt")}
        table = pa.table(columns).replace_schema_metadata({"rep": json.dumps(described)})
        write_arrow(run / "robustness" / "logits.arrow", table)

    def write_films(self, folder: Path, plots: list[list[str]], other_labels: bool = False) -> None:
        """Writes the samples to FOLDER/mmimdb_test.arrow; the image of film `number` is grey, level `8 * number`."""
        images = []
        for number in range(self.films):
            file = io.BytesIO()
            Image.new("RGB", (100, 200), (8 * number,) * 3).save(file, "PNG")
            images.append(file.getvalue())
        labels = self.labels[[self.rows.index(row) for row in range(self.films)]]
        columns = {
            "image": pa.array(images, pa.binary()),
            "plots": pa.array(plots, pa.list_(pa.string())),
            "label": pa.array((1 - labels if other_labels else labels).tolist(), pa.list_(pa.int64())),
            "image_id": pa.array([f"tt{self.first_id + number}" for number in range(self.films)]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_arrow(folder / "mmimdb_test.arrow", pa.table(columns))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_measured(
    run: Path,
    split: SplitLogits,
    classes: Sequence[str],
    missing_types: Sequence[str],
    ratios: Sequence[float],
    modalities: tuple[str, ...],
    offset: float | None = None,
) -> dict[str, Any]:
    """Writes RUN/robustness for a split's logits, two missing tables per pattern; returns robustness.json's content."""
    config, best = json.loads((run / "config.json").read_text()), run / "best.ckpt"
    patterns = [
        [MissingPattern(kind, ratio, 0.5, seed) for seed in (0, 1)] for kind in missing_types for ratio in ratios
    ]
    run_facts = (config["prompt_type"], config["exp_name"], config["seed"], None, "32-true", TASKS[config["task"]])
    data_facts = (modalities, tuple(classes), run / "missing_tables", config["task"], offset)
    content = measure(Subject(best, sha256_of(best), *run_facts, *data_facts), split, patterns, resamples=10)
    content["confidence"] = {"level": 0.95, "resamples": 1000} | {
        name: {metric: [value - 0.03, value + 0.02] for metric, value in found.items()}
        for name, found in content["by_type"].items()
    }
    (run / "robustness").mkdir(exist_ok=True)
    write_results(content, run / "robustness")
    return content


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


HOSTILE = (
    """<script>alert("x")</script>'"> <img src=x onerror=alert(1)> | `code` *stars* [a](http://b) {{ 7 * 7 }} $x$ _"""
)
PLOTS = [[f"Plot of film {number}, with words enough."] for number in range(29)]
PLOTS[3:5] = [["The first plot of film 3.", HOSTILE], [HOSTILE]]


def write_runs(root: Path) -> Path:
    """Two seeds at 70 % both with results and images, a run at 90 % text without, and runs on two other datasets."""
    TestSet().write_films(root / "films", PLOTS)
    for seed, name in ((0, "rep"), (1, HOSTILE)):
        options: dict[str, Any] = {"seed": seed, "exp_name": name, "data_root": str(root / "films")}
        run = write_run(root / "mmimdb" / f"rep_seed{seed}" / "version_0", tested=0.4 + seed / 100, **options)
        TestSet().write(run, seed)
    write_run(root / "mmimdb" / "text_seed0" / "version_0", tested=0.52, **at("text", 0.9))
    for task in ("food101", "hatememes"):
        run = write_run(root / "others" / f"{task}_seed0" / "version_0", task, exp_name=task)
        TestSet(task).write(run)
    return root


def page_text(report: Path) -> str:
    """Visible text of a report's page, one heading or paragraph per line."""
    page = re.sub(r"<style>.*?</style>|<[^>]*>", "", (report / "index.html").read_text("utf-8"), flags=re.DOTALL)
    return html.unescape(page).replace("\N{NO-BREAK SPACE}", " ")


def edit_json(run: Path, name: str, **changes: Any) -> Path:
    """Changes values in one of the run's JSON files; returns `run`."""
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))
    return run
