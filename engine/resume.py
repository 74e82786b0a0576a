"""`resume_from=auto`: how far earlier runs with the same options, on the same data, got."""

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import CheckpointError, DataError
from common.locks import locked
from common.messages import first_line
from common.strict_json import read_json
from common.text import counted, natural_key
from engine.checkpoint_file import check_intact
from engine.contents import CONTENTS_FILE, OF_TEST, other_contents

log = logging.getLogger("rep")

OF_A_START = ("load_path", "finetune_first")
"""Options that a resumed training has no use for."""
TEST_PATTERN = ("missing_ratio.test", "missing_type.test")


@dataclass(frozen=True)
class Progress:
    """What there is of a run; nothing if all is None."""

    finished: Path | None = None
    """Folder of the run, if nothing is left to do."""
    checkpoint: Path | None = None
    """From which it resumes otherwise. A run that lacks only the test has one of its last step."""


@dataclass(frozen=True)
class Training:
    """A training that is asked for, to be compared with those that there are.

    Args:
        parent: folder of the run folders `version_N`.
        config: the options.
        free: names of the options in which it may differ.
        samples_per_batch: of all processes together.
        contents: SHA-256 of what it reads, see `engine/contents.py`.
    """

    parent: Path
    config: Mapping[str, Any]
    free: Collection[str]
    samples_per_batch: int
    contents: Mapping[str, str]


@contextmanager
def alone(parent: Path, config: Mapping[str, Any], free: Collection[str], samples_per_batch: int) -> Iterator[None]:
    """Keeps two runs below `parent` from doing the same training at once, each from the other's checkpoints.

    Runs that differ in an option of the training have different locks. Of several processes the first one holds it.
    The arguments are those of `Training`.

    Raises:
        BusyError: another one is at it; names it.
        ConfigError: `parent` cannot be written.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    training = {name: value for name, value in _comparable(config).items() if name not in free}
    described = json.dumps([training, samples_per_batch], sort_keys=True)
    lock = parent / f".training_{hashlib.sha256(described.encode()).hexdigest()[:16]}.lock"
    with locked(lock, f"resume_from=auto: another process is at this training in {parent}"):
        yield


def find_progress(ours: Training) -> Progress:
    """The newest intact checkpoint of the runs of this training, or the run that has finished it.

    Logs what it finds, and which checkpoints are damaged.
    """
    config = ours.config
    wanted, runs = _comparable(config), list(_agreeing(ours))
    for folder, theirs, theirs_read in runs:
        same_test = all(theirs[name] == wanted[name] for name in TEST_PATTERN) and all(
            theirs_read.get(name) == ours.contents.get(name) for name in OF_TEST
        )
        if config["test_after_fit"] and same_test and (folder / "test_results.json").is_file():
            return Progress(finished=folder)
    for path in (folder / "last.ckpt" for folder, *_ in runs):
        try:
            place = _place(path) if path.is_file() else None
        except CheckpointError as error:
            log.warning("%s; the one before is taken", error)
            continue
        if place is None:
            continue
        epochs, steps = place
        trained = epochs >= config["max_epoch"] or steps >= (config["max_steps"] or math.inf)
        if trained and not config["test_after_fit"]:
            return Progress(finished=path.parent)
        log.info("resume_from=auto: resumes from %s (%s, %s)", path, counted(epochs, "epoch"), counted(steps, "step"))
        return Progress(checkpoint=path)
    log.info("resume_from=auto: no checkpoint of this run in %s; starts from the beginning", ours.parent)
    return Progress()


def _agreeing(ours: Training) -> Iterator[tuple[Path, dict[str, Any], dict[str, str]]]:
    """The run folders of the same training, newest first, with their options and what they read."""
    folders = [path for path in ours.parent.glob("version_*") if path.name[8:].isdigit()]
    for folder in sorted(folders, key=natural_key, reverse=True):
        try:
            config = read_json(folder / "config.json")
            theirs = _comparable(config)
            batch = _samples_per_batch(config)
            read = read_json(folder / CONTENTS_FILE)
        except (DataError, KeyError, TypeError) as error:
            log.warning("%s: passed over: %s", folder, first_line(error))
            continue
        differing = _differences(theirs, _comparable(ours.config), ours.free)
        if batch != ours.samples_per_batch:
            differing.append(f"samples per batch (there {batch}, here {ours.samples_per_batch})")
        if differing:
            log.info("%s: a run with other options: %s", folder, ", ".join(differing))
        elif other := other_contents(read, ours.contents, *OF_TEST):
            log.info("%s: a run on something else under these options: %s", folder, ", ".join(other))
        else:
            yield folder, theirs, read


def say_differences(checkpoint: Path, config: Mapping[str, Any], free: Collection[str]) -> None:
    """Logs in which options a training that resumes from `checkpoint` differs, `free` ones apart, from its run.

    Raises:
        CheckpointError: it has another optimiser, whose state means something else.
    """
    path = checkpoint.with_name("config.json")
    if not path.is_file():
        return
    try:
        theirs, ours = _comparable(read_json(path)), _comparable(config)
        differing = _differences(theirs, ours, {*free, *OF_A_START})
    except DataError as error:
        log.info("%s: not compared: %s", path, first_line(error))
        return
    if (there := theirs.get("optim_type", ours["optim_type"])) != (here := ours["optim_type"]):
        raise CheckpointError(f"resume_from={checkpoint}: expected optim_type={there}, as its run had, found {here}")
    if differing:
        log.info("resume_from: from here on other options than the run had: %s", ", ".join(differing))


def _differences(theirs: dict[str, Any], ours: dict[str, Any], free: Collection[str]) -> list[str]:
    return [
        f"{name} (there {theirs.get(name, 'no such option')}, here {ours.get(name, 'no such option')})"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in free and (name not in ours or name not in theirs or ours[name] != theirs[name])
    ]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options as config.json gives them back; those of a split as `option.split`."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(config), default=str)).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _samples_per_batch(config: Mapping[str, Any]) -> int:
    """Of all processes together. Raises KeyError or TypeError where the options are not numbers."""
    processes = config["num_nodes"], config["num_gpus"] or config["cpu_processes"]
    if any(type(number) is not int for number in (config["per_gpu_batchsize"], *processes)):
        raise TypeError("samples per batch: expected whole numbers")
    return config["per_gpu_batchsize"] * math.prod(processes)


def _place(path: Path) -> tuple[int, int]:
    """Epochs and optimiser steps behind a checkpoint. Raises CheckpointError where it is damaged."""
    check_intact(path)
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=True)
        return int(content["MissingModalityData"]["epoch"]), int(content["global_step"])
    except Exception as error:  # torch.load raises many types on damaged files
        raise CheckpointError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
