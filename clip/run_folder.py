"""The folder of a run: its configuration, what it ran on, and its results. Earlier runs are never touched."""

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigError, DataError
from common.files import atomic_path
from common.messages import first_line
from common.strict_json import kind_of, parse_json

PACKAGES = (
    *("torch", "pytorch-lightning", "transformers", "tokenizers", "torchmetrics"),
    *("pyarrow", "pillow", "sacred", "numpy"),
)
"""Whose versions are recorded."""


def make_run_folder(log_dir: Path, name: str) -> Path:
    """A new folder `log_dir/name/version_N`, with the lowest N that nobody has; safe against other processes.

    Raises:
        ConfigError: log_dir cannot be written.
    """
    parent = log_dir / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError(f"log_dir: cannot make a folder in {parent}: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes `content` readably; a reader finds the old file or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises DataError, naming it, where it is not readable as an object."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {kind_of(content)}")
    return content


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table; a reader finds the old file or the new one."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def environment() -> dict[str, Any]:
    """Versions, devices and the state of the code, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions | {"torch": torch.__version__},  # with what it was built for
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpus},
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the code, or None where it is not in a git repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.rstrip("\n")

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None
