"""Finding run folders and reading what they hold, checked: configuration, curves, test and robustness results."""

import csv
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip.run_folder import custom_in, read_json
from clip.run_table import best_validation
from clip.tasks import TASK_NAMES, TASKS, Task, task_of
from common.arrow_file import open_table
from common.errors import ConfigError, DataError
from common.files import whole_lines
from common.hashing import file_sha256
from common.messages import first_line, quoted
from report.text import without_home
from vilt.datasets.custom import CUSTOM, CustomData
from vilt.datasets.specs import DATASETS, SPLITS, DatasetSpec, custom_spec
from vilt.missing_tables import MISSING_TYPES, TYPE_NAMES

log = logging.getLogger("rep")

FORMAT = 1
LOGIT_COLUMNS = {name: f"logits_{name.replace(' ', '_')}" for name in TYPE_NAMES}
"""Missing types to the columns of logits.arrow."""

OPTIONS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "exp_name", "prompt_type", "data_root"), (str,)),
    **dict.fromkeys(("missing_type", "missing_ratio"), (dict,)),
    **dict.fromkeys(("test_only", "far", "fmb"), (bool,)),
    "both_ratio": (float, int),
    "seed": (int,),
}
"""Of the configuration, those that the report needs, with the types that run.py writes."""
NEWER_OPTIONS = ("far", "fmb")
"""Those that an old configuration may lack."""


@dataclass(frozen=True)
class Cell:
    """One evaluation pattern of a robustness result."""

    missing_type: str
    ratio: float
    both_ratio: float
    values: dict[str, list[float]]
    """Metric to one value per table seed, fractions."""


@dataclass(frozen=True)
class ClassScores:
    """Of one class at one missing type, fractions."""

    type_name: str
    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Confusion:
    """How often samples of one class were taken for another."""

    type_name: str
    true: str
    predicted: str
    count: int
    share: float
    """Of the samples of the true class."""


@dataclass(frozen=True)
class Roc:
    """A receiver operating characteristic."""

    fpr: list[float]
    tpr: list[float]
    auroc: float


@dataclass(frozen=True)
class StoredLogits:
    """A logits.arrow that belongs to the robustness.json beside it."""

    path: Path
    rows: int
    """Of the test set; a film with several plots is one."""
    test_set: str
    """Digest of ids and labels: equal for logits of the same test set."""


@dataclass(frozen=True)
class Robustness:
    """What `robustness/robustness.json` says; the tables by type have the keys of TYPE_NAMES."""

    samples: int
    metrics: tuple[str, ...]
    table_seeds: tuple[int, ...]
    class_names: tuple[str, ...]
    cells: tuple[Cell, ...]
    by_type: dict[str, dict[str, float]]
    level: float
    resamples: int
    intervals: dict[str, dict[str, tuple[float, float]]]
    """Of every metric; of none without resamples."""
    per_class: tuple[ClassScores, ...]
    confusions: tuple[Confusion, ...]
    roc: dict[str, Roc]
    logits: StoredLogits | None


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder. What it lacks is None."""

    number: int
    folder: Path
    """As the user spelled it."""
    started: datetime
    """When the configuration was written."""
    config: dict[str, Any]
    environment: dict[str, Any] | None
    curves: dict[str, list[tuple[int, float]]] | None
    """Columns of metrics.csv by name: (optimiser step, value)."""
    best_validation: float | None
    """Of the metric of the task, a fraction; None for an evaluation, too."""
    test: dict[str, Any] | None
    robustness: Robustness | None
    custom: CustomData | None = None
    """Of one's own data."""

    @property
    def tag(self) -> str:
        """Short name, used throughout the report."""
        return f"R{self.number}"

    @property
    def task(self) -> str:
        """A key of TASKS, or that of one's own data."""
        return str(self.config["task"]) if self.custom is None else self.custom.key

    @property
    def metric(self) -> str:
        """The metric of the task."""
        return task_of(self.config["task"], self.custom).monitor

    @property
    def data(self) -> DatasetSpec:
        """The row of the dataset."""
        return dataset_of(self.task, self.custom)

    @property
    def is_evaluation(self) -> bool:
        """Whether nothing was trained (test_only)."""
        return bool(self.config["test_only"])

    @property
    def place(self) -> str:
        """NAME/version_N, without the folders above."""
        return "/".join(Path(without_home(str(self.folder.resolve()))).parts[-2:])


def dataset_of(task: str, custom: CustomData | None) -> DatasetSpec:
    """The row of the dataset of a task."""
    return DATASETS[task] if custom is None else custom_spec(custom)


