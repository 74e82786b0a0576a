"""The cache of decoded images: equal to decoding, made once, made again when stale or damaged, whole or not there."""

import fcntl
import io
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import DataError
from tests.data_files import as_npy, assert_equal, write
from tests.data_files import memes as memes_table
from tests.data_files import png as png_of
from vilt import image_cache
from vilt.datasets import kinds
from vilt.datasets.arrow_dataset import ArrowDataset, Sample
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.image_cache import open_image_cache
from vilt.transforms import decode_image

SIZE = 8
ROWS = 7
ARROW = "hatememes_train.arrow"
LOCK = ".hatememes_train_images8.lock"


def png(seed: int) -> bytes:
    return png_of(seed, 12)


def write_memes(folder: Path, images: list[bytes]) -> None:
    write(folder / ARROW, memes_table(len(images), dict(enumerate(images))))


def open_memes(folder: Path, size: int = SIZE) -> ArrowDataset:
    dataset = ArrowDataset(DATASETS["hatememes"], folder, "train", size)
    dataset.tokenize(lambda texts: np.array([[len(text)] * 77 for text in texts]), "lengths")
    return dataset


@pytest.fixture
def memes(tmp_path: Path) -> Path:
    write_memes(tmp_path, [png(row) for row in range(ROWS)])
    return tmp_path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "BATCH_BYTES", 2 * 3 * SIZE**2)  # two images; the last batch has one


def expected_images(n_rows: int = ROWS) -> np.ndarray:
    return np.stack([decode_image(png(row), SIZE).numpy() for row in range(n_rows)])


def names(folder: Path) -> set[str]:
    """What is in the folder, apart from the arrow file and its tokens."""
    return {path.name for path in folder.iterdir() if path.name != ARROW and "_tokens_" not in path.name}


def cache_in(folder: Path) -> Path:
    (name,) = names(folder)
    return folder / name


def refuse(*_: Any) -> Any:
    raise AssertionError("must not be called")


# ---- what is kept


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_the_same_with_and_without_the_cache(golden_arrow, name, split):
    plain, cached = (ArrowDataset(DATASETS[name], golden_arrow, split, 24) for _ in range(2))
    cached.cache_images(0)
    for dataset in (plain, cached):
        dataset.tokenize(lambda texts: np.array([[len(text)] * 77 for text in texts]), "lengths")
    for missing_type in range(3):
        plain.missing_table[:] = cached.missing_table[:] = missing_type
        for index in range(len(plain)):
            assert_equal(cached[0, index], plain[0, index])
    plain.missing_table[:] = cached.missing_table[:] = 0
    plain.simulate_seed = cached.simulate_seed = 3
    for epoch in range(3):
        for index in range(len(plain)):
            assert_equal(cached[epoch, index], plain[epoch, index])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_file_holds_the_image_of_every_row(memes, small_batches, workers):
    open_memes(memes).cache_images(workers)
    cache = cache_in(memes)
    assert cache.name.startswith("hatememes_train_images8_")
    kept = np.load(cache, allow_pickle=False)
    assert kept.dtype == np.uint8
    assert kept.tolist() == expected_images().tolist()
    assert cache.stat().st_size == 128 + ROWS * 3 * SIZE**2


def test_with_the_cache_nothing_is_decoded_and_the_arrow_file_is_not_opened(memes, monkeypatch):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    monkeypatch.setattr(kinds, "decode_image", refuse)
    worker = pickle.loads(pickle.dumps(dataset))
    for row, expected in enumerate(expected_images()):
        for reader in (dataset, worker):
            image = reader[0, row].inputs["image"]
            assert image.tolist() == expected.tolist()
    assert vars(worker)["_table"] is None


def test_an_image_may_be_written_to_without_changing_the_cache(memes):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    image = dataset[0, 1].inputs["image"]
    assert image is not None and image.sum() > 0
    image.zero_()
    assert_equal([dataset[0, 1].inputs["image"]], [torch.from_numpy(expected_images()[1])])
    assert np.load(cache_in(memes)).tolist() == expected_images().tolist()


