"""The report's section on a search, from Optuna's journal: trials, best score so far, importance of the options."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial

from common.text import LOWER_IS_BETTER, counted
from runs.report.figures import COLOURS, Figure, figure
from runs.report.parts import Note, Part, Section
from runs.report.results import ReportRun
from runs.report.table import Row, Table, absent, number
from runs.report.text import CAPTIONS, Unit, dataset_title, in_words, metric_title, without_home
from runs.sweep.jobs import JOURNAL
from runs.sweep.search import STATE_NAMES, open_study, ranked, short

TOP_SHARE = 0.25
"""Share of the complete trials, the best ones, that importances distinguish from the rest."""
TRIALS_FOR_IMPORTANCES = 4


def search_section(folder: Path, runs: Sequence[ReportRun], place: int) -> Section:
    """The section of the search in a sweep's folder: the report's `place`-th search, with `runs` of its trials.

    Raises:
        DataError: the journal is damaged.
    """
    study, metric = open_study(folder / JOURNAL), runs[0].spec.monitor
    trials = study.get_trials(deepcopy=False)
    best_first, unit = ranked(trials, metric), Unit.of(metric, 100)  # the number of validation samples is unknown
    states = [STATE_NAMES.get(trial.state, trial.state.name.lower()) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    summary = f"{counted(len(trials), 'trial')} ({counts})."
    options = sorted({option for trial in trials for option in trial.params})
    rows: list[Row] = []
    for trial, state in zip(trials, states, strict=True):
        values = {option: without_home(short(trial.params.get(option, ""))) for option in options}
        rows.append({"trial": trial.number, "state": state, **values})
        rows[-1][f"val/{metric}"] = number(trial.value, unit, absent("none"))
    titles = {option: option for option in options} | {f"val/{metric}": "Score"}
    table = Table(f"search_{place}_trials", CAPTIONS["trials"].format(metric=metric_title(metric)), rows, titles)
    parts = [Part("Trials", [table])]
    if best_first:
        best = best_first[0]
        with_values = in_words([f"{option}={short(value)}" for option, value in sorted(best.params.items())])
        reached = f"reaches a validation {metric_title(metric)} of {unit.full(best.values[0])}"
        summary += without_home(f" The best, trial {best.number}, {reached} with {with_values}.")
        parts.insert(0, Part("Best score by trial", [_history(trials, metric, unit, f"search_{place}_history")]))
        run = next((run for run in runs if f"_trial_{best.number}_seed" in run.place), None)
        if run and run.command:
            parts[0].shown.append(Note(f"This command repeats the best trial, {run.tag}:", run.command))
        parts.append(Part("Importance of each option"))
        if len(best_first) >= TRIALS_FOR_IMPORTANCES:
            with warnings.catch_warnings(action="ignore"):  # about an experimental evaluator and few trials
                shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE))
            rows = [{"option": name, "importance": number(share, Unit(100, 0, ""))} for name, share in shares.items()]
            parts[-1].shown = [Table(f"search_{place}_importances", CAPTIONS["importances"], rows)]
        else:
            parts[-1].shown = [Note(f"Missing: this needs {TRIALS_FOR_IMPORTANCES} trials with different values.")]
    title = f"Search {folder.resolve().name} ({dataset_title(runs[0].dataset)})"
    return Section(f"search-{place}", title, summary, parts)


def _history(trials: Sequence[FrozenTrial], metric: str, unit: Unit, name: str) -> Figure:
    """Each complete trial's score, and the best so far."""
    complete = [trial for trial in trials if trial.value is not None]
    numbers, scores = [trial.number for trial in complete], [unit.factor * trial.values[0] for trial in complete]
    best_so_far = (np.minimum if metric in LOWER_IS_BETTER else np.maximum).accumulate(scores)

    def draw(axes: Axes) -> None:
        axes.plot(numbers, scores, "o", color=COLOURS[5], ms=4.5)
        axes.step(numbers, best_so_far, where="post", color=COLOURS[0])
        axes.set(xlabel="trial", ylabel=f"Validation {metric_title(metric)}{unit.sign and ', %'}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = CAPTIONS["history"].format(metric=metric_title(metric))
    return figure(name, "Best score by trial", caption, [("", draw)])
