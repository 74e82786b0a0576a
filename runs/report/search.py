"""The section of a search, from Optuna's journal: its best trials, how it got there, and which options mattered."""

import itertools
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from common.errors import DataError
from common.messages import first_line
from common.text import LOWER_IS_BETTER, counted, order_of
from runs.report.figures import COLOURS, Figure, Panel, figure, limits, ring
from runs.report.parts import Note, Part, Section
from runs.report.results import ReportRun
from runs.report.table import Row, Table, absent, number
from runs.report.text import CAPTIONS, Unit, dataset_title, excerpt, listed, metric_title, without_home

JOURNAL = "optuna.journal"
BEST_SHOWN = 10
TOP_SHARE = 0.25
"""Of the complete trials, those that importances tell from the rest."""
TRIALS_FOR_IMPORTANCES = 4
STATE_NAMES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "cut off"}
OWN_OF_A_TRIAL = ("exp_name", "log_dir", "test_after_fit", "resume_from")
"""Options at the end of a trial's command that are those of the trial alone."""


@dataclass(frozen=True, eq=False)
class Search:
    """A search and the runs of its trials, at least one."""

    name: str
    """The option sweep_name."""
    runs: list[ReportRun]
    trials: list[FrozenTrial]
    importances: dict[str, float]
    """Shares of each option, the highest first; of none where there are too few trials."""

    @property
    def metric(self) -> str:
        """Title of the validation metric that is to be best."""
        return f"validation {metric_title(self.runs[0].metric)}"

    @property
    def unit(self) -> Unit:
        """With one decimal: how many validation samples scores are of is not known here."""
        return Unit.of(self.runs[0].metric, 100)

    @property
    def lower_is_better(self) -> bool:
        """Whether the best score is the lowest."""
        return self.runs[0].metric in LOWER_IS_BETTER

    @property
    def scores(self) -> dict[int, float]:
        """Of the complete trials by number."""
        return {t.number: t.value for t in self.trials if t.state == TrialState.COMPLETE and t.value is not None}

    @property
    def ranked(self) -> list[FrozenTrial]:
        """The complete trials, the best first; of those with the same values, which have one run, the first."""
        first = {str(sorted(t.params.items())): t for t in reversed(self.trials) if t.number in self.scores}
        scores, metric = self.scores, self.runs[0].metric
        return sorted(first.values(), key=lambda trial: (-order_of(scores[trial.number], metric), trial.number))

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """The options it looks for values of, and what these were drawn from."""
        return next((dict(sorted(trial.distributions.items())) for trial in self.trials if trial.params), {})

    def run_of(self, trial: FrozenTrial) -> ReportRun | None:
        """The run that gave a trial its score, if it is there."""
        same = [other.number for other in self.ranked if other.params == trial.params and trial.number in self.scores]
        wanted = f"{self.name}_trial_{[*same, trial.number][0]}_seed"
        return next((run for run in reversed(self.runs) if run.run.folder.parent.name.startswith(wanted)), None)


def read_searches(places: Sequence[Path], runs: Sequence[ReportRun]) -> list[Search]:
    """The searches in and below the folders `places`, known by the runs of their trials among `runs`.

    Raises:
        DataError: a journal is damaged.
    """
    runs_of: dict[Path, list[ReportRun]] = {}
    for run in runs:
        sweep = run.run.folder.parent.parent
        if any(sweep.is_relative_to(place) for place in places) and (sweep / JOURNAL).is_file():
            runs_of.setdefault(sweep, []).append(run)
    return [_read_search(folder, of_search) for folder, of_search in runs_of.items()]


def _read_search(folder: Path, runs: list[ReportRun]) -> Search:
    journal = folder / JOURNAL
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))
        trials = study.get_trials(deepcopy=False)
    except Exception as error:  # of many types, on a damaged file
        raise DataError(f"{journal}: not readable as Optuna's journal: {first_line(error)}") from error
    importances: dict[str, float] = {}
    if sum(trial.state == TrialState.COMPLETE for trial in trials) >= TRIALS_FOR_IMPORTANCES:
        with warnings.catch_warnings(action="ignore"):  # that few trials are few; the caption says it
            importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE))
    return Search(folder.resolve().name, runs, trials, importances)


def search_section(search: Search, number_of_search: int) -> Section:
    """The parts of the search; what is missing is said where it would stand."""
    file = f"search_{number_of_search}"
    everything = trials_table(search, f"{file}_trials", "trials", search.trials)
    parts = [Part("Best trials", folded={"All trials": everything})]
    if search.ranked:
        parts[0].shown = [trials_table(search, f"{file}_best", "best_trials", search.ranked[:BEST_SHOWN])]
        parts.append(Part("Best score by trial", [_history(search, f"{file}_history")]))
        parts.append(Part("Score against each option", [_scatter(search, f"{file}_options")]))
        shares, unit = search.importances, Unit(100, 0, "")
        rows: list[Row] = [{"option": name, "importance": number(shares[name], unit)} for name in shares]
        parts.append(Part("Importance of each option", [Table(f"{file}_importances", CAPTIONS["importances"], rows)]))
        if not rows:
            why = f"they take at least {TRIALS_FOR_IMPORTANCES} complete trials, found {len(search.scores)}"
            parts[-1].notes = [Note(f"Importances are missing: {why}.")]
        note = Note("The command is missing: it follows from environment.json of the best trial's run.")
        if command := training_command(search, search.ranked[0]):
            note = Note("Once more, with a test:", command)
        parts.append(Part("To train and test with the best values", notes=[note]))
    title = f"Search {search.name} ({dataset_title(search.runs[0].run.dataset)})"
    return Section(f"search-{number_of_search}", title, _summary(search), parts)


