"""The figures of the report, drawn with matplotlib: as PNG and SVG files, and as SVG to stand within a page."""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from report.estimate import Estimate, estimate
from report.series import Dataset, Pattern, Series
from report.text import NOT_MEASURED, capital, dataset_title, listed, percent, spread
from vilt.missing_tables import TYPE_NAMES

WIDTH = 7.2
"""Inches of every figure; a page of two columns of text."""
PNG_DPI = 200
INK, MUTED, RULE, PAPER = "#1a1a1b", "#6b6b6c", "#d8d8d9", "#fefefe"
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
"""Within a page these follow its light or dark scheme; no other element of a figure may have these exact colours."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers can tell apart; without black, and the yellow that paper swallows."""
TYPE_COLOURS = dict(zip(TYPE_NAMES, (COLOURS[0], COLOURS[4], COLOURS[2]), strict=True))
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":", "-.")
SHADES = LinearSegmentedColormap.from_list("accent", ["#f4f9fc", "#9cc9e3", COLOURS[0], "#003a5d"])
CURVE_POINTS = 150
"""Points that a training curve is thinned to, by averaging."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "rep",  # the same figure gives the same file
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure; `name` is that of its files."""

    name: str
    title: str
    caption: str
    alt: str
    """What the figure says, for those who cannot see it."""
    svg: str
    """A whole file."""
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
        start = Markup('<svg class="plot" viewBox="{}" role="img" aria-label="{}">').format(found[1], self.alt)
        return start + Markup(re.sub(r"\n\s*\n+", "\n", body)) + Markup("</svg>")


def robustness_curves(dataset: Dataset) -> Figure:
    """Metric against missing ratio, a panel per missing type, a line per series with its band."""
    shown = dataset.measured
    kinds = list(dict.fromkeys(pattern.kind for series in shown for pattern in series.patterns))
    rows = math.ceil(len(kinds) / 3)
    with new_canvas(0.25 + 2.5 * rows + 0.17 * len(shown)) as canvas:
        panels = canvas.subplots(rows, min(3, len(kinds)), sharey=True, squeeze=False)
        for axes in panels.flat[len(kinds) :]:
            axes.set_visible(False)
        for axes, kind in zip(panels.flat, kinds, strict=False):
            for place, series in enumerate(shown):
                points = [(p, series.at(p, dataset.metric)) for p in series.patterns if p.kind == kind]
                _line_with_band(axes, [(100 * p.ratio, value) for p, value in points if value], place)
                own = series.at(series.pattern, dataset.metric)
                if series.pattern.kind == kind and own is not None:
                    axes.plot(
                        *(100 * series.pattern.ratio, 100 * own.mean, "o"),
                        ms=8.5, mfc="none", mec=look(place)["color"], mew=1.1,
                    )  # fmt: skip
            axes.set_title(_kind_title(kind))
            axes.set_xlabel("missing ratio, %")
            axes.set_xticks(range(0, 101, 20))
            axes.margins(x=0.04)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"{capital(dataset.metric_title)}, %")
        _legend(canvas, [series.label for series in shown])
    told = [f"{series.label}: {_ends(series, dataset.metric)}" for series in shown]
    return canvas_figure(
        canvas,
        f"curves_{dataset.task}",
        "Robustness curves",
        f"{capital(dataset.metric_title)} on {dataset_title(dataset.task)} as more of the test samples lose "
        "their text, their image, or one of the two. Line: mean; band: ± one standard deviation over train seeds and "
        "table seeds; ring: the pattern of the training.",
        f"Line chart of {dataset.metric_title} against the missing ratio. {'; '.join(told)}.",
    )


def heat_map(dataset: Dataset) -> Figure:
    """Missing type × ratio with numbers, a panel per series, one scale for all."""
    shown = dataset.measured
    grids = [_grid(series, dataset.metric) for series in shown]
    values = np.concatenate([grid.ravel() for _, _, grid in grids])
    low, high = np.nanmin(values), np.nanmax(values)
    with new_canvas(sum(0.62 + 0.3 * len(kinds) for kinds, _, _ in grids) + 0.1) as canvas:
        heights = [len(kinds) for kinds, _, _ in grids]
        panels = canvas.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, series, (kinds, ratios, grid) in zip(panels, shown, grids, strict=True):
            # Cells are drawn as shapes: an image would be pixels in the SVG.
            axes.pcolormesh(grid, cmap=SHADES, vmin=low, vmax=max(high, low + 1e-9), edgecolors=PAPER, linewidth=1.2)
            for (row, column), value in np.ndenumerate(grid):
                if not math.isnan(value):
                    shade = SHADES((value - low) / max(high - low, 1e-9))
                    axes.text(
                        *(column + 0.5, row + 0.5, f"{value:.2f}"),
                        ha="center", va="center", fontsize=7, color=_readable_on(shade),
                    )  # fmt: skip
            axes.set_xticks(np.arange(len(ratios)) + 0.5, [f"{100 * ratio:g}" for ratio in ratios])
            axes.set_yticks(np.arange(len(kinds)) + 0.5, [_kind_title(kind) for kind in kinds])
            axes.invert_yaxis()
            axes.grid(False)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(_wrapped(series.label), loc="left")
        panels[-1].set_xlabel("missing ratio, %")
    told = [f"{series.label}: {_ends(series, dataset.metric)}" for series in shown]
    return canvas_figure(
        canvas,
        f"matrix_{dataset.task}",
        "Missing type × missing ratio",
        f"Mean {dataset.metric_title} in per cent on {dataset_title(dataset.task)} by what the test samples lose "
        "(rows) and how many of them do (columns). Darker is better; one scale for all panels.",
        f"Heat map of {dataset.metric_title}. {'; '.join(told)}.",
    )