def test_the_cache_is_made_once_and_found_again(memes, monkeypatch, caplog):
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    made = cache.stat()
    monkeypatch.setattr(kinds, "decode_image", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)  # a folder that may only be read has room for no lock either
    dataset = open_memes(memes)
    with caplog.at_level(logging.INFO):
        dataset.cache_images(2)
    assert caplog.messages == []
    assert dataset[0, 3].inputs["image"] is not None
    assert cache_in(memes) == cache
    assert (cache.stat().st_ino, cache.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


@pytest.mark.parametrize("workers", [0, 1])
def test_making_it_draws_nothing_from_the_runs_random_numbers(memes, workers):
    dataset = open_memes(memes)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    dataset.cache_images(workers)
    assert torch.equal(torch.rand(4), expected)


def test_image_sizes_have_their_own_caches(memes):
    datasets = {size: open_memes(memes, size) for size in (8, 10)}
    for dataset in datasets.values():
        dataset.cache_images(0)
    assert {name.rpartition("_")[0] for name in names(memes)} == {f"hatememes_train_images{size}" for size in datasets}
    for size, dataset in datasets.items():
        assert_equal([dataset[0, 2].inputs["image"]], [decode_image(png(2), size)])


def test_the_log_says_how_large_it_is_and_a_terminal_shows_the_progress(memes, monkeypatch, caplog, capsys):
    with caplog.at_level(logging.INFO):
        open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    first, last = caplog.messages
    assert str(cache) in first and "7 images" in first and "1.3 kB" in first
    assert last.startswith(f"{cache}: made in ")
    assert capsys.readouterr().err == "", "no progress bar where there is no terminal"
    cache.unlink()
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    open_memes(memes).cache_images(0)
    assert "7/7" in terminal.getvalue()


# ---- stale and damaged caches


@pytest.mark.parametrize("change", ["an image", "a row more", "time"])
def test_a_changed_arrow_file_has_a_new_cache_and_the_old_one_goes(memes, change):
    open_memes(memes).cache_images(0)
    old = cache_in(memes)
    if change == "time":
        os.utime(memes / ARROW, ns=(1, 1))
    else:
        write_memes(memes, [*(png(row) for row in range(ROWS - (change == "an image"))), png(99)])
    dataset, plain = open_memes(memes), open_memes(memes)
    dataset.cache_images(0)
    assert cache_in(memes) != old
    for index in range(len(plain)):
        assert_equal(dataset[0, index], plain[0, index])


@pytest.mark.parametrize("what", ["footer", "Pillow", "format"])
def test_what_else_makes_a_cache_stale(memes, monkeypatch, what):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    old, path = cache_in(memes), memes / ARROW
    if what == "footer":  # size and time stay; the last byte is none that an open dataset reads again
        state = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif what == "Pillow":
        monkeypatch.setattr(image_cache, "PIL", SimpleNamespace(__version__="99.0"))
    else:
        monkeypatch.setattr(image_cache, "FORMAT_VERSION", 99)
    dataset.cache_images(0)
    assert cache_in(memes) != old


def test_only_stale_caches_of_the_same_file_and_size_are_removed(memes, caplog):
    digest = "0123456789abcdef"
    stale = f"hatememes_train_images8_{digest}.npy"
    unfinished = f".hatememes_train_images8_{digest}.npy.89abcdef.part"
    others = {
        f"hatememes_train_images18_{digest}.npy",
        f"hatememes_train_images8_{digest}0.npy",
        f"hatememes_train_images8_{digest}.npy.bak",
        f"my_hatememes_train_images8_{digest}.npy",
        f"hatememes_dev_images8_{digest}.npy",
        "hatememes_train_images8_mine.npy",
    }
    for name in (stale, unfinished, *others):
        (memes / name).write_bytes(b"kept?")
    with caplog.at_level(logging.INFO):
        open_memes(memes).cache_images(0)
    (cache,) = names(memes) - others
    assert names(memes) == {cache, *others}
    assert cache not in (stale, unfinished)
    assert f"{memes / stale}: of another state of the arrow file; removed" in caplog.messages
    assert f"{memes / unfinished}: left by a killed maker; removed" in caplog.messages


def test_the_stale_cache_stays_until_the_new_one_is_complete(memes):
    open_memes(memes).cache_images(0)
    old = cache_in(memes)
    write_memes(memes, [png(0), b"broken"])
    with pytest.raises(DataError):
        open_memes(memes).cache_images(0)
    assert cache_in(memes) == old


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"garbage", ""),
        (as_npy(expected_images())[:-1], ""),
        (as_npy(expected_images())[:200], ""),
        (as_npy(expected_images(6)), "expected uint8 (7, 3, 8, 8), found uint8 (6, 3, 8, 8)"),
        (as_npy(expected_images()[0]), "expected uint8 (7, 3, 8, 8), found uint8 (3, 8, 8)"),
        (as_npy(expected_images().astype(np.int16)), "expected uint8 (7, 3, 8, 8), found int16 (7, 3, 8, 8)"),
        (as_npy(np.array([None] * ROWS)), ""),
    ],
    ids=["empty", "garbage", "a byte short", "cut", "a row short", "one image", "int16", "objects"],
)
def test_a_damaged_cache_is_made_anew_with_one_warning(memes, caplog, content, reason):
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    cache.write_bytes(content)
    dataset = open_memes(memes)
    with caplog.at_level(logging.WARNING):
        dataset.cache_images(0)
    (warning,) = caplog.messages
    assert warning.startswith(f"{cache}: not readable ({reason}")
    assert warning.endswith("); making it again")
    assert cache_in(memes) == cache
    assert np.load(cache).tolist() == expected_images().tolist()
    assert_equal(dataset[0, 1], open_memes(memes)[0, 1])


