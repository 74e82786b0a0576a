"""Optimiser steps: the weights of batches and samples, and the learning rate, also in a resumed run."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.optimization import AdamW, OptimizerSettings, make_schedule, schedule_steps, weight_in_step
from tests.conftest import Workspace, read_csv
from tests.custom_files import convert, write_labelled


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    ("samples", "size", "accumulation"), [(18, 8, 1), (18, 4, 2), (17, 2, 3), (7, 4, 8), (3, 1, 2)]
)
def test_the_loss_of_a_step_is_the_mean_over_its_samples(samples, size, accumulation, processes):
    """Losses are added as Lightning does, each sample's loss being its place in the epoch; repeats do not count."""
    share = -(-samples // processes)
    batches = -(-share // size)
    for first in range(0, batches, accumulation):
        found, in_step, weights = 0.0, set[int](), list[float]()
        for batch in range(first, min(batches, first + accumulation)):
            for rank in range(processes):
                places = [place * processes + rank for place in range(batch * size, min(share, (batch + 1) * size))]
                counted, weight = weight_in_step(batch, size, accumulation, samples, rank, processes)
                found += weight * sum(places[:counted]) / counted / accumulation / processes
                in_step |= {place for place in places if place < samples}
                weights.append(weight)
        if len(in_step) == size * accumulation * processes:
            assert set(weights) == {1}, "same bits as without weights"
        assert found == pytest.approx(sum(in_step) / len(in_step))


def rates(settings: OptimizerSettings, total: int, steps: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([parameter], settings.learning_rate, (0.9, 0.98), 1e-8)
    scheduler = make_schedule(optimizer, settings, total)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("power", [1, 2.0, "cosine"])
def test_the_rate_rises_then_falls_to_end_lr_and_stays_there(power: float | str) -> None:
    found = rates(OptimizerSettings("adamw", 1.0, 1, 0, 0.2, 0.1, power), 10, 14)
    assert found[:3] == [0, 0.5, 1]
    assert all(before > after for before, after in pairwise(found[2:11]))
    assert found[10:] == pytest.approx([0.1] * 4)
    halfway = {1: 0.55, 2.0: 0.1 + 0.9 / 4, "cosine": 0.55}
    assert found[6] == pytest.approx(halfway[power])


@pytest.mark.parametrize("warmup", [5, 6, 1000])
def test_a_warm_up_may_be_longer_than_the_training(warmup: int) -> None:
    found = rates(OptimizerSettings("adamw", 1.0, 1, 0, warmup, 0, 1), 5, 7)
    assert found[:5] == [step / warmup for step in range(5)]


def test_the_schedule_spans_the_batches_of_all_epochs_rounded_down() -> None:
    for taken, as_published in ((21, True), (24, False)):  # the published code does not count three of the steps
        assert schedule_steps(21, 4, 4, None, as_published=as_published) == taken
        assert schedule_steps(21, 4, 4, 100, as_published=as_published) == taken
    assert schedule_steps(21, 4, 4, 10, as_published=True) == 10
    assert schedule_steps(1, 2, 8, None, as_published=True) == 1
    found = rates(OptimizerSettings("adamw", 1.0, 1, 0, 0.1, 0, 1), 21, 24)
    assert found[:3] == [0, 0.5, 1] and found[20] > 0 and found[21:] == [0, 0, 0]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrow files with 18 training samples: two steps of 8 and one of 2."""
    root = tmp_path_factory.mktemp("uneven")
    spec = write_labelled(root / "raw", {"train": 18, "val": 4, "test": 4}, ["green", "red"])
    assert convert(root / "raw", root / "arrow", "--spec", str(spec)) == 0
    return root / "arrow"


def trained(workspace: Workspace, data_root: Path, log_dir: Path, name: str, *options: str) -> Path:
    common = ("prompt_type=none", "val_check_interval=1.0", "test_after_fit=False")
    return workspace.train(name, *common, *options, log_dir=log_dir, task="custom", data_root=data_root)


def test_accumulation_does_not_change_a_step(workspace: Workspace, uneven: Path, tmp_path: Path) -> None:
    states = []
    for size in (8, 4):
        folder = trained(workspace, uneven, tmp_path, f"of_{size}", f"per_gpu_batchsize={size}")
        states.append(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-6)


def test_a_resumed_run_follows_its_own_schedule_and_optimiser_options(workspace, uneven, tmp_path, capsys):
    first = trained(workspace, uneven, tmp_path, "first")
    longer = ("max_epoch=4", "learning_rate=0.02", "weight_decay=0.5", f"resume_from={first / 'last.ckpt'}")
    folder = trained(workspace, uneven, tmp_path, "longer", *longer)
    said = capsys.readouterr().err
    assert all(f"{name} (there " in said for name in ("learning_rate", "max_epoch", "weight_decay"))
    assert "resumed at step 6; learning rate 0.0109, by this run's schedule (12 steps)" in said
    rows = read_csv(folder / "metrics.csv")
    found = {int(row["step"]): float(row["lr-AdamW/pg1"]) for row in rows if row["lr-AdamW/pg1"]}
    assert found == pytest.approx({step: 0.02 * (12 - step) / 11 for step in range(6, 12)})
    [optimizer] = torch.load(folder / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.5}
