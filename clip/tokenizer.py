"""CLIP's byte-pair tokenizer, read from a Hugging Face tokenizer or CLIP's merges file (docs/method.md section 1)."""

import gzip
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from clip.pretrained import read_pretrained
from common.errors import BackboneError
from common.messages import first_line, listed, quoted

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
FILES = ("tokenizer.json", "vocab.json")
"""Files of which a Hugging Face tokenizer's folder has at least one."""
CLIP_MERGES = 49152 - 256 - 2
"""Number of merges that CLIP reads from its file, which contains more."""
SPLIT = pre_tokenizers.Split(
    Regex(r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
    behavior="removed",
    invert=True,
)
"""Splits a text into pieces by CLIP's pattern."""


class ClipTokenizer:
    """Converts texts to CLIP token ids, exactly like OpenAI's code.

    Args:
        vocab: maps pieces to ids; `<|endoftext|>` has the highest, by which the text tower finds where to read out.
        merges: pairs of pieces, in the order in which they are merged.

    Raises:
        ValueError: the vocabulary lacks a special token or a byte, `<|endoftext|>` does not have the highest id, or a
            merge refers to unknown pieces.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        highest = max(vocab, key=lambda piece: vocab[piece], default=None)
        needed = {START, *byte_characters(), *(f"{c}</w>" for c in byte_characters())}
        if not needed <= vocab.keys() or highest != END:
            raise ValueError(
                f"not a CLIP vocabulary: expected {START}, the 256 byte characters inside and at the end of "
                f"a word, and {END} as the highest id; found {len(needed & vocab.keys())} of those {len(needed)} and "
                f"{quoted(highest)} as the highest"
            )
        self.start_id, self.end_id = vocab[START], vocab[END]
        self.vocab_size = self.end_id + 1
        digest = json.dumps([sorted(vocab.items()), list(merges)]).encode()
        self.fingerprint = hashlib.sha256(digest).hexdigest()
        """Identifies vocabulary and merges; part of token caches' names."""
        try:
            bpe = BPE(vocab=vocab, merges=list(merges), end_of_word_suffix="</w>", continuing_subword_prefix="")
        except Exception as error:  # what tokenizers raises for a merge of unknown pieces
            raise ValueError(f"not a CLIP vocabulary: {first_line(error)}") from error
        self._tokenizer = Tokenizer(bpe)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([SPLIT, to_bytes])

    def __call__(self, texts: Sequence[str], windows: int = 1) -> np.ndarray:
        """Ids of `texts`, int64 (N, 77): start, text, end, zeros; a long text is truncated so that end comes last.

        With `windows` above 1, the shape is (N, W, 77): a long text continues in further windows, up to that number. W
        is the number of windows of the longest text; the unused windows of shorter ones are 0.
        """
        cleaned, room = [clean(text) for text in texts], CONTEXT_LENGTH - 2
        pieces = [
            self._with_marks(text) if START in text or END in text else encoding.ids
            for text, encoding in zip(cleaned, self._tokenizer.encode_batch(cleaned), strict=True)
        ]
        most = min(windows, max((-(-len(found) // room) for found in pieces), default=1) or 1)
        ids = np.zeros((len(texts), most, CONTEXT_LENGTH), dtype=np.int64)
        for row, found in enumerate(pieces):
            for window, start in zip(range(most), range(0, max(1, len(found)), room), strict=False):
                marked = [self.start_id, *found[start : start + room], self.end_id]
                ids[row, window, : len(marked)] = marked
        return ids if windows > 1 else ids[:, 0]

    def _with_marks(self, text: str) -> list[int]:
        """Ids of a cleaned text that contains a special token. With OpenAI's pattern, it counts as one only if it is a
        piece by itself: `!<|endoftext|>` is punctuation, a word and punctuation."""
        marks = {START: self.start_id, END: self.end_id}
        ids: list[int] = []
        for piece, _ in SPLIT.pre_tokenize_str(text):
            ids += [marks[piece]] if piece in marks else self._tokenizer.encode(piece).ids
        return ids


def is_surely_cut(text: str) -> bool:
    """Whether a text is too long for CLIP's 77 positions even if each of its pieces is a single token."""
    if len(text) <= CONTEXT_LENGTH - 2:
        return False
    pieces = SPLIT.pre_tokenize_str(clean(text))
    return len(pieces) > CONTEXT_LENGTH - 2


def clean(text: str) -> str:
    """CLIP's cleaning: ftfy, HTML entities unescaped twice, white space collapsed, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def load_tokenizer(source: str) -> ClipTokenizer:
    """The tokenizer of a Hugging Face folder or hub name, or of CLIP's `bpe_simple_vocab_16e6.txt[.gz]`.

    Raises:
        BackboneError: nothing usable is at `source`.
    """
    path = Path(source)
    return _from_merges_file(path) if path.is_file() else _from_hugging_face(source)


def _from_merges_file(path: Path) -> ClipTokenizer:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = file.read().decode("utf-8").split("\n")[1 : CLIP_MERGES + 1]
        pairs = [tuple(line.split()) for line in lines if line]
        if len(pairs) != CLIP_MERGES or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"expected {CLIP_MERGES} merges of two pieces, found {len(pairs)} lines")
        merges = [(first, second) for first, second in pairs]
        characters = byte_characters()
        pieces = [*characters, *(f"{c}</w>" for c in characters), *(a + b for a, b in merges), START, END]
        return ClipTokenizer({piece: i for i, piece in enumerate(pieces)}, merges)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BackboneError(f"tokenizer={path}: not readable as a CLIP merges file: {first_line(error)}") from error


def byte_characters() -> list[str]:
    """The printable character that represents each byte, in the order of CLIP's ids: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def _from_hugging_face(source: str) -> ClipTokenizer:
    from transformers import CLIPTokenizer  # takes seconds to import

    def read(local_files_only: bool) -> ClipTokenizer:
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=local_files_only)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        if len(model["vocab"]) <= len(tokenizer.all_special_tokens):  # transformers' result without files
            raise ValueError("no vocabulary found")
        _check_settings(tokenizer)
        merges = [(a, b) for a, b in (m if isinstance(m, list) else m.split() for m in model["merges"])]
        return ClipTokenizer(model["vocab"], merges)

    what = "a CLIP tokenizer (a Hugging Face folder, a hub name, or the merges file bpe_simple_vocab_16e6.txt.gz)"
    return read_pretrained(f"tokenizer={source}", source, read, what)


def _check_settings(tokenizer: Any) -> None:
    """Raises ValueError if a Hugging Face tokenizer's settings would give ids different from OpenAI's code."""
    settings = tokenizer.init_kwargs
    added = sorted({token.content for token in tokenizer.added_tokens_decoder.values()} - {START, END})
    for name, expected, found, fits in (
        ("added tokens", f"only {START} and {END}", listed(added), not added),
        ("bos_token", START, tokenizer.bos_token, tokenizer.bos_token == START),
        ("eos_token", END, tokenizer.eos_token, tokenizer.eos_token == END),
        ("do_lower_case", True, settings.get("do_lower_case"), settings.get("do_lower_case", True)),
        ("add_prefix_space", False, settings.get("add_prefix_space"), not settings.get("add_prefix_space", False)),
        ("truncation_side", "right", tokenizer.truncation_side, tokenizer.truncation_side == "right"),
        (
            "model_max_length",
            f"at least {CONTEXT_LENGTH}",
            tokenizer.model_max_length,
            tokenizer.model_max_length >= CONTEXT_LENGTH,
        ),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {expected}, found {found}, which is not supported")
