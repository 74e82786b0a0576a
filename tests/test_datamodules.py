"""Batches, their order and division among processes, and resuming after an interruption."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.errors import ConfigError, DataError
from tests.data_files import assert_equal, data_settings, films, memes, types_of, write
from vilt.batches import collate
from vilt.datamodules import DataSettings, EpochSampler, MissingModalityData
from vilt.datasets.arrow_dataset import Sample
from vilt.datasets.kinds import InputFormat, kinds_of
from vilt.datasets.specs import DATASETS, SPLITS, Split
from vilt.missing_tables import MissingPattern, draw_missing_table

SIZE = 8
BOTH = MissingPattern("both", 0.5, 0.5, 0)


def tokenize(texts: Sequence[str]) -> np.ndarray:
    """Encodes each text, a number, as 77 copies of that number."""
    return np.array([[int(text)] * 77 for text in texts])


def write_memes(folder: Path, split: Split, rows: int, images: dict[int, bytes] | None = None) -> None:
    write(folder / DATASETS["hatememes"].file_name(split), memes(rows, images, "{}"))


@dataclass
class Processes:
    """The trainer attributes that the loaders read."""

    global_rank: int
    world_size: int


def open_data(settings: DataSettings, *splits: Split) -> MissingModalityData:
    return MissingModalityData(settings, splits, InputFormat(SIZE, tokenize, "numbers"))


def sample(number: int, missing_type: int, label: Any = 1) -> Sample:
    inputs = {"image": torch.full((3, 2, 2), number, dtype=torch.uint8), "text": torch.tensor([number, number + 1, 0])}
    if missing_type:
        del inputs["text" if missing_type == 1 else "image"]
    return Sample(
        inputs, torch.tensor(label) if isinstance(label, int) else torch.tensor(label, dtype=torch.uint8), number
    )


MEME_KINDS = kinds_of(DATASETS["hatememes"])


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("types", [[2, 0, 1, 0], [2, 2], [1]], ids=["all types", "no image", "no text"])
def test_batches_leave_out_missing_inputs(types, once):
    samples = [sample(5 + row, kind, [0, row, 1]) for row, kind in enumerate(types)]
    batch = collate(MEME_KINDS, samples, once=once)
    for name, lost in (("image", 2), ("text", 1)):
        rows = [row for row, kind in enumerate(types) if kind != lost]
        empty = torch.empty(0, 3, 0, 0, dtype=torch.uint8) if name == "image" else torch.empty(0, 0, dtype=torch.int64)
        inputs = torch.stack([samples[row].inputs[name] for row in rows]) if rows else empty
        assert_equal([batch.rows[name], batch.inputs[name]], [torch.tensor(rows, dtype=torch.int64), inputs])
    assert types_of(batch) == types and batch.types == tuple(sorted(set(types)))
    assert batch.lengths == ({"text": 2} if types != [1] else {}) and not batch.source_of_B and not batch.length_b
    assert_equal(batch.label, torch.tensor([[0, row, 1] for row in range(len(types))], dtype=torch.uint8))
    assert batch.index_B.tolist() == list(range(5, 5 + len(types)))


def test_a_shared_image_is_in_an_evaluation_batch_once():
    first, second, third, fourth = sample(5, 0), sample(6, 2), sample(7, 1), sample(8, 0)
    samples = [first, second, third._replace(inputs={"image": first.inputs["image"]}), fourth]
    apart = collate(MEME_KINDS, samples)
    once = apart._replace(
        inputs={**apart.inputs, "image": torch.stack([first.inputs["image"], fourth.inputs["image"]])},
        rows={**apart.rows, "image": torch.tensor([0, 3])},
        source_of_B={"image": torch.tensor([0, 1, 0, 3])},
    )
    assert_equal(collate(MEME_KINDS, samples, once=True), once)


def shares(samples: int, world: int, seed: int | None, epoch: int = 0, **more: Any) -> list[list[int]]:
    result = []
    for rank in range(world):
        sampler = EpochSampler(samples, seed=seed, rank=rank, world_size=world, **more)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert {key[0] for key in keys} <= {epoch}
        result.append([key[1] for key in keys])
    return result


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8, 9, 16, 101])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_processes_take_samples_in_turn(samples: int, world: int) -> None:
    """In evaluation each sample counts once; in training, the first samples repeat until shares are equally long."""
    parts = shares(samples, world, None, epoch=3)
    assert parts == [list(range(rank, samples, world)) for rank in range(world)]
    assert shares(samples, world, None, order=np.arange(samples)[::-1]) == [
        list(range(samples))[::-1][rank::world] for rank in range(world)
    ]
    (alone,), parts = shares(samples, 1, seed=4, epoch=2), shares(samples, world, seed=4, epoch=2)
    assert sorted(alone) == list(range(samples)) and {len(part) for part in parts} == {-(-samples // world)}
    in_turn = [index for turn in zip(*parts, strict=True) for index in turn]
    assert in_turn == [alone[place % samples] for place in range(len(in_turn))]


def test_the_order_is_the_recorded_one():
    assert shares(10, 1, seed=0, epoch=0) == [[4, 1, 7, 5, 3, 9, 0, 8, 6, 2]]
    assert shares(10, 1, seed=1, epoch=3) == [[2, 7, 8, 4, 5, 3, 6, 0, 9, 1]]


@pytest.mark.parametrize("rank", [0, 1])
def test_skip_omits_the_start_of_one_epoch_only(rank: int) -> None:
    sampler, whole = EpochSampler(21, seed=3, rank=rank, world_size=2), {}
    for epoch in range(3):
        sampler.set_epoch(epoch)
        whole[epoch] = list(sampler)
    sampler.skip = (1, 4)
    for epoch, expected in ((0, whole[0]), (1, whole[1][4:]), (2, whole[2])):
        sampler.set_epoch(epoch)
        assert list(sampler) == expected
    sampler.skip = (2, 11)
    assert list(sampler) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, rows in zip(SPLITS, (11, 7, 9), strict=True):
        write_memes(tmp_path, split, rows)
    return tmp_path


def test_each_split_has_its_own_pattern(folder):
    patterns: dict[Split, MissingPattern] = {
        "train": MissingPattern("both", 0.7, 0.5, 1),
        "val": MissingPattern("text", 0.5, 0.5, 1),
        "test": MissingPattern("image", 0.9, 0.5, 1),
    }
    drawn: dict[str, Any] = {"simulate_missing": True, "modality_dropout": 0.25, "seed": 6}
    data = open_data(data_settings("hatememes", folder, BOTH, patterns=patterns, **drawn), *SPLITS)
    for split, pattern in patterns.items():
        dataset = data.datasets[split]
        assert np.array_equal(dataset.missing_table, draw_missing_table("hatememes", split, pattern, dataset.n_rows))
    assert [data.datasets[split].simulate_seed for split in SPLITS] == [6, None, None], "in training only"
    assert [data.datasets[split].modality_dropout[0] for split in SPLITS] == [0.25, 0, 0], "in training only"
    assert len(list((folder / "tables").iterdir())) == 3
    assert data.describe() == (
        "  train       11 samples (4 complete, 4 text missing, 3 image missing)\n"
        "  val          7 samples (4 complete, 3 text missing, 0 image missing)\n"
        "  test         9 samples (1 complete, 0 text missing, 8 image missing)\n"
        f"  missing modalities in training: {data.training_missing}"
    )
    assert data.training_missing.endswith("; modality dropout 0.25")


def test_missing_types_are_counted_in_rows(folder: Path) -> None:
    """Naturally missing ones too; a film with three plots counts once."""
    table = films([["a", "b", "c"], ["d"], ["e"]])
    images = pa.array([None, *table["image"].to_pylist()[1:]])
    write(folder / "mmimdb_test.arrow", table.set_column(0, "image", images))
    settings = data_settings("mmimdb", folder, MissingPattern("both", 0, 0.5, 0))
    data = MissingModalityData(settings, ("test",), InputFormat(SIZE))
    rows = "(2 complete, 0 text missing, 1 image missing; naturally 1 image missing)"
    assert data.describe() == f"  test         5 samples of 3 rows {rows}"


def test_only_the_requested_splits_are_opened(folder):
    (folder / "hatememes_train.arrow").unlink()
    (folder / "hatememes_dev.arrow").write_bytes(b"")
    assert list(open_data(data_settings("hatememes", folder, BOTH), "test").datasets) == ["test"]
    with pytest.raises(DataError, match=r"hatememes_train\.arrow: no such file"):
        open_data(data_settings("hatememes", folder, BOTH), "train", "test")


def test_evaluation_batches_hold_the_samples_in_order(folder):
    data = open_data(data_settings("hatememes", folder, BOTH, per_gpu_batchsize=4), "test")
    dataset = data.datasets["test"]
    batches = list(data.test_dataloader())
    assert [batch.index_B.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    for batch in batches:
        assert_equal(batch, collate(MEME_KINDS, [dataset[0, index] for index in batch.index_B.tolist()]))


def test_a_pass_begun_early_is_the_next_one_read(folder: Path) -> None:
    """Loader workers start on it at once and keep to the epoch of that moment."""
    data = open_data(data_settings("hatememes", folder, BOTH, num_workers=1), "train")
    loader = data.train_dataloader()
    sampler, reading = loader.sampler, data.datasets["train"].reading
    assert isinstance(sampler, EpochSampler) and reading is not None
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] != orders[1]
    loader.begin()
    deadline = time.monotonic() + 60
    while reading[0, 1] < 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading[0, 1] in orders[1][:4], "nobody has asked for a batch yet"
    sampler.set_epoch(0)
    for wanted in (orders[1], orders[0]):
        assert [index for batch in loader for index in batch.index_B.tolist()] == wanted


@pytest.mark.parametrize("world", [1, 3, 8])
def test_processes_together_evaluate_each_sample_once_and_train_equally_many(folder, world):
    data = open_data(data_settings("hatememes", folder, BOTH), *SPLITS)
    seen: dict[str, list[int]] = {"val": [], "test": [], "train": []}
    for rank in range(world):
        data.trainer = Processes(rank, world)  # type: ignore[assignment]
        loaders = {"val": data.val_dataloader(), "test": data.test_dataloader(), "train": data.train_dataloader()}
        for split, loader in loaders.items():
            batches = list(loader)
            assert len(batches) == len(loader)
            seen[split] += [index for batch in batches for index in batch.index_B.tolist()]
        assert len(loaders["train"]) == data.steps_per_epoch(world)
    assert (sorted(seen["val"]), sorted(seen["test"])) == (list(range(7)), list(range(9)))
    assert set(seen["train"]) == set(range(11))


@pytest.mark.parametrize(
    ("changes", "rows_now", "found"),
    [
        ({"per_gpu_batchsize": 3}, 11, "samples per batch = 2, now it is 3"),
        ({}, 12, "samples = 11, now it is 12"),
        ({"seed": 1}, 11, "with seed = 0, now it is 1"),
        ({"order_seed": 1}, 11, "order seed = 0, now it is 1"),
    ],
)
def test_a_run_with_a_different_sample_order_is_not_resumed(folder, changes, rows_now, found):
    """tests/test_run.py covers resuming whole runs from every place."""
    before = open_data(data_settings("hatememes", folder, BOTH), "train")
    write_memes(folder, "train", rows_now)
    now = open_data(data_settings("hatememes", folder, BOTH, **changes), "train")
    before.trainer = now.trainer = Processes(0, 1)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=f"resume_from: .*{found}"):
        now.load_state_dict({"epoch": 0, "batches": 2, **before._order()})
