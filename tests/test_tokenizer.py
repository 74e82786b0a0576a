"""The tokenizer equals a slow, obvious byte-pair encoding, in every form it can be read from.

The small vocabulary is made here. Tests of CLIP's own vocabulary need the environment variable CLIP_VOCAB, the path
of `bpe_simple_vocab_16e6.txt.gz`.
"""

import gzip
import html
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from transformers import CLIPTokenizer

from clip.tokenizer import CLIP_MERGES, END, START, ClipTokenizer, load_tokenizer
from common.errors import BackboneError
from tests import golden
from tests.conftest import read_json

SENTENCES = (
    "the quick brown fox jumps over the lazy dog and then the other dogs, too; they've all seen it: 1999 was the year",
    "a film about a photographer who photographs photographs (in black & white) and the city that she's leaving",
    "l'été à la mer – où les enfants jouent à être des héros… très, très lentement",
    "日本語の映画 и русский фильм о войне 😀😀 !!! ??? ... --- $100,000.00",
)
OPENAI_PATTERN = regex.compile(
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
    regex.IGNORECASE,
)
needs_vocabulary = pytest.mark.skipif(not os.environ.get("CLIP_VOCAB"), reason="CLIP_VOCAB names no vocabulary file")


def byte_symbols() -> dict[int, str]:
    """The character that stands for each byte, in the order of CLIP's ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


SYMBOLS = byte_symbols()


def openai_clean(text: str) -> str:
    """The text as OpenAI's code cleans it before splitting it into pieces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def symbols_of(word: str) -> list[str]:
    symbols = [SYMBOLS[byte] for byte in word.encode()]
    return [*symbols[:-1], symbols[-1] + "</w>"]


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    while parts:
        width = 2 if tuple(parts[:2]) == pair else 1
        out.append("".join(parts[:width]))
        parts = parts[width:]
    return out


class SlowTokenizer:
    """Byte-pair encoding, step by step: among the pairs present, the one merged first in training is joined."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        characters = list(SYMBOLS.values())
        pieces = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
        self.vocab = {piece: number for number, piece in enumerate(pieces)}

    def __call__(self, text: str) -> list[int]:
        ids = [self.vocab[START]]
        for word in OPENAI_PATTERN.findall(openai_clean(text)):
            parts = [word] if word in (START, END) else symbols_of(word)
            while known := [pair for pair in itertools.pairwise(parts) if pair in self.ranks]:
                parts = merged(parts, min(known, key=self.ranks.__getitem__))
            ids += [self.vocab[part] for part in parts]
        ids = [*ids, self.vocab[END]]
        if len(ids) > 77:
            ids = [*ids[:76], self.vocab[END]]
        return ids + [0] * (77 - len(ids))


def train_merges(texts: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """Merges learnt by repeatedly joining the most frequent pair."""
    words = [symbols_of(word) for text in texts for word in OPENAI_PATTERN.findall(openai_clean(text))]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [merged(word, best) for word in words]
    return merges


@pytest.fixture(scope="module")
def slow() -> SlowTokenizer:
    return SlowTokenizer(train_merges(SENTENCES, 150))


@pytest.fixture(scope="module")
def fast(slow: SlowTokenizer) -> ClipTokenizer:
    return ClipTokenizer(slow.vocab, slow.merges)


def write_folder(folder: Path, vocab: object, merges: list[tuple[str, str]]) -> Path:
    """Writes a Hugging Face folder with vocab.json and merges.txt."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def ids_of(tokenizer: ClipTokenizer, text: str) -> list[int]:
    return tokenizer([text])[0].tolist()


ALPHABET = [
    *"abcdetho xyz é日😀ßİſ½12!?.,&;#'-\t\n\x00\x1c\x85\u00a0\u3000\u200d\u0301\ud800",
    *("<|endoftext|>", "<|STARTOFTEXT|>", "<|end", "|>", "&amp;", "<b> &amp;amp;", "&amp;amp;amp;", "&lt;b&gt;"),
    *("'ll", "I'M", "'ſ", "the ", "photograph"),
]


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice(ALPHABET) for _ in range(draw.randrange(60))) for _ in range(count)]


