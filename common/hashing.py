"""SHA-256 of files."""

import hashlib
from functools import cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. The file is read again only if its metadata has changed."""
    state = path.stat()
    return _sha256(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
