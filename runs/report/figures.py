"""The figures of the report, drawn with matplotlib: as PNG and SVG files, and as SVG to stand within a page."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from common.text import estimate
from runs.report.lines import Dataset, Line
from runs.report.text import capital, listed, spread
from vilt.missing_types import ANY, BOTH, SOME

WIDTH = 7.2
"""Inches of every figure; a page of two columns of text."""
PNG_DPI = 200
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
matplotlib.rcParams.update(STYLE)
INK, MUTED, RULE, PAPER = (STYLE[name] for name in ("text.color", "xtick.color", "grid.color", "figure.facecolor"))
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
"""Within a page these follow its light or dark scheme; no other element of a figure may have these exact colours."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers can tell apart; without black, and the yellow that paper swallows."""
TYPE_COLOURS = [COLOURS[place] for place in (0, 4, 2, 1, 3, 5)]
"""Of the missing types, in turn."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":", "-.")
SHADES = LinearSegmentedColormap.from_list("accent", ["#f4f9fc", "#9cc9e3", COLOURS[0], "#003a5d"])
CURVE_POINTS = 150
"""Points that a training curve is thinned to, by averaging."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure; `name` is that of its files."""

    name: str
    title: str
    caption: str
    """Also what stands for the figure for those who cannot see it; its numbers are in tables."""
    svg: str
    """A file."""
    png: bytes

    @property
    def inline(self) -> Markup:
        """The SVG to stand in an HTML page with others: names of its own, no outside reference, the page's colours."""
        found = re.search(r'<svg\b[^>]*\bviewBox="([^"]*)"[^>]*>(.*)</svg>', self.svg, re.DOTALL)
        assert found is not None
        body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style\b.*?</style>", "", found[2], flags=re.DOTALL)
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r'(url\(|xlink:href=")#', rf"\1#{self.name}-", body)
        for colour, variable in PAGE_COLOURS.items():
            body = body.replace(colour, variable)
        start = Markup('<svg class="plot" viewBox="{}" role="img" aria-label="{}">').format(found[1], self.title)
        return start + Markup(re.sub(r"\n\s*\n+", "\n", body)) + Markup("</svg>")


def new_canvas(height: float) -> Canvas:
    """An empty figure of WIDTH × `height` inches."""
    return Canvas(figsize=(WIDTH, height), layout="constrained")


