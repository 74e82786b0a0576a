"""The cache of decoded images: equal to decoding, created once, rebuilt if stale or damaged, never partial."""

import fcntl
import hashlib
import io
import logging
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import DataError
from tests.data_files import FORK, as_npy, assert_equal, at_once, write
from tests.data_files import memes as memes_table
from tests.data_files import png as png_of
from tests.interrupted import files_up_to
from vilt import image_cache
from vilt.datasets import kinds
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import decode_image
from vilt.datasets.specs import DATASETS
from vilt.image_cache import open_image_cache

SIZE = 8
ROWS = 7
ARROW = "hatememes_train.arrow"
LOCK = ".hatememes_train_images8.lock"


MODES = (("RGB", 48), ("RGB", 20), ("L", 96), ("RGBA", 48), ("P", 30))


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


def expected_images(n_rows: int = ROWS) -> np.ndarray:
    return np.stack([decode_image(png(row), SIZE).numpy() for row in range(n_rows)])


def names(folder: Path) -> set[str]:
    """Names of the folder's files, except the arrow file and its cached tokens."""
    return {path.name for path in folder.iterdir() if path.name != ARROW and "_tokens_" not in path.name}


def cache_in(folder: Path) -> Path:
    (name,) = names(folder)
    return folder / name


@pytest.mark.parametrize("workers", [0, 2])
def test_with_the_cache_nothing_is_decoded_and_the_arrow_file_stays_closed(memes, monkeypatch, workers):
    dataset = open_memes(memes)
    dataset.cache_images(workers)
    kept = np.load(cache_in(memes), allow_pickle=False)
    assert kept.dtype == np.uint8 and kept.tolist() == expected_images().tolist()
    monkeypatch.setattr(kinds, "decode_image", None)
    worker = pickle.loads(pickle.dumps(dataset))
    for row, expected in enumerate(expected_images()):
        for reader in (dataset, worker):
            image = reader[0, row].inputs["image"]
            assert image.tolist() == expected.tolist()
            image.zero_()  # must change only this copy
    assert vars(worker)["_table"] is None


def test_the_cache_is_created_once_and_reused(memes, monkeypatch, caplog):
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    made = cache.stat()
    monkeypatch.setattr(kinds, "decode_image", None)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(fcntl, "flock", None)  # in a read-only folder no lock can be taken
        dataset = open_memes(memes)
        dataset.cache_images(2)
    assert caplog.messages == []
    assert dataset[0, 3].inputs["image"] is not None
    (memes / "hatememes_train_images8_0123456789abcdef.npy").touch()  # as left by a process killed just before the end
    (memes / LOCK).touch()
    open_memes(memes).cache_images(0)
    assert cache_in(memes) == cache
    assert (cache.stat().st_ino, cache.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


@pytest.mark.parametrize("change", ["an image", "a row more"])
def test_a_changed_arrow_file_gets_a_new_cache_and_the_old_one_is_removed(memes, change):
    open_memes(memes).cache_images(0)
    old = cache_in(memes)
    write_memes(memes, [*(png(row) for row in range(ROWS - (change == "an image"))), png(99)])
    dataset, plain = open_memes(memes), open_memes(memes)
    dataset.cache_images(0)
    assert cache_in(memes) != old
    for index in range(len(plain)):
        assert_equal(dataset[0, index], plain[0, index])


@pytest.mark.parametrize("changed", ["footer", "Pillow", "format"])
def test_footer_pillow_and_format_changes_make_a_cache_stale(memes, monkeypatch, changed):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    old, path = cache_in(memes), memes / ARROW
    if changed == "footer":  # size and time stay; an open dataset never reads the last byte again
        state = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif changed == "Pillow":
        monkeypatch.setattr(image_cache, "PIL", SimpleNamespace(__version__="99.0"))
    else:
        monkeypatch.setattr(image_cache, "FORMAT_VERSION", 99)
    dataset.cache_images(0)
    assert cache_in(memes) != old


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="another version of Pillow may decode differently")
def test_a_change_of_decoded_pixels_requires_a_new_format_version():
    """If this fails, `decode_image` has changed: increase FORMAT_VERSION, or old caches would still be read."""
    images = [Image.open(io.BytesIO(png_of(0, 48))).resize((48, height)).convert(mode) for mode, height in MODES]
    pixels = b"".join(decode_image(image, 16).numpy().tobytes() for image in images)
    assert (image_cache.FORMAT_VERSION, hashlib.sha256(pixels).hexdigest()[:16]) == (2, "501fbc82349ca0b8")


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
    assert f"{memes / stale}: made from another version of the arrow file; removed" in caplog.messages
    assert f"{memes / unfinished}: left by a killed process; removed" in caplog.messages


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"garbage", ""),
        (as_npy(expected_images())[:-1], ""),
        (as_npy(expected_images(6)), "expected uint8 (7, 3, 8, 8), found uint8 (6, 3, 8, 8)"),
        (as_npy(expected_images().astype(np.int16)), "expected uint8 (7, 3, 8, 8), found int16 (7, 3, 8, 8)"),
        (as_npy(np.array([None] * ROWS)), ""),
    ],
    ids=["empty", "garbage", "one byte short", "one row short", "int16", "objects"],
)
def test_a_damaged_cache_is_rebuilt_with_one_warning(memes, caplog, content, reason):
    open_memes(memes).cache_images(0)
    cache = cache_in(memes)
    cache.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        open_memes(memes).cache_images(0)
    (warning,) = caplog.messages
    assert warning.startswith(f"{cache}: not usable (") and reason in warning and "creating it again" in warning
    assert cache_in(memes) == cache
    assert np.load(cache).tolist() == expected_images().tolist()