def read_runs(given: Sequence[Path]) -> list[Run]:
    """The runs in and below `given`, each once, in the order given and by name below.

    A folder whose config.json cannot be read may be anything's: it is left out, with a warning that names the file.

    Raises:
        ConfigError: a folder is not there, or neither is a run nor holds one.
        DataError: a file is damaged, or results belong to another checkpoint, dataset or test set.
    """
    folders: dict[Path, Path] = {}
    for path in given:
        odd: list[DataError] = []
        found = list(_run_folders(path, odd))
        if odd and not found:
            raise odd[0]
        for error in odd:
            log.warning("left out of the report: %s", error)
        if not found:
            what = "no run" if path.is_dir() else "a file" if path.exists() else "no such folder"
            raise ConfigError(
                f"runs={path}: expected a run folder or a folder with runs below it (known by their config.json), "
                f"found {what}"
            )
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise ConfigError("runs: expected run folders, or folders with runs below them, found nothing")
    runs = [read_run(folder, number) for number, folder in enumerate(folders.values(), start=1)]
    _check_same_test_set(runs)
    return runs


def read_run(folder: Path, number: int) -> Run:
    """Reads one run folder.

    Raises:
        DataError: a file is damaged, or results belong to another checkpoint or dataset.
    """
    path = folder / "config.json"
    config = read_json(path)
    with _as_written_by_run(path):
        task = config["task"]
        if task not in TASK_NAMES:
            expected = f"expected one of {', '.join(TASKS)}"
            raise ValueError(f"task: {expected}, found {quoted(task)}; one's own data is {CUSTOM}")
        custom = custom_in(config)
        rules, data = task_of(task, custom), dataset_of(task, custom)
        for option, kinds in OPTIONS.items():
            if option not in config and option not in NEWER_OPTIONS:
                raise ValueError(f"the option {option} is not there")
            if option in config and type(config[option]) not in kinds:
                raise ValueError(f"the option {option} is {quoted(config[option])}")
        for split in SPLITS:
            _check_pattern(config["missing_type"][split], config["missing_ratio"][split], config["both_ratio"])
    environment, test = (
        read_json(folder / name) if (folder / name).is_file() else None
        for name in ("environment.json", "test_results.json")
    )
    if environment is not None:
        with _as_written_by_run(folder / "environment.json"):
            environment["packages"].items()
            machine, git = environment.get("machine") or {}, environment.get("git") or {}
            len(machine.get("gpus") or []), len(git.get("changed") or [])
            if not environment["command"] or not all(isinstance(word, str) for word in environment["command"]):
                raise ValueError(f"command: expected words, found {quoted(environment['command'])}")
    if test is not None:
        with _as_written_by_run(folder / "test_results.json"):
            _check_task(test["task"], task)
            int(test["samples"]), float(test["metrics"][rules.monitor])
            tested = test["missing_pattern"]
            _check_pattern(tested["missing_type"], tested["ratio"], tested["both_ratio"])
    return Run(
        number=number,
        folder=folder,
        started=datetime.fromtimestamp(path.stat().st_mtime),
        config=config,
        environment=environment,
        curves=read_curves(folder / "metrics.csv"),
        best_validation=None if config["test_only"] else best_validation(folder, f"val/{rules.monitor}"),
        test=test,
        robustness=read_robustness(folder, rules, data),
        custom=custom,
    )


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]] | None:
    """The columns of a metrics.csv that have values, as (step, value); None where there is no such file.

    Raises:
        DataError: a step or value is not a number; names file and line.
    """
    if not path.is_file():
        return None
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(whole_lines(file))
            for row in reader:
                for name, value in row.items():
                    if name not in ("epoch", "step") and value:
                        curves.setdefault(name, []).append((int(row["step"]), float(value)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: line {reader.line_num}: not what a run writes: {first_line(error)}") from error
    return {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}


def read_robustness(folder: Path, task: Task, data: DatasetSpec) -> Robustness | None:
    """The robustness results of a run folder; None where there are none.

    Raises:
        DataError: they are damaged, or belong to another task or checkpoint.
    """
    path = folder / "robustness" / "robustness.json"
    if not path.is_file():
        return None
    raw = read_json(path)
    with _as_written_by_run(path):
        if raw["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {quoted(raw['format'])}")
        _check_task(raw["task"], task.name)
        _check_checkpoint(raw["checkpoint_sha256"], folder / "best.ckpt")
        metrics, class_names = tuple(raw["metrics"]), tuple(map(str, raw["class_names"]))
        if raw["metric"] != task.monitor or raw["metric"] not in metrics:
            raise ValueError(f"metric: expected {task.monitor}, found {quoted(raw['metric'])}")
        if len(class_names) != task.n_classes:
            raise ValueError(f"class_names: expected {task.n_classes}, found {len(class_names)}")
        samples, confidence = int(raw["samples"]), raw["confidence"]
        return Robustness(
            samples=samples,
            metrics=metrics,
            table_seeds=tuple(raw["table_seeds"]),
            class_names=class_names,
            cells=tuple(_cell(cell, metrics, len(raw["table_seeds"])) for cell in raw["cells"]),
            by_type={
                name: {metric: _finite(raw["by_type"][name][metric]) for metric in metrics} for name in TYPE_NAMES
            },
            level=float(confidence["level"]),
            resamples=int(confidence["resamples"]),
            intervals={
                name: {metric: _interval(confidence[name][metric]) for metric in metrics if confidence["resamples"]}
                for name in TYPE_NAMES
            },
            per_class=tuple(_class_scores(entry) for entry in raw["per_class"]),
            confusions=tuple(_confusion(entry) for entry in raw["confusions"]),
            roc={name: _roc(raw["roc"][name]) for name in TYPE_NAMES if name in raw["roc"]},
            logits=_stored_logits(path.with_name("logits.arrow"), data, samples, raw["checkpoint_sha256"]),
        )


def read_logits(path: Path) -> pa.Table:
    """The memory-mapped table of stored logits. Raises DataError, naming the file, where it is damaged."""
    table = open_table(path)
    kinds = dict.fromkeys(("sample", "row", "text_number"), pa.types.is_integer) | {"id": pa.types.is_string}
    kinds |= dict.fromkeys(LOGIT_COLUMNS.values(), _is_list_of_floats)
    if lacking := sorted((kinds.keys() | {"label"}) - set(table.column_names)):
        raise DataError(f"{path}: expected the columns of stored logits, found none called {', '.join(lacking)}")
    for name, is_right in kinds.items():
        if table[name].null_count or not is_right(table[name].type):
            raise DataError(f"{path}: column {name}: not that of stored logits")
    for name in LOGIT_COLUMNS.values():
        if not np.isfinite(pc.list_flatten(table[name]).to_numpy()).all():
            raise DataError(f"{path}: column {name}: expected finite numbers")
    return table


def _is_list_of_floats(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)


def _run_folders(top: Path, odd: list[DataError], seen: set[Path] | None = None) -> Iterator[Path]:
    """Run folders in natural order: version_10 after version_9. A run has no runs below it.

    Links lead to no folder twice. `odd` gets what is wrong with each config.json that cannot be read.
    """
    seen = set() if seen is None else seen
    if top.is_dir() and top.resolve() in seen:
        return
    if top.is_dir():
        seen.add(top.resolve())
    if _is_run(top, odd):
        yield top
    elif top.is_dir():
        for below in sorted(top.iterdir(), key=lambda path: _natural(path.name)):
            yield from _run_folders(below, odd, seen)


def _is_run(folder: Path, odd: list[DataError]) -> bool:
    # CLIP's weights have a config.json too; Sacred's record of a run has one that says the same, and a run.json.
    path = folder / "config.json"
    if not path.is_file() or (folder / "run.json").is_file():
        return False
    try:
        return {"task", "exp_name"} <= set(read_json(path))
    except DataError as error:
        odd.append(error)
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


@contextmanager
def _as_written_by_run(path: Path) -> Iterator[None]:
    """Turns what odd content leads to into one line that names the file."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{path}: {first_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path}: not as written by run.py: {first_line(error)}") from error


def _check_task(found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"results of another dataset: expected {expected}, found {quoted(found)}")


def _check_checkpoint(recorded: str, best: Path) -> None:
    if best.is_file():  # a run may be kept without its checkpoint
        actual = file_sha256(best)
        if recorded != actual:
            raise ValueError(
                f"results of another checkpoint: expected those of best.ckpt (sha256 {actual[:12]}), "
                f"found sha256 {recorded[:12]}; run `python run.py robustness` again"
            )


def _stored_logits(path: Path, data: DatasetSpec, samples: int, sha256: str) -> StoredLogits | None:
    """None where no logits are kept. Raises DataError unless they are of the same result."""
    if not path.is_file():
        return None
    table = read_logits(path)
    with _as_written_by_run(path):
        described = json.loads((table.schema.metadata or {})[b"rep"])
        _check_task(described["task"], data.name)
        if described["checkpoint_sha256"] != sha256:
            raise ValueError("logits of another checkpoint than robustness.json beside it")
        if table.num_rows != samples:
            raise ValueError(f"expected the {samples} samples of robustness.json, found {table.num_rows}")
        for column in [*LOGIT_COLUMNS.values(), *(["label"] if data.multilabel else [])]:
            if table.num_rows and pc.unique(pc.list_value_length(table[column])).to_pylist() != [data.n_classes]:
                raise ValueError(f"column {column}: expected lists of {data.n_classes}")
        labels_are_lists = pa.types.is_list(table["label"].type)
        if labels_are_lists != data.multilabel:
            raise ValueError(f"column label: not that of {data.name}: {table['label'].type}")
        labels = (pc.list_flatten(table["label"]) if labels_are_lists else table["label"]).to_numpy()
        highest = 1 if data.multilabel else data.n_classes - 1
        if not np.isin(labels, np.arange(highest + 1)).all():
            raise ValueError(f"column label: expected numbers from 0 to {highest}")
    digest = hashlib.sha256("\0".join(table["id"].to_pylist()).encode())
    digest.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    return StoredLogits(path, len(pc.unique(table["row"])), digest.hexdigest())


def _check_same_test_set(runs: Sequence[Run]) -> None:
    """Raises DataError where runs of one task were measured on different test sets: their numbers do not compare."""
    first_of: dict[str, Run] = {}
    first: dict[str, tuple[Run, int]] = {}
    first_digest: dict[str, tuple[Run, str]] = {}
    advice = "make a report of each"
    for run in runs:
        namesake = first_of.setdefault(run.task, run)
        if namesake.custom != run.custom:
            raise DataError(
                f"{run.folder}: a run on another dataset than {namesake.folder}, of the same name {run.task}: "
                f"with other classes, labels or metric; {advice}"
            )
        sizes = [run.robustness.samples] if run.robustness else []
        sizes += [int(run.test["samples"])] if run.test else []
        for size in sizes:
            other, expected = first.setdefault(run.task, (run, size))
            if size != expected:
                raise DataError(
                    f"{run.folder}: results on another dataset than {other.folder}: expected {expected} test samples, "
                    f"found {size}; {advice}"
                )
        logits = run.robustness.logits if run.robustness else None
        if logits is not None:
            other, known = first_digest.setdefault(run.task, (run, logits.test_set))
            if known != logits.test_set:
                raise DataError(
                    f"{logits.path}: logits of another dataset than {other.folder} has: other ids or labels; {advice}"
                )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a number, found {number}")
    return number


def _check_pattern(missing_type: str, ratio: float, both_ratio: float) -> None:
    if missing_type not in MISSING_TYPES:
        raise ValueError(f"missing_type: expected {' or '.join(MISSING_TYPES)}, found {quoted(missing_type)}")
    for share in (ratio, both_ratio):
        if type(share) not in (float, int) or not 0 <= share <= 1:
            raise ValueError(f"expected a ratio from 0 to 1, found {quoted(share)}")


def _cell(raw: dict[str, Any], metrics: Sequence[str], seeds: int) -> Cell:
    _check_pattern(raw["missing_type"], raw["ratio"], raw["both_ratio"])
    values = {metric: [_finite(value) for value in raw["metrics"][metric]["values"]] for metric in metrics}
    if any(len(of_metric) != seeds for of_metric in values.values()):
        raise ValueError(f"expected {seeds} values per cell, one per table seed")
    return Cell(raw["missing_type"], float(raw["ratio"]), float(raw["both_ratio"]), values)


def _interval(raw: Sequence[float]) -> tuple[float, float]:
    low, high = raw
    return _finite(low), _finite(high)


def _class_scores(raw: dict[str, Any]) -> ClassScores:
    precision, recall, f1 = (_finite(raw[name]) for name in ("precision", "recall", "f1"))
    return ClassScores(raw["type"], str(raw["class"]), precision, recall, f1, int(raw["support"]))


def _confusion(raw: dict[str, Any]) -> Confusion:
    return Confusion(raw["type"], str(raw["true"]), str(raw["predicted"]), int(raw["count"]), _finite(raw["share"]))


def _roc(raw: dict[str, Any]) -> Roc:
    fpr, tpr = ([_finite(value) for value in raw[name]] for name in ("fpr", "tpr"))
    if len(fpr) != len(tpr):
        raise ValueError(f"roc: expected as many tpr as fpr, found {len(tpr)} and {len(fpr)}")
    return Roc(fpr, tpr, _finite(raw["auroc"]))
