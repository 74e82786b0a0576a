"""The cache of decoded images: equal to decoding, made once, stale when the arrow file changes, never half there."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from tests.test_arrow_dataset import assert_equal
from vilt import image_cache
from vilt.datamodules import collate
from vilt.datasets import arrow_dataset
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from vilt.errors import DataError

SIZE = 32
Usage = namedtuple("Usage", "total used free")


def open_food(folder: Path) -> ArrowDataset:
    return ArrowDataset(DATASETS["food101"], folder, "train", SIZE)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("food101_train_images*"))


def fail(*_: object, **__: object) -> None:
    raise AssertionError("decoded again")


@pytest.fixture
def decoded_once(golden_arrow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with its cache; decoding is an error from here on."""
    open_food(golden_arrow).cache_images(0)
    monkeypatch.setattr(arrow_dataset, "decode_image", fail)
    return golden_arrow


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_without_a_cache(golden_arrow: Path, workers: int) -> None:
    plain, cached = open_food(golden_arrow), open_food(golden_arrow)
    cached.cache_images(workers)
    assert len(files(golden_arrow)) == 1
    for missing_type in range(3):
        plain.missing_table = cached.missing_table = np.full(plain.n_rows, missing_type, dtype=np.int8)
        for index in range(len(plain)):
            assert_equal(cached[0, index], plain[0, index])


def test_it_is_found_again_and_nothing_decoded(decoded_once: Path) -> None:
    again = open_food(decoded_once)
    again.cache_images(0)
    image = again[0, 1].image_3RR
    assert image is not None and image.shape == (3, SIZE, SIZE)
    image.zero_()  # a sample's own: the file stays as it is
    other = again[0, 1].image_3RR
    assert other is not None and other.any()


def test_loader_processes_read_it(decoded_once: Path) -> None:
    dataset = open_food(decoded_once)
    dataset.cache_images(0)
    here = dataset[0, 2].image_3RR
    assert here is not None
    keys = [[(0, 0)], [(0, 2)]]
    for context in ("fork", "spawn"):
        loader = DataLoader(
            dataset, batch_sampler=keys, collate_fn=collate, num_workers=1, multiprocessing_context=context
        )
        assert torch.equal([batch.image_b3RR for batch in loader][1][0], here), context


def test_pickling_carries_neither_images_nor_tokens(decoded_once: Path) -> None:
    dataset = open_food(decoded_once)
    dataset.tokenize(lambda texts: np.ones((len(texts), 77), dtype=np.int64), "ones")
    dataset.cache_images(0)
    dataset[0, 0]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 3 * SIZE * SIZE
    assert_equal(pickle.loads(pickled)[0, 1], dataset[0, 1])


def test_a_changed_arrow_file_gets_a_new_cache_and_the_old_one_goes(golden_arrow: Path) -> None:
    open_food(golden_arrow).cache_images(0)
    (old,) = files(golden_arrow)
    unrelated = golden_arrow / "food101_train_images64_0123456789abcdef.npy"
    unrelated.write_bytes(b"of another size")
    path = golden_arrow / "food101_train.arrow"
    table = pa.ipc.open_file(path).read_all()
    images = table["image"].to_pylist()
    turned = table.set_column(0, table.schema.field("image"), pa.array(images[::-1], pa.binary()))
    with pa.ipc.new_file(path, turned.schema) as writer:
        writer.write_table(turned)
    plain, cached = open_food(golden_arrow), open_food(golden_arrow)
    cached.cache_images(0)
    assert_equal(cached[0, 0], plain[0, 0])
    assert old not in files(golden_arrow) and len(files(golden_arrow)) == 2 and unrelated.exists()


def test_another_time_of_the_arrow_file_alone_is_a_change(golden_arrow: Path) -> None:
    open_food(golden_arrow).cache_images(0)
    before = files(golden_arrow)
    os.utime(golden_arrow / "food101_train.arrow", ns=(1, 1))
    open_food(golden_arrow).cache_images(0)
    assert len(files(golden_arrow)) == 1 and files(golden_arrow) != before


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "no array"])
def test_a_damaged_cache_is_made_anew(golden_arrow: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    open_food(golden_arrow).cache_images(0)
    path = golden_arrow / files(golden_arrow)[0]
    whole = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((2, 3, SIZE, SIZE), dtype=np.uint8))
    else:
        path.write_bytes({"truncated": whole[:-1], "empty": b"", "no array": b"x" * len(whole)}[damage])
    with caplog.at_level(logging.WARNING):
        open_food(golden_arrow).cache_images(0)
    assert path.read_bytes() == whole
    assert f"{path}: not readable" in caplog.text


def _ask(folder: Path, start: "multiprocessing.synchronize.Barrier", made: "multiprocessing.Queue[int]") -> None:
    dataset = open_food(folder)
    write = image_cache._write

    def counting(*arguments: object) -> None:
        made.put(1)
        write(*arguments)  # type: ignore[arg-type]

    image_cache._write = counting  # type: ignore[assignment]
    start.wait()
    dataset.cache_images(0)
    made.put(int(dataset[0, 0].image_3RR.sum()) * 10)  # type: ignore[union-attr]


def test_eight_processes_at_once_make_one(golden_arrow: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, made = fork.Barrier(8), fork.Queue()
    processes = [fork.Process(target=_ask, args=(golden_arrow, start, made)) for _ in range(8)]
    for process in processes:
        process.start()
    said = [made.get(timeout=60) for _ in range(9)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert said.count(1) == 1 and len({value for value in said if value != 1}) == 1
    assert len(files(golden_arrow)) == 1 and not list(golden_arrow.glob("*.part"))


def test_too_little_room_is_said_before_anything_is_written(
    golden_arrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    with pytest.raises(DataError, match=r"food101_train_images32_\w+\.npy: 0\.00 GB needed .*, 0\.00 GB free"):
        open_food(golden_arrow).cache_images(0)
    assert files(golden_arrow) == []


def test_a_full_disk_leaves_nothing_half_written(golden_arrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); it takes 0\.00 GB"):
        open_food(golden_arrow).cache_images(0)
    assert not list(golden_arrow.glob("*images*.npy")) and not list(golden_arrow.glob("*.part"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_and_leaves_nothing(golden_arrow: Path, workers: int) -> None:
    path = golden_arrow / "food101_train.arrow"
    table = pa.ipc.open_file(path).read_all()
    images = table["image"].to_pylist()
    images[3] = images[3][:500]
    broken = table.set_column(0, table.schema.field("image"), pa.array(images, pa.binary()))
    with pa.ipc.new_file(path, broken.schema) as writer:
        writer.write_table(broken)
    with pytest.raises(DataError, match=r"food101_train\.arrow: row 3: the image cannot be decoded"):
        open_food(golden_arrow).cache_images(workers)
    assert files(golden_arrow) == [] and not list(golden_arrow.glob("*.part"))