def test_the_error_for_a_vanished_cache_names_it(memes):
    dataset = open_memes(memes)
    dataset.cache_images(0)
    cache = cache_in(memes)
    cache.unlink()
    with pytest.raises(DataError) as raised:
        dataset[0, 1]
    assert str(raised.value).startswith(f"{cache}: not readable as a .npy file: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_is_named_by_file_and_row(memes, workers):
    write_memes(memes, [png(row) if row != 5 else b"no image" for row in range(ROWS)])
    dataset = open_memes(memes)
    with pytest.raises(DataError, match=rf"^{memes / ARROW}: row 5: the image cannot be decoded: .*$"):
        dataset.cache_images(workers)
    assert names(memes) == set()
    assert dataset[0, 4].inputs["image"] is not None, "other images still load, without a cache"


@pytest.mark.parametrize("room", [100, 1000])
def test_a_full_disk_leaves_nothing_behind(memes, room):
    """The space runs out in the header (100 bytes) or in the images."""
    dataset = open_memes(memes)
    with files_up_to(room), pytest.raises(DataError) as raised:
        dataset.cache_images(0)
    assert all(fact in str(raised.value) for fact in (str(memes / ARROW), "File too large", "they need 1,344 bytes"))
    assert names(memes) == set()


@pytest.mark.parametrize("before", ["nothing", "a stale cache", "a damaged cache", "a lock that nobody holds"])
def test_eight_concurrent_processes_create_one_cache(memes, before):
    if "cache" in before:
        open_memes(memes).cache_images(0)
    if before == "a stale cache":
        (memes / ARROW).write_bytes((memes / ARROW).read_bytes()[:-1] + b"?")
    elif before == "a damaged cache":
        cache_in(memes).write_bytes(b"damaged")
    elif before == "a lock that nobody holds":
        (memes / LOCK).touch()
    counted = FORK.Value("i", 0)
    expected = expected_images()

    def ask() -> None:
        def read_image(row: int) -> Tensor:
            with counted.get_lock():
                counted.value += 1
            return torch.from_numpy(expected[row])

        images = open_image_cache(memes / ARROW, ROWS, SIZE, read_image, workers=0)
        assert images.values.tolist() == expected.tolist()

    at_once(8, ask)
    assert counted.value == ROWS, "each image is decoded once"
    assert np.load(cache_in(memes)).tolist() == expected.tolist()
