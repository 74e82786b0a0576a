"""Opening what others wrote with `torch.save`: nothing in it runs, and it cannot ask for more memory than it fills."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP_START = b"PK\x03\x04"
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_inert(path: Path, *, mmap: bool = False) -> Any:
    """The plain values and CPU tensors in a file of `torch.save`; with `mmap` the tensors stay on disk.

    Raises:
        ValueError: it is an archive that grows when it is unpacked.
        Exception: torch raises many types on damaged files, and on those that mention code.
    """
    check_archive(path)
    return torch.load(path, "cpu", weights_only=True, mmap=mmap)


def check_archive(path: Path) -> None:
    """Raises ValueError or zipfile.BadZipFile where `path` is a zip archive that is damaged or grows when unpacked.

    `torch.save` compresses nothing, so that the entries of an archive of its own together are smaller than the file.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed, which torch.save never does")
    claimed, there = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > there:
        raise ValueError(f"its entries claim {claimed:,} bytes, and it has {there:,}")


def fault_of_weights(tensor: Tensor) -> str | None:
    """What `tensor` has that weights of a model have not, to follow its name in a message; None if nothing."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in NUMBERS:
        return f"holds {tensor.dtype} ({tensor.layout}, {tensor.device}), expected floating-point numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has the shape {tuple(tensor.shape)}, but not as many values"
    if not torch.isfinite(tensor).all():
        return "holds values that are not finite"
    return None
