"""Resuming a training run: finds earlier runs of the same training, and checks what may have changed since."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_only

from clip.backbone import FrozenWeights
from common.errors import CheckpointError, ConfigError, DataError, UserError
from common.locks import locked
from common.messages import first_line
from common.strict_json import read_json
from common.text import counted, natural_key
from engine.checkpoint import Checkpoint, ModelSpec, check_backbone, check_classes, check_tokenizer
from engine.checkpoint_file import check_intact
from engine.contents import CONTENTS_FILE, OF_TEST, other_contents
from runs.comparable import BY_CONTENT, NOT_THE_TRAINING
from runs.option_readers import PRECISIONS
from runs.run_reader import as_written_by_run, flat_options, open_checkpoint, trained_so_far
from runs.sweep.jobs import BUSY
from vilt.datasets.arrow_dataset import ArrowDataset

log = logging.getLogger("rep")

FREE = NOT_THE_TRAINING | set(BY_CONTENT)
"""Options in which two runs of the same training may differ."""
TEST_PATTERN = ("missing_ratio.test", "missing_type.test")


class Progress(NamedTuple):
    """How far earlier runs of a training have come; both fields are None if there are none."""

    finished: Path | None = None  # folder of the run that has finished it
    checkpoint: Path | None = None
    """Checkpoint to resume from otherwise. If only the test is left, this is the checkpoint of the last step."""


@contextmanager
def training_lock(parent: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Keeps two runs in `parent` from doing the same training at once and resuming from each other's checkpoints.

    Runs that differ in an option of the training have different locks. The first process of a run holds the lock.

    Raises:
        BusyError: another process holds the lock; the message names it.
        ConfigError: the folder cannot be written to.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    training = {name: value for name, value in _comparable(config).items() if name not in FREE}
    digest = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()
    with locked(parent / f".training_{digest[:16]}.lock", f"{BUSY} in {parent}"):
        yield


def find_progress(
    parent: Path, config: Mapping[str, Any], contents: Mapping[str, str], *, any_precision: bool
) -> Progress:
    """Finds the newest intact checkpoint of this training in `parent`, or the run that has finished it.

    Logs what it finds, and which checkpoints are damaged.

    Args:
        config, contents: the future config.json and contents.json of this run.
        any_precision: runs of another precision count too if this machine supports it; resuming adopts it.
    """
    wanted = _comparable(config)
    runs = list(_agreeing(parent, wanted, contents, any_precision=any_precision))
    for folder, theirs, read in runs:
        same_test = all(theirs[name] == wanted[name] for name in TEST_PATTERN)
        same_test = same_test and all(read.get(name) == contents.get(name) for name in OF_TEST)
        if config["test_after_fit"] and same_test and (folder / "test_results.json").is_file():
            return Progress(finished=folder)
    for path in (path for folder, *_ in runs if (path := folder / "last.ckpt").is_file()):
        try:
            check_intact(path)
            epochs, steps, trained = trained_so_far(path, config)
        except UserError as error:
            log.warning("%s; tries the one before it", error)
            continue
        if trained and not config["test_after_fit"]:
            return Progress(finished=path.parent)
        log.info("resume_from=auto: resumes from %s (%s, %s)", path, counted(epochs, "epoch"), counted(steps, "step"))
        return Progress(checkpoint=path)
    log.info("resume_from=auto: no checkpoint of this run in %s; starts from the beginning", parent)
    return Progress()


def _agreeing(
    parent: Path, wanted: dict[str, Any], contents: Mapping[str, str], *, any_precision: bool
) -> Iterator[tuple[Path, dict[str, Any], dict[str, str]]]:
    """The run folders of the same training, newest first, with their options and the digests of what they read."""
    folders = [path for path in parent.glob("version_*") if path.name[8:].isdigit()]
    for folder in sorted(folders, key=natural_key, reverse=True):
        try:
            theirs, read = _comparable(read_json(folder / "config.json")), read_json(folder / CONTENTS_FILE)
        except (DataError, KeyError, TypeError) as error:
            log.warning("%s: skipped: %s", folder, first_line(error))
            continue
        supported = any_precision and (theirs.get("precision") != PRECISIONS["16"] or wanted["num_gpus"])
        if differing := _differences(theirs, wanted, FREE | {"precision"} if supported else FREE):
            log.info("%s: a run with other options: %s", folder, ", ".join(differing))
        elif other := other_contents(read, contents, *OF_TEST):
            log.info("%s: a run with these options on other files: %s", folder, ", ".join(other))
        else:
            yield folder, theirs, read


def log_differences(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Logs the relevant options in which the resumed training differs from the run of `checkpoint`.

    Raises:
        CheckpointError: the run has another optimiser, whose state does not fit.
    """
    path = checkpoint.with_name("config.json")
    if not path.is_file():
        return
    try:
        theirs, ours = _comparable(read_json(path)), _comparable(config)
    except (DataError, KeyError, TypeError) as error:
        log.info("%s: not compared: %s", path, first_line(error))
        return
    if (there := theirs.get("optim_type", ours["optim_type"])) != (here := ours["optim_type"]):
        raise CheckpointError(f"resume_from={checkpoint}: expected optim_type={there}, as its run had, found {here}")
    if differing := _differences(theirs, ours, {*FREE, "finetune_first"}):  # finetune_first has no effect on resuming
        log.info("resume_from: continues with options other than the run's: %s", ", ".join(differing))


