"""The section of a search: its best trials, how it got there, and which options mattered."""

import itertools
import math
import shlex
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from clip.text_table import per_cent
from report.figures import COLOURS, Figure, canvas_figure, new_canvas
from report.parts import Missing, Part, Section
from report.searches import TOP_SHARE, Search, Trial, count_states
from report.series import METRIC_TITLES
from report.tables import Column, Table, Value
from report.text import dataset_title, excerpt, listed, percent, without_home

BEST_SHOWN = 10
OWN_OF_A_TRIAL = ("exp_name", "log_dir", "test_after_fit", "resume_from")
"""Options at the end of a trial's command that are those of the trial alone."""


def search_section(search: Search, number: int) -> Section:
    """The parts of the search, the `number`-th of the report; what is missing is said where it would stand."""
    anchor = f"search-{number}"
    parts = [
        _best_part(search, anchor),
        _history_part(search, anchor),
        _options_part(search, anchor),
        _importances_part(search, anchor),
        _command_part(search, anchor),
    ]
    return Section(anchor, f"Search {search.name} ({dataset_title(search.task)})", _summary(search), parts)


def best_table(search: Search, name: str) -> Table:
    """The best trials, each set of values once."""
    rows = [_row(search, trial) for trial, _ in search.ranked[:BEST_SHOWN]]
    return _trials_table(search, name, "The best trials of the search, each set of values once.", rows)


def all_table(search: Search, name: str) -> Table:
    """All trials, by number."""
    return _trials_table(search, name, "All trials of the search.", [_row(search, trial) for trial in search.trials])


def best_so_far(scores: Sequence[float]) -> list[float]:
    """The highest score up to each."""
    return list(itertools.accumulate(scores, max))


def training_command(search: Search, trial: Trial) -> str | None:
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


def _summary(search: Search) -> str:
    """The best trial in a sentence."""
    if not search.ranked:
        return f"Results are missing: {search.missing.get('trials', count_states(search.trials))}."
    trial, score = search.ranked[0]
    run = search.run_of(trial)
    values = listed([f"{name}={_short(value)}" for name, value in trial.values.items()])
    return (
        f"{count_states(search.trials)}. The best, trial {trial.number}{f' ({run.tag})' if run else ''}, reaches a "
        f"validation {_metric(search)} of {percent(score)} % with {values}. The test split has no part in a search."
    )


def _best_part(search: Search, anchor: str) -> Part:
    part = Part(f"{anchor}-best", "Best trials", missing=_missing(search, "trials", "The trials are missing"))
    if search.trials:
        part.tables = [best_table(search, f"{_file(anchor)}_best")] if search.ranked else []
        part.folded_tables = [all_table(search, f"{_file(anchor)}_trials")]
    return part


def _history_part(search: Search, anchor: str) -> Part:
    part = Part(f"{anchor}-history", "Best score by trial")
    if search.complete:
        part.figures.append(history(search, f"{_file(anchor)}_history"))
    else:
        part.missing.append(Missing("The history is missing: no trial is known to be complete."))
    return part


def _options_part(search: Search, anchor: str) -> Part:
    part = Part(f"{anchor}-options", "Score against each option")
    if search.complete:
        part.figures.append(scatter(search, f"{_file(anchor)}_options"))
        part.missing = _missing(search, "scales", "Which options were drawn log-uniformly is missing")
    else:
        part.missing.append(Missing("The scores are missing: no trial is known to be complete."))
    return part


def _importances_part(search: Search, anchor: str) -> Part:
    part = Part(f"{anchor}-importances", "Importance of each option")
    part.missing = _missing(search, "importances", "Importances are missing")
    if search.importances:
        part.figures.append(importances(search, f"{_file(anchor)}_importances"))
        part.folded_tables.append(importances_table(search, f"{_file(anchor)}_importances"))
    return part


def _command_part(search: Search, anchor: str) -> Part:
    part = Part(f"{anchor}-command", "To train and test with the best values")
    command = training_command(search, search.ranked[0][0]) if search.ranked else None
    if command is not None:
        part.commands.append(command)
    else:
        part.missing.append(
            Missing("The command is missing: it follows from environment.json of the best trial's run.")
        )
    return part


def _missing(search: Search, piece: str, what: str) -> list[Missing]:
    return [Missing(f"{what}: {why}.") for of, why in search.missing.items() if of == piece]


def _trials_table(search: Search, name: str, caption: str, rows: list[list[Value]]) -> Table:
    return Table(
        name,
        f"{caption} Score: the best validation {_metric(search)}, in per cent.",
        (
            Column("number", "Trial", "number"),
            Column("state", "State"),
            *(Column(option, option, "code") for option in search.options),
            Column(f"val/{search.metric}", "Score", "share", "none"),
            Column("run", "Run", absent="none"),
        ),
        rows,
    )