def training_curves(dataset: Dataset) -> Figure | None:
    """Loss and validation metric by optimiser step, a line per run; None where no run has curves."""
    recorded = [(place, run) for place, series in enumerate(dataset.series) for run in series.runs if run.curves]
    names = ("train/loss", f"val/{dataset.metric}")
    if not any(run.curves and run.curves.get(name) for _, run in recorded for name in names):
        return None
    with new_canvas(2.55 + 0.17 * len(dataset.series)) as canvas:
        panels = canvas.subplots(1, 2)
        best = []
        for place, run in recorded:
            assert run.curves is not None
            for axes, name, factor in zip(panels, names, (1, 100), strict=True):
                steps, values = _thinned(run.curves.get(name, []))
                marker = MARKERS[place % len(MARKERS)] if len(steps) <= 30 else ""
                axes.plot(steps, [factor * v for v in values], marker=marker, ms=2.6, lw=1, **look(place), alpha=0.85)
            best.append(f"{run.tag} {NOT_MEASURED if run.best_validation is None else percent(run.best_validation)}")
        panels[0].set_title("Training loss")
        panels[1].set_title(f"Validation {dataset.metric_title}, %")
        for axes in panels:
            axes.set_xlabel("optimiser step")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes is panels[0] else None)
        _legend(canvas, [series.label for series in dataset.series])
    return canvas_figure(
        canvas,
        f"training_{dataset.task}",
        "Training",
        f"Training loss and validation {dataset.metric_title} by optimiser step on {dataset_title(dataset.task)}; "
        f"one line per run ({', '.join(run.tag for _, run in recorded)}). Long curves are averaged to "
        f"{CURVE_POINTS} points.",
        f"Two line charts. Best validation {dataset.metric_title} in per cent: {', '.join(best)}.",
    )


def class_bars(dataset: Dataset, series: Series, number: int) -> Figure:
    """F1 by class and missing type of one series; whiskers are the deviation over train seeds."""
    names = [name for name in series.classes if series.support(name)]
    absent = [name for name in series.classes if not series.support(name)]
    values = {type_name: [series.of_class(type_name, name, "f1") for name in names] for type_name in TYPE_NAMES}
    with new_canvas(0.8 + 0.29 * len(names)) as canvas:
        axes = canvas.subplots()
        for offset, type_name in zip((-0.27, 0, 0.27), TYPE_NAMES, strict=True):
            axes.barh(
                np.arange(len(names)) + offset,
                [100 * value.mean if value else 0 for value in values[type_name]],
                height=0.25,
                color=TYPE_COLOURS[type_name],
                xerr=[100 * (value.std or 0) if value else 0 for value in values[type_name]]
                if len(series.results) > 1
                else None,
                error_kw={"elinewidth": 0.7, "ecolor": MUTED},
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("F1, %")
        axes.set_xlim(0, 100)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        handles = [matplotlib.patches.Patch(color=TYPE_COLOURS[name]) for name in TYPE_NAMES]
        canvas.legend(handles, TYPE_NAMES, loc="outside upper left", ncols=3, handlelength=1, handleheight=0.8)
    best = [
        f"{name}: {', '.join(f'{spread(values[type_name][place])} {type_name}' for type_name in TYPE_NAMES)}"
        for place, name in enumerate(names[:3])
    ]
    return canvas_figure(
        canvas,
        f"per_class_{dataset.task}_{number}",
        f"F1 by class: {series.label}",
        f"F1 by class of {series.label} on {dataset_title(dataset.task)}, with every test sample complete, without "
        "text, or without image; the most frequent class first."
        + (" Whiskers: ± one standard deviation over train seeds." if len(series.results) > 1 else "")
        + (f" No test sample is of {listed(absent)}." if absent else ""),
        f"Bar chart of F1 in per cent by class. {'; '.join(best)}.",
    )


def roc_curves(dataset: Dataset) -> Figure:
    """ROC by missing type, a line per run."""
    shown = [series for series in dataset.measured if any(robustness.roc for _, robustness in series.results)]
    told = []
    with new_canvas(2.75 + 0.17 * len(shown)) as canvas:
        panels = canvas.subplots(1, len(TYPE_NAMES), sharey=True)
        for axes, type_name in zip(panels, TYPE_NAMES, strict=True):
            axes.plot([0, 100], [0, 100], color=MUTED, lw=0.7, ls=":")
            for place, series in enumerate(shown):
                curves = [robustness.roc.get(type_name) for _, robustness in series.results]
                for curve in filter(None, curves):
                    axes.plot(
                        [100 * x for x in curve.fpr], [100 * y for y in curve.tpr], lw=1.1, **look(place), alpha=0.85
                    )
                area = estimate([curve.auroc for curve in curves if curve])
                told.append(f"{series.label}, {type_name}: AUROC {spread(area)} %")
                axes.text(
                    *(98, 3 + 8 * (len(shown) - 1 - place), f"AUROC {spread(area)}"),
                    ha="right", color=COLOURS[place % len(COLOURS)], fontsize=7,
                )  # fmt: skip
            axes.set_title(type_name.capitalize())
            axes.set_xlabel("false positives, %")
            axes.set_aspect("equal")
            axes.set_xlim(-2, 102)
            axes.set_ylim(-2, 102)
        panels[0].set_ylabel("true positives, %")
        _legend(canvas, [series.label for series in shown])
    return canvas_figure(
        canvas,
        f"roc_{dataset.task}",
        "ROC curves",
        f"True against false positives on {dataset_title(dataset.task)} with every test sample complete, without "
        "text, or without image; one line per run. Dotted: chance.",
        f"ROC curves by missing type. {'; '.join(told)}.",
    )


@contextmanager
def new_canvas(height: float) -> Iterator[Canvas]:
    """A figure of WIDTH × `height` inches; drawn in within the style of the report."""
    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(WIDTH, height), layout="constrained")


