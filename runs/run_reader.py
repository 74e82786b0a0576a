"""Reads run folders, for the table of runs, robustness results, comparisons and the report.

A resumed run and those it was resumed from count as one run. `runs/lines.py` groups runs into lines.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, DataError
from common.messages import first_line, quoted
from common.readers import text
from common.strict_json import read_json
from common.text import baseline_texts, counted, natural_key
from config import DEFAULTS
from engine.ending import ERROR_FILE
from runs.comparable import BY_CONTENT, NOT_THE_LINE
from runs.pattern import Pattern
from runs.sweep.jobs import error_in
from vilt.datasets.custom import CUSTOM, CUSTOM_TASKS, CustomData
from vilt.datasets.specs import CLIP, EVERY_DATASET, SPLITS, spec_of

if TYPE_CHECKING:
    from runs.stored_results import Robustness, StoredLogits

RUN_FILES = ("best.ckpt", "last.ckpt", "metrics.csv", "test_results.json")
"""Any of these identifies a run folder, even if its config.json does not."""
ERROR_LENGTH = 100
"""Maximum length of the error shown for a failed run."""
NEEDED = ("task", "exp_name", "prompt_type", "data_root", "seed", "test_only")
SAME_CONTENTS = ("data of train", "data of val", "data of test", "backbone")
"""Entries of contents.json in which the runs of one line agree."""
PATTERN_OPTIONS = ("missing_type.train", "missing_ratio.train", "both_ratio")


class Run:
    """A run folder with a readable configuration. Its other files are read on demand.

    Args:
        folder: as the user spelled it.

    Raises:
        DataError: config.json or contents.json is damaged; the properties raise it if another file is.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "config.json"
        self.folder, self.config = folder, read_json(path)
        config = self.config
        with as_written_by_run(path):
            [config[name] for name in NEEDED]  # the KeyError names the first one missing
            for name in ("exp_name", "prompt_type"):
                text(name, config[name])
            if config["task"] not in EVERY_DATASET:
                raise ValueError(f"task: expected one of {', '.join(EVERY_DATASET)}, found {quoted(config['task'])}")
            self.custom = CustomData.from_dict(config[CUSTOM]) if config["task"] in CUSTOM_TASKS else None
            self.dataset = str(config["task"]) if self.custom is None else self.custom.key  # unique
            self.spec = spec_of(config["task"], self.custom)
            patterns = {}
            for split in SPLITS:
                at = config["missing_type"][split], config["missing_ratio"][split], config["both_ratio"]
                patterns[split] = Pattern.of(self.spec, *at)
        self.pattern = patterns["train"]
        self.is_evaluation = bool(config["test_only"])  # nothing was trained
        self.pretrains = self.spec.recordings and config["prompt_type"] == self.spec.pretraining["prompt_type"]
        """Whether it pretrained a backbone without labels; such runs are not tested."""
        self.started = _started(folder)  # in local time
        path = folder / "contents.json"
        self.contents = read_json(path) if path.is_file() else {}
        """Digests of the files it read; empty for old runs, which did not record them."""
        earlier = _resumed_from(folder, config)
        self.parts: list[Run] = [self, *(earlier.parts if earlier is not None else [])]
        """This run and those it was resumed from, latest first."""

    @cached_property
    def test(self) -> dict[str, Any] | None:
        """The content of test_results.json; None if it does not exist."""
        path = self.folder / "test_results.json"
        if not path.is_file():
            return None
        results = read_json(path)
        with as_written_by_run(path):
            if results.get("task", self.config["task"]) != self.config["task"]:
                found = quoted(results["task"])
                raise ValueError(f"results of another dataset: expected {self.config['task']}, found {found}")
            results["metrics"] = numbers_by_name(results["metrics"])
            results["metrics"][self.spec.monitor]
            baseline_texts(results.get("baselines", {}), self.spec.monitor)
            Pattern.of(self.spec, *(results["missing_pattern"][name] for name in Pattern._fields))
        return results

    @property
    def tested_at(self) -> Pattern | None:
        """The missing pattern of the test; None if the run was not tested."""
        if self.test is None:
            return None
        return Pattern.of(self.spec, *(self.test["missing_pattern"][name] for name in Pattern._fields))

    @cached_property
    def robustness(self) -> "Robustness | None":
        """Its robustness results, if any."""
        from runs.stored_results import read_robustness  # loads torch, which a table of runs need not do

        return read_robustness(self)

    @property
    def logits(self) -> "StoredLogits | None":
        """The logits of its robustness results, if any. Not cached, since those of many runs may be large."""
        from runs.stored_results import read_logits

        return read_logits(self)

    @property
    def has_logits(self) -> bool:
        """Whether it has robustness results and their logits."""
        return all((self.folder / "robustness" / name).is_file() for name in ("robustness.json", "logits.arrow"))

    @cached_property
    def best_validation(self) -> float | None:
        """The task's metric in best.ckpt, as a fraction; None without one, for evaluations and for pretraining."""
        best = self.folder / "best.ckpt"
        if self.is_evaluation or self.pretrains or not best.is_file():
            return None
        return float(open_checkpoint(best, "score")["score"])

    @cached_property
    def failure(self) -> str | None:
        """The error that ended the run, shortened; None if it is running, was killed or has a test result."""
        path = self.folder / ERROR_FILE
        if not path.is_file() or (self.folder / "test_results.json").is_file():
            return None
        line = re.sub(r"^[\w.]+\.(?=\w+(: |$))", "", error_in(path.read_text("utf-8", errors="replace")))
        return line if len(line) <= ERROR_LENGTH else f"{line[: ERROR_LENGTH - 1]}…"

    @cached_property
    def state(self) -> tuple[str, str]:
        """`finished`, `unfinished` or `failed`, and a note."""
        if self.test is not None:
            return "finished", ""
        if self.failure is not None:
            return "failed", self.failure
        if self.is_evaluation:
            return "unfinished", "no test result"
        path = self.folder / "last.ckpt"
        if not path.is_file():
            return "unfinished", "no validation yet"
        epochs, _, trained = trained_so_far(path, self.config)
        done = trained and not self.config["test_after_fit"]
        note = "pretraining" if self.pretrains else "not tested"
        note = note if trained else f"{epochs} of {counted(self.config['max_epoch'], 'epoch')}"
        return "finished" if done else "unfinished", note

    @cached_property
    def line(self) -> dict[str, Any]:
        """The options in which the runs of a line agree, as `option.split` if keyed by split, without the pattern.

        Options that did not exist yet at the time of the run have their defaults. If recorded, the first digits of the
        digests of its data and backbone are included.
        """
        flat = flat_options({**DEFAULTS, **self.config})
        left_out = {*NOT_THE_LINE, *PATTERN_OPTIONS}
        if all(flat[f"{name}.val"] == flat[f"{name}.train"] for name in ("missing_type", "missing_ratio")):
            left_out |= {"missing_type.val", "missing_ratio.val"}
        same = {name: str(self._read[name])[:12] for name in SAME_CONTENTS if name in self._read}
        return {name: value for name, value in flat.items() if name not in left_out} | same

    @property
    def line_key(self) -> str:
        """Key shared by the runs of a line, whatever their pattern and wherever the files they read were stored."""
        known = {name: self._read[entry] for name, entry in BY_CONTENT.items() if entry in self._read}
        return json.dumps(self.line | known, sort_keys=True)

    @property
    def _read(self) -> dict[str, Any]:
        """Digests of the files it read; a backbone drawn from the run's seed is left out."""
        drawn = self.spec.family != CLIP and str(self.config.get("vit")).partition(":")[0] == "random"
        return {name: digest for name, digest in self.contents.items() if not (drawn and name == "backbone")}


