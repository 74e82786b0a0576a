"""Which samples lose which modality (the protocol's missing tables).

A table assigns each row of an arrow file its missing type: with image and text, 0 complete, 1 text missing, 2 image
missing (see `vilt/missing_types.py`). It is determined by its description alone, so every process on every machine has
the same one. There are two ways to draw it:

- nested, from (dataset, split, type, ratio, both_ratio, seed): rows that lose a modality at ratio 0.3 lose the same one
  at 0.5;
- published, as in the published code, which draws the tables of train, dev and test in turn from one generator: a table
  also depends on the patterns and sizes of the splits before it.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import get_args

import numpy as np

from common.errors import DataError, reason_of
from common.files import atomic_path
from common.messages import first_line, quoted
from common.shares import part_of, parts_of
from vilt.datasets.specs import SPLITS, Split, row_of
from vilt.missing_types import ANY, BOTH, COMPLETE, SOME, code_of, is_missing

log = logging.getLogger(__name__)

NESTED, PUBLISHED = DRAWINGS = ("nested", "published")
LINE = 100
MAGIC = "missing table"
DRAWN_AGAIN = "a table follows from its description: delete the file to have it redrawn"


@dataclass(frozen=True)
class MissingPattern:
    """How a split loses modalities.

    Args:
        missing_type: what the affected samples lose: a modality by name, `both`, `any` or `some`, see
            `vilt/missing_types.py`.
        ratio: share of samples that lose a modality.
        both_ratio: for `both`, the share of these that lose the first modality; the others lose the second.
        seed: seed of the drawing.
        drawing: one of DRAWINGS.
        after: for the published drawing, (missing_type, ratio, both_ratio, rows) of each split drawn before this one;
            see `published_patterns`.
    """

    missing_type: str
    ratio: float
    both_ratio: float
    seed: int
    drawing: str = NESTED
    after: tuple[tuple[str, float, float, int], ...] = ()

    def describe(self, dataset: str, split: Split, samples: int) -> dict[str, str]:
        """Everything that determines a table, as written into its header."""
        assert split in get_args(Split)
        return {
            "dataset": dataset,
            "split": row_of(dataset).file_splits[split],
            "type": self.missing_type,
            "ratio": repr(float(self.ratio)),
            "both_ratio": repr(float(self.both_ratio)),
            "seed": str(self.seed),
            "samples": str(samples),
            **({} if self.drawing == NESTED else {"drawing": self.drawing, "after": self._described_after()}),
        }

    def recorded(self) -> dict[str, str | float]:
        """The pattern as recorded in test results."""
        kept = ("missing_type", "ratio", "both_ratio", "seed", *(() if self.drawing == NESTED else ("drawing",)))
        return {name: getattr(self, name) for name in kept}

    def _described_after(self) -> str:
        return ",".join(":".join(map(str, split)) for split in self.after) or "nothing"


def published_patterns(
    patterns: Mapping[Split, MissingPattern], rows: Mapping[Split, int]
) -> dict[Split, MissingPattern]:
    """The patterns of the published drawing, each with the draws that precede it.

    Args:
        rows: number of rows in the arrow file of each split.
    """
    found: dict[Split, MissingPattern] = {}
    after: tuple[tuple[str, float, float, int], ...] = ()
    for split in SPLITS:
        pattern = replace(patterns[split], after=after)
        found[split] = pattern
        after += ((pattern.missing_type, float(pattern.ratio), float(pattern.both_ratio), rows[split]),)
    return found


def after_training(train: MissingPattern, test: MissingPattern, rows: Mapping[Split, int]) -> MissingPattern:
    """The test pattern in the published drawing, drawn after training at `train` and validation at `test`."""
    drawn = replace(test, drawing=PUBLISHED)
    return published_patterns({"train": replace(train, seed=test.seed), "val": drawn, "test": drawn}, rows)["test"]


def draw_missing_table(dataset: str, split: Split, pattern: MissingPattern, samples: int) -> np.ndarray:
    """Draws the missing types of `samples` rows, int8 (N,).

    Exactly k = ⌊N·ratio⌋ rows lose a modality; for `both`, exactly ⌊k·both_ratio⌋ of these lose the first one. The
    published drawing multiplies in binary floating point, as the published code does: 62, not 63, of 90 at 0.7.
    """
    modalities = list(row_of(dataset).modalities)
    if pattern.drawing == PUBLISHED:
        return _draw_as_published(pattern, modalities, samples)
    key = hashlib.sha256(f"{dataset}/{row_of(dataset).file_splits[split]}/{pattern.seed}".encode()).digest()
    # random_raw is the only NumPy stream that is guaranteed never to change.
    order = np.argsort(np.random.PCG64(int.from_bytes(key, "big")).random_raw(samples), kind="stable")
    missing = order[: part_of(samples, pattern.ratio)]
    table = np.zeros(samples, dtype=np.int8)
    table[missing] = _types_lost(modalities, pattern.missing_type, pattern.both_ratio, len(missing))
    return table


def _types_lost(modalities: list[str], missing_type: str, both_ratio: float, count: int) -> np.ndarray:
    """Missing types (count,) of the affected samples. A shorter result is a prefix of a longer one."""
    place = np.arange(count)
    if missing_type == BOTH:
        # A sample loses the first modality if ⌊j·both_ratio⌋ increases at its j, so every prefix has the right share.
        first = np.diff(parts_of(range(count + 1), both_ratio)) > 0
        return np.where(first, *(code_of(modalities, name) for name in modalities))
    if missing_type == ANY:
        return 2 ** (place % len(modalities))
    if missing_type == SOME:
        return 1 + place % (2 ** len(modalities) - 2)
    return np.full(count, code_of(modalities, missing_type))


def draw_missing_type(pattern: MissingPattern, modalities: Iterable[str], generator: np.random.Generator) -> int:
    """Draws the missing type of a single sample: complete, or with probability `ratio` one that the pattern allows.

    `both` draws the first modality with probability `both_ratio`; other patterns draw uniformly.
    """
    names = list(modalities)
    if generator.random() >= pattern.ratio:
        return COMPLETE
    if pattern.missing_type == BOTH:
        return code_of(names, names[int(generator.random() >= pattern.both_ratio)])
    choices = {ANY: len(names), SOME: 2 ** len(names) - 2}.get(pattern.missing_type, 1)
    return int(_types_lost(names, pattern.missing_type, pattern.both_ratio, choices)[generator.integers(choices)])


def drop_modalities(missing_type: int, chance: float, modalities: Iterable[str], generator: np.random.Generator) -> int:
    """The missing type of a sample after modality dropout.

    With probability `chance` the sample loses a random non-empty proper subset of the modalities that it has.
    """
    names = list(modalities)
    left = [code_of(names, name) for name in names if not is_missing(names, name, missing_type)]
    if generator.random() >= chance or len(left) < 2:
        return missing_type
    lost = 1 + int(generator.integers(2 ** len(left) - 2))
    return missing_type + sum(code for place, code in enumerate(left) if lost >> place & 1)


def _draw_as_published(pattern: MissingPattern, modalities: list[str], samples: int) -> np.ndarray:
    generator = random.Random(pattern.seed)
    own = (pattern.missing_type, pattern.ratio, pattern.both_ratio, samples)
    for missing_type, ratio, both_ratio, rows in (*pattern.after, own):
        table = np.zeros(rows, dtype=np.int8)
        missing = generator.sample(range(rows), int(rows * ratio))
        if missing_type == BOTH:
            table[missing] = code_of(modalities, modalities[1])
            table[generator.sample(missing, int(len(missing) * both_ratio))] = code_of(modalities, modalities[0])
        else:
            table[missing] = _types_lost(modalities, missing_type, both_ratio, len(missing))
    return table


def load_missing_table(
    root: Path, dataset: str, split: Split, pattern: MissingPattern, samples: int, *, keep: bool = True
) -> np.ndarray:
    """The table of a split, int8 (N,): read from `root` if stored there, else drawn and stored there.

    A table in the published form in `root` (`mmimdb_train_missing_both_07.pt`; at ratio 1 `…_10.pt`, else `…_1.pt`)
    takes precedence; its use is logged.

    Args:
        keep: whether a drawn table is stored.

    Raises:
        DataError: a stored table does not fit the split or its description, or `root` is not readable or writable.
    """
    described = pattern.describe(dataset, split, samples)
    stem = f"{dataset}_{described['split']}_missing_{pattern.missing_type}"
    published = next((path for path in _published_paths(root, stem, pattern.ratio) if _is_file(path)), None)
    if published is not None:
        table = _read_published(published, dataset, samples)
        _say_published(dataset, split, published)
        return table
    table = draw_missing_table(dataset, split, pattern, samples)
    if pattern.ratio == 0:
        return table
    drawn = ""
    if pattern.drawing == PUBLISHED:
        drawn = f"_published_{hashlib.sha256(described['after'].encode()).hexdigest()[:12]}"
    path = root / (
        f"{stem}_{described['ratio']}_both_ratio_{described['both_ratio']}_seed_{pattern.seed}_of_{samples}{drawn}.txt"
    )
    content = _format(table, dataset, described)
    if _is_file(path):
        _check(path, content)
    elif keep:
        try:
            with atomic_path(path) as temporary:
                temporary.write_text(content, "utf-8")
        except OSError as error:
            raise DataError(f"missing_table_root={root}: cannot write {path.name}: {reason_of(error)}") from error
    return table


@cache
def _say_published(dataset: str, split: Split, path: Path) -> None:
    """Logs the use of a published table; cached, so that it is logged once and not for every seed."""
    log.info("missing table of %s %s: %s (published form; seed and both_ratio not used)", dataset, split, path)


def type_counts(table: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Number of entries of `table` with each missing type, keyed by the type's name in `names`."""
    return {name: int((table == value).sum()) for value, name in enumerate(names)}


