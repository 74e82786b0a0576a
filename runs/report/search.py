"""The section of a search, from Optuna's journal: its best trials, and all of them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from common.text import counted
from runs.report.parts import Note, Part, Section
from runs.report.results import ReportRun
from runs.report.table import Row, Table, absent, number
from runs.report.text import CAPTIONS, Unit, dataset_title, listed, metric_title, without_home
from runs.sweep.search import JOURNAL, STATE_NAMES, open_study, ranked, run_number, short

BEST_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Search:
    """A search and the runs of its trials, at least one."""

    folder: Path
    runs: list[ReportRun]
    trials: list[FrozenTrial]

    @property
    def name(self) -> str:
        """The option sweep_name."""
        return self.folder.resolve().name

    @property
    def monitor(self) -> str:
        """The validation metric that is to be best."""
        return self.runs[0].metric

    @property
    def metric(self) -> str:
        """Its title."""
        return f"validation {metric_title(self.monitor)}"

    @property
    def unit(self) -> Unit:
        """With one decimal: how many validation samples scores are of is not known here."""
        return Unit.of(self.monitor, 100)

    @cached_property
    def ranked(self) -> list[FrozenTrial]:
        """The complete trials, the best first; each set of values once."""
        return ranked(self.trials, self.monitor)

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """The options it looks for values of, and what these were drawn from."""
        return next((dict(sorted(trial.distributions.items())) for trial in self.trials if trial.params), {})

    def run_of(self, trial: FrozenTrial) -> ReportRun | None:
        """The run that gave a trial its score, if it is there."""
        wanted = f"{self.name}_trial_{run_number(trial, self.trials)}_seed"
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
    return [Search(sweep, of_sweep, open_study(sweep / JOURNAL).trials) for sweep, of_sweep in runs_of.items()]


def search_section(search: Search, number_of_search: int) -> Section:
    """The parts of the search; what is missing is said where it would stand."""
    file = f"search_{number_of_search}"
    everything = trials_table(search, f"{file}_trials", "trials", search.trials)
    parts = [Part("Best trials", folded={"All trials": everything})]
    if search.ranked:
        parts[0].shown = [trials_table(search, f"{file}_best", "best_trials", search.ranked[:BEST_SHOWN])]
        dashboard = shlex.join(["optuna-dashboard", without_home(str(search.folder / JOURNAL))])
        text = "Scores by trial and by option, and the importance of each option, are shown by Optuna's own tool:"
        parts[0].notes = [Note(text, dashboard)]
    title = f"Search {search.name} ({dataset_title(search.runs[0].run.dataset)})"
    return Section(f"search-{number_of_search}", title, _summary(search), parts)


def _summary(search: Search) -> str:
    """The best trial in a sentence."""
    states = [STATE_NAMES[trial.state] for trial in search.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = f"{counted(len(states), 'trial')} ({counts})"
    if not search.ranked:
        return f"Results are missing: {total}."
    best = search.ranked[0]
    run, values = search.run_of(best), [f"{option}={_short(best.params[option])}" for option in search.space]
    return (
        f"{total}. The best, trial {best.number}{f' ({run.tag})' if run else ''}, reaches a {search.metric} of "
        f"{search.unit.full(best.values[0])} with {listed(values)}. The test split has no part in a search."
    )


def trials_table(search: Search, name: str, caption: str, trials: Sequence[FrozenTrial]) -> Table:
    """A row per trial: its values and its score."""
    score, none = f"val/{search.monitor}", absent("none")
    rows: list[Row] = []
    for trial in trials:
        run = search.run_of(trial)
        row: Row = {"number": trial.number, "state": STATE_NAMES[trial.state]}
        row |= {option: _short(trial.params[option]) if option in trial.params else "" for option in search.space}
        rows.append(row | {score: number(trial.value, search.unit, none), "run": run.tag if run else none})
    titles = {"number": "Trial", score: "Score", **{option: option for option in search.space}}
    return Table(name, CAPTIONS[caption].format(metric=search.metric), rows, titles)


def _short(value: Any) -> str:
    """A value for tables."""
    return without_home(short(value))