def test_ids_equal_the_slow_version(slow: SlowTokenizer, fast: ClipTokenizer) -> None:
    texts = [*SENTENCES, *random_texts(600, seed=0)]
    found = fast(texts)
    assert found.shape == (len(texts), 77) and found.dtype == np.int64
    for text, row in zip(texts, found.tolist(), strict=True):
        assert row == slow(text), ascii(text)
    assert (found[:, 76] == fast.end_id).any(), "no text was long enough to be cut"


@pytest.mark.parametrize("text", ["", "   ", "\n\t\u3000", "\x00 \x07", "&#32;"])
def test_an_empty_text_is_start_and_end(fast: ClipTokenizer, text: str) -> None:
    assert ids_of(fast, text) == [fast.start_id, fast.end_id] + [0] * 75


@pytest.mark.parametrize("text", ["a" * 1_000_000, "the dog " * 125_000], ids=["one word", "many words"])
def test_a_megabyte_is_truncated_with_end_last(fast: ClipTokenizer, slow: SlowTokenizer, text: str) -> None:
    assert ids_of(fast, text) == slow(text[:800])


@pytest.mark.parametrize("words", [74, 75, 76])
def test_texts_are_truncated_to_77_tokens(fast: ClipTokenizer, words: int) -> None:
    ids = ids_of(fast, "7" * words)  # each digit is its own piece
    seven = ids[1]
    assert ids == [fast.start_id, *[seven] * min(words, 75), fast.end_id, *[0] * (75 - words)]


def test_spelt_out_marks_are_marks_only_as_separate_pieces(slow: SlowTokenizer, fast: ClipTokenizer) -> None:
    """As in OpenAI's code: after punctuation, the pattern has already consumed the mark's bracket."""
    start, end = fast.start_id, fast.end_id
    dog = ids_of(fast, "dog")[1:-1]
    dog = dog[: dog.index(end)]
    marked = ids_of(fast, "dog<|endoftext|>dog <|StartOfText|>")
    assert marked[: 5 + 2 * len(dog)] == [start, *dog, end, *dog, start, end, 0]
    glued = ids_of(fast, "!<|endoftext|>")
    assert glued == slow("!<|endoftext|>")
    assert glued.index(end) > 5  # only the one that ends the text


