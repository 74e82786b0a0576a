"""Kinds of modalities: how each is stored in arrow files, read and collated. To add one, add a class and a line here.

Shape suffixes: N samples, b samples with the modality, L length, R side of images.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import DataError, reason_of
from common.files import atomic_path
from vilt.datasets.specs import DatasetSpec, Modality
from vilt.image_cache import open_image_cache
from vilt.images import square_image
from vilt.utils.mapped_array import MappedArray, is_usable
from vilt.utils.names import find_file
from vilt.utils.raw_data import MAX_FILE_BYTES
from vilt.utils.write_vla import NOT_FINITE, finite

if TYPE_CHECKING:
    from vilt.datasets.arrow_dataset import ArrowDataset

log = logging.getLogger(__name__)

Tokenize = Callable[..., np.ndarray]
"""Maps texts to token ids (N, 77), or (N, W, 77) if a number of windows is the second argument, see `ClipTokenizer`."""


@dataclass(frozen=True)
class InputFormat:
    """The inputs that a model expects."""

    image_size: int = 224
    """Side of images in pixels."""
    tokenize: Tokenize | None = field(default=None, compare=False)
    """Tokenizer of texts."""
    fingerprint: str = ""
    """Identifies the tokenizer."""
    text_windows: int = 1
    """Most windows of 75 tokens that a text is read in."""
    group_texts: bool = False
    """Whether all texts of a row form one sample."""


class Collated(NamedTuple):
    """The inputs of b samples."""

    input_b: Tensor
    length: int | None = None
    """Length of the longest input, if inputs are padded at the end."""
    length_b: Tensor | None = None
    """Length (b,) of each input, if they are padded in front."""


class Kind:
    """One modality of a dataset."""

    in_file: ClassVar[bool] = True
    """True: users name a file for each input; False: they give the input itself."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """File suffixes recognised in a folder."""
    of_sample: ClassVar[bool] = False
    """Whether each sample of a row has its own input, instead of sharing the row's."""
    max_windows = 1
    """Most windows that a text is read in; 1 for other kinds."""

    def __init__(self, modality: Modality, data: "ArrowDataset") -> None:
        self.modality, self.data = modality, data

    @property
    def column(self) -> pa.ChunkedArray:
        """The modality's column in the arrow file."""
        return self.data.table[self.modality.column]

    def check(self) -> None:
        """Raises DataError unless the column is of this kind; nulls, which are naturally missing, are allowed."""
        raise NotImplementedError

    def absent(self) -> np.ndarray:
        """Whether the modality is naturally missing in each row, bool (n_rows,)."""
        return np.asarray(pc.is_null(self.column).to_numpy())

    @cached_property
    def position_of_sample(self) -> np.ndarray:
        """Position of each sample's input among all inputs of the split, int64 (N,); -1 if it has none."""
        row_N = self.data.row_of_sample
        return np.where(self.absent()[row_N], -1, row_N)

    def given(self, row: int, sample: int) -> Any:
        """The file's raw value for a sample, None if it is naturally missing."""
        return self.column[row].as_py()

    def read(self, row: int, sample: int) -> Tensor | None:
        """The input of a sample; None for texts before `tokenize`. Raises DataError, which names the row."""
        raise NotImplementedError

    def lengths(self) -> np.ndarray | int:
        """Input lengths (N,), which decide how much is padded; 0 if all are equal, or not known yet."""
        return 0

    @staticmethod
    def read_given(value: Any, modality: Modality, given: InputFormat) -> Tensor:
        """Reads an input that a user gives. On damaged input it may raise any error."""
        raise NotImplementedError

    @staticmethod
    def collate(inputs: Sequence[Tensor]) -> Collated:
        """Stacks inputs; the list may be empty."""
        raise NotImplementedError

    def _fault(self, what: str, row: int | None = None) -> DataError:
        place = "" if row is None else f"row {row}: "
        return DataError(f"{self.data.path}: {place}column {self.modality.column}: {what}")


