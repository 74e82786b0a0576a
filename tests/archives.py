"""Tampered `torch.save` archives: entries changed with valid checksums, or pickles that run code."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewritten(data: bytes, entry: str, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with `change` applied to the entries whose name ends in `entry`."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            target.writestr(info.filename, change(content) if info.filename.endswith(entry) else content)
    return out.getvalue()


class Touch:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)