def find_runs(*places: Path) -> tuple[list[Run], dict[Path, DataError]]:
    """The runs in and below `places`, without duplicates, and an error for each folder with an unreadable config.json.

    Runs are in natural order below a place: version_10 after version_9. A run that was resumed is part of the run that
    resumed it, unless it has a test result of its own.

    Raises:
        ConfigError: a folder is not readable.
    """
    runs: dict[Path, Run] = {}
    damaged: dict[Path, DataError] = {}
    for folder in (folder for place in places for folder in _run_folders(place, set())):
        try:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = Run(folder)
        except DataError as error:
            damaged[folder] = error
    parts = {
        part.folder.resolve()
        for run in runs.values()
        for part in run.parts[1:]
        if not (part.folder / "test_results.json").is_file()
    }
    return [run for folder, run in runs.items() if folder not in parts], damaged


def runs_of_each(places: Sequence[Path]) -> tuple[list[Run], dict[Path, DataError]]:
    """As `find_runs`, but every place must have runs.

    Raises:
        ConfigError: a place does not exist, or neither is a run nor contains one.
        DataError: all runs of a place are damaged.
    """
    for place in places:
        runs, damaged = find_runs(place)
        if not runs and damaged:
            raise next(iter(damaged.values()))
        if not runs:
            found = "no run" if place.is_dir() else "a file" if place.exists() else "no such folder"
            raise ConfigError(f"runs={place}: expected a run folder or a folder with runs below it, found {found}")
    return find_runs(*places)