def decode_image(source: bytes | Image.Image, size: int) -> Tensor:
    """`square_image` as a tensor, uint8 (3, size, size) (docs/method.md section 1)."""
    return torch.from_numpy(np.array(square_image(source, size))).permute(2, 0, 1).contiguous()


class ImageKind(Kind):
    """Image files, stored as bytes and read as uint8 (3, R, R)."""

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    _cache: MappedArray | None = None

    def check(self) -> None:
        found = self.column.type
        if not (pa.types.is_binary(found) or pa.types.is_large_binary(found)):
            raise self._fault(f"expected the bytes of image files, found {found}")

    def read(self, row: int, sample: int) -> Tensor:
        return self._decoded(row) if self._cache is None else torch.from_numpy(self._cache.values[row].copy())

    def cache(self, workers: int) -> None:
        """See `ArrowDataset.cache_images`."""
        self._cache = open_image_cache(self.data.path, self.data.n_rows, self.data.image_size, self._decoded, workers)

    def _decoded(self, row: int) -> Tensor:
        size, content = self.data.image_size, self.column[row].as_py()
        if content is None:  # the cache has an entry for every row
            return torch.zeros(3, size, size, dtype=torch.uint8)
        try:
            return decode_image(content, size)
        except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
            reason = str(error) or type(error).__name__
            raise DataError(f"{self.data.path}: row {row}: the image cannot be decoded: {reason}") from error

    @staticmethod
    def read_given(value: str | Path | Image.Image, modality: Modality, given: InputFormat) -> Tensor:
        if not isinstance(value, str | Path | Image.Image):
            raise ValueError(f"expected a path or a Pillow image, found {type(value).__name__}")
        content = value if isinstance(value, Image.Image) else _bytes_of(find_file(Path(), str(value)))
        return decode_image(content, given.image_size)

    @staticmethod
    def collate(inputs: Sequence[Tensor]) -> Collated:
        return Collated(torch.stack([*inputs]) if inputs else torch.empty(0, 3, 0, 0, dtype=torch.uint8))


def _token_ids(tokenize: Tokenize, texts: Sequence[str], windows: int) -> np.ndarray:
    return tokenize(texts, windows) if windows > 1 else tokenize(texts)


def real_windows(windows: Tensor) -> Tensor:
    """The non-zero windows of (…, W, n), flattened to (w, n). All-zero windows are padding."""
    windows = windows.flatten(0, -2)
    return windows[windows.any(dim=-1)]


