"""The folder of a run: its configuration, what it ran on, and its results. Earlier runs are never touched."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigError

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
        raise ConfigError(f"log_dir: cannot make a folder in {parent}: {error.strerror}; choose another") from error


def environment() -> dict[str, Any]:
    """Time, versions, devices and the state of the code, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))  # not of every Linux
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": versions | {"torch": torch.__version__},  # with what it was built for
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "cpu": processor[1] if processor else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the code, or None where it is not of a git repository, though it may lie in one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.rstrip("\n")

    try:
        git("ls-files", "--error-unmatch", here.name)  # of an installed package in a user's repository it is none
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The commit of the code, with `-dirty` where files of it were changed; None outside of a git checkout."""
    if (state := git_state()) is None:
        return None
    changed = any(not line.startswith("??") for line in state["changed"])
    return f"{state['commit']}{'-dirty' if changed else ''}"
