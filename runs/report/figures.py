"""The figures of the report, drawn with matplotlib: as PNG and SVG files, and as SVG to stand within a page."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from runs.report.tables import compared_patterns, compared_variants, support_of
from runs.report.text import capital, conditions, dataset_title, listed, spread
from vilt.missing_types import ANY, BOTH, SOME

WIDTH = 7.2
"""Inches of every figure; a page of two columns of text."""
PNG_DPI = 200
INK, MUTED, RULE, PAPER = "#1a1a1b", "#6b6b6c", "#d8d8d9", "#fefefe"
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

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7.5),
    "axes.labelsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a $
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), PAPER),
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "rep",  # the same figure gives the same file
}


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


def draw_figure(name: str, title: str, caption: str, height: float, draw: Callable[[Canvas], None]) -> Figure:
    """A figure of WIDTH × `height` inches, in the style of the report; `draw` draws it."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        draw(canvas)
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def panels(canvas: Canvas, count: int, columns: int, ylabel: str = "", xlabel: str = "") -> list[Axes]:
    """`count` panels that share their y axis, in rows of `columns`."""
    grid = canvas.subplots(math.ceil(count / columns), columns, sharey=True, squeeze=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return list(grid.flat[:count])


def side_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Labels down the side, the first at the top, with a grid along x."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def comparison_figure(dataset: Dataset) -> Figure:
    """A panel per training pattern, a dot per variant: its mean with a whisker for the deviation over seeds."""
    variants, patterns = compared_variants(dataset), compared_patterns(dataset)
    columns = min(3, len(patterns))

    def draw(canvas: Canvas) -> None:
        grid = panels(canvas, len(patterns), columns, xlabel=f"{capital(dataset.metric_title)}, %")
        for axes, pattern in zip(grid, patterns, strict=True):
            side_labels(axes, list(variants))
            for place, lines in enumerate(variants.values()):
                found = next((line.at_own_pattern() for line in lines if line.pattern == pattern), None)
                if found is not None:
                    style: Any = {"color": COLOURS[0], "ecolor": MUTED, "elinewidth": 0.9, "ms": 5}
                    axes.errorbar(100 * found.mean, place, None, 100 * found.std, "o", **style)
            axes.set_title(str(pattern))
            axes.margins(x=0.12)

    return draw_figure(
        f"comparison_{dataset.key}",
        "Methods compared",
        f"{capital(dataset.metric_title)} on {dataset_title(dataset.key)} at the pattern of the training, which is "
        "above each panel. Whiskers: ± one standard deviation over train seeds.",
        0.45 + math.ceil(len(patterns) / columns) * (0.45 + 0.24 * len(variants)),
        draw,
    )


def robustness_curves(dataset: Dataset) -> Figure:
    """Metric against missing ratio, a panel per missing type, a curve per line with its band."""
    shown, metric = dataset.measured, dataset.metric
    kinds = list(dict.fromkeys(pattern.kind for line in shown for pattern in line.patterns))

    def draw(canvas: Canvas) -> None:
        grid = panels(canvas, len(kinds), min(3, len(kinds)), f"{capital(dataset.metric_title)}, %")
        for axes, kind in zip(grid, kinds, strict=True):
            for place, line in enumerate(shown):
                found = [(p.ratio, value) for p in line.patterns if p.kind == kind and (value := line.at(p, metric))]
                ratios = [100 * ratio for ratio, _ in found]
                means, stds = (100 * np.array(part) for part in zip(*[value[:2] for _, value in found], strict=True))
                axes.fill_between(ratios, means - stds, means + stds, color=look(place)["color"], alpha=0.18, lw=0)
                axes.plot(ratios, means, marker=MARKERS[place % len(MARKERS)], **look(place))
                own = line.at(line.pattern, metric)
                if line.pattern.kind == kind and own is not None:
                    ring: Any = {"ms": 8.5, "mfc": "none", "mec": look(place)["color"], "mew": 1.1}
                    axes.plot(100 * line.pattern.ratio, 100 * own.mean, "o", **ring)
            axes.set_title(_kind_title(kind))
            axes.set_xlabel("missing ratio, %")
            axes.set_xticks(range(0, 101, 20))
            axes.margins(x=0.04)
        _legend(canvas, shown)

    return draw_figure(
        f"curves_{dataset.key}",
        "Robustness curves",
        f"{capital(dataset.metric_title)} on {dataset_title(dataset.key)} as more of the test samples lose "
        f"{_losses(dataset)}. Line: mean; band: ± one standard deviation over train seeds and "
        "table seeds; ring: the pattern of the training.",
        0.25 + 2.5 * math.ceil(len(kinds) / 3) + 0.17 * len(shown),
        draw,
    )


def heat_map(dataset: Dataset) -> Figure:
    """Missing type × ratio with numbers, a panel per line, one scale for all."""
    frames = []
    for line in dataset.measured:
        values = {(p.kind, p.ratio): 100 * found.mean for p in line.patterns if (found := line.at(p, dataset.metric))}
        frames.append(pd.Series(values).unstack().reindex(dict.fromkeys(kind for kind, _ in values)))
    low, high = min(f.min().min() for f in frames), max(f.max().max() for f in frames)

    def draw(canvas: Canvas) -> None:
        heights = [len(frame) for frame in frames]
        grid = canvas.subplots(len(frames), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, line, frame in zip(grid, dataset.measured, frames, strict=True):
            # Cells are drawn as shapes: an image would be pixels in the SVG.
            axes.pcolormesh(frame, cmap=SHADES, vmin=low, vmax=max(high, low + 1e-9), edgecolors=PAPER, linewidth=1.2)
            for (row, column), value in np.ndenumerate(frame.to_numpy()):
                if not math.isnan(value):
                    colour = _readable_on(SHADES((value - low) / max(high - low, 1e-9)))
                    place: Any = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                    axes.text(column + 0.5, row + 0.5, f"{value:.2f}", **place)
            axes.set_xticks(np.arange(frame.shape[1]) + 0.5, [f"{100 * ratio:g}" for ratio in frame.columns])
            axes.set_yticks(np.arange(len(frame)) + 0.5, [_kind_title(kind) for kind in frame.index])
            axes.invert_yaxis()
            axes.grid(False)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(_wrapped(line.label), loc="left")
        grid[-1].set_xlabel("missing ratio, %")

    return draw_figure(
        f"matrix_{dataset.key}",
        "Missing type × missing ratio",
        f"Mean {dataset.metric_title} in per cent on {dataset_title(dataset.key)} by what the test samples lose "
        "(rows) and how many of them do (columns). Darker is better; one scale for all panels.",
        sum(0.62 + 0.3 * len(frame) for frame in frames) + 0.1,
        draw,
    )


def training_curves(dataset: Dataset) -> Figure | None:
    """Loss and validation metric by optimiser step, a curve per run; None where no run has curves."""
    names = ("train/loss", f"val/{dataset.metric}")
    recorded = [(place, run) for place, line in enumerate(dataset.lines) for run in line.runs if run.run.curves]
    if not any(run.run.curves.get(name) for _, run in recorded for name in names):
        return None

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(1, 2)
        for place, run in recorded:
            for axes, name, factor in zip(grid, names, (1, 100), strict=True):
                points = thinned(np.array(run.run.curves.get(name, [])).reshape(-1, 2))
                marker = MARKERS[place % len(MARKERS)] if len(points) <= 30 else ""
                axes.plot(points[:, 0], factor * points[:, 1], marker=marker, ms=2.6, lw=1, **look(place), alpha=0.85)
        grid[0].set_title("Training loss")
        grid[1].set_title(f"Validation {dataset.metric_title}, %")
        for axes in grid:
            axes.set_xlabel("optimiser step")
        grid[0].set_ylim(bottom=min(0, grid[0].get_ylim()[0]))
        _legend(canvas, dataset.lines)

    return draw_figure(
        f"training_{dataset.key}",
        "Training",
        f"Training loss and validation {dataset.metric_title} by optimiser step on {dataset_title(dataset.key)}; "
        f"one line per run ({', '.join(run.tag for _, run in recorded)}). Long curves are averaged to "
        f"{CURVE_POINTS} points.",
        2.55 + 0.17 * len(dataset.lines),
        draw,
    )


def class_bars(dataset: Dataset, line: Line, number: int) -> Figure:
    """F1 by class and missing type of one line; whiskers are the deviation over train seeds."""
    types = dataset.spec.type_names
    there = {name: of_class for name, of_class in line.by_class.items() if support_of(of_class)}
    absent = [name for name in line.by_class if name not in there]
    several = len(line.results) > 1

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        side_labels(axes, list(there))
        for place, name in enumerate(types):
            found = [of_class.get(("f1", name)) for of_class in there.values()]
            axes.barh(
                np.arange(len(there)) + (place - (len(types) - 1) / 2) * 0.81 / len(types),
                [100 * value.mean if value else 0 for value in found],
                height=0.75 / len(types),
                color=TYPE_COLOURS[place % len(TYPE_COLOURS)],
                xerr=[100 * value.std if value else 0 for value in found] if several else None,
                error_kw={"elinewidth": 0.7, "ecolor": MUTED},
            )
        axes.set_xlabel("F1, %")
        axes.set_xlim(0, 100)
        colours = [TYPE_COLOURS[place % len(TYPE_COLOURS)] for place in range(len(types))]
        handles = [matplotlib.patches.Patch(color=colour) for colour in colours]
        canvas.legend(handles, types, loc="outside upper left", ncols=3, handlelength=1, handleheight=0.8)

    return draw_figure(
        f"per_class_{dataset.key}_{number}",
        f"F1 by class: {line.label}",
        f"F1 by class of {line.label} on {dataset_title(dataset.key)}, with every test sample "
        f"{conditions(types)}; the most frequent class first."
        + (" Whiskers: ± one standard deviation over train seeds." if several else "")
        + (f" No test sample is of {listed(absent)}." if absent else ""),
        0.8 + 0.29 * len(there),
        draw,
    )


def roc_curves(dataset: Dataset) -> Figure:
    """ROC by missing type, a curve per run."""
    shown = [line for line in dataset.measured if any(robustness.roc for _, robustness in line.results)]
    types = dataset.spec.type_names

    def draw(canvas: Canvas) -> None:
        grid = panels(canvas, len(types), 3, "true positives, %", "false positives, %")
        for axes, type_name in zip(grid, types, strict=True):
            axes.plot([0, 100], [0, 100], color=MUTED, lw=0.7, ls=":")
            for place, line in enumerate(shown):
                curves = [robustness.roc[type_name] for _, robustness in line.results if type_name in robustness.roc]
                for curve in curves:
                    axes.plot(
                        *(100 * np.array(curve[name]) for name in ("fpr", "tpr")), lw=1.1, **look(place), alpha=0.85
                    )
                area = f"AUROC {spread(estimate([curve['auroc'] for curve in curves]))}"
                style: Any = {"ha": "right", "color": look(place)["color"], "fontsize": 7}
                axes.text(98, 3 + 8 * (len(shown) - 1 - place), area, **style)
            axes.set_title(type_name.capitalize())
            axes.set_aspect("equal")
            axes.set_xlim(-2, 102)
            axes.set_ylim(-2, 102)
        _legend(canvas, shown)

    return draw_figure(
        f"roc_{dataset.key}",
        "ROC curves",
        f"True against false positives on {dataset_title(dataset.key)} with every test sample "
        f"{conditions(types)}; one line per run. Dotted: chance.",
        0.35 + 2.4 * math.ceil(len(types) / 3) + 0.17 * len(shown),
        draw,
    )


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


def _losses(dataset: Dataset) -> str:
    names = [f"their {name}" for name in reversed(dataset.spec.modalities)]
    return f"{', '.join(names)}, or {'one of the two' if len(names) == 2 else 'several of them'}"


def _legend(canvas: Canvas, lines: Sequence[Line]) -> None:
    handles = [
        Line2D([], [], marker=MARKERS[place % len(MARKERS)], ms=3.6, lw=1.4, **look(place))
        for place in range(len(lines))
    ]
    canvas.legend(handles, [_wrapped(line.label) for line in lines], loc="outside upper left", ncols=1)


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 90)) or label