def test_a_cache_that_vanishes_is_an_error_that_names_it(memes):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    cache = cache_in(memes)
    cache.unlink()
    with pytest.raises(DataError) as raised:
        dataset[0, 1]
    assert str(raised.value).startswith(f"{cache}: not readable as a .npy file: ")


# ---- what ends it, and leaves nothing behind


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_is_named_by_file_and_row(memes, small_batches, workers):
    write_memes(memes, [png(row) if row != 5 else b"no image" for row in range(ROWS)])
    dataset = open_memes(memes)
    with pytest.raises(DataError, match=rf"^{memes / ARROW}: row 5: the image cannot be decoded: .*$"):
        dataset.cache_images(workers)
    assert names(memes) == set()
    assert dataset[0, 4].inputs["image"] is not None, "works without a cache"


@pytest.mark.parametrize("room", [100, 1000])
def test_a_disk_that_refuses_to_be_written_leaves_nothing_behind(memes, small_batches, room):
    """The limit on the size of files refuses as a full disk does: within the header, or within the images."""
    dataset = open_memes(memes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError) as raised:
            dataset.cache_images(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value).startswith(f"{memes / ARROW}: cannot keep the decoded images beside it: File too large; ")
    assert str(raised.value).endswith(" bytes free; they need 1,344 bytes")
    assert names(memes) == set()
    dataset.cache_images(0)
    assert np.load(cache_in(memes)).tolist() == expected_images().tolist()


def test_a_folder_that_takes_no_lock_is_an_error(memes):
    (memes / LOCK).mkdir()
    with pytest.raises(DataError, match=rf"^{memes / ARROW}: .*: Is a directory; they need 1,344 bytes"):
        open_memes(memes).cache_images(0)


def test_what_a_maker_killed_at_the_very_end_has_left_is_removed(memes):
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    made = cache.stat().st_ino
    (memes / "hatememes_train_images8_0123456789abcdef.npy").touch()
    (memes / LOCK).touch()
    open_memes(memes).cache_images(0)
    assert cache_in(memes) == cache and cache.stat().st_ino == made