def panels(titles: Sequence[str], row: float, more: float, y: str, columns: int = 3) -> tuple[Canvas, list[Axes]]:
    """A figure of panels that share their y axis `y`; its height is `row` for each row of them, and `more`."""
    columns = min(columns, len(titles))
    canvas = new_canvas(row * math.ceil(len(titles) / columns) + more)
    grid = canvas.subplots(math.ceil(len(titles) / columns), columns, sharey=True, squeeze=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.set_title(title)
    for axes in grid.flat[len(titles) :]:
        axes.set_visible(False)
    return canvas, list(grid.flat[: len(titles)])


def finished(canvas: Canvas, name: str, title: str, caption: str) -> Figure:
    """The figure that was drawn on `canvas`."""
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def side_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Labels down the side, the first at the top, with a grid along x."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def ring(axes: Axes, x: float, y: float, colour: str) -> None:
    """A ring around a point."""
    axes.plot(x, y, "o", ms=8.5, mfc="none", mec=colour, mew=1.1)


def comparison_figure(dataset: Dataset) -> Figure:
    """A panel per training pattern, a dot per variant: its mean with a whisker for the deviation over seeds."""
    variants = dataset.compared
    patterns = list(dict.fromkeys(line.pattern for lines in variants.values() for line in lines))
    canvas, grid = panels([str(pattern) for pattern in patterns], 0.45 + 0.24 * len(variants), 0.45, "")
    for axes, pattern in zip(grid, patterns, strict=True):
        side_labels(axes, list(variants))
        for place, lines in enumerate(variants.values()):
            for found in (line.at_own_pattern for line in lines if line.pattern == pattern and line.at_own_pattern):
                style: Any = {"color": COLOURS[0], "ecolor": MUTED, "elinewidth": 0.9, "ms": 5}
                axes.errorbar(100 * found.mean, place, None, 100 * found.std, "o", **style)
        axes.set_xlabel(f"{capital(dataset.metric_title)}, %")
        axes.margins(x=0.12)
    return finished(canvas, f"comparison_{dataset.key}", "Methods compared", dataset.caption("comparison_figure"))


def robustness_curves(dataset: Dataset) -> Figure:
    """Metric against missing ratio, a panel per missing type, a curve per line with its band."""
    shown = dataset.measured
    kinds = list(dict.fromkeys(pattern.kind for line in shown for pattern in line.matrix))
    metric = f"{capital(dataset.metric_title)}, %"
    canvas, grid = panels([_kind_title(kind) for kind in kinds], 2.5, 0.25 + 0.17 * len(shown), metric)
    for axes, kind in zip(grid, kinds, strict=True):
        for place, line in enumerate(shown):
            found = [(p.ratio, *value[:2]) for p, value in line.matrix.items() if p.kind == kind]
            ratios, means, stds = 100 * np.array(found).reshape(-1, 3).T
            axes.fill_between(ratios, means - stds, means + stds, color=look(place)["color"], alpha=0.18, lw=0)
            axes.plot(ratios, means, marker=MARKERS[place % len(MARKERS)], **look(place))
            if line.pattern.kind == kind and (own := line.matrix.get(line.pattern)):
                ring(axes, 100 * line.pattern.ratio, 100 * own.mean, look(place)["color"])
        axes.set_xlabel("missing ratio, %")
        axes.set_xticks(range(0, 101, 20))
        axes.margins(x=0.04)
    _legend(canvas, shown)
    return finished(canvas, f"curves_{dataset.key}", "Robustness curves", dataset.caption("curves"))


def heat_map(dataset: Dataset) -> Figure:
    """Missing type × ratio with numbers, a panel per line, one scale for all."""
    frames = []
    for line in dataset.measured:
        values = {(pattern.kind, pattern.ratio): 100 * found.mean for pattern, found in line.matrix.items()}
        frames.append(pd.Series(values).unstack().reindex(dict.fromkeys(kind for kind, _ in values)))
    low, high = min(f.min().min() for f in frames), max(f.max().max() for f in frames)
    canvas = new_canvas(sum(0.62 + 0.3 * len(frame) for frame in frames) + 0.1)
    heights = [len(frame) for frame in frames]
    grid = canvas.subplots(len(frames), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, line, frame in zip(grid, dataset.measured, frames, strict=True):
        # Cells are drawn as shapes: an image would be pixels in the SVG.
        axes.pcolormesh(frame, cmap=SHADES, vmin=low, vmax=max(high, low + 1e-9), edgecolors=PAPER, linewidth=1.2)
        for (row, column), value in np.ndenumerate(frame.to_numpy()):
            if not math.isnan(value):
                colour = _readable_on(SHADES((value - low) / max(high - low, 1e-9)))
                style: Any = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", **style)
        axes.set_xticks(np.arange(frame.shape[1]) + 0.5, [f"{100 * ratio:g}" for ratio in frame.columns])
        axes.set_yticks(np.arange(len(frame)) + 0.5, [_kind_title(kind) for kind in frame.index])
        axes.invert_yaxis()
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(_wrapped(line.label), loc="left")
    grid[-1].set_xlabel("missing ratio, %")
    return finished(canvas, f"matrix_{dataset.key}", "Missing type × missing ratio", dataset.caption("heat_map"))


def training_curves(dataset: Dataset) -> Figure:
    """Loss and validation metric by optimiser step, a curve per run."""
    recorded = [(place, run) for place, line in enumerate(dataset.lines) for run in line.runs if run.run.curves]
    canvas = new_canvas(2.55 + 0.17 * len(dataset.lines))
    loss, validation = canvas.subplots(1, 2)
    for place, run in recorded:
        for axes, name, factor in ((loss, "train/loss", 1), (validation, f"val/{dataset.spec.monitor}", 100)):
            points = thinned(np.array(run.run.curves.get(name, [])).reshape(-1, 2))
            marker = MARKERS[place % len(MARKERS)] if len(points) <= 30 else ""
            axes.plot(points[:, 0], factor * points[:, 1], marker=marker, ms=2.6, lw=1, **look(place), alpha=0.85)
            axes.set_xlabel("optimiser step")
    loss.set_title("Training loss")
    loss.set_ylim(bottom=min(0, loss.get_ylim()[0]))
    validation.set_title(f"Validation {dataset.metric_title}, %")
    _legend(canvas, dataset.lines)
    runs = ", ".join(run.tag for _, run in recorded)
    caption = dataset.caption("training", runs=runs, points=CURVE_POINTS)
    return finished(canvas, f"training_{dataset.key}", "Training", caption)


def class_bars(dataset: Dataset, line: Line, number: int) -> Figure:
    """F1 by class and missing type of one line; whiskers are the deviation over train seeds."""
    types, several = dataset.spec.type_names, len(line.results) > 1
    there = [name for name, support in line.support.items() if support]
    absent = [name for name in line.support if name not in there]
    canvas = new_canvas(0.8 + 0.29 * len(there))
    axes = canvas.subplots()
    side_labels(axes, there)
    for place, name in enumerate(types):
        found = [line.by_class.get((of_class, "f1", name)) for of_class in there]
        axes.barh(
            np.arange(len(there)) + (place - (len(types) - 1) / 2) * 0.81 / len(types),
            [100 * value.mean if value else 0 for value in found],
            height=0.75 / len(types),
            color=TYPE_COLOURS[place % len(TYPE_COLOURS)],
            xerr=[100 * value.std if value else 0 for value in found] if several else None,
            error_kw={"elinewidth": 0.7, "ecolor": MUTED},
            label=name,
        )
    axes.set_xlabel("F1, %")
    axes.set_xlim(0, 100)
    canvas.legend(loc="outside upper left", ncols=3, handlelength=1, handleheight=0.8)
    caption = dataset.caption("class_bars", line=line.label)
    caption += " Whiskers: ± one standard deviation over train seeds." if several else ""
    caption += f" No test sample is of {listed(absent)}." if absent else ""
    return finished(canvas, f"per_class_{dataset.key}_{number}", f"F1 by class: {line.label}", caption)


def roc_curves(dataset: Dataset) -> Figure:
    """ROC by missing type, a curve per run."""
    types, shown = dataset.spec.type_names, dataset.measured
    titles = [capital(name) for name in types]
    canvas, grid = panels(titles, 2.4, 0.35 + 0.17 * len(shown), "true positives, %")
    for axes, type_name in zip(grid, types, strict=True):
        axes.plot([0, 100], [0, 100], color=MUTED, lw=0.7, ls=":")
        for place, line in enumerate(shown):
            curves = [found.roc[type_name] for _, found in line.results if type_name in found.roc]
            for curve in curves:
                rates = (100 * np.array(curve[name]) for name in ("fpr", "tpr"))
                axes.plot(*rates, lw=1.1, **look(place), alpha=0.85)
            if area := estimate([curve["auroc"] for curve in curves]):
                style: Any = {"ha": "right", "color": look(place)["color"], "fontsize": 7}
                axes.text(98, 3 + 8 * (len(shown) - 1 - place), f"AUROC {spread(area)}", **style)
        axes.set(xlabel="false positives, %", aspect="equal", xlim=(-2, 102), ylim=(-2, 102))
    _legend(canvas, shown)
    return finished(canvas, f"roc_{dataset.key}", "ROC curves", dataset.caption("roc"))


def look(place: int) -> dict[str, Any]:
    """Colour and dashes of the line at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}


def thinned(points_N2: np.ndarray) -> np.ndarray:
    """Steps and values, averaged over equal parts where there are more than CURVE_POINTS."""
    if len(points_N2) <= CURVE_POINTS:
        return points_N2
    return np.stack([part.mean(0) for part in np.array_split(points_N2, CURVE_POINTS)])


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever has the higher contrast (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "#000000" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "#ffffff"


def _kind_title(kind: str) -> str:
    titles = {ANY: "Any one missing", SOME: "Some missing"}
    both = kind.replace(BOTH, "One or the other missing") if kind.startswith(BOTH) else None
    return titles.get(kind) or both or f"{capital(kind)} missing"


def _legend(canvas: Canvas, lines: Sequence[Line]) -> None:
    places = range(len(lines))
    handles = [Line2D([], [], marker=MARKERS[place % len(MARKERS)], ms=3.6, lw=1.4, **look(place)) for place in places]
    canvas.legend(handles, [_wrapped(line.label) for line in lines], loc="outside upper left", ncols=1)


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 90)) or label