def _started(folder: Path) -> datetime:
    """When the run started, as it recorded it; else the time of its config.json, which copying may have changed."""
    with suppress(DataError, KeyError, TypeError, ValueError):
        return (
            datetime.fromisoformat(read_json(folder / "environment.json")["started"]).astimezone().replace(tzinfo=None)
        )
    return datetime.fromtimestamp((folder / "config.json").stat().st_mtime)


def _resumed_from(folder: Path, config: Mapping[str, Any]) -> Run | None:
    """The run of the checkpoint in `resume_from`, if any; looks next to this run first, since both may have moved."""
    named = config.get("resume_from")
    if not isinstance(named, str) or config["test_only"]:
        return None
    place = Path(named).parent
    for candidate in (folder.parents[1] / Path(*place.parts[-2:]) if len(folder.parents) > 1 else place, place):
        if (candidate / "config.json").is_file() and candidate.resolve() != folder.resolve():
            try:
                return Run(candidate)
            except (DataError, RecursionError):
                return None
    return None


def _run_folders(top: Path, seen: set[Path]) -> Iterator[Path]:
    """The run folders in and below `top`, skipping those in `seen`. Does not look for runs below a run."""
    if not top.is_dir() or top.resolve() in seen:
        return
    seen.add(top.resolve())
    try:
        if _is_run(top):
            yield top
            return
        below = sorted((path for path in top.iterdir() if path.is_dir()), key=natural_key)
    except OSError as error:
        raise ConfigError(f"{top}: not readable: {error.strerror}") from error
    for folder in below:
        yield from _run_folders(folder, seen)


def _is_run(folder: Path) -> bool:
    if (folder / "run.json").is_file():  # Sacred's record of a run; it has a config.json too, as CLIP's weights have
        return False
    if re.fullmatch(r"version_\d+", folder.name) or any((folder / name).is_file() for name in RUN_FILES):
        return True
    try:
        return {"task", "exp_name"} <= set(read_json(folder / "config.json"))
    except DataError:
        return False


def open_checkpoint(path: Path, *needed: str) -> dict[str, Any]:
    """Opens one of our checkpoints, with the `needed` keys; its tensors stay on disk. Raises DataError."""
    from common.torch_file import load_inert  # loads torch, which a table of runs without checkpoints does not need

    try:
        content = load_inert(path, mmap=True)
        if not isinstance(content, dict) or not set(needed) <= set(content):
            raise ValueError(f"expected a checkpoint of a run, with {' and '.join(needed)}")
    except Exception as error:  # on damaged files, torch.load raises errors of many types
        raise DataError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
    return content


def trained_so_far(path: Path, config: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Epochs and optimiser steps trained up to a last.ckpt, and whether `config` asks for no more. Raises DataError."""
    last = open_checkpoint(path, "MissingModalityData", "global_step")
    with as_written_by_run(path):
        epochs, steps = int(last["MissingModalityData"]["epoch"]), int(last["global_step"])
        loops = last.get("loops", {}).get("fit_loop", {})  # an interrupted validation is still due
        validation = loops.get("epoch_loop.val_loop.batch_progress", {}).get("total", {"ready": 0, "completed": 0})
        at_limit = steps >= (config["max_steps"] or math.inf) and validation["ready"] == validation["completed"]
        return epochs, steps, epochs >= config["max_epoch"] or at_limit


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options and their values; entries of a dictionary as `option.key`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


@contextmanager
def as_written_by_run(path: Path) -> Iterator[None]:
    """Turns errors caused by unexpected content of a file into a DataError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, ConfigError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not as written by run.py: {first_line(error)}") from error


def numbers_by_name(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics from a results file; null, an undefined value, becomes NaN."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
