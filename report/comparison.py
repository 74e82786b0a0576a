"""Methods, or variants of one, beside each other: what each reaches where it was trained to, and at what cost."""

import math
import statistics
from collections.abc import Sequence

from report.estimate import Estimate
from report.figures import COLOURS, MUTED, Figure, canvas_figure, new_canvas
from report.series import Dataset, Pattern, Series
from report.tables import Column, Table, Value
from report.text import capital, dataset_title, spread


def compared_variants(dataset: Dataset) -> dict[str, list[Series]]:
    """The series of each variant; empty unless there are two variants with results to compare."""
    variants: dict[str, list[Series]] = {}
    for series in dataset.series:
        if series.at_own_pattern() is not None:
            variants.setdefault(series.variant, []).append(series)
    return variants if len(variants) > 1 else {}


def comparison_table(dataset: Dataset) -> Table:
    """A row per variant: values trained, time of a training, and the metric at each training pattern."""
    variants, patterns = compared_variants(dataset), _patterns(dataset)
    rows: list[list[Value]] = []
    for variant, of_variant in variants.items():
        at = {series.pattern: series.at_own_pattern() for series in of_variant}
        seeds = {len(series.runs) for series in of_variant}
        rows.append(
            [
                variant,
                _cost(of_variant, "trained_parameters", 1),
                _cost(of_variant, "training_seconds", 60),
                "–".join(str(count) for count in sorted({min(seeds), max(seeds)})),
                *(at.get(pattern) for pattern in patterns),
            ]
        )
    strong = set()
    for place in range(4, 4 + len(patterns)):
        means = {number: cell.mean for number, row in enumerate(rows) if isinstance(cell := row[place], Estimate)}
        strong |= {(number, place) for number, mean in means.items() if mean == max(means.values())}
    return Table(
        f"comparison_{dataset.task}",
        f"{capital(dataset.metric_title)} in per cent on the test split, at the pattern of the training: mean over "
        "train seeds, ± their standard deviation where there are several; the best mean in bold. Values trained: the "
        "head's too. Minutes are those of a training, its validation included, where the run was not interrupted.",
        (
            Column("method", "Method"),
            Column("trained_parameters", "Values trained"),
            Column("training_minutes", "Minutes"),
            Column("seeds", "Seeds", "number"),
            *(Column(f"trained at {pattern}", str(pattern), "percent") for pattern in patterns),
        ),
        rows,
        strong,
    )


def comparison_figure(dataset: Dataset) -> Figure:
    """A panel per training pattern, a line per variant: its mean with a whisker for the deviation over seeds."""
    variants, patterns = compared_variants(dataset), _patterns(dataset)
    columns = min(3, len(patterns))
    rows = math.ceil(len(patterns) / columns)
    with new_canvas(0.45 + rows * (0.45 + 0.24 * len(variants))) as canvas:
        panels = canvas.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in panels.flat[len(patterns) :]:
            axes.set_visible(False)
        for axes, pattern in zip(panels.flat, patterns, strict=False):
            for place, of_variant in enumerate(variants.values()):
                found = next((series.at_own_pattern() for series in of_variant if series.pattern == pattern), None)
                if found is not None:
                    axes.errorbar(
                        *(100 * found.mean, place, None, 100 * (found.std or 0), "o"),
                        color=COLOURS[0], ecolor=MUTED, elinewidth=0.9, ms=5,
                    )  # fmt: skip
            axes.set_title(str(pattern))
            axes.set_yticks(range(len(variants)), list(variants))
            axes.set_ylim(len(variants) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.margins(x=0.12)
        for axes in panels[-1]:
            axes.set_xlabel(f"{capital(dataset.metric_title)}, %")
    said = [
        f"{series.variant}, {series.pattern}: {spread(series.at_own_pattern())} %"
        for of_variant in variants.values()
        for series in of_variant
    ]
    return canvas_figure(
        canvas,
        f"comparison_{dataset.task}",
        "Methods compared",
        f"{capital(dataset.metric_title)} on {dataset_title(dataset.task)} at the pattern of the training, which is "
        "above each panel. Whiskers: ± one standard deviation over train seeds.",
        f"Dots with whiskers. {'; '.join(said)}.",
    )


def _patterns(dataset: Dataset) -> list[Pattern]:
    """Training patterns of the compared series, in order of appearance."""
    return list(dict.fromkeys(series.pattern for of in compared_variants(dataset).values() for series in of))


def _cost(of_variant: Sequence[Series], name: str, unit: float) -> str | None:
    """Mean of a figure that test results tell of their training, or None."""
    tests = [run.test for series in of_variant for run in series.runs if run.test is not None]
    found = [float(test[name]) / unit for test in tests if test.get(name)]
    return None if not found else f"{statistics.fmean(found):,.{0 if unit == 1 else 1}f}"
