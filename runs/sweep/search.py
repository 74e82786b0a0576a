"""The search for option values with the best validation metric; Optuna's TPE proposes one trial after another.

All trials are recorded in Optuna's journal in the sweep's folder, from which a search is resumed.
"""

import hashlib
import itertools
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from common.errors import ConfigError, DataError
from common.files import write_csv
from common.messages import first_line
from common.text import LOWER_IS_BETTER, counted, order_of, terminal_table
from config import Options
from runs.check_options import check, is_range, is_range_of_steps
from runs.command_line import written
from runs.run_reader import open_checkpoint
from runs.sweep.jobs import BUSY, JOURNAL, Job, Outcome, Progress, command_line_of
from runs.sweep.launchers import Launcher

log = logging.getLogger("rep")

STATE_NAMES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "cut off"}
BEST_SHOWN = 5


def ranked(trials: Sequence[FrozenTrial], metric: str) -> list[FrozenTrial]:
    """The complete trials that have their own run, the best first."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.number == run_number(t, trials)]
    return sorted(complete, key=lambda trial: (-order_of(trial.values[0], metric), trial.number))


def run_number(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """Number of the trial whose run gave `trial` its score: the first complete one with the same values, or itself."""
    complete = (other for other in trials if other.state == trial.state == TrialState.COMPLETE)
    return next((other.number for other in complete if other.params == trial.params), trial.number)


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Option values as command-line words."""
    return [written(name, value) for name, value in values.items()]


def short(value: Any) -> str:
    """A value as shown in tables."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def distributions(options: Options) -> dict[str, BaseDistribution]:
    """Optuna's search space: ranges of two numbers (log-uniform; uniform if they start at 0) and lists of choices."""
    space: dict[str, BaseDistribution] = {}
    for name, values in options.search.items():
        if is_range_of_steps(name, values):
            low, high = map(int, values)
            space[name] = IntDistribution(low, high, log=low > 0)
        elif is_range(name, values):
            low, high = values
            space[name] = FloatDistribution(low, high, log=low > 0)
        else:
            space[name] = CategoricalDistribution(values)
    return space


