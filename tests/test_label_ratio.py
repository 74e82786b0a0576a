"""Training on a share of the labelled samples (option `label_ratio`)."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from clip.modules.aoept import AOEPT
from clip.modules.interfaces import ModelInput
from engine.training import FinetuneModule
from run import command_line
from tests.conftest import Captured, Patch, Workspace, read_json
from tests.data_files import data_settings, films, write
from tests.test_datamodules import SIZE, tokenize
from vilt.datamodules import DataSettings, MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import InputFormat
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern

FILMS = films([[str(row)] * (1 + row % 3) for row in range(40)])
PATTERN = MissingPattern("both", 0.7, 0.5, 0)


def open_training(settings: DataSettings) -> MissingModalityData:
    return MissingModalityData(settings, ["train"], InputFormat(SIZE, tokenize, "numbers"))


def names(dataset: ArrowDataset) -> list[str]:
    return [dataset.sample_name(index) for index in dataset.chosen.tolist()]


def test_a_share_is_drawn_from_the_seed_by_name_and_contains_smaller_ones(tmp_path: Path) -> None:
    write(tmp_path / "mmimdb_train.arrow", FILMS)
    settings = data_settings("mmimdb", tmp_path, PATTERN)
    whole, half, tenth = (open_training(replace(settings, label_ratio=ratio)) for ratio in (1, 0.5, 0.1))
    everything, chosen, fewer = (data.datasets["train"] for data in (whole, half, tenth))
    assert len(everything.chosen) == len(everything) and len(set(names(chosen))) == 20 and len(set(names(fewer))) == 4
    assert set(names(fewer)) < set(names(chosen)), "nested"
    for name in set(names(chosen)):
        assert names(chosen).count(name) == names(everything).count(name), "a film keeps all its texts"
    assert np.array_equal(chosen.missing_table, everything.missing_table), "what a film loses does not depend on it"
    for epoch in range(2):
        sampler = half._sampler("train", 0, 1)
        sampler.set_epoch(epoch)
        assert sorted(index for _, index in sampler) == chosen.chosen.tolist()
    shares = [half._sampler("train", rank, 2) for rank in range(2)]
    assert {index for share in shares for _, index in share} == set(chosen.chosen)
    assert half.steps_per_epoch(1) == -(-len(chosen.chosen) // 2)
    assert "label_ratio=0.1: training uses" in tenth.describe() and "label_ratio" not in whole.describe()

    other_seed = open_training(replace(settings, label_ratio=0.5, seed=1)).datasets["train"]
    assert set(names(other_seed)) != (expected := set(names(chosen)))
    write(tmp_path / "mmimdb_train.arrow", FILMS.take(pa.array(range(39, -1, -1))))
    assert set(names(open_training(replace(settings, label_ratio=0.5)).datasets["train"])) == expected


RUNS: dict[str, tuple[str, ...]] = {
    "rep": ("prompt_type=rep",),
    "neighbours": ("prompt_type=none", "neighbours=3"),
    "aoept": ("prompt_type=aoept", "aoept_prototypes=4"),
    "taught": ("prompt_type=none", "teacher={}/best.ckpt"),
}


@pytest.mark.parametrize("method", RUNS)
def test_a_training_sees_its_share_alone(method, workspace: Workspace, fitted, tmp_path, monkeypatch: Patch) -> None:
    seen, read, banks = set(), [], []
    step, see = FinetuneModule.training_step, AOEPT.see

    def looking(module: FinetuneModule, batch: Any, batch_idx: int) -> Any:
        seen.update(batch.index_B.tolist())
        if (bank := module.classifier.neighbours) is not None:
            banks.append(bank.get_buffer("present_NM").any(1).nonzero().flatten().tolist())
        return step(module, batch, batch_idx)

    def noted(self: AOEPT, model: Any, batches: Iterable[ModelInput]) -> None:
        read.extend(kept := list(batches))
        see(self, model, kept)

    monkeypatch.setattr(FinetuneModule, "training_step", looking)
    monkeypatch.setattr(AOEPT, "see", noted)
    places = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "exp_name=few")
    own = [option.format(fitted) for option in RUNS[method]]
    assert command_line(workspace.command(*places, "label_ratio=0.3", *own)) == 0
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "train")
    dataset.choose(0.3, seed=0)
    chosen = dataset.chosen.tolist()
    assert 12 <= len(chosen) < 20 and sorted(seen) == chosen
    assert read_json(tmp_path / "few_seed0" / "version_0" / "config.json")["label_ratio"] == 0.3
    if method == "aoept":
        indices = torch.cat([batch.index_B for batch in read if batch.index_B is not None])
        assert sorted(indices.tolist()) == chosen
    assert all(bank == chosen for bank in banks) and bool(banks) is (method == "neighbours")


def test_a_run_on_another_share_is_not_resumed(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    places = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "exp_name=few", "max_epoch=1", "resume_from=auto")
    for ratio in (0.3, 0.5):
        assert command_line(workspace.command(*places, f"label_ratio={ratio}")) == 0
    said = capsys.readouterr().err
    assert "label_ratio (there 0.3, here 0.5)" in said
    assert "mmimdb_train.arrow: with label_ratio=0.3, no sample is of class " in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("label_ratio=0",), "label_ratio: expected a number above 0 and at most 1, found 0"),
        (("label_ratio=1.5",), "label_ratio: expected a number above 0 and at most 1, found 1.5"),
        (
            ("label_ratio=0.01",),
            "expected at least one sample for each of the 1 processes, found 0 in train; use a larger label_",
        ),
    ],
)
def test_a_share_without_samples_is_refused(workspace: Workspace, capsys: Captured, options, said) -> None:
    assert command_line(workspace.command(f"vit={workspace.backbone}", *options)) == 2
    assert said in capsys.readouterr().err
