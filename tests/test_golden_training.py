"""Whole trainings reproduce the published implementation's losses, learning rates and parameters.

Runs over every `.npz` with a `meta` in GOLDEN_TRAINING_DIR (default: tests/data/golden/training), in float64 and
without dropout, through the program's own module, optimiser and schedule, and Lightning's loop. Initial values and
inputs are generated from a tag, see `tests/golden.py`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.sides import VIT_B16
from clip.modules.method import MethodOptions
from clip.published_queries import published_queries
from engine.checkpoint import ModelSpec
from engine.optimization import OptimizerSettings
from engine.published_checkpoint import model_names
from engine.tasks import TASKS
from engine.training import FinetuneModule
from tests import golden
from tests.conftest import Patch
from tests.models import classifier_of, published_name
from vilt.batches import Batch

DIR = Path(os.environ.get("GOLDEN_TRAINING_DIR") or golden.GOLDEN_DIR / "training")


def meta_of(path: Path) -> dict[str, Any] | None:
    with np.load(path) as file:
        return json.loads(str(file["meta"])) if "meta" in file.files else None


class Samples:
    """Loader of each epoch's batches, in the order of the published run."""

    def __init__(self, meta: dict[str, Any], order: np.ndarray) -> None:
        self.meta, self.order = meta, order
        self.sampler = self  # Lightning calls the sampler's set_epoch
        self.set_epoch(0)
        weights = golden.load_module(golden.GOLDEN_DIR / "weights.py")
        task = TASKS[meta["task"]]
        inputs = weights.inputs(meta["tag"], meta["missing_type"], meta["resolution"], task.name, task.n_classes)
        self.tokens, self.images, self.labels = map(torch.from_numpy, inputs)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.meta["samples"] // self.meta["per_gpu_batchsize"])

    def __iter__(self) -> Iterator[Batch]:
        order, size = torch.from_numpy(self.order[self.epoch]), self.meta["per_gpu_batchsize"]
        return (self.batch(indices) for indices in order.split(size))

    def batch(self, indices: torch.Tensor) -> Batch:
        kinds = torch.tensor(self.meta["missing_type"])[indices]
        image_rows, text_rows = (kinds != 2).nonzero().flatten(), (kinds != 1).nonzero().flatten()
        tokens_bL = self.tokens[indices][text_rows]
        return Batch(
            inputs={"image": self.images[indices][image_rows].double(), "text": tokens_bL},  # normalised
            rows={"image": image_rows, "text": text_rows},
            present_BM=torch.stack([kinds != 2, kinds != 1], dim=1),
            types=tuple(sorted(set(kinds.tolist()))),
            lengths={"text": int(tokens_bL.argmax(-1).max()) + 1} if len(text_rows) else {},
            length_b={},
            source_of_B={},
            label=self.labels[indices],
            index_B=indices,
        )


class Record(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("path", [path for path in sorted(DIR.glob("*.npz")) if meta_of(path)], ids=lambda p: p.stem)
def test_a_training_reproduces_the_published_one(path: Path, monkeypatch: Patch) -> None:
    meta = meta_of(path)
    assert meta is not None
    with np.load(path) as file:
        order, losses, rates = (file[name] for name in ("order", "loss", "rate"))
    task = TASKS[meta["task"]]
    options = MethodOptions(meta["method"], meta["memory_length"], meta["memory_depth"])
    shapes = golden.shapes(task.name, options, golden.architecture(meta["layers"], meta["layers"], meta["resolution"]))
    weights = golden.load_module(golden.GOLDEN_DIR / "weights.py")
    state = {
        name: torch.from_numpy(np.asarray(weights.parameter(meta["tag"], name, shape))).double()
        for name, shape in shapes.items()
    }
    classifier = classifier_of(state, task.name, options).double()
    classifier.load_state_dict(model_names(state))
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    schedule = {name: meta[name] for name in ("learning_rate", "lr_mult", "weight_decay", "warmup_steps")}
    settings = OptimizerSettings("adamw", **schedule, end_lr=meta["end_lr"], decay_power=meta["decay_power"])
    module = FinetuneModule(classifier, ModelSpec(task.name, options, VIT_B16), settings=settings)
    record = Record()
    given: dict[str, Any] = {"max_epochs": meta["epochs"], "accumulate_grad_batches": meta["accumulation"]}
    given["val_check_interval"] = 2 * meta["accumulation"]  # validating must not change the training
    given |= {f"enable_{feature}": False for feature in ("checkpointing", "progress_bar", "model_summary")}
    given |= {"accelerator": "cpu", "precision": "64-true", "num_sanity_val_steps": 0, "logger": False}
    trainer = pl.Trainer(callbacks=[record], **given)
    samples = Samples(meta, order)
    trainer.fit(module, samples, DataLoader([samples.batch(torch.arange(2))], batch_size=None))  # type: ignore[arg-type]

    assert record.losses == pytest.approx(losses.tolist(), rel=1e-9)
    assert [group_rates[0] for group_rates in record.rates] == pytest.approx(rates.tolist(), rel=1e-9)
    assert all(set(group_rates) == {group_rates[0]} for group_rates in record.rates)  # lr_mult is 1

    named = {published_name(name): parameter for name, parameter in classifier.named_parameters()}
    names = {id(parameter): name for name, parameter in named.items()}
    never_moves = {name for name, moved in meta["moved"].items() if moved == 0}  # we do not train these
    groups = trainer.optimizers[0].param_groups
    found = [(group["weight_decay"], sorted(names[id(p)] for p in group["params"])) for group in groups]
    expected = [(group["weight_decay"], sorted(set(group["parameters"]) - never_moves)) for group in meta["groups"]]
    assert found == expected
    for name, norm in meta["final_norm"].items():
        value = named[name].detach()
        if name not in never_moves:
            assert float(value.norm()) == pytest.approx(norm, rel=1e-8), name
            head = [float(x) for x in value.flatten()[:4]]
            assert head == pytest.approx(meta["final_head"][name], rel=1e-8, abs=1e-10), name
            moved = float((value - state[name]).norm())
            assert moved == pytest.approx(meta["moved"][name], rel=1e-8), name


def test_published_queries_are_redrawn_from_the_seed() -> None:
    queries, other = (published_queries(VIT_B16, 12, seed) for seed in (0, 1))
    with np.load(DIR / "queries_seed0_vitb16.npz") as file:
        published = {published_name(f"model.memory_learner.dynamic.{name}"): query for name, query in queries.items()}
        assert published.keys() == {f"model.{name}" for name in file.files}
        for name, query in published.items():
            assert np.array_equal(query.numpy(), file[name.removeprefix("model.")]), name
    assert not any(torch.equal(query, other[name]) for name, query in queries.items())