def check_values(options: Options, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that no combination with values of the other searched options makes valid.

    Args:
        config: the complete configuration.
    """
    possible: set[tuple[str, Any]] = set()
    refused: dict[tuple[str, Any], ConfigError] = {}
    for together in itertools.product(*options.search.values()):
        values = dict(zip(options.search, together, strict=True))
        if not values.items() <= possible:
            try:
                check({**config, **values})
                possible |= values.items()
            except ConfigError as error:
                refused |= dict.fromkeys(values.items(), error)
    for (name, value), reason in refused.items():
        if (name, value) not in possible:
            raise ConfigError(f"search.{name}: {value!r} is not possible: {reason}")


def open_study(path: Path, name: str = "", metric: str = "") -> optuna.Study:
    """Opens the study `name` in a journal, creating it for `metric` if needed; without a name, the existing study.

    Raises:
        DataError: the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = StudyDirection.MINIMIZE if metric in LOWER_IS_BETTER else StudyDirection.MAXIMIZE
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        if not name:
            return optuna.load_study(study_name=None, storage=storage)
        return optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    except Exception as error:  # of many types, on a damaged file
        raise DataError(f"{path}: not readable as Optuna's journal: {first_line(error)}") from error


class Search:
    """A search and its trials.

    Args:
        options: the sweep's options.
        metric: the task's metric, whose validation value the search optimises.
        given: options from the command line that all trials get.
        folder: the sweep's folder.

    Raises:
        DataError: the journal in `folder` is damaged.
    """

    def __init__(self, options: Options, metric: str, given: Sequence[str], folder: Path) -> None:
        self.options, self.given, self.folder, self.metric = options, given, folder, f"val/{metric}"
        self.study = open_study(folder / JOURNAL, options.sweep_name, metric)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials so far, in the given states (by default all), sorted by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def run(self, launch: Launcher) -> None:
        """Runs trials until `search_trials` are complete or have failed now; writes `search.csv` and prints the best.

        Raises:
            SweepError: trials failed, or are still running elsewhere; they are listed first.
        """
        wanted = self.options.search_trials
        counts = {name: len(self.trials(state)) for state, name in STATE_NAMES.items()}
        so_far = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        asked = counted(wanted, "trial")
        log.info("search %s: %s wanted%s", self.options.sweep_name, asked, f"; so far {so_far}" if so_far else "")
        progress = Progress(max(wanted, counts["complete"] + counts["cut off"]), counts["complete"])
        for number, values in self._proposals():
            job, words = self._job(number, values), ""
            score, outcome = self._try(job, values, launch)
            if score is None and (outcome.error or "").startswith(BUSY):
                pass  # remains cut off, to be resumed by a later call
            elif score is None:
                self.study.tell(number, state=TrialState.FAIL)
            else:
                self.study.tell(number, score)
                shown = " ".join(f"{name}={short(value)}" for name, value in values.items())
                words = f"{self.metric} {score:.4f} with {shown}"
            progress.report(job, outcome, words)
            self._write_trials()
        self._write_trials()
        self._print_best()
        progress.end(asked, "tries as many new ones")

    def _job(self, number: int, values: Mapping[str, Any]) -> Job:
        """The run of a trial. It is not tested, to keep the test split out of the choice."""
        name = f"{self.options.sweep_name}_trial_{number}"
        own = (*assignments(values), f"exp_name={name}", f"log_dir={self.folder}", "test_after_fit=False")
        return Job(f"{name}_seed{self.options.seed}", self.folder, (*self.given, *own), tested=False)

    def _job_of(self, trial: FrozenTrial) -> Job:
        """The run that gave a trial its score."""
        return self._job(run_number(trial, self.trials()), trial.params)

    def _proposals(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields number and values of the trials to run: first those cut off, then new ones, each from all results."""
        space, cut_off = distributions(self.options), []
        for trial in self.trials(TrialState.RUNNING):
            if trial.params.keys() == space.keys():
                cut_off.append(trial)
            else:  # interrupted while its values were drawn
                self.study.tell(trial.number, state=TrialState.FAIL)
        new = self.options.search_trials - len(self.trials(TrialState.COMPLETE)) - len(cut_off)
        for trial in cut_off:
            yield trial.number, trial.params
        for _ in range(new):
            # Each trial has its own seed, so that an interruption does not change later trials.
            key = hashlib.sha256(f"{self.options.seed}/{len(self.trials())}".encode()).digest()
            self.study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(key[:4], "big"))
            proposed = self.study.ask(space)
            yield proposed.number, proposed.params

    def _try(self, job: Job, values: dict[str, Any], launch: Launcher) -> tuple[float | None, Outcome]:
        """The score of a trial and how its run ended; reuses the score of a complete trial with the same values."""
        for trial in self.trials(TrialState.COMPLETE):
            if trial.params == values:
                log.info("%s has the same values as trial %d and takes its score", job.name, trial.number)
                return trial.values[0], Outcome(None, 0.0)
        [(_, outcome)] = launch([job])
        if outcome.error is not None:
            return None, outcome
        if (best := job.newest("best.ckpt")) is None:
            return None, Outcome(f"it ended without best.ckpt: no validation gave {self.metric}", outcome.seconds)
        score = float(open_checkpoint(best, "score")["score"])
        if math.isnan(score):
            return None, Outcome(f"{self.metric} is not a number", outcome.seconds)
        return score, outcome

    def _write_trials(self) -> None:
        """Writes `search.csv`: a row per trial with its values, its score and its run folder."""
        rows = []
        for trial in self.trials():
            newest = self._job_of(trial).newest("config.json")
            row = {"number": trial.number, "state": STATE_NAMES[trial.state]}
            row |= {name: trial.params.get(name, "") for name in self.options.search}
            rows.append(row | {self.metric: trial.value, "folder": None if newest is None else newest.parent})
        write_csv(self.folder / "search.csv", rows)

    def _print_best(self) -> None:
        best_first = ranked(self.trials(), self.metric)
        if not best_first:
            return
        best, names = best_first[0], list(self.options.search)
        rows = [
            (f"trial {trial.number}", *(short(trial.params[name]) for name in names), f"{trial.values[0]:.4f}")
            for trial in best_first[:BEST_SHOWN]
        ]
        table = terminal_table(("", *names, self.metric), rows, "<" + ">" * (len(names) + 1))
        print(f"\nsearch {self.options.sweep_name}: the best trials\n\n{table}\n")
        model = self._job_of(best).newest("best.ckpt")
        print(f"  all are in {self.folder / 'search.csv'}; the best model is {model}\n")
        print("to train and test with the best values:\n")
        name = f"exp_name={self.options.sweep_name}_best"
        print(f"  {shlex.join(command_line_of('with', *self.given, *assignments(best.params), name))}\n")
