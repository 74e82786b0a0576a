"""The report's figures, drawn with matplotlib as PNG and SVG files, and as single panels to embed in the page."""

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from runs.pattern import Pattern
from runs.report.lines import Dataset, Line
from runs.report.text import capital, excerpt, in_words
from vilt.missing_types import ANY, BOTH, SOME

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 3.2, 0.5, 0.1, 0.28, 0.42
"""Width of a panel and margins around its axes, in inches. Three panels fill the width of the page."""
PNG_DPI = 150
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
matplotlib.rcParams.update(STYLE)
MUTED = STYLE["xtick.color"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, safe for colour-blind readers, without black and a yellow too faint on paper."""
Look = dict[str, Any]
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":", "-.")
FLOORS: tuple[Look, ...] = ({"color": "#6d6d6e", "linestyle": "--"}, {"color": "#6d6d6e", "linestyle": ":"})
"""Looks of the baselines."""
TITLE, LINE, SIDE_LABEL = 42, 0.14, 48
"""Characters per line of a panel's title, inches added by a further title line, characters per line of a row label."""
TOGETHER = 3
"""Maximum number of lines shown in one panel; if there are more, each gets its own panel."""
CURVE_POINTS = 150
"""Maximum number of points of a training curve."""

Curve = tuple[Line, str, Look]
"""A line, the missing type whose curve is drawn, and its look."""
Panel = tuple[str, Callable[[Axes], None]]
"""The title of one coordinate system of a figure, and what draws it."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure."""

    name: str  # stem of its files' names
    title: str
    caption: str  # also the alternative text; the numbers are in tables
    legend: Mapping[str, Look]
    panels: list[tuple[str, str]]  # title and SVG of each panel; they stack on a narrow screen
    svg: str  # all panels in one file
    png: bytes  # the same as PNG


def figure(
    name: str,
    title: str,
    caption: str,
    panels: Sequence[Panel],
    height: float = 2.3,
    legend: Mapping[str, Look] = MappingProxyType({}),
) -> Figure:
    """Draws panels of `height` inches, three in a row."""
    panels = [(textwrap.fill(excerpt(panel_title, 2 * TITLE), TITLE), draw) for panel_title, draw in panels]
    top = TOP + LINE * max(panel_title.count("\n") for panel_title, _ in panels)
    png, together = io.BytesIO(), _drawn(panels, height, top, legend)
    together.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    singles = [(panel[0] or title, _svg(_drawn([panel], height, top, {}))) for panel in panels]
    return Figure(name, title, caption, legend, singles, _svg(together), png.getvalue())


def _drawn(panels: Sequence[Panel], height: float, top: float, legend: Mapping[str, Look]) -> Canvas:
    columns = min(3, len(panels))
    rows, head = math.ceil(len(panels) / columns), 0.17 * math.ceil(len(legend) / columns) + 0.1 if legend else 0
    width, total, inner = WIDTH * columns, (height - TOP + top) * rows + head, height - TOP - BOTTOM
    canvas = Canvas(figsize=(width, total))
    canvas.subplots_adjust(LEFT / width, BOTTOM / total, 1 - RIGHT / width, 1 - (head + top) / total)
    canvas.subplots_adjust(wspace=(LEFT + RIGHT) / (WIDTH - LEFT - RIGHT), hspace=(top + BOTTOM) / inner)
    for place, (title, draw) in enumerate(panels, start=1):
        axes = canvas.add_subplot(rows, columns, place)
        axes.set_title(title, loc="left")
        draw(axes)
    if legend:
        handles = [Line2D([], [], ms=3.6, lw=1.4, **look) for look in legend.values()]
        canvas.legend(handles, [excerpt(label, 52) for label in legend], loc="upper left", ncols=columns)
    return canvas


def _svg(canvas: Canvas) -> str:
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def look(place: int) -> Look:
    """Colour, dashes and marker of the line at index `place`."""
    dashes = DASHES[place // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes, "marker": MARKERS[place % len(MARKERS)]}


def side_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Labels the rows, the first at the top; each label is above its row's data, to leave room for long ones."""
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.4, -0.75)
    for place, label in enumerate(labels):
        text = textwrap.fill(excerpt(label, 2 * SIDE_LABEL), SIDE_LABEL)
        axes.text(0.0, place - 0.28, text, transform=axes.get_yaxis_transform(), fontsize=7, linespacing=1, va="bottom")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def limits(values: Iterable[float]) -> tuple[float, float]:
    """Limits of an axis that panels share."""
    finite = [value for value in values if math.isfinite(value)] or [0, 1]
    low, high = min(finite), max(finite)
    room = 0.05 * (high - low or 1)
    return low - room, high + room


def arranged(lines: Sequence[Line], kinds: dict[str, str]) -> tuple[list[tuple[str, list[Curve]]], dict[str, Look]]:
    """Distributes curves over panels, one per kind with all lines or the reverse; returns these and the legend."""
    if len(lines) <= TOGETHER:
        looks = {line.label: look(place) for place, line in enumerate(lines)}
        return [(title, [(line, kind, looks[line.label]) for line in lines]) for kind, title in kinds.items()], looks
    looks = {title: look(place) for place, title in enumerate(kinds.values())}
    return [(line.label, [(line, kind, looks[title]) for kind, title in kinds.items()]) for line in lines], looks


def comparison_figure(dataset: Dataset) -> Figure:
    """A panel per training pattern with a dot per line at its mean, and whiskers for the deviation over seeds."""
    scale = dataset.unit().factor
    found = [line.at_own_pattern for lines in dataset.compared.values() for line in lines]
    bounds = limits(scale * (each.mean + sign * each.std) for each in found if each for sign in (-1, 1))

    def draw(axes: Axes, lines: Sequence[Line]) -> None:
        side_labels(axes, [line.variant + dataset.marked(line) for line in lines])
        for place, line in enumerate(lines):
            if own := line.at_own_pattern:
                axes.errorbar(
                    scale * own.mean, place, None, scale * own.std, "o", color=COLOURS[0], ms=4.5, ecolor=MUTED
                )
        axes.set(xlim=bounds, xlabel=dataset.axis_title)

    panels = [
        (f"Trained at {pattern.title}", partial(draw, lines=lines)) for pattern, lines in dataset.compared.items()
    ]
    longest = max(len(line.variant) for lines in dataset.compared.values() for line in lines)
    height = TOP + BOTTOM + (0.42 if longest > SIDE_LABEL else 0.3) * max(map(len, dataset.compared.values()))
    return figure(f"comparison_{dataset.key}", "Methods compared", dataset.caption("comparison_figure"), panels, height)


def robustness_curves(dataset: Dataset) -> Figure:
    """Metric against missing ratio, in a panel per missing type, or per line if there are many lines."""
    kinds = {pattern.kind: kind_title(pattern.kind) for line in dataset.measured for pattern in line.matrix}
    arrangement, legend = arranged(dataset.measured, kinds)

    def band(line: Line, pattern: Pattern) -> tuple[float, float]:
        mean, std, *_ = line.matrix[pattern]
        return line.interval_at(pattern) or (mean - std, mean + std)

    scale = dataset.unit().factor
    floors = [scale * metrics[dataset.spec.monitor] for metrics in dataset.baselines.values()]
    ends = [scale * end for line in dataset.measured for pattern in line.matrix for end in band(line, pattern)]
    bounds = limits([*ends, *floors])
    legend = {**legend, **dict(zip(dataset.baselines, FLOORS, strict=False))}

    def draw(axes: Axes, curves: Sequence[Curve]) -> None:
        for line, kind, style in curves:
            found = [(p.ratio, value.mean, *band(line, p)) for p, value in line.matrix.items() if p.kind == kind]
            ratios, means, lows, highs = np.array(found).reshape(-1, 4).T * [[100], [scale], [scale], [scale]]
            if len(curves) <= TOGETHER:
                axes.fill_between(ratios, lows, highs, color=style["color"], alpha=0.15, lw=0)
            axes.plot(ratios, means, **style)
            if line.pattern.kind == kind and (own := line.matrix.get(line.pattern)):
                ring = {"ms": 8.5, "mfc": "none", "mec": style["color"], "mew": 1.1}
                axes.plot(100 * line.pattern.ratio, scale * own.mean, "o", **ring)
        axes.set(xlabel="missing ratio, %", ylabel=dataset.axis_title, xticks=range(0, 101, 20))
        for floor, style in zip(floors, FLOORS, strict=False):
            axes.axhline(floor, lw=0.9, **style)
        axes.set(xlim=(-4, 104), ylim=bounds)

    panels = [(title, partial(draw, curves=curves)) for title, curves in arrangement]
    return figure(f"curves_{dataset.key}", "Robustness curves", dataset.caption("curves"), panels, legend=legend)


def training_figure(dataset: Dataset, column: str, title: str, factor: float) -> Figure:
    """A column of metrics.csv by optimiser step, with a panel per line and a curve per run."""
    curves: dict[Line, list[pd.Series]] = {}
    for line in dataset.lines:
        if found := [run.curve(column) for run in line.runs if len(run.curve(column))]:
            curves[line] = [factor * thinned(curve) for curve in found]
    bounds = limits(value for line_curves in curves.values() for curve in line_curves for value in curve)

    def draw(axes: Axes, line: Line) -> None:
        for curve in curves[line]:
            axes.plot(curve, "o-" if len(curve) <= 30 else "-", color=COLOURS[0], lw=1, ms=2.6, alpha=0.75)
        axes.set(xlabel="optimiser step", ylabel=title, ylim=bounds)

    panels = [(line.label, partial(draw, line=line)) for line in curves]
    name, caption = column.replace("/", "_"), dataset.caption("training", curve_points=CURVE_POINTS, title=title)
    return figure(f"{name}_{dataset.key}", title, caption, panels, 2.1)


def thinned(curve: pd.Series) -> pd.Series:
    """A curve reduced to at most CURVE_POINTS points, by averaging over equal parts."""
    points = curve.rename("value").reset_index()
    points = points.groupby(points.index // math.ceil(len(points) / CURVE_POINTS)).mean()
    return points.set_index("step").value


def class_figure(dataset: Dataset, lines: Sequence[Line]) -> Figure:
    """F1 by class, with a panel per line and a bar per missing type; whiskers are the deviation over training seeds."""
    looks = {name: look(place) for place, name in enumerate(dataset.spec.type_names)}
    present = [name for name, support in lines[0].support.items() if support]
    absent = [name for name in lines[0].support if name not in present]

    def draw(axes: Axes, line: Line) -> None:
        side_labels(axes, present)
        height = 0.54 / len(looks)
        for (place, class_name), (bar, name) in itertools.product(enumerate(present), enumerate(looks)):
            if value := line.f1_of(class_name, name):
                whisker, y = 100 * value.std if value.n > 1 else None, place - 0.22 + (bar + 0.5) * height
                axes.barh(
                    y,
                    100 * value.mean,
                    height,
                    xerr=whisker,
                    color=looks[name]["color"],
                    error_kw={"elinewidth": 0.7, "ecolor": MUTED},
                )
        axes.set(xlim=(0, 102), xlabel="F1, %")

    caption = dataset.caption("class_figure") + (f" No test sample is of {in_words(absent)}." if absent else "")
    panels = [(line.label, partial(draw, line=line)) for line in lines]
    height, legend = TOP + BOTTOM + 0.28 * len(present), {capital(name): style for name, style in looks.items()}
    return figure(f"per_class_{dataset.key}", "F1 by class", caption, panels, height, legend)


def roc_curves(dataset: Dataset) -> Figure:
    """ROC curves, one per run, in a panel per missing type, or per line if there are many lines."""
    arrangement, legend = arranged(dataset.measured, {name: capital(name) for name in dataset.spec.type_names})

    def draw(axes: Axes, curves: Sequence[Curve]) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, lw=0.7, ls=":")
        for place, (line, name, style) in enumerate(reversed(curves)):
            found = [results.raw["roc"][name] for _, results in line.results if name in results.raw["roc"]]
            for curve in found:
                rates = (100 * np.array(curve[rate]) for rate in ("fpr", "tpr"))
                axes.plot(*rates, lw=1.1, alpha=0.85, **{**style, "marker": ""})
            if area := line.by_type.get(name):
                text = f"AUROC {dataset.unit().text(area.mean)}"
                axes.text(98, 3 + 8 * place, text, ha="right", color=style["color"], fontsize=7)
        axes.set(xlabel="false positives, %", ylabel="true positives, %", xlim=(-2, 102), ylim=(-2, 102))

    panels = [(title, partial(draw, curves=curves)) for title, curves in arrangement]
    return figure(f"roc_{dataset.key}", "ROC curves", dataset.caption("roc"), panels, 2.8, legend)


def kind_title(kind: str) -> str:
    """Title of a missing type."""
    titles = {ANY: "Any one missing", SOME: "Some missing"}
    both = kind.replace(BOTH, "One or the other missing") if kind.startswith(BOTH) else None
    return titles.get(kind) or both or f"{capital(kind)} missing"