class TextKind(Kind):
    """Texts, stored as one list per row and read as int64 token ids (77,), or (w, 77) with several windows.

    Each text of a row is a sample, or, with `group_texts`, all of them together are one.
    """

    in_file = False
    suffixes = (".txt",)
    of_sample = True
    _tokens: MappedArray | np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray | None:
        """Token ids of every text, int32 (n, 77) or (n, W, 77); None before `tokenize`."""
        return self._tokens.values if isinstance(self._tokens, MappedArray) else self._tokens

    def check(self) -> None:
        found = self.column.type
        if not pa.types.is_list(found) or not pa.types.is_string(found.value_type):
            raise self._fault(f"expected lists of texts, found {found}")
        texts = pc.list_flatten(self.column)
        if texts.null_count:
            row = pc.list_parent_indices(self.column)[pc.index(pc.is_null(texts), True).as_py()].as_py()
            raise self._fault("a text is empty (null)", row)

    def absent(self) -> np.ndarray:
        return self.lengths_of_rows() == 0

    def lengths_of_rows(self) -> np.ndarray:
        """Number of texts in each row, int64 (n_rows,)."""
        return np.asarray(pc.fill_null(pc.list_value_length(self.column), 0), dtype=np.int64)

    @cached_property
    def position_of_sample(self) -> np.ndarray:
        absent_N = self.absent()[self.data.row_of_sample]
        return np.where(absent_N, -1, np.cumsum(~absent_N) - 1)

    @cached_property
    def texts_of_sample(self) -> np.ndarray:
        """Start and end of each sample's texts among all texts, int64 (N, 2)."""
        texts_N = self.lengths_of_rows()[self.data.row_of_sample]
        if not self.data.group_texts:
            texts_N = np.minimum(texts_N, 1)
        end_N = texts_N.cumsum()
        return np.stack([end_N - texts_N, end_N], axis=1)

    def given(self, row: int, sample: int) -> str | None:
        start, end = self.texts_of_sample[sample]
        texts = pc.list_flatten(self.column)[start:end].to_pylist()
        return "\n".join(texts) if texts else None

    def read(self, row: int, sample: int) -> Tensor | None:
        if (tokens := self.tokens) is None:
            return None
        start, end = self.texts_of_sample[sample]
        ids = torch.from_numpy(tokens[start:end].astype(np.int64))
        return ids[0] if ids.ndim == 2 else real_windows(ids)[: self.max_windows]

    def lengths(self) -> np.ndarray | int:
        if (tokens := self.tokens) is None:
            return 0
        ends = tokens.argmax(axis=-1) + 1
        if ends.ndim == 2:
            ends = (ends * tokens.any(axis=-1)).sum(axis=1)
        upto = np.append(0, ends.cumsum())
        return np.asarray(np.diff(upto[self.texts_of_sample], axis=1)[:, 0])

    def tokenize(self, tokenize: Tokenize, fingerprint: str, windows: int = 1) -> None:
        """See `ArrowDataset.tokenize`."""
        texts: list[str] = pc.list_flatten(self.column).to_pylist()
        assert len(self.texts_of_sample) == len(self.data)  # computed here, so that workers do not need the arrow file
        self.max_windows = windows
        shape = (len(texts), *[None] * (2 if windows > 1 else 1))
        if not texts:
            self._tokens = np.zeros([size or 1 for size in shape], dtype=np.int32)[:0]
            return
        digest = hashlib.sha256(f"{fingerprint}{f' {windows} windows' if windows > 1 else ''}".encode())
        for text in texts:
            digest.update(text.encode() + b"\0")
        cache = self.data.path.with_name(f"{self.data.path.stem}_tokens_{digest.hexdigest()[:16]}.npy")
        self._tokens = MappedArray(cache)
        if is_usable(cache, np.int32, shape):
            return
        tokens = _token_ids(tokenize, texts, windows).astype(np.int32)
        try:
            with atomic_path(cache) as temporary, temporary.open("wb") as file:
                np.save(file, tokens)
        except OSError as error:
            log.info("%s: cannot cache the token ids there (%s); each run computes them", cache, reason_of(error))
            self._tokens = tokens

    @staticmethod
    def read_given(value: str, modality: Modality, given: InputFormat) -> Tensor:
        if not isinstance(value, str):
            raise ValueError(f"expected a text, found {type(value).__name__}")
        assert given.tokenize is not None
        ids = torch.from_numpy(_token_ids(given.tokenize, [value], given.text_windows)[0])
        return ids if ids.ndim == 1 else real_windows(ids)

    @staticmethod
    def collate(inputs: Sequence[Tensor]) -> Collated:
        if not inputs:
            return Collated(torch.empty(0, 0, dtype=torch.long))
        tokens_bL = torch.stack([*inputs])
        return Collated(tokens_bL, int(tokens_bL.argmax(dim=-1).max()) + 1)  # up to the last `<end>`


