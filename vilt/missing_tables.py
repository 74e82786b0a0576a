"""Which samples lose which modality (the protocol's missing tables).

A table gives each row of an arrow file its missing type: 0 complete, 1 text missing, 2 image missing. It follows from
(dataset, split, type, ratio, both_ratio, seed) alone, so that every process and every machine has the same one, and it
is nested: what is missing at ratio 0.3 is missing in the same way at 0.5.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from vilt.datasets.specs import DATASETS, Split
from vilt.errors import DataError
from vilt.utils.files import atomic_path

log = logging.getLogger(__name__)

COMPLETE, TEXT_MISSING, IMAGE_MISSING = 0, 1, 2
TYPE_NAMES = ("complete", "text missing", "image missing")
MISSING_TYPES = ("text", "image", "both")
LINE = 100
MAGIC = "missing table"


@dataclass(frozen=True)
class MissingPattern:
    """How a split loses modalities.

    Args:
        missing_type: `text`, `image` or `both`: what the chosen samples lose; `both` means one or the other.
        ratio: share of samples that lose a modality.
        both_ratio: for `both`, share of those that lose the image; the others lose the text.
        seed: draws the samples.
    """

    missing_type: str
    ratio: float
    both_ratio: float
    seed: int

    def describe(self, dataset: str, split: Split, samples: int) -> dict[str, str]:
        """All that a table follows from, as written into its header."""
        assert split in get_args(Split)
        return {
            "dataset": dataset,
            "split": DATASETS[dataset].file_splits[split],
            "type": self.missing_type,
            "ratio": repr(float(self.ratio)),
            "both_ratio": repr(float(self.both_ratio)),
            "seed": str(self.seed),
            "samples": str(samples),
        }


def draw_missing_table(dataset: str, split: Split, pattern: MissingPattern, samples: int) -> np.ndarray:
    """Missing types of `samples` rows, int8 (N,).

    Exactly int(N·ratio) are missing; for `both`, exactly int(k·both_ratio) of those k lose the image.
    """
    key = hashlib.sha256(f"{dataset}/{DATASETS[dataset].file_splits[split]}/{pattern.seed}".encode()).digest()
    # random_raw is the one stream of NumPy that is promised never to change.
    order = np.argsort(np.random.PCG64(int.from_bytes(key, "big")).random_raw(samples), kind="stable")
    missing = order[: int(samples * pattern.ratio)]
    table = np.zeros(samples, dtype=np.int8)
    if pattern.missing_type == "both":
        # The j-th missing sample loses the image where int(j·both_ratio) steps up, so that every prefix has its share.
        images = (np.arange(len(missing) + 1) * pattern.both_ratio).astype(np.int64)
        table[missing] = np.where(np.diff(images) > 0, IMAGE_MISSING, TEXT_MISSING)
    else:
        table[missing] = TEXT_MISSING if pattern.missing_type == "text" else IMAGE_MISSING
    return table


def load_missing_table(
    root: Path, dataset: str, split: Split, pattern: MissingPattern, samples: int, *, announce: bool = True
) -> np.ndarray:
    """The table of a split, int8 (N,): read from `root` where it is kept, else drawn and kept there.

    A table in the published form (`mmimdb_train_missing_both_07.pt`) in `root` has precedence and is logged.

    Args:
        announce: log the use of a published table.

    Raises:
        DataError: a table found does not fit the split, or `root` is not writable.
    """
    described = pattern.describe(dataset, split, samples)
    stem = f"{dataset}_{described['split']}_missing_{pattern.missing_type}"
    published = root / f"{stem}_{str(float(pattern.ratio)).replace('.', '')}.pt"
    if published.is_file():
        table = _read_published(published, samples)
        if announce:
            log.info(
                "missing table of %s %s: %s (published form; seed and both_ratio not used)", dataset, split, published
            )
        return table
    if pattern.ratio == 0:
        return np.zeros(samples, dtype=np.int8)
    name = f"{stem}_{described['ratio']}_both_ratio_{described['both_ratio']}_seed_{pattern.seed}_of_{samples}.txt"
    path = root / name
    if path.is_file():
        return _read(path, described)
    table = draw_missing_table(dataset, split, pattern, samples)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(_format(table, described), "utf-8")
    except OSError as error:
        raise DataError(f"missing_table_root={root}: cannot write {name}: {error.strerror or error}") from error
    return table


def type_counts(table: np.ndarray) -> dict[str, int]:
    """How many entries of `table` have each missing type, by name."""
    return {name: int((table == value).sum()) for value, name in enumerate(TYPE_NAMES)}


def _format(table: np.ndarray, described: dict[str, str]) -> str:
    header = " ".join(f"{key}={value}" for key, value in described.items())
    meaning = " ".join(f"{value}={name.replace(' ', '_')}" for value, name in enumerate(TYPE_NAMES))
    digits = "".join(map(str, table.tolist()))
    lines = [digits[start : start + LINE] for start in range(0, len(digits), LINE)]
    return "\n".join([f"# {MAGIC}: {header}", f"# {meaning}", *lines, ""])


def _read(path: Path, described: dict[str, str]) -> np.ndarray:
    expected = f"# {MAGIC}: " + " ".join(f"{key}={value}" for key, value in described.items())
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as a missing table: {error}") from error
    if not lines or lines[0] != expected:
        raise DataError(f"{path}: expected the first line {expected!r}, found {lines[0] if lines else 'nothing'!r}")
    digits = "".join(line for line in lines if not line.startswith("#"))
    samples = int(described["samples"])
    if len(digits) != samples or not set(digits) <= set("012"):
        raise DataError(f"{path}: expected {samples} digits 0, 1 or 2, found {len(digits)} characters")
    return np.frombuffer(digits.encode(), dtype=np.int8) - ord("0")


def _read_published(path: Path, samples: int) -> np.ndarray:
    try:
        table = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on damaged files
        raise DataError(f"{path}: not readable as a published missing table: {error}") from error
    if not isinstance(table, torch.Tensor) or table.shape != (samples,):
        found = tuple(table.shape) if isinstance(table, torch.Tensor) else type(table).__name__
        raise DataError(f"{path}: expected a tensor of {samples} entries, one per row of the split, found {found}")
    if not torch.isin(table, torch.tensor([0.0, 1.0, 2.0])).all():
        raise DataError(f"{path}: expected only 0, 1 and 2 in it")
    return table.numpy().astype(np.int8)