def counts_text(of_types: Mapping[str, int]) -> list[str]:
    """`type_counts` as text; if there are more than three types, only those that occur."""
    return [f"{count:,} {name}" for name, count in of_types.items() if count or len(of_types) <= 3]


def _published_paths(root: Path, stem: str, ratio: float) -> list[Path]:
    """Where the published code stores a table. It writes ratios without the dot: 1 as `1`, but 1.0 as `10`."""
    spellings = [str(float(ratio)), *([str(int(ratio))] if ratio == int(ratio) else [])]
    return [root / f"{stem}_{spelling.replace('.', '')}.pt" for spelling in spellings]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # no permission for the folder, or too long a name
        raise DataError(f"missing_table_root={path.parent}: not readable: {error.strerror or error}") from error


def _format(table: np.ndarray, dataset: str, described: dict[str, str]) -> str:
    header = " ".join(f"{key}={value}" for key, value in described.items())
    names = row_of(dataset).type_names
    meaning = " ".join(f"{value:x}={name.replace(' ', '_')}" for value, name in enumerate(names))
    digits = "".join(f"{value:x}" for value in table.tolist())
    lines = [digits[start : start + LINE] for start in range(0, len(digits), LINE)]
    return "\n".join([f"# {MAGIC}: {header}", f"# {meaning}", *lines, ""])


