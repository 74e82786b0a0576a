"""Damaged files and odd values, for tests of what reads those of others."""

import random
from collections.abc import Iterator
from typing import Any

ODD_FILES = (
    b"", b"\0", b"null", b"[", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"NaN", b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00", b"\r\r\r", b"\n" * 100, b'{"a": 1, "a": 2}', b'"\\ud800"', b"<svg/>",
    b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP",
    b"ARROW1\0\0", b"\x93NUMPY\x01\x00", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueq\x85R.",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 10**400, 0.5, float("nan"), "", "\0", "0.5", "x" * 100_000, [], [[]], {}, {"": None}, [None] * 3,
)  # fmt: skip
INSERTED = (b"", b"", b"\0", b"\n", b'"', b"\xff\xfe", b"[" * 20_000)


def damaged(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` times the content with some bits flipped; then also with something inserted, or its end cut off."""
    draw = random.Random(seed)
    for number in range(count):
        content = bytearray(whole)
        for _ in range(1 + number % 3):
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        if number % 2:
            place = draw.randrange(len(whole))
            content[place:place] = draw.choice(INSERTED)
            content = content[: draw.choice([len(content), draw.randrange(len(whole))])]
        yield bytes(content)