def _summary(search: Search) -> str:
    """The best trial in a sentence."""
    states = [STATE_NAMES.get(trial.state, "waiting") for trial in search.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = f"{counted(len(states), 'trial')} ({counts})"
    if not search.ranked:
        return f"Results are missing: {total}."
    best = search.ranked[0]
    run, values = search.run_of(best), [f"{option}={_short(best.params[option])}" for option in search.space]
    return (
        f"{total}. The best, trial {best.number}{f' ({run.tag})' if run else ''}, reaches a {search.metric} of "
        f"{search.unit.full(search.scores[best.number])} with {listed(values)}. The test split has no part in a search."
    )


def training_command(search: Search, trial: FrozenTrial) -> str | None:
    """The command that trains and tests with the values of `trial`; None where its run does not say its own."""
    run = search.run_of(trial)
    if run is None or run.environment is None:
        return None
    words = list(run.environment["command"][1:])
    for option in OWN_OF_A_TRIAL:
        if places := [place for place, word in enumerate(words) if word.startswith(f"{option}=")]:
            del words[places[-1]]
    return without_home(shlex.join(["python", "run.py", *words, f"exp_name={search.name}_best"]))


def trials_table(search: Search, name: str, caption: str, trials: Sequence[FrozenTrial]) -> Table:
    """A row per trial: its values and its score."""
    score, none = f"val/{search.runs[0].metric}", absent("none")
    rows: list[Row] = []
    for trial in trials:
        run = search.run_of(trial)
        row: Row = {"number": trial.number, "state": STATE_NAMES.get(trial.state, "waiting")}
        row |= {option: _short(trial.params[option]) if option in trial.params else "" for option in search.space}
        rows.append(row | {score: number(trial.value, search.unit, none), "run": run.tag if run else none})
    titles = {"number": "Trial", score: "Score", **{option: option for option in search.space}}
    return Table(name, CAPTIONS[caption].format(metric=search.metric), rows, titles)


def _history(search: Search, name: str) -> Figure:
    """Each trial's score, and the best so far."""
    numbers, scores = list(search.scores), [search.unit.factor * score for score in search.scores.values()]
    best = list(itertools.accumulate(scores, min if search.lower_is_better else max))

    def draw(axes: Axes) -> None:
        axes.plot(numbers, scores, "o", color=COLOURS[5], ms=4.5)
        axes.step([*numbers, search.trials[-1].number], [*best, best[-1]], where="post", color=COLOURS[0])
        axes.set(xlabel="trial", ylabel=f"{search.metric}{search.unit.sign and ', %'}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = CAPTIONS["history"].format(metric=search.metric, search=search.name)
    return figure(name, "Best score by trial", caption, [Panel("", draw)])


def _scatter(search: Search, name: str) -> Figure:
    """Score against the values of each option, a panel each; the best trial has a ring."""
    complete = [trial for trial in search.trials if trial.number in search.scores]
    scores = [search.unit.factor * search.scores[trial.number] for trial in complete]

    def panel(option: str, drawn_from: BaseDistribution) -> Panel:
        def draw(axes: Axes) -> None:
            place_of = _places([trial.params[option] for trial in complete], drawn_from, axes)
            places = [place_of[trial.params[option]] for trial in complete]
            axes.plot(places, scores, "o", color=COLOURS[0], alpha=0.75)
            best = complete.index(search.ranked[0])
            ring(axes, places[best], scores[best], COLOURS[1])
            axes.set(ylabel=f"{search.metric}{search.unit.sign and ', %'}", ylim=limits(scores, 0.1))

        return Panel(option, draw)

    logarithmic = [option for option, drawn_from in search.space.items() if getattr(drawn_from, "log", False)]
    caption = CAPTIONS["scatter"].format(metric=search.metric)
    if logarithmic:
        caption += f" On a logarithmic axis, as they were drawn: {listed(logarithmic)}."
    return figure(name, "Score against each option", caption, [panel(*entry) for entry in search.space.items()])


def _places(found: Sequence[Any], drawn_from: BaseDistribution, axes: Axes) -> dict[Any, float]:
    """Where each value of an option stands along x, which is made for them: by size, or side by side."""
    values = list(dict.fromkeys(found))
    if isinstance(drawn_from, CategoricalDistribution):
        values.sort(key=lambda value: (isinstance(value, str), value))
        axes.set_xticks(range(len(values)), [excerpt(_short(value), 16) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return {value: float(place) for place, value in enumerate(values)}
    if getattr(drawn_from, "log", False):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 30 * min(values) else (1,)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")  # its own is mathematics, which texts are not here
        axes.xaxis.set_minor_formatter("")
    return {value: value for value in values}


def _short(value: Any) -> str:
    """A value for tables."""
    return f"{value:.4g}" if isinstance(value, float) else without_home(str(value))
