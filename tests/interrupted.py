"""Runs in separate processes that are interrupted and resumed, and the results of such a chain of runs."""

import csv
import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.conftest import Workspace

CONTEXT = multiprocessing.get_context("forkserver")  # imports everything once, so that each run starts quickly
CONTEXT.set_forkserver_preload(["run", "runs.training"])
OPTIONS = (
    *("val_check_interval=0.4", "max_epoch=3", "num_workers=1", "simulate_missing=True"),
    *("batch_size=8", "per_gpu_batchsize=4", "resume_from=auto"),
)
"""Twelve batches per epoch, two per optimiser step; validation after batches 4, 8 and 12."""

Trap = tuple[str, int, int]
"""Place in the run, the pass through it at which the process signals itself, and the signal's number."""


def _trap(trap: Trap, group: bool) -> None:
    from engine.callbacks import Checkpoints
    from engine.training import FinetuneModule

    place, passes, number = trap
    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "accumulation": (FinetuneModule, "training_step", lambda _, __, batch_idx: batch_idx % 2 == 1),
        "optimiser step": (FinetuneModule, "training_step", lambda _, __, batch_idx: batch_idx % 2 == 0),
        "before the optimiser": (FinetuneModule, "optimizer_step", lambda *_: True),
        "validation": (FinetuneModule, "validation_step", lambda *_: True),
        "before the checkpoint": (Checkpoints, "_write_last", lambda *_: True),
        "checkpoint": (Path, "replace", lambda path, _: ".ckpt." in path.name),
        "epoch end": (FinetuneModule, "on_train_epoch_end", lambda *_: True),
        "test": (FinetuneModule, "test_step", lambda *_: True),
    }
    owner, name, condition = places[place]
    original: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def trapped(*arguments: Any) -> Any:
        nonlocal passed
        if condition(*arguments):
            passed += 1
            if passed == passes:
                (os.killpg if group else os.kill)(os.getpid(), number)
        return original(*arguments)

    setattr(owner, name, trapped)


def _run(command: list[str], log: Path, traps: tuple[Trap, ...], group: bool) -> None:
    os.setsid()  # its own process group, as a shell would start it
    multiprocessing.set_start_method("fork", force=True)  # as runs start their loader workers
    os.environ["HF_HUB_OFFLINE"] = "1"
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from engine import callbacks
    from run import command_line

    callbacks.SECONDS_BETWEEN = 0.0
    for trap in traps:
        _trap(trap, group)
    sys.exit(command_line(command))


class Chain:
    """Successive runs under one name, each resuming the one before."""

    def __init__(self, workspace: Workspace, name: str, *options: str) -> None:
        self.command = workspace.command(f"vit={workspace.backbone}", *OPTIONS, f"exp_name={name}", *options)
        self.parent = workspace.results / f"{name}_seed0"
        self.log = workspace.root / f"{name}.log"

    def run(self, *traps: Trap, group: bool = False) -> int:
        """Starts a run, waits for it to end, and returns its exit status, or minus the signal that killed it.

        Args:
            group: send signals to the whole process group, as Ctrl-C does.
        """
        process = self.started(*traps, group=group)
        process.join(120)
        assert process.exitcode is not None, f"does not end:\n{self.log.read_text()}"
        return process.exitcode

    def started(self, *traps: Trap, group: bool = False) -> multiprocessing.process.BaseProcess:
        """Starts a run and returns its process without waiting."""
        process = CONTEXT.Process(target=_run, args=(self.command, self.log, traps, group))
        process.start()
        return process

    @property
    def folders(self) -> list[Path]:
        """Folders of the runs, oldest first."""
        return sorted(self.parent.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))

    def metrics(self) -> dict[tuple[int, str], str]:
        """All logged values keyed by step and column, except times; values logged twice must agree."""
        found: dict[tuple[int, str], str] = {}
        for path in (folder / "metrics.csv" for folder in self.folders if (folder / "metrics.csv").is_file()):
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            assert len({row["step"] for row in rows}) == len(rows), path
            for row in rows:
                for name in (name for name, value in row.items() if value and name != "seconds"):
                    assert found.setdefault((int(row["step"]), name), row[name]) == row[name], (path, name, row)
        return found

    def result(self) -> dict[str, Any]:
        """Everything the chain computed: the newest last.ckpt and best.ckpt, the test metrics, all logged metrics."""
        last = next(folder for folder in reversed(self.folders) if (folder / "last.ckpt").is_file())
        best = torch.load(self.folders[-1] / "best.ckpt", weights_only=True)
        state = torch.load(last / "last.ckpt", weights_only=True)
        return {
            "weights": state["state_dict"],
            "optimizer": state["optimizer_states"],
            "schedule": state["lr_schedulers"],
            "step": state["global_step"],
            "best": {name: best[name] for name in ("state_dict", "score", "epoch", "global_step")},
            "test": json.loads((self.folders[-1] / "test_results.json").read_text())["metrics"],
            "metrics": self.metrics(),
        }


@contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """Limits file sizes: a write beyond `n_bytes` fails as on a full disk, but with a different errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two results are not bitwise equal."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        alone = [f"{path}/{key}: only in one" for key in one.keys() ^ other.keys()]
        return sum((differences(one[key], other[key], f"{path}/{key}") for key in one.keys() & other.keys()), alone)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if one == other else [f"{path}: {one!r}, {other!r}"]


def assert_same_end(one: Path, other: Path) -> None:
    """The trainings of two run folders ended in the same state."""
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (one, other)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert not differences(*(state[part] for state in states)), part