def canvas_figure(canvas: Canvas, name: str, title: str, caption: str, alt: str) -> Figure:
    """The drawn figure as files."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Figure(name, title, caption, alt, svg.getvalue(), png.getvalue())


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever has the higher contrast (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "#000000" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "#ffffff"


def _kind_title(kind: str) -> str:
    return {"text": "Text missing", "image": "Image missing"}.get(
        kind, kind.replace("both", "One or the other missing")
    )


def look(place: int) -> dict[str, str]:
    """Colour and dashes of the series at this place."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }


def _line_with_band(axes: Axes, points: Sequence[tuple[float, Estimate]], place: int) -> None:
    ratios = [ratio for ratio, _ in points]
    means = np.array([100 * value.mean for _, value in points])
    stds = np.array([100 * (value.std or 0) for _, value in points])
    axes.fill_between(ratios, means - stds, means + stds, color=COLOURS[place % len(COLOURS)], alpha=0.18, lw=0)
    axes.plot(ratios, means, marker=MARKERS[place % len(MARKERS)], **look(place))  # type: ignore[arg-type]


def _legend(canvas: Canvas, labels: Sequence[str]) -> None:
    handles = [
        Line2D([], [], marker=MARKERS[place % len(MARKERS)], ms=3.6, lw=1.4, **look(place))  # type: ignore[arg-type]
        for place in range(len(labels))
    ]
    canvas.legend(handles, [_wrapped(label) for label in labels], loc="outside upper left", ncols=1)


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 90)) or label


def _grid(series: Series, metric: str) -> tuple[list[str], list[float], np.ndarray]:
    """Kinds of missing, ratios, and the metric in per cent, (kinds, ratios); NaN where not measured."""
    kinds = list(dict.fromkeys(pattern.kind for pattern in series.patterns))
    ratios = sorted({pattern.ratio for pattern in series.patterns})
    grid = np.full((len(kinds), len(ratios)), np.nan)
    for pattern in series.patterns:
        value = series.at(pattern, metric)
        if value is not None:
            grid[kinds.index(pattern.kind), ratios.index(pattern.ratio)] = 100 * value.mean
    return kinds, ratios, grid


def _ends(series: Series, metric: str) -> str:
    """The metric at the lowest and highest ratio of each missing type, in words."""
    told = []
    for kind in dict.fromkeys(pattern.kind for pattern in series.patterns):
        of_kind = [pattern for pattern in series.patterns if pattern.kind == kind]
        ends: list[Pattern] = [of_kind[0], of_kind[-1]] if len(of_kind) > 1 else of_kind
        told.append(f"{kind}: " + " to ".join(f"{spread(series.at(p, metric))} % at {100 * p.ratio:g} %" for p in ends))
    return listed(told)


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over equal parts where there are more than CURVE_POINTS."""
    if len(points) <= CURVE_POINTS:
        return [float(step) for step, _ in points], [value for _, value in points]
    parts = np.array_split(np.array(points), CURVE_POINTS)
    return [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts]
