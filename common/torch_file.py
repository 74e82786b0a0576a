"""Reads `torch.save` files and the state dicts in them: no code in a file runs, and every name is accounted for."""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_inert(path: Path, *, mmap: bool = False) -> Any:
    """The plain values and CPU tensors in a `torch.save` file; with `mmap` the tensors stay on disk.

    Raises:
        ValueError: the file is an archive that would grow when unpacked; those of `torch.save` are not compressed.
        Exception: torch raises many types on damaged files and on those that refer to code.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed, found = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if claimed > found:
            raise ValueError(f"its entries claim {claimed:,} bytes, but the file has {found:,}")
    return torch.load(path, "cpu", weights_only=True, mmap=mmap)


def state_dict_of(value: object) -> dict[str, Tensor]:
    """`value`, checked to be a state dict; otherwise raises a ValueError that says what it is instead."""
    expected = "expected a state dict (name to tensor)"
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{expected}, found {type(value).__name__}{' without entries' * (value == {})}")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, Tensor):
            raise ValueError(f"{expected}; {str(name)[:80]!r} is a {type(entry).__name__}")
    return value


def unwrapped_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add to its names.

    Raises ValueError if two entries then have the same name.
    """
    found = {}
    for name, tensor in state.items():
        plain = name.replace("_orig_mod.", "")
        while plain.startswith("module."):
            plain = plain.removeprefix("module.")
        if plain in found:
            raise ValueError(f"two entries have the name {plain}, one of them as {name}")
        found[plain] = tensor
    return found


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `state` has exactly the names and shapes of `expected`, and finite values.

    Values must be floating-point, or have the dtype that `expected` has (such as that of a counter in a buffer).
    """
    check_names(missing=expected.keys() - state.keys(), unexpected=state.keys() - expected.keys())
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if tensor.dtype not in (*NUMBERS, expected[name].dtype) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} holds {tensor.dtype} ({tensor.layout}), expected floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")


def check_names(missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raises a ValueError that lists the names, if there are any."""
    if missing or unexpected:
        raise ValueError(
            f"the weights do not fit: {len(missing)} names missing {first_of(missing)}, "
            f"{len(unexpected)} unexpected {first_of(unexpected)}"
        )


def first_of(names: Collection[str]) -> str:
    """The first names, in parentheses; empty if there are none."""
    return f"({', '.join(sorted(names)[:8])}{', …' if len(names) > 8 else ''})" if names else ""