def test_an_interruption_leaves_nothing_behind(memes, small_batches, monkeypatch):
    dataset = open_memes(memes)
    decoded = []

    def interrupted(data: bytes, size: int) -> Tensor:
        decoded.append(data)
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode_image(data, size)

    monkeypatch.setattr(kinds, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.cache_images(0)
    assert names(memes) == set()


# ---- several processes

FORK = multiprocessing.get_context("fork")


@contextmanager
def started(target: Callable[[], None], n: int) -> Iterator[list[Any]]:
    """`n` processes that run `target`; killed at the end if they still run."""
    processes = [FORK.Process(target=target) for _ in range(n)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("before", ["nothing", "a stale cache", "a damaged cache"])
def test_eight_processes_at_once_make_one_cache(memes, small_batches, before):
    if before != "nothing":
        open_memes(memes).cache_images(0)
        if before == "a stale cache":
            os.utime(memes / ARROW, ns=(1, 1))
        else:
            cache_in(memes).write_bytes(b"damaged")
    barrier, counted = FORK.Barrier(8), FORK.Value("i", 0)
    expected = expected_images()

    def ask() -> None:
        def read_image(row: int) -> Tensor:
            with counted.get_lock():
                counted.value += 1
            return torch.from_numpy(expected[row])

        barrier.wait(60)
        images = open_image_cache(memes / ARROW, ROWS, SIZE, read_image, workers=0)
        assert images.values.tolist() == expected.tolist()

    with started(ask, 8) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 8
    assert counted.value == ROWS, "each image once"
    assert np.load(cache_in(memes)).tolist() == expected.tolist()


@pytest.mark.parametrize("removed", [True, False], ids=["after a maker that ended well", "after one that was killed"])
def test_who_comes_later_waits_and_says_so_and_holds_the_lock_then(memes, caplog, monkeypatch, removed):
    dataset = open_memes(memes)
    said, held_by_others = threading.Event(), []

    def try_lock(data: bytes, size: int) -> Tensor:
        with (memes / LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held_by_others.append(True)
        return decode_image(data, size)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    monkeypatch.setattr(kinds, "decode_image", try_lock)
    monkeypatch.setattr(image_cache.log, "handlers", [Listener()])
    waiting = threading.Thread(target=dataset.cache_images, args=(0,))
    with (memes / LOCK).open("ab") as lock, caplog.at_level(logging.INFO):
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        assert said.wait(60)
        assert names(memes) == {LOCK}
        assert held_by_others == []
        if removed:
            (memes / LOCK).unlink()
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join(60)
    cache = cache_in(memes)
    assert caplog.messages[0] == f"{cache}: another process is making it (1.3 kB); waiting for that"
    assert held_by_others == [True] * ROWS
    assert np.load(cache).tolist() == expected_images().tolist()


def test_the_lock_of_a_killed_maker_is_free_and_its_half_file_goes(memes, small_batches):
    reached = FORK.Event()

    def make_half() -> None:
        def read_image(row: int) -> Tensor:
            if row == 4:
                reached.set()
                signal.pause()
            return torch.from_numpy(expected_images()[row])

        open_image_cache(memes / ARROW, ROWS, SIZE, read_image, workers=0)

    with started(make_half, 1):
        assert reached.wait(60)
    half = names(memes)
    assert len(half) == 2
    assert LOCK in half
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    assert half - {LOCK} != {cache.name}
    assert np.load(cache).tolist() == expected_images().tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(memes, method):
    dataset = open_memes(memes)
    keys = [(0, index) for index in range(ROWS)]
    dataset.missing_table = np.arange(ROWS, dtype=np.int8) % 3
    expected = [dataset[key] for key in keys]
    dataset.cache_images(0)
    # Images and tokens can come from the caches alone.
    (memes / ARROW).rename(memes / "elsewhere.arrow")
    loader: DataLoader[Sample] = DataLoader(
        dataset, batch_size=None, sampler=keys, num_workers=1, multiprocessing_context=method
    )
    samples = list(loader)
    assert len(samples) == ROWS
    for sample, plain in zip(samples, expected, strict=True):
        assert_equal(sample, plain)


def test_pickling_carries_neither_images_nor_tokens(tmp_path):
    rows = 400
    write_memes(tmp_path, [png_of(row, 4) for row in range(rows)])
    made = open_memes(tmp_path, 32)
    made.cache_images(0)
    found = open_memes(tmp_path, 32)
    found.cache_images(0)
    for dataset in (made, found):
        assert dataset[0, 1].inputs["image"] is not None  # the files are mapped now
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 20_000, "tokens are 123 kB, images 1.2 MB"
        copy = pickle.loads(pickled)
        for index in (0, 1, rows - 1):
            assert_equal(copy[0, index], dataset[0, index])
