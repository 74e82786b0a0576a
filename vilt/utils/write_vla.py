"""Converts text, audio and vision features labelled with sentiment: MulT's and MMSA's pickles, or a table and arrays.

Shape suffixes: N rows of a split, T steps, D width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.hashing import file_sha256
from common.messages import listed, quoted
from vilt.datasets.specs import DATASETS, SPLITS, DatasetSpec, Split, with_shapes
from vilt.utils.mapped_array import open_numbers
from vilt.utils.pickled_arrays import SUFFIXES, PickledArray, read_pickle
from vilt.utils.raw_data import REMARKS, RawDataset, RawSplit, Row, not_as_in, require_layout
from vilt.utils.tables import FORMATS, table_rows

MODALITIES, STEPS = ("text", "audio", "vision"), ("steps", "width")
SPLIT_KEYS: dict[Split, str] = {"train": "train", "val": "valid", "test": "test"}
LABELS = ("labels", "regression_labels")
"""Key of the labels in MulT's files, and in MMSA's, which are padded at the end."""
KNOWN_FILES = {
    "1a113ad5edc8b9b625a7e29e6b94a97ecade70494c4e022d9f7ba5affca3bbdc": ("mosi", "MulT's mosi_data.pkl"),
    "637d72469fe19333d7acfe9ca543f0f45af8004f103ed05649881b713c769e45": ("mosi", "MulT's mosi_data_noalign.pkl"),
    "31007381c01dd346945ed8a64c7321239de5aaf1ef05bf112e952848a823186d": ("mosei", "MulT's mosei_senti_data.pkl"),
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": ("mosi", "MMSA's MOSI aligned_50.pkl"),
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": ("mosi", "MMSA's MOSI unaligned_50.pkl"),
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": ("mosei", "MMSA's MOSEI aligned_50.pkl"),
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": ("mosei", "MMSA's MOSEI unaligned_50.pkl"),
    "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f": ("sims", "MMSA's SIMS unaligned_39.pkl"),
}
"""Dataset and title of each published file, keyed by SHA-256."""
NOT_FINITE = "numbers that were not finite, now 0"
TABLE_COLUMNS = ("id", "split", "label", "text")
LAYOUT = """\
RAW/
  FILE.pkl            MulT's or MMSA's file: splits train, valid, test with text, audio, vision and labels
or
RAW/
  TABLE.csv           columns id, split, label and text; or .tsv, or .jsonl
  text/ID.npy         features of each segment, (steps, width); also audio/ID.npy and vision/ID.npy