class ArrayKind(Kind):
    """Arrays of the modality's shape, stored as nested lists of float32. If the first size varies, batches are padded
    with zeros in front."""

    suffixes = (".npy",)

    def check(self) -> None:
        values, expected = self.column.drop_null(), f"expected arrays of shape {self.modality.shape}"
        for size in self.modality.shape:
            if not isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
                raise self._fault(f"{expected}, found {self.column.type}")
            lengths = pc.list_value_length(values).to_numpy()
            if wrong := lengths[lengths < 1 if size is None else lengths != size].tolist():
                raise self._fault(f"{expected}, found the size {wrong[0]}")
            values = pc.list_flatten(values)
        if values.type != pa.float32() or values.null_count:
            raise self._fault(f"expected arrays of float32 without nulls, found {self.column.type}")

    def read(self, row: int, sample: int) -> Tensor:
        values = self.column[row].values
        shape = (len(values), *self.modality.shape[1:])
        for _ in shape[1:]:
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=False).reshape(shape)
        if not np.isfinite(array).all():
            raise self._fault("expected finite numbers", row)
        return torch.from_numpy(array.copy())

    def lengths(self) -> np.ndarray | int:
        if self.modality.shape[0] is not None:
            return 0
        lengths = pc.fill_null(pc.list_value_length(self.column), 0)
        return np.asarray(lengths, dtype=np.int64)[self.data.row_of_sample]

    @staticmethod
    def read_given(value: str | Path | np.ndarray, modality: Modality, given: InputFormat) -> Tensor:
        file, shape = None, modality.shape
        if not isinstance(value, np.ndarray):
            file = Path(value)
            value = np.lib.format.read_array(io.BytesIO(_bytes_of(file)), allow_pickle=False)
        if value.dtype.kind not in "biuf":
            raise ValueError(f"expected numbers, found {value.dtype}")
        array, replaced = finite(value)
        if not array.size or (replaced and not modality.padded):
            raise ValueError("expected finite numbers" + ("" if array.size else ", found none"))
        if replaced and file:
            log.warning("%s: %s: %d", file, NOT_FINITE, replaced)
        if modality.padded and array.ndim == len(shape) and len(array) < (shape[0] or 0):
            array = np.pad(array, [((shape[0] or 0) - len(array), 0), *[(0, 0)] * (array.ndim - 1)])
        if array.ndim != len(shape) or array.shape[1:] != shape[1:] or shape[0] not in (None, len(array)):
            expected = "at most {} steps of width {}".format(*shape) if modality.padded else f"the shape {shape}"
            raise ValueError(f"expected {expected}, found {array.shape}")
        return torch.from_numpy(array)

    @staticmethod
    def collate(inputs: Sequence[Tensor]) -> Collated:
        if not inputs:
            return Collated(torch.empty(0))
        if len({len(array) for array in inputs}) == 1:  # torch.stack takes a tenth of the time of pad_sequence
            return Collated(torch.stack([*inputs]), length_b=torch.full((len(inputs),), len(inputs[0])))
        padded_b = pad_sequence([*inputs], batch_first=True, padding_side="left")
        return Collated(padded_b, length_b=torch.tensor([len(array) for array in inputs]))


def root_mean_squares(data: "ArrowDataset") -> dict[str, float]:
    """Root mean square of each array modality over a whole split; 1 if all its values are 0."""
    found = {}
    for name, kind in data.kinds.items():
        squares, count = 0.0, 0
        for chunk in kind.column.drop_null().chunks:
            values = chunk
            for _ in kind.modality.shape:
                values = values.flatten()
            squares += float(np.square(values.to_numpy(zero_copy_only=False), dtype=np.float64).sum())
            count += len(values)
        found[name] = (squares / count) ** 0.5 or 1.0 if count else 1.0
    return found


KINDS: dict[str, type[Kind]] = {"image": ImageKind, "text": TextKind, "array": ArrayKind}


def kinds_of(spec: DatasetSpec) -> dict[str, type[Kind]]:
    """The kind of each modality of a dataset."""
    return {name: KINDS[modality.kind] for name, modality in spec.modalities.items()}


def _bytes_of(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
    return path.read_bytes()
