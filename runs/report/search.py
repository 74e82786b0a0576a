"""The section of a search, from Optuna's journal: its best trials, how it got there, and which options mattered."""

import itertools
import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from common.messages import first_line
from common.text import per_cent
from runs.report.figures import COLOURS, Figure, draw_figure, panels, side_labels
from runs.report.parts import Missing, Part, Section
from runs.report.results import ReportRun
from runs.report.tables import Column, Table, Value
from runs.report.text import METRIC_TITLES, counted, dataset_title, excerpt, listed, percent, without_home

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

    folder: Path
    runs: tuple[ReportRun, ...]
    trials: tuple[FrozenTrial, ...]
    importances: dict[str, float]
    """Shares of each option, the highest first; of none where there are too few trials."""
    fault: str | None
    """Why there are no trials."""

    @property
    def name(self) -> str:
        """The option sweep_name."""
        return self.folder.resolve().name

    @property
    def metric_title(self) -> str:
        """Of the validation metric that is to be high."""
        return f"validation {METRIC_TITLES[self.runs[0].run.spec.monitor]}"

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """The options it looks for values of, and what these were drawn from."""
        return next((dict(sorted(trial.distributions.items())) for trial in self.trials if trial.params), {})

    @property
    def complete(self) -> list[FrozenTrial]:
        """The trials that have a score."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE and trial.value is not None]

    @property
    def ranked(self) -> list[FrozenTrial]:
        """The complete trials, the best first; of those with the same values, which have one run, the first."""
        first: dict[tuple[Any, ...], FrozenTrial] = {}
        for trial in self.complete:
            first.setdefault(tuple(sorted(trial.params.items())), trial)
        return sorted(first.values(), key=lambda trial: -(trial.value or 0))

    def run_of(self, trial: FrozenTrial) -> ReportRun | None:
        """The run that gave a trial its score, if it is there."""
        same = next((other for other in self.complete if other.params == trial.params), trial)
        wanted = f"{self.name}_trial_{same.number if trial in self.complete else trial.number}_seed"
        return next((run for run in reversed(self.runs) if run.run.folder.parent.name.startswith(wanted)), None)


def read_searches(places: Sequence[Path], runs: Sequence[ReportRun]) -> list[Search]:
    """The searches in and below the folders `places`, known by the runs of their trials among `runs`."""
    runs_of: dict[Path, list[ReportRun]] = {}
    for run in runs:
        sweep = run.run.folder.parent.parent
        if any(sweep.is_relative_to(place) for place in places) and any(
            (sweep / name).is_file() for name in (JOURNAL, "search.csv")
        ):
            runs_of.setdefault(sweep, []).append(run)
    return [_read_search(folder, tuple(of_search)) for folder, of_search in runs_of.items()]


def _read_search(folder: Path, runs: tuple[ReportRun, ...]) -> Search:
    if not (folder / JOURNAL).is_file():
        return Search(folder, runs, (), {}, f"{JOURNAL}: is not there")
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))))
        trials = tuple(study.get_trials(deepcopy=False))
    except Exception as error:  # of many types, on a damaged file
        return Search(folder, runs, (), {}, f"{JOURNAL}: not readable as Optuna's journal: {first_line(error)}")
    importances: dict[str, float] = {}
    if sum(trial.state == TrialState.COMPLETE for trial in trials) >= TRIALS_FOR_IMPORTANCES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that few trials are few; the caption says it
            importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE))
    return Search(folder, runs, trials, importances, None)


def search_section(search: Search, number: int) -> Section:
    """The parts of the search, the `number`-th of the report; what is missing is said where it would stand."""
    anchor, file = f"search-{number}", f"search_{number}"
    title = f"Search {search.name} ({dataset_title(search.runs[0].run.dataset)})"
    best = Part(f"{anchor}-best", "Best trials")
    history = Part(f"{anchor}-history", "Best score by trial")
    options = Part(f"{anchor}-options", "Score against each option")
    importances = Part(f"{anchor}-importances", "Importance of each option")
    command = Part(f"{anchor}-command", "To train and test with the best values")
    if search.fault:
        best.missing.append(Missing(f"The trials are missing: {search.fault}."))
    else:
        best.folded_tables = [_trials_table(search, f"{file}_trials", "All trials of the search.", search.trials)]
    if search.complete:
        best.tables = [best_table(search, f"{file}_best")]
        history.figures = [_history(search, f"{file}_history")]
        options.figures = [_scatter(search, f"{file}_options")]
    else:
        history.missing.append(Missing("The history is missing: no trial is known to be complete."))
        options.missing.append(Missing("The scores are missing: no trial is known to be complete."))
    if search.importances:
        importances.figures = [_importances(search, f"{file}_importances")]
        importances.folded_tables = [_importances_table(search, f"{file}_importances")]
    else:
        why = f"they take at least {TRIALS_FOR_IMPORTANCES} complete trials, found {len(search.complete)}"
        importances.missing.append(Missing(f"Importances are missing: {why}."))
    training = training_command(search, search.ranked[0]) if search.ranked else None
    if training is None:
        why = "it follows from environment.json of the best trial's run"
        command.missing.append(Missing(f"The command is missing: {why}."))
    else:
        command.commands.append(training)
    return Section(anchor, title, _summary(search), [best, history, options, importances, command])


def _summary(search: Search) -> str:
    """The best trial in a sentence."""
    states = [STATE_NAMES[trial.state] for trial in search.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = f"{counted(len(states), 'trial')} ({counts})"
    if not search.ranked:
        return f"Results are missing: {search.fault or total}."
    trial, run = search.ranked[0], search.run_of(search.ranked[0])
    return (
        f"{total}. The best, trial {trial.number}{f' ({run.tag})' if run else ''}, reaches a {search.metric_title} of "
        f"{percent(trial.value or 0)} % with {_values(search, trial)}. The test split has no part in a search."
    )


def training_command(search: Search, trial: FrozenTrial) -> str | None:
    """The command that trains and tests with the values of `trial`; None where its run does not say its own."""
    run = search.run_of(trial)
    if run is None or run.environment is None:
        return None
    words = list(run.environment["command"][1:])
    for option in OWN_OF_A_TRIAL:
        last = next((place for place in reversed(range(len(words))) if words[place].startswith(f"{option}=")), None)
        if last is not None:
            del words[last]
    return without_home(shlex.join(["python", "run.py", *words, f"exp_name={search.name}_best"]))


def best_table(search: Search, name: str) -> Table:
    """The best trials, each set of values once."""
    shown = search.ranked[:BEST_SHOWN]
    return _trials_table(search, name, "The best trials of the search, each set of values once.", shown)


def _trials_table(search: Search, name: str, caption: str, trials: Sequence[FrozenTrial]) -> Table:
    rows: list[list[Value]] = []
    for trial in trials:
        run = search.run_of(trial)
        values = [_short(trial.params[option]) if option in trial.params else "" for option in search.space]
        rows.append([trial.number, STATE_NAMES[trial.state], *values, trial.value, run.tag if run else None])
    return Table(
        name,
        f"{caption} Score: the best {search.metric_title}, in per cent.",
        (
            Column("number", "Trial", "number"),
            Column("state", "State"),
            *(Column(option, option, "code") for option in search.space),
            Column(f"val/{search.runs[0].run.spec.monitor}", "Score", "share", "none"),
            Column("run", "Run", absent="none"),
        ),
        rows,
    )


def _importances_table(search: Search, name: str) -> Table:
    return Table(
        name,
        "Importance of each option, in per cent of the sum.",
        (Column("option", "Option", "code"), Column("importance", "Importance", "share")),
        [[option, share] for option, share in search.importances.items()],
    )


def _history(search: Search, name: str) -> Figure:
    """Each trial's score, and the best so far."""
    numbers, scores = _scores(search)
    best = list(itertools.accumulate(scores, max))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.plot(numbers, scores, "o", color=COLOURS[5], ms=4.5, label="trial")
        last = search.trials[-1].number  # complete or not
        axes.step([*numbers, last], [*best, best[-1]], where="post", color=COLOURS[0], label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel(f"V{search.metric_title[1:]}, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.legend(loc="outside upper left", ncols=2)

    caption = f"The {search.metric_title} of each complete trial of the search {search.name}, and the best so far."
    return draw_figure(name, "Best score by trial", caption, 2.6, draw)


def _scatter(search: Search, name: str) -> Figure:
    """Score against the values of each option, a panel each; the best trial has a ring."""
    columns = 2 if len(search.space) == 4 else min(3, len(search.space))
    best = search.ranked[0]

    def draw(canvas: Canvas) -> None:
        grid = panels(canvas, len(search.space), columns, f"V{search.metric_title[1:]}, %")
        for axes, (option, drawn_from) in zip(grid, search.space.items(), strict=True):
            place_of = _places(search, option, drawn_from, axes)
            _, scores = _scores(search)
            axes.plot([place_of[t.params[option]] for t in search.complete], scores, "o", color=COLOURS[0], alpha=0.75)
            ring: Any = {"ms": 8.5, "mfc": "none", "mec": COLOURS[1], "mew": 1.2}
            axes.plot(place_of[best.params[option]], 100 * (best.value or 0), "o", **ring)
            axes.set_xlabel(option)

    logarithmic = [option for option, drawn_from in search.space.items() if getattr(drawn_from, "log", False)]
    caption = (
        f"The {search.metric_title} of each complete trial against the value of each option; ring: the best trial."
    )
    if logarithmic:
        caption += f" On a logarithmic axis, as they were drawn: {listed(logarithmic)}."
    return draw_figure(
        name, "Score against each option", caption, 0.2 + 2.3 * math.ceil(len(search.space) / columns), draw
    )


def _importances(search: Search, name: str) -> Figure:
    """A bar for each option."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        side_labels(axes, list(search.importances))
        shares = [100 * share for share in search.importances.values()]
        axes.barh(range(len(shares)), shares, height=0.6, color=COLOURS[0])
        axes.set_xlim(0, 100)
        axes.set_xlabel("importance, % of the sum")

    caption = (
        f"How far the values of each option tell the best {per_cent(TOP_SHARE)} of the complete trials from all "
        "(PED-ANOVA), as shares of the sum. Of few trials, a hint at most."
    )
    return draw_figure(name, "Importance of each option", caption, 0.55 + 0.27 * len(search.importances), draw)


def _places(search: Search, option: str, drawn_from: BaseDistribution, axes: Axes) -> dict[Any, float]:
    """Where each value of an option stands along x, which is made for them: by size, or side by side."""
    values = list(dict.fromkeys(trial.params[option] for trial in search.complete))
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


def _scores(search: Search) -> tuple[list[int], list[float]]:
    """Numbers and scores in per cent of the complete trials."""
    return [trial.number for trial in search.complete], [100 * (trial.value or 0) for trial in search.complete]


def _values(search: Search, trial: FrozenTrial) -> str:
    return listed([f"{option}={_short(trial.params[option])}" for option in search.space])


def _short(value: Any) -> str:
    """A value for tables."""
    return f"{value:.4g}" if isinstance(value, float) else without_home(str(value))