def _differences(theirs: dict[str, Any], ours: dict[str, Any], free: Collection[str]) -> list[str]:
    return [
        f"{name} (there {theirs.get(name, 'no such option')}, here {ours.get(name, 'no such option')})"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in free and (name not in ours or name not in theirs or ours[name] != theirs[name])
    ]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options as read back from config.json, as `option.split` if keyed by split, and the samples per batch.

    Raises KeyError or TypeError if any are missing.
    """
    processes = config["num_nodes"] * (config["num_gpus"] or config["cpu_processes"])
    batch = {"samples per batch": config["per_gpu_batchsize"] * processes}
    return flat_options(json.loads(json.dumps(dict(config), default=str))) | batch


def check_length(checkpoint: Path, max_epoch: int, max_steps: int | None) -> None:
    """Raises ConfigError if the run of `checkpoint` has already trained for more than this."""
    last = open_checkpoint(checkpoint, "MissingModalityData", "global_step")
    with as_written_by_run(checkpoint):
        position = last["MissingModalityData"]
        begun = int(position["epoch"]) + (position.get("batches", 0) > 0)
        steps = int(last["global_step"])
    for name, limit, trained in (("max_epoch", max_epoch, begun), ("max_steps", max_steps, steps)):
        if limit is not None and trained > limit:
            reached = f"the number that resume_from={checkpoint} has trained"
            raise ConfigError(f"{name}: expected at least {trained}, {reached}; found {limit}")


def differing_options(there: ModelSpec, here: ModelSpec) -> str:
    """The options in which two models differ, with both values."""
    theirs, ours = (
        asdict(one.method)
        | {"task": one.task, "head": one.head, "architecture": one.architecture}
        | (asdict(one.custom) if one.custom is not None else {})
        for one in (there, here)
    )
    both = [key for key in theirs if key in ours]
    return ", ".join(f"{key} (there {theirs[key]}, here {ours[key]})" for key in both if theirs[key] != ours[key])


def check_resume(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    backbone: FrozenWeights,
    fingerprint: str,
    dataset: ArrowDataset,
    contents: Mapping[str, str],
) -> None:
    """Raises CheckpointError unless training can resume from `checkpoint` with this model on `dataset`."""
    if checkpoint.published:
        raise CheckpointError(f"resume_from={checkpoint.path}: is a published checkpoint; use it as load_path")
    if not checkpoint.resumable:
        raise CheckpointError(
            f"resume_from={checkpoint.path}: does not hold the training state, as last.ckpt does; use it as load_path"
        )
    check_backbone(checkpoint, backbone)
    check_tokenizer(checkpoint, fingerprint)
    check_classes(checkpoint, dataset)
    if checkpoint.spec != spec:
        differing = differing_options(checkpoint.spec, spec)
        raise CheckpointError(f"resume_from={checkpoint.path}: its run has other options: {differing}")
    if not checkpoint.contents:
        log.warning("resume_from=%s: does not record its training data; not compared", checkpoint.path)
    elif other := other_contents(checkpoint.contents, contents, *OF_TEST, "load_path", "architecture"):
        raise CheckpointError(
            f"resume_from={checkpoint.path}: trained on other files, so its best validation result does not apply "
            f"here: {', '.join(other)}; to start from its weights, use it as load_path"
        )
