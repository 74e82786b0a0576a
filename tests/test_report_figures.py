"""The report's figures and captions."""

import re
import statistics
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd
import pytest

from runs.report import figures, parts
from runs.report.parts import section_of
from runs.report.text import CAPTIONS
from tests.report_files import (
    TestSet,
    write_run,
)
from tests.report_parts import dataset_of
from vilt.datasets.specs import MMIMDB_GENRES


def test_results_by_class_are_sorted_by_support(report_runs: Path, report_results: list[dict[str, Any]]) -> None:
    dataset = dataset_of(report_runs / "mmimdb")
    [line] = dataset.measured
    entries = [entry for found in report_results for entry in found["per_class"]]
    support = {entry["class"]: entry["support"] for entry in entries}
    assert list(line.support) == sorted(MMIMDB_GENRES, key=lambda name: -support[name])
    f1 = [entry["f1"] for entry in entries if (entry["type"], entry["class"]) == ("text missing", "Drama")]
    found = line.f1_of("Drama", "text missing")
    assert found is not None and found[:2] == pytest.approx((statistics.mean(f1), statistics.stdev(f1)))
    drawn = figures.class_figure(dataset, [line])
    assert drawn.svg.count('style="fill: #d55e00"') == len(line.support) - 1, "a bar for each"
    assert "No test sample is of Film-Noir." in drawn.caption


def test_a_long_panel_title_is_wrapped() -> None:
    title = "REP, memory_depth 6, learning_rate 0.01, trained at 70 % image"
    drawn = figures.figure("name", "title", "", [(title, lambda axes: None)])
    comments = re.findall(r"<!--(.*?)-->", drawn.svg, re.DOTALL)
    lines = [line.strip() for comment in comments for line in comment.split("\n")]
    assert "REP, memory_depth 6, learning_rate 0.01," in lines and "trained at 70 % image" in lines


def test_long_training_curves_are_averaged_over_equal_parts() -> None:
    steps = np.arange(4 * figures.CURVE_POINTS)
    found = figures.thinned(pd.Series(steps % 4, pd.Index(steps, name="step")))
    assert list(found.index) == [4 * part + 1.5 for part in range(figures.CURVE_POINTS)] and set(found) == {1.5}
    few = pd.Series([0.5, 0.25], pd.Index([3, 7], name="step"))
    assert figures.thinned(few).to_dict() == few.to_dict()


def test_every_caption_is_filled(tmp_path: Path) -> None:
    """With the facts of its dataset and, under other names, those of its own."""
    write_run(tmp_path / "run")
    dataset = dataset_of(tmp_path)
    shared = {
        "metric",
        "Metric",
        "dataset",
        "baselines",
        "conditions",
        "better",
        "unit",
        "points",
        "at_offset",
        "tables",
    }
    for name, caption in CAPTIONS.items():
        own = {field for _, field, _, _ in Formatter().parse(caption) if field} - shared
        text = dataset.caption(name, **{field: f"<{field}>" for field in own})
        assert all(f"<{field}>" in text for field in own) and not re.search(r"[{}]|\b(\w+) \1\b", text), name
    for name in shared:
        with pytest.raises(TypeError, match=name):
            dataset.caption("matrix", **{name: "mine"})


def test_training_curves_have_a_panel_per_configuration_and_a_curve_per_run(tmp_path: Path) -> None:
    for length, seed in ((6, 0), (6, 1), (12, 0)):
        write_run(tmp_path / f"{length}_{seed}", memory_length=length, seed=seed)
    (tmp_path / "12_0" / "metrics.csv").write_text("epoch,step,train/loss,val/f1_macro\n0,0,0.5,\n")
    [part] = [part for part in section_of(dataset_of(tmp_path)).parts if part.title == "Training curves"]
    [shown, note], [loss] = part.shown, part.folded.values()
    assert isinstance(shown, figures.Figure) and isinstance(loss, figures.Figure)
    assert [svg.count("fill: none; stroke: #0072b2") for _, svg in shown.panels] == [2]
    assert [len(shown.panels), len(loss.panels)] == [1, 2]
    assert f"averaged to {figures.CURVE_POINTS} points." in shown.caption
    assert isinstance(note, parts.Note) and note.text.split(":")[0] == "Missing for R3"


def test_few_configurations_share_panels_and_many_have_their_own(tmp_path: Path) -> None:
    for number in range(4):
        TestSet().write(write_run(tmp_path / f"{number}", memory_length=6 * number + 6))
        dataset = dataset_of(tmp_path)
        labels = [line.label for line in dataset.lines]
        curves = figures.robustness_curves(dataset)
        if number < 3:
            assert list(curves.legend)[:-2] == labels and len(curves.panels) == 3
        else:
            assert list(curves.legend)[:3] == ["Text missing", "Image missing", "One or the other missing"]
            assert len(curves.panels) == 4
            assert [title for title, _ in curves.panels] == labels
