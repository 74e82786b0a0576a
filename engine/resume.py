"""`resume_from=auto`: how far earlier runs with the same options, on the same data, got."""

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    finished: Path | None = None  # folder of the run, if nothing is left to do
    checkpoint: Path | None = None
    """From which it resumes otherwise. A run that lacks only the test has one of its last step."""


@dataclass(frozen=True)
class Training:
    """A training that is asked for, to be compared with those that there are.

    Args:
        parent: folder of the run folders `version_N`.
        config: the options.
        free: names of the options in which it may differ.
        contents: SHA-256 of what it reads, see `engine/contents.py`.
    """

    parent: Path
    config: Mapping[str, Any]
    free: Collection[str]
    contents: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def alone(ours: Training) -> Iterator[None]:
    """Keeps two runs from doing the same training at once, each from the other's checkpoints.

    Runs that differ in an option of the training have different locks. Of several processes the first one holds it.

    Raises:
        BusyError: another one is at it; names it.
        ConfigError: the folder cannot be written.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    training = {name: value for name, value in _comparable(ours.config).items() if name not in ours.free}
    digest = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()
    busy = f"resume_from=auto: another process is at this training in {ours.parent}"
    with locked(ours.parent / f".training_{digest[:16]}.lock", busy):
        yield


def find_progress(ours: Training) -> Progress:
    """The newest intact checkpoint of the runs of this training, or the run that has finished it.

    Logs what it finds, and which checkpoints are damaged.
    """
    config, wanted, runs = ours.config, _comparable(ours.config), list(_agreeing(ours))
    for folder, theirs, read in runs:
        same_test = all(theirs[name] == wanted[name] for name in TEST_PATTERN)
        same_test = same_test and all(read.get(name) == ours.contents.get(name) for name in OF_TEST)
        if config["test_after_fit"] and same_test and (folder / "test_results.json").is_file():
            return Progress(finished=folder)
    for path in (path for folder, *_ in runs if (path := folder / "last.ckpt").is_file()):
        try:
            epochs, steps = _place(path)
        except CheckpointError as error:
            log.warning("%s; the one before is taken", error)
            continue
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
            theirs = _comparable(read_json(folder / "config.json"))
            read = read_json(folder / CONTENTS_FILE)
        except (DataError, KeyError, TypeError) as error:
            log.warning("%s: passed over: %s", folder, first_line(error))
            continue
        if differing := _differences(theirs, _comparable(ours.config), ours.free):
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
    except (DataError, KeyError, TypeError) as error:
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
    """The options as config.json gives them back, with what follows from them; those of a split as `option.split`.

    Raises KeyError or TypeError where they are not complete.
    """
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(config), default=str)).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    processes = config["num_nodes"] * (config["num_gpus"] or config["cpu_processes"])
    return flat | {"samples per batch": config["per_gpu_batchsize"] * processes}


def _place(path: Path) -> tuple[int, int]:
    """Epochs and optimiser steps behind a checkpoint. Raises CheckpointError where it is damaged."""
    check_intact(path)
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=True)
        return int(content["MissingModalityData"]["epoch"]), int(content["global_step"])
    except Exception as error:  # torch.load raises many types on damaged files
        raise CheckpointError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