def _row(search: Search, trial: Trial) -> list[Value]:
    run = search.run_of(trial)
    return [trial.number, trial.state, *map(_short, trial.values.values()), trial.score, run.tag if run else None]


def importances_table(search: Search, name: str) -> Table:
    """The numbers of the figure."""
    return Table(
        name,
        "Importance of each option, in per cent of the sum.",
        (Column("option", "Option", "code"), Column("importance", "Importance", "share")),
        [[option, share] for option, share in search.importances.items()],
    )


def history(search: Search, name: str) -> Figure:
    """Each trial's score, and the best so far."""
    numbers = [trial.number for trial, _ in search.complete]
    scores = [100 * score for _, score in search.complete]
    best = best_so_far(scores)
    with new_canvas(2.6) as canvas:
        axes = canvas.subplots()
        axes.plot(numbers, scores, "o", color=COLOURS[5], ms=4.5, label="trial")
        last = search.trials[-1].number  # complete or not
        axes.step([*numbers, last], [*best, best[-1]], where="post", color=COLOURS[0], label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel(f"Validation {_metric(search)}, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.legend(loc="outside upper left", ncols=2)
    return canvas_figure(
        canvas,
        name,
        "Best score by trial",
        f"Validation {_metric(search)} of each complete trial of the search {search.name}, and the best so far.",
        f"The best validation {_metric(search)} rises from {best[0]:.2f} % in trial {numbers[0]} to {best[-1]:.2f} %.",
    )


def scatter(search: Search, name: str) -> Figure:
    """Score against the values of each option, a panel each; the best trial has a ring."""
    columns = 2 if len(search.options) == 4 else min(3, len(search.options))
    rows = math.ceil(len(search.options) / columns)
    best_trial, best_score = search.ranked[0]
    with new_canvas(0.2 + 2.3 * rows) as canvas:
        panels = canvas.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in panels.flat[len(search.options) :]:
            axes.set_visible(False)
        for axes, option in zip(panels.flat, search.options, strict=False):
            place_of = _places(search, option, axes)
            points = [(place_of[trial.values[option]], 100 * score) for trial, score in search.complete]
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[0], alpha=0.75)
            best = (place_of[best_trial.values[option]], 100 * best_score)
            axes.plot(*best, "o", ms=8.5, mfc="none", mec=COLOURS[1], mew=1.2)
            axes.set_xlabel(option)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"Validation {_metric(search)}, %")
    logarithmic = [option for option, scale in search.scales.items() if scale == "log"]
    values = listed([f"{option}={_short(value)}" for option, value in best_trial.values.items()])
    return canvas_figure(
        canvas,
        name,
        "Score against each option",
        f"Validation {_metric(search)} of each complete trial against the value of each option; ring: the best trial."
        + (f" On a logarithmic axis, as they were drawn: {listed(logarithmic)}." if logarithmic else ""),
        f"Scatter plots of the score against {listed(list(search.options))}. The best: {percent(best_score)} % with "
        f"{values}.",
    )


def importances(search: Search, name: str) -> Figure:
    """A bar for each option."""
    shares = search.importances
    with new_canvas(0.55 + 0.27 * len(shares)) as canvas:
        axes = canvas.subplots()
        axes.barh(range(len(shares)), [100 * share for share in shares.values()], height=0.6, color=COLOURS[0])
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 100)
        axes.set_xlabel("importance, % of the sum")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    return canvas_figure(
        canvas,
        name,
        "Importance of each option",
        f"How far the values of each option tell the best {per_cent(TOP_SHARE)} of the complete trials from all "
        "(PED-ANOVA), as shares of the sum. Of few trials, a hint at most.",
        f"Bar chart of importances: {listed([f'{option} {percent(share)} %' for option, share in shares.items()])}.",
    )


def _places(search: Search, option: str, axes: Axes) -> dict[str, float]:
    """Where each value of an option stands along x, which is made for them: by size, or side by side."""
    values = list(dict.fromkeys(trial.values[option] for trial, _ in search.complete))
    sizes = [size for value in values if (size := _size(value)) is not None]
    scale = search.scales.get(option, "linear")
    if scale == "choices" or len(sizes) < len(values):
        values.sort(key=lambda value: (_size(value) is None, _size(value) or 0, value))
        axes.set_xticks(range(len(values)), [excerpt(_short(value), 16) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return {value: float(place) for place, value in enumerate(values)}
    axes.set_xscale(scale)
    if scale == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(sizes) < 30 * min(sizes) else (1,)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")  # its own is mathematics, which texts are not here
        axes.xaxis.set_minor_formatter("")
    return dict(zip(values, sizes, strict=True))


def _size(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _short(value: str) -> str:
    """A value for the eye."""
    size = _size(value)
    return without_home(value) if size is None or value.isdecimal() else f"{size:.4g}"


def _metric(search: Search) -> str:
    return METRIC_TITLES[search.metric]


def _file(anchor: str) -> str:
    return anchor.replace("-", "_")