def _check(path: Path, content: str) -> None:
    """Raises DataError unless the stored table is the one that its description determines."""
    try:
        found = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as a missing table: {error}; {DRAWN_AGAIN}") from error
    for line, (actual, expected) in enumerate(zip_longest(found.split("\n"), content.split("\n")), 1):
        if actual != expected:
            difference = f"line {line}: expected {quoted(expected)}, found {quoted(actual)}"
            raise DataError(f"{path}: {difference}; {DRAWN_AGAIN}")


def _read_published(path: Path, dataset: str, samples: int) -> np.ndarray:
    import torch  # needed only here, and this module is imported to read the options

    from common.torch_file import load_inert

    try:
        loaded = load_inert(path)
        fits = isinstance(loaded, torch.Tensor) and loaded.shape == (samples,)
        table = loaded.detach().float().numpy() if fits else None
    except Exception as error:  # many types, on damaged files and on tensors that are not plain lists of numbers
        raise DataError(f"{path}: not readable as a published missing table: {first_line(error)}") from error
    if table is None:
        found = tuple(loaded.shape) if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise DataError(f"{path}: expected a tensor of {samples} entries, one per row of the split, found {found}")
    known = range(len(row_of(dataset).type_names))
    wrong = np.flatnonzero(~np.isin(table, known))
    if len(wrong):
        raise DataError(f"{path}: expected only numbers 0 to {known[-1]}, found {table[wrong[0]]} for row {wrong[0]}")
    return table.astype(np.int8)
