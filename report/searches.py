"""Reading what a search for good options left in the folder of its sweep; what is not there or damaged is missing."""

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from clip.run_folder import read_json
from common.errors import DataError
from common.messages import first_line
from config import is_range
from report.collect import Run
from report.text import counted, without_home

TOP_SHARE = 0.25
"""Of the complete trials, those that importances tell from the rest."""
TRIALS_FOR_IMPORTANCES = 4

Scale = Literal["log", "linear", "choices"]


@dataclass(frozen=True)
class Trial:
    """A line of search.csv."""

    number: int
    state: str
    values: dict[str, str]
    """Of the options, as the command line has them."""
    score: float | None
    """The best validation metric of a complete trial, a fraction."""
    place: tuple[str, ...]
    """NAME, version_N of the run that gave the score; nothing where there is none."""


@dataclass(frozen=True, eq=False)
class Search:
    """A search, with all that could be read of it."""

    folder: Path
    runs: tuple[Run, ...]
    """Of its trials; at least one."""
    options: tuple[str, ...]
    """Those it looks for values of."""
    trials: tuple[Trial, ...]
    """By number; none where search.csv is missing."""
    scales: dict[str, Scale]
    """How the values of each option were drawn; of all options or none."""
    importances: dict[str, float]
    """Shares of each option, the highest first; of none where they are missing."""
    missing: dict[Literal["trials", "scales", "importances"], str]
    """Why something is missing."""

    @property
    def name(self) -> str:
        """The option sweep_name."""
        return self.folder.resolve().name

    @property
    def task(self) -> str:
        """A key of TASKS, or that of one's own data."""
        return self.runs[0].task

    @property
    def metric(self) -> str:
        """The metric of the task."""
        return self.runs[0].metric

    @property
    def complete(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, with it."""
        return [(trial, trial.score) for trial in self.trials if trial.score is not None]

    @property
    def ranked(self) -> list[tuple[Trial, float]]:
        """The complete trials, the best first; of those with the same values, which have one run, the first."""
        first: dict[tuple[str, ...], tuple[Trial, float]] = {}
        for trial, score in self.complete:
            first.setdefault(tuple(trial.values.values()), (trial, score))
        return sorted(first.values(), key=lambda entry: -entry[1])

    def run_of(self, trial: Trial) -> Run | None:
        """The run that gave a trial its score, if it is there."""
        return next((run for run in self.runs if run.folder.resolve().parts[-2:] == trial.place), None)


def read_searches(given: Sequence[Path], runs: Sequence[Run]) -> list[Search]:
    """The searches in and below the folders `given`, known by the runs of their trials among `runs`."""
    runs_of: dict[Path, list[Run]] = {}
    for run in runs:
        sweep = run.folder.parent.parent
        if any(sweep.is_relative_to(folder) for folder in given) and _is_search(sweep):
            runs_of.setdefault(sweep, []).append(run)
    return [_read_search(folder, tuple(of_search)) for folder, of_search in runs_of.items()]


def _is_search(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("search.csv", "optuna.journal")):
        return True
    try:
        return bool(_space(folder))
    except DataError:
        return False


def _read_search(folder: Path, runs: tuple[Run, ...]) -> Search:
    missing: dict[Literal["trials", "scales", "importances"], str] = {}
    options: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    scales: dict[str, Scale] = {}
    importances: dict[str, float] = {}
    try:
        options, trials = _read_trials(folder / "search.csv", f"val/{runs[0].metric}")
    except DataError as error:
        missing["trials"] = _said(folder, error)
    try:
        scales = _read_scales(folder, options)
    except DataError as error:
        missing["scales"] = _said(folder, error)
    try:
        importances = _read_importances(folder / "optuna.journal")
    except DataError as error:
        missing["importances"] = _said(folder, error)
    return Search(folder, runs, options, trials, scales, importances, missing)


def _read_trials(path: Path, metric: str) -> tuple[tuple[str, ...], tuple[Trial, ...]]:
    """Options and trials. Raises DataError, naming file and line, where they are not as a search writes them."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text("utf-8")), strict=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: is not there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {first_line(error)}") from error
    try:
        names = list(reader.fieldnames or [])
        options = tuple(names[2:-2])
        if not options or names != ["number", "state", *options, metric, "folder"]:
            raise ValueError(f"expected the columns number, state, options, {metric} and folder")
        return options, tuple(_trial(row, options, metric) for row in reader)
    except (TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: line {reader.line_num}: not as a search writes it: {first_line(error)}") from error


def _trial(row: Mapping[str, str], options: Sequence[str], metric: str) -> Trial:
    if None in row.values():
        raise ValueError("expected a value in each column")
    score = float(row[metric]) if row[metric] else None
    if score is not None and not math.isfinite(score):
        raise ValueError(f"{metric}: expected a number, found {row[metric]}")
    values = {name: row[name] for name in options}
    return Trial(int(row["number"]), row["state"], values, score, Path(row["folder"]).parts[-2:])


def _space(folder: Path) -> dict[str, list[Any]]:
    """The option `search` as sweep.json records it. Raises DataError where that cannot be read."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise DataError(f"{path}: is not there")
    record = read_json(path)
    try:
        return {str(name): list(values) for name, values in record["options"]["search"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not as a search writes it: {first_line(error)}") from error


def _read_scales(folder: Path, options: Sequence[str]) -> dict[str, Scale]:
    """Of `options`. Raises DataError where sweep.json does not say them."""
    space, scales = _space(folder), dict[str, Scale]()
    for name in options:
        try:
            if not is_range(name, space[name]):
                scales[name] = "choices"
            else:
                scales[name] = "log" if space[name][0] > 0 else "linear"
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / 'sweep.json'}: the values of {name} are not as a search writes them") from error
    return scales


def _read_importances(path: Path) -> dict[str, float]:
    """Raises DataError where Optuna cannot read its journal, or there are too few trials."""
    if not path.is_file():
        raise DataError(f"{path}: is not there")
    try:
        study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))
        complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if complete < TRIALS_FOR_IMPORTANCES:
            raise DataError(
                f"{path}: importances take at least {TRIALS_FOR_IMPORTANCES} complete trials, found {complete}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that few trials are few; the caption says it
            evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)
            return get_param_importances(study, evaluator=evaluator)
    except DataError:
        raise
    except Exception as error:  # of many types, on a damaged file
        raise DataError(f"{path}: not readable as Optuna's journal: {first_line(error)}") from error


def _said(folder: Path, error: DataError) -> str:
    """An error as a sentence of the report, without the folders above the search's."""
    return without_home(str(error).replace(f"{folder}/", ""))


def count_states(trials: Sequence[Trial]) -> str:
    """How many trials there are, by how they ended."""
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{counted(len(trials), 'trial')} ({counts})"