def test_folders_and_objects_give_the_same_tokenizer(slow: SlowTokenizer, fast: ClipTokenizer, tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old", slow.vocab, slow.merges)
    CLIPTokenizer(vocab=slow.vocab, merges=slow.merges).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").is_file() and not (tmp_path / "new" / "vocab.json").exists()
    texts = random_texts(100, seed=1)
    for folder in (old, tmp_path / "new"):
        read = load_tokenizer(str(folder))
        assert (read(texts) == fast(texts)).all()
        assert (read.fingerprint, read.vocab_size) == (fast.fingerprint, len(slow.vocab))


def test_fingerprints_differ_between_vocabularies_and_merges(slow: SlowTokenizer, fast: ClipTokenizer) -> None:
    reordered = ClipTokenizer(slow.vocab, [slow.merges[1], slow.merges[0], *slow.merges[2:]])
    fewer = SlowTokenizer(slow.merges[:-1])
    smaller = ClipTokenizer(fewer.vocab, fewer.merges)
    assert len({fast.fingerprint, reordered.fingerprint, smaller.fingerprint}) == 3


def write_new(folder: Path, slow: SlowTokenizer, change: Callable[[str], str]) -> None:
    """Writes a Hugging Face folder with a changed tokenizer.json."""
    CLIPTokenizer(vocab=slow.vocab, merges=slow.merges).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(change(path.read_text("utf-8")), "utf-8")


def without(slow: SlowTokenizer, piece: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = {name: number for name, number in slow.vocab.items() if name != piece}
    return vocab, [pair for pair in slow.merges if piece not in pair]


def swapped(slow: SlowTokenizer) -> dict[str, int]:
    return {**slow.vocab, START: slow.vocab[END], END: slow.vocab[START]}


BROKEN: dict[str, tuple[Callable[[Path, SlowTokenizer], object], str]] = {
    "empty": (lambda to, slow: to.mkdir(), "no vocabulary"),
    "cut": (lambda to, slow: write_new(to, slow, lambda text: text[: len(text) // 2]), "not readable as a CLIP"),
    "other JSON": (lambda to, slow: write_new(to, slow, lambda text: '{"a": 1}'), "KeyError"),
    "no merges": (lambda to, slow: (write_folder(to, slow.vocab, slow.merges) / "merges.txt").unlink(), "merges"),
    "unknown merge": (lambda to, slow: write_folder(to, slow.vocab, [*slow.merges, ("zz", "q")]), "[Mm]erges"),
    "list": (lambda to, slow: write_folder(to, [1, 2], slow.merges), "vocabulary"),
    "no byte": (lambda to, slow: write_folder(to, *without(slow, "q</w>")), "found 512 of those 513"),
    "end not highest": (
        lambda to, slow: write_folder(to, swapped(slow), slow.merges),
        r"startoftext\|>' as the highest",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(name: str, slow: SlowTokenizer, tmp_path: Path) -> None:
    make, problem = BROKEN[name]
    make(tmp_path / "folder", slow)
    with pytest.raises(BackboneError, match=problem) as refusal:
        load_tokenizer(str(tmp_path / "folder"))
    assert str(tmp_path / "folder") in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.txt", b"", "found 0 lines"),
        ("few.txt", b"#version\na b\nc d\n", "found 2 lines"),
        ("odd.txt", b"#version\n" + b"a b\n" * (CLIP_MERGES - 1) + b"a b c\n", "two pieces"),
        ("binary.txt", b"\xff\xfe\x00", "not readable"),
        ("plain.gz", b"#version\na b\n", "[Nn]ot a gzipped file"),
        ("cut.gz", gzip.compress(b"#version\n" + random.Random(0).randbytes(4096), mtime=0)[:2000], "not readable"),
        ("damaged.gz", gzip.compress(b"#version\n", mtime=0)[:10] + b"\x07" * 40, "not readable"),
    ],
)
def test_broken_merges_files_are_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=problem) as refusal:
        load_tokenizer(str(tmp_path / name))
    assert str(tmp_path / name) in str(refusal.value)


def test_the_hub_is_asked_if_the_cache_has_no_vocabulary(slow, fast, monkeypatch):
    """For a hub name that is not cached, transformers returns an empty tokenizer without an error."""
    asked: list[bool] = []

    def from_pretrained(source: str, *, local_files_only: bool, **_: Any) -> CLIPTokenizer:
        asked.append(local_files_only)
        return CLIPTokenizer() if local_files_only else CLIPTokenizer(vocab=slow.vocab, merges=slow.merges)

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda *_: True)
    assert load_tokenizer("openai/clip-vit-base-patch16").fingerprint == fast.fingerprint
    assert asked == [True, False]


@needs_vocabulary
def test_ids_equal_the_golden_ones_in_every_form(tmp_path: Path) -> None:
    packed = Path(os.environ["CLIP_VOCAB"])
    plain = tmp_path / "bpe_simple_vocab_16e6.txt"
    if packed.suffix == ".gz":
        plain.write_bytes(gzip.decompress(packed.read_bytes()))
    else:
        shutil.copy(packed, plain)
    lines = plain.read_text("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    slow = SlowTokenizer([(a, b) for a, b in (line.split() for line in lines)])
    write_folder(tmp_path / "old", slow.vocab, slow.merges)
    CLIPTokenizer(vocab=slow.vocab, merges=slow.merges).save_pretrained(tmp_path / "new")
    entries = read_json(golden.GOLDEN_DIR / "clip_tokens.json")
    texts = [entry["text"] for entry in entries]
    expected = [entry["ids"] + [0] * (77 - len(entry["ids"])) for entry in entries]
    assert [slow(text) for text in texts] == expected
    more = random_texts(200, seed=2)
    fingerprints = set()
    for source in (packed, plain, tmp_path / "old", tmp_path / "new"):
        tokenizer = load_tokenizer(str(source))
        assert tokenizer(texts).tolist() == expected
        assert tokenizer(more).tolist() == [slow(text) for text in more]
        assert (tokenizer.start_id, tokenizer.end_id, tokenizer.vocab_size) == (49406, 49407, 49408)
        fingerprints.add(tokenizer.fingerprint)
    assert len(fingerprints) == 1