"""


@dataclass(frozen=True)
class Segments:
    """One split of a file. Its labels have been checked, but its features not read yet."""

    split: Split
    source: str
    ids: Sequence[str]
    labels_N: np.ndarray
    texts: Sequence[str]
    features: Callable[[int], dict[str, np.ndarray]]
    """Reads the features of a row, from 0: (T, D) for each modality, padded in front."""


def open_raw(raw: Path, dataset: str, table: Path | None = None) -> RawDataset:
    """Opens the segments of `dataset` in `raw`, a folder or the file itself.

    Args:
        table: table of the user's own dataset, if `raw` has several.

    Raises:
        DataError: no file fits, several do, or one is malformed; the message names file and row.
    """
    spec = DATASETS[dataset]
    if not raw.is_file():
        require_layout(raw, (), LAYOUT)
    pickles = [raw] if raw.is_file() else sorted(path for path in raw.iterdir() if path.suffix in SUFFIXES)
    if table is None and pickles:
        shapes, segments, note = _of_pickles(spec, pickles)
    elif dataset == "vla":
        shapes, segments = _of_table(spec, raw, table)
        note = ""
    else:
        raise not_as_in(LAYOUT, f"{raw}: expected a pickle ({', '.join(SUFFIXES)}), found none")
    spec = with_shapes(spec, shapes)
    splits = []
    for part in segments:
        samples = [(row + 1, partial(_row, spec, part, row)) for row in range(len(part.labels_N))]
        splits.append(RawSplit(part.split, part.source, samples))
    return RawDataset(spec, spec.class_names or (), tuple(splits), note)


def _row(spec: DatasetSpec, segments: Segments, row: int) -> Row:
    remarks: Counter[str] = Counter()
    columns: Row = {"id": segments.ids[row], "raw_text": [segments.texts[row]], REMARKS: remarks}
    for name, given_TD in segments.features(row).items():
        x_TD, count = finite(given_TD)
        remarks[f"{name}: {NOT_FINITE}"] += count
        steps = spec.modalities[name].shape[0]
        assert steps is not None
        columns[name] = np.pad(x_TD, ((steps - len(x_TD), 0), (0, 0)))
    return columns | {"label": float(segments.labels_N[row])}


def finite(x_TD: np.ndarray) -> tuple[np.ndarray, int]:
    """`x_TD` as float32, with 0 in place of numbers that are not finite, and how many these are."""
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, and are replaced below
        x_TD = x_TD.astype(np.float32)
    finite_TD = np.isfinite(x_TD)
    return (x_TD, 0) if finite_TD.all() else (np.where(finite_TD, x_TD, 0), int((~finite_TD).sum()))


# ---- pickles


def _of_pickles(spec: DatasetSpec, paths: Sequence[Path]) -> tuple[dict[str, tuple[int, ...]], list[Segments], str]:
    """Reads the one pickle of the dataset, recognised by its checksum or else by its number of segments."""
    fitting = paths
    if len(paths) > 1:
        known = {path: KNOWN_FILES.get(file_sha256(path), (None, ""))[0] for path in paths}
        fitting = [path for path in paths if known[path] == spec.name]
        if not fitting:
            fitting = [path for path in paths if known[path] is None and _has_sizes_of(spec, path)]
    if len(fitting) != 1:
        found = ", ".join(path.name for path in fitting or paths)
        raise DataError(
            f"{paths[0].parent}: expected one pickle of {spec.title}, found {len(fitting) or 'none'} that fits: "
            f"{found}; give the file itself as --root"
        )
    path, digest = fitting[0], file_sha256(fitting[0])
    of_dataset, title = KNOWN_FILES.get(digest, (spec.name, ""))
    if of_dataset != spec.name and spec.name != "vla":
        raise DataError(f"{path}: this is {title}; convert it with --dataset {of_dataset}")
    note = f"{path.name}: {title or 'SHA-256 ' + digest}"
    if not title and spec.name != "vla":
        note = f"warning: {note}, not one of the published files"
    return *_read_splits(spec, path, read_pickle(path)), note


def _has_sizes_of(spec: DatasetSpec, path: Path) -> bool:
    try:
        content = read_pickle(path)
    except DataError:
        return False
    try:
        sizes = {split: len(content[key]["text"]) for split, key in SPLIT_KEYS.items()}
    except (AttributeError, LookupError, TypeError):  # some other pickle
        return False
    return all(sizes[split] in spec.published_rows.get(split, (sizes[split],)) for split in SPLITS)


def _read_splits(spec: DatasetSpec, path: Path, content: Any) -> tuple[dict[str, tuple[int, ...]], list[Segments]]:
    if not isinstance(content, dict) or not set(SPLIT_KEYS.values()) <= set(content):
        found = listed(list(content)) if isinstance(content, dict) else quoted(content)
        raise DataError(f"{path}: expected the splits train, valid and test, found {found}")
    shapes: dict[str, tuple[int, ...]] = {}
    segments = []
    for split, key in SPLIT_KEYS.items():
        arrays = content[key]
        if not isinstance(arrays, dict):
            raise DataError(f"{path}: {key}: expected arrays by name, found {quoted(arrays)}")
        for name in MODALITIES:
            array = arrays.get(name)
            if not isinstance(array, PickledArray) or len(array.shape) != 3 or array.dtype.kind not in "fiu":
                found = f"{array.dtype} {array.shape}" if isinstance(array, PickledArray) else quoted(array)
                raise DataError(f"{path}: {key}: {name}: expected numbers (rows, steps, width), found {found}")
            if shapes.setdefault(name, array.shape[1:]) != array.shape[1:]:
                expected = shapes[name]
                raise DataError(f"{path}: {key}: {name}: expected the shape {expected}, found {array.shape[1:]}")
        segments.append(_of_arrays(spec, path, split, key, arrays))
    return shapes, segments


def _of_arrays(spec: DatasetSpec, path: Path, split: Split, key: str, arrays: dict[str, Any]) -> Segments:
    """One split of a pickle in either layout."""
    n_rows = len(arrays["text"])
    keys = [name for name in LABELS if name in arrays]
    if not keys:
        raise DataError(f"{path}: {key}: expected {' or '.join(LABELS)}, found {listed(list(arrays))}")
    for name in (*MODALITIES, keys[0], *(one for one in ("id", "raw_text") if one in arrays)):
        if (found := len(arrays[name])) != n_rows:
            raise DataError(f"{path}: {key}: {name}: expected {n_rows:,} rows, as in text, found {found:,}")
    labels = _whole(arrays[keys[0]])
    if labels.size != n_rows or labels.dtype.kind not in "fiu":
        raise DataError(f"{path}: {key}: {keys[0]}: expected a number in each row, found {labels.dtype} {labels.shape}")
    labels_N = labels.reshape(n_rows).astype(np.float32)
    for row in np.flatnonzero(~(np.abs(labels_N) <= (spec.label_range or np.inf))):
        _refuse_label(spec, f"{path}: {key}, row {row + 1}: {keys[0]}", labels_N[row])
    ids = [id_of(one) for one in _whole(arrays["id"])] if "id" in arrays else [f"{key}_{n}" for n in range(n_rows)]
    texts = [str(one) for one in _whole(arrays["raw_text"])] if "raw_text" in arrays else [""] * n_rows
    lengths = lengths_of(path, key, arrays, n_rows) if keys[0] == LABELS[1] else None

    def features(row: int) -> dict[str, np.ndarray]:
        read = {name: arrays[name][row : row + 1][0] for name in MODALITIES}
        if lengths is None:
            return read
        return {name: padded_in_front(x, lengths[name][row] if name in lengths else None) for name, x in read.items()}

    return Segments(split, f"{path.name}: {key}", ids, labels_N, texts, features)


def lengths_of(path: Path, key: str, arrays: dict[str, Any], n_rows: int) -> dict[str, np.ndarray]:
    """Number of steps (N,) before the padding at the end, for each modality whose lengths the file gives."""
    given = {name: arrays.get(f"{name}_lengths") for name in ("audio", "vision")}
    found = {name: _whole(lengths) for name, lengths in given.items() if lengths is not None}
    if (tokens := arrays.get("text_bert")) is not None:
        expected = (n_rows, 3, arrays["text"].shape[1])
        if not isinstance(tokens, PickledArray) or tokens.shape != expected:
            raise DataError(f"{path}: {key}: text_bert: expected the shape {expected}")
        found["text"] = np.array([int(tokens[row : row + 1][0, 1].sum()) for row in range(n_rows)])
    for name, lengths in found.items():
        steps, what = arrays[name].shape[1], "the mask of text_bert" if name == "text" else f"{name}_lengths"
        if len(lengths) != n_rows:
            raise DataError(f"{path}: {key}: {what}: expected {n_rows:,}, found {len(lengths):,}")
        for row, length in enumerate(lengths, 1):
            if not isinstance(length, (int, np.integer)) or not 0 <= length <= steps:
                expected_length = f"expected a length from 0 to {steps}, found {quoted(length)}"
                raise DataError(f"{path}: {key}, row {row}: {what}: {expected_length}")
    return found


def padded_in_front(x_TD: np.ndarray, length: int | None) -> np.ndarray:
    """(T, D) with its first `length` steps moved to the end; None means up to the last step that is not all zeros."""
    if length is None:
        real = np.flatnonzero(x_TD.any(axis=1))
        length = int(real[-1]) + 1 if len(real) else 0
    return np.concatenate([np.zeros_like(x_TD[length:]), x_TD[:length]])


def _whole(value: Any) -> np.ndarray:
    return value[:] if isinstance(value, PickledArray) else np.asarray(value)


def id_of(value: Any) -> str:
    parts = np.atleast_1d(value).tolist()
    return "_".join(one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in parts)


def _refuse_label(spec: DatasetSpec, place: str, found: object) -> None:
    limit = f" from {-spec.label_range:g} to {spec.label_range:g}" if spec.label_range is not None else ""
    raise DataError(f"{place}: expected a number{limit}, found {quoted(found)}")


# ---- a table with files


def _of_table(spec: DatasetSpec, raw: Path, table: Path | None) -> tuple[dict[str, tuple[int, ...]], list[Segments]]:
    if table is None:
        tables = [path for path in sorted(raw.iterdir()) if path.suffix in FORMATS]
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "none"
            raise not_as_in(LAYOUT, f"{raw}: expected one table or pickle, found {found}")
        [table] = tables
    rows: dict[Split, list[tuple[str, float, str]]] = {split: [] for split in SPLITS}
    of_key = {key: split for split, key in SPLIT_KEYS.items()} | {split: split for split in SPLITS}
    shapes: dict[str, tuple[int, ...]] = {}
    first_with: dict[str, tuple[str, int]] = {}
    """Name and width of the first file of each modality."""
    for row, name, split, label, text in _listed(table):
        place = f"{table}, row {row}"
        if split not in of_key:
            raise DataError(f"{place}: split: expected {' or '.join(of_key)}, found {quoted(split)}")
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(label, bool) or not abs(number) <= (spec.label_range or np.inf):
            _refuse_label(spec, f"{place}: label", label)
        for modality in MODALITIES:
            file = raw / modality / f"{name}.npy"
            if not file.is_file():
                raise DataError(f"{place}: expected its features in {file}, found no such file")
            try:
                steps, width = open_numbers(file, STEPS).shape
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            first, most = first_with.setdefault(modality, (file.name, width)), shapes.get(modality, (0,))[0]
            if width != first[1]:
                raise DataError(f"{place}: {file}: expected the width {first[1]}, as in {first[0]}, found {width}")
            shapes[modality] = (max(steps, most), width)
        rows[of_key[split]].append((name, number, text))
    for split, of_split in rows.items():
        if not of_split:
            raise DataError(f"{table}: expected rows with split {SPLIT_KEYS[split]}, found none")
    segments = []
    for split, of_split in rows.items():
        ids, labels, texts = zip(*of_split, strict=True)
        features = partial(_load, raw, ids)
        segments.append(Segments(split, table.name, ids, np.array(labels, dtype=np.float32), texts, features))
    return shapes, segments


def _listed(table: Path) -> Iterator[tuple[int, str, Any, Any, str]]:
    """Yields row, id, split, label and text of each line."""
    seen: dict[str, int] = {}
    for row, values in table_rows(table, TABLE_COLUMNS):
        name, split, label, text = (values.get(column) for column in TABLE_COLUMNS)
        if not isinstance(name, str) or not name.strip() or Path(name).name != name:
            raise DataError(f"{table}, row {row}: id: expected a name, found {quoted(name)}")
        if seen.setdefault(name, row) != row:
            raise DataError(f"{table}, row {row}: id: {quoted(name)} is also in row {seen[name]}")
        yield row, name, split.strip() if isinstance(split, str) else split, label, str(text or "")


def _load(raw: Path, ids: Sequence[str], row: int) -> dict[str, np.ndarray]:
    return {name: open_numbers(raw / name / f"{ids[row]}.npy", STEPS) for name in MODALITIES}
