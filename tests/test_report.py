"""The report: its numbers against the files it reads, what is missing, hostile texts, and the page in a browser."""

import csv
import io
import itertools
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError, UserError
from config import DEFAULTS
from run import command_line
from runs.report import make_report
from runs.report.figures import CURVE_POINTS, class_bars, thinned, training_curves
from runs.report.lines import Dataset, by_dataset
from runs.report.parts import options_table, run_details, section_of
from runs.report.results import Pattern, read_report_runs
from runs.report.samples import sample_grid
from runs.report.tables import (
    Table,
    compared_variants,
    comparison_table,
    confidence_table,
    confusion_table,
    matrix_table,
    per_class_table,
    published_table,
    read_published,
    runs_table,
)
from runs.report.text import excerpt, signed, without_home
from tests.conftest import Workspace
from tests.report_files import TestSet, at, sha256_of, write_films, write_logits, write_run
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES

HOSTILE = (
    """<script>alert("x")</script>'"> <img src=x onerror=alert(1)> | `code` *stars* [a](http://b) {{ 7 * 7 }} $x$ _"""
)
VOID = {"meta", "link", "img", "br", "hr", "input"}

ROOT_HOME = "/root"


class Page(HTMLParser):
    """A parsed page; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What is to be read, white space collapsed."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def plots(number_of_films: int = 29) -> list[list[str]]:
    found = [[f"Plot of film {number}, with words enough."] for number in range(number_of_films)]
    found[3] = ["The first plot of film 3.", HOSTILE]
    found[4] = [HOSTILE]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds at 70 % both with results and pictures, a run at 90 % text without, and two other datasets."""
    root = tmp_path_factory.mktemp("runs")
    test_set = TestSet()
    films = root / "films"
    write_films(films, plots(), test_set.labels[[test_set.rows.index(row) for row in range(test_set.films)]])
    for seed in (0, 1):
        run = write_run(
            root / "mmimdb" / f"rep_seed{seed}" / "version_0",
            tested=0.4 + seed / 100,
            seed=seed,
            exp_name=HOSTILE if seed else "rep",
            data_root=str(films),
        )
        test_set.write(run, seed)
    write_run(root / "mmimdb" / "text_seed0" / "version_0", tested=0.52, **at("text", 0.9))
    for task in ("food101", "hatememes"):
        run = write_run(root / "others" / f"{task}_seed0" / "version_0", task, exp_name=task)
        TestSet(task).write(run)
    return root


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all of them."""
    out = tmp_path_factory.mktemp("out") / "report"
    assert make_report([runs / "others", runs / "mmimdb"], out, {}) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "index.html").read_text("utf-8"))


def dataset_of(*folders: Path) -> Dataset:
    (found,) = by_dataset(read_report_runs(folders))
    return found


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "robustness" / "robustness.json").read_text())


def as_dicts(table: Table) -> list[dict[str, str]]:
    """The rows of a table's CSV."""
    return list(csv.DictReader(io.StringIO(table.csv())))


def column(table: Table, key: str) -> list[str]:
    """The shown cells of a column."""
    number = [column.key for column in table.columns].index(key)
    return [row[number] for row in table.shown()]


# The numbers


def test_the_matrix_of_one_run_is_that_of_its_results(runs: Path) -> None:
    folder = runs / "mmimdb" / "rep_seed0"
    rows = as_dicts(matrix_table(dataset_of(folder)))
    cells = results_of(folder / "version_0")["cells"]
    assert len(rows) == len(cells) == 33
    for row, cell in zip(rows, cells, strict=True):
        assert (row["missing_type"], float(row["missing_ratio"])) == (cell["missing_type"], 100 * cell["ratio"])
        assert float(row["image_available"]) == pytest.approx(100 * cell["image_available"])
        assert float(row["text_available"]) == pytest.approx(100 * cell["text_available"])
        assert row["REP"] == f"{100 * cell['metrics']['f1_macro']['mean']:.4f}"
        assert row["REP std"] == f"{100 * cell['metrics']['f1_macro']['std']:.4f}"


def test_options_of_speed_and_of_other_commands_are_no_other_method(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"image_cache": True, "compile": True, "activation_checkpointing": True}
    changed |= {"bootstrap": 0, "runs_sort": "-test", "runs": "x", "out": "y"}
    changed |= {"robustness_types": ["text"], "robustness_ratios": [0.5], "robustness_both_ratios": [0.3]}
    changed |= {"robustness_seeds": [7], "robustness_anew": True}
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **changed)
    (line,) = dataset_of(tmp_path).lines
    assert [run.run.folder.name for run in line.runs] == ["a", "b"]


def test_seeds_are_pooled_with_table_seeds_in_the_matrix_and_the_curves(runs: Path) -> None:
    dataset = dataset_of(runs / "mmimdb")
    results = [results_of(runs / "mmimdb" / f"rep_seed{seed}" / "version_0") for seed in (0, 1)]
    shown = column(matrix_table(dataset), dataset.measured[0].label)
    for number, value in enumerate(shown):
        pooled = [v for found in results for v in found["cells"][number]["metrics"]["f1_macro"]["values"]]
        assert len(pooled) == 10
        assert value == f"{100 * statistics.mean(pooled):.2f} ± {100 * statistics.stdev(pooled):.2f}"


def test_the_published_table_and_the_differences(runs: Path) -> None:
    table = published_table(dataset_of(runs / "mmimdb"))
    values = []
    for seed in (0, 1):
        cells = results_of(runs / "mmimdb" / f"rep_seed{seed}" / "version_0")["cells"]
        (cell,) = [cell for cell in cells if (cell["missing_type"], cell["ratio"]) == ("both", 0.7)]
        values.append(cell["metrics"]["f1_macro"]["mean"])
    mean, std = statistics.mean(values), statistics.stdev(values)
    rows = table.shown()
    assert [row[1:4] for row in rows] == [
        *(["50", "100", "50"], ["50", "50", "100"], ["50", "75", "75"]),
        *(["70", "100", "30"], ["70", "30", "100"], ["70", "65", "65"]),
        *(["90", "100", "10"], ["90", "10", "100"], ["90", "55", "55"]),
    ]
    assert rows[5][4:11] == ["46.84", "42.66", "48.30", "50.32", "50.34", "51.69", "52.31"]
    assert rows[5][11:] == [f"{100 * mean:.2f} ± {100 * std:.2f}", signed(100 * mean - 52.31)]
    # One seed without robustness results: its test result, which is at the pattern of the training.
    assert rows[6][4:] == ["44.06", "45.32", "46.84", "47.56", "42.07", "49.26", "50.05", "52.00", "+1.95"]
    assert {tuple(row[11:]) for number, row in enumerate(rows) if number not in (5, 6)} == {("not measured", "—")}
    assert {(5, 10), (6, 10)} <= table.strong and len(table.strong) == 9, "the best published value of each row"
    assert float(as_dicts(table)[6]["REP difference"]) == pytest.approx(1.95)


@pytest.mark.parametrize(("task", "best"), [("food101", 88.56), ("hatememes", 70.01)])
def test_each_dataset_has_its_published_rows(task: str, best: float) -> None:
    rows = read_published(task)
    assert len(rows) == 9 and rows.REP.max() == best


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({"missing_ratio": {"train": 0.7, "val": 0.7, "test": 0.5}}, ["not measured", "—"]),  # tested elsewhere
        ({"prompt_type": "new"}, ["60.00", "not published"]),
        ({"prompt_type": "map"}, ["60.00", "+17.34"]),
    ],
)
def test_ours_beside_the_published_results(tmp_path: Path, options: dict[str, Any], cells: list[str]) -> None:
    table = published_table(dataset_of(write_run(tmp_path / "run", tested=0.6, **options)))
    assert table.shown()[5][-2:] == cells
    write_run(tmp_path / "second", tested=0.5, prompt_type="maple")
    titles = [column.title for column in published_table(dataset_of(tmp_path)).columns[-4:]]
    assert titles[2:] == ["MaPLe (ours)", "MaPLe, difference"] and titles[1].endswith(", difference")


def test_a_pattern_outside_the_published_table_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", **at("both", 0.3))
    write_run(tmp_path / "b", both_ratio=0.2)
    [note] = [note for part in section_of(dataset_of(tmp_path)).parts for note in part.notes]
    assert note.endswith("R1 (30 % missing, both) and R2 (70 % missing, both (20% image)).")


def write_compared(top: Path) -> None:
    """Two methods at two patterns with two seeds; one of a pattern's runs is not tested."""
    for method, base in (("rep", 0.5), ("maple", 0.4)):
        for seed in (0, 1):
            for kind, tested in (("both", base + seed / 10), ("text", base / 2)):
                if (method, kind, seed) == ("maple", "text", 1):
                    continue
                run = write_run(top / f"{method}_{kind}_{seed}", prompt_type=method, seed=seed, tested=tested,
                                **at(kind, 0.7))  # fmt: skip
                results = json.loads((run / "test_results.json").read_text())
                cost = {"trained_parameters": 1234567, "training_seconds": 60.0 * (1 + seed)}
                (run / "test_results.json").write_text(json.dumps(results | (cost if method == "rep" else {})))


def test_methods_are_compared_where_they_were_trained_to(tmp_path: Path) -> None:
    write_compared(tmp_path)
    table = comparison_table(dataset_of(tmp_path))
    titles = ["Method", "Trainable parameters", "Minutes", "Seeds", "70 % missing, both", "70 % missing, text"]
    assert [column.title for column in table.columns] == titles
    assert sorted(table.shown()) == [
        ["MaPLe", "not measured", "not measured", "1–2", "45.00 ± 7.07", "20.00"],
        ["REP", "1,234,567", "1.5", "2", "55.00 ± 7.07", "25.00 ± 0.00"],
    ]
    best = next(number for number, row in enumerate(table.rows) if row[0] == "REP")
    assert table.strong == {(best, 4), (best, 5)}
    parts = [part.title for part in section_of(dataset_of(tmp_path)).parts]
    assert parts[0] == "Methods compared"


def test_one_method_is_compared_with_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", tested=0.6)
    write_run(tmp_path / "b", tested=0.6, seed=1)
    write_run(tmp_path / "c", prompt_type="maple", tested=None)
    assert compared_variants(dataset_of(tmp_path)) == {}
    assert "Methods compared" not in [part.title for part in section_of(dataset_of(tmp_path)).parts]


def test_parts_of_rep_have_the_names_of_the_ablation(tmp_path: Path) -> None:
    for far in (False, True):
        for fmb in (False, True):
            write_run(tmp_path / f"{far}_{fmb}", far=far, fmb=fmb, tested=0.5)
    assert set(compared_variants(dataset_of(tmp_path))) == {"baseline", "baseline + FAR", "baseline + FMB", "REP"}


def test_confidence_intervals(runs: Path) -> None:
    table = confidence_table(dataset_of(runs / "mmimdb"))
    results = [results_of(runs / "mmimdb" / f"rep_seed{seed}" / "version_0") for seed in (0, 1)]
    expected = [
        f"{100 * found['by_type'][name][metric]:.2f} "
        f"[{100 * found['confidence'][name][metric][0]:.2f}, {100 * found['confidence'][name][metric][1]:.2f}]"
        for found in results
        for name in ("complete", "text missing", "image missing")
        for metric in ("f1_macro", "f1_micro", "f1_samples", "f1_weighted")
    ]
    assert [cell for row in table.shown() for cell in row[4:]] == expected
    assert "95 % from 1,000 resamples" in table.caption


def test_results_by_class(runs: Path) -> None:
    dataset = dataset_of(runs / "mmimdb")
    table = per_class_table(dataset)
    entries = [results_of(runs / "mmimdb" / f"rep_seed{seed}" / "version_0")["per_class"] for seed in (0, 1)]
    support = {entry["class"]: entry["support"] for entry in entries[0]}
    assert column(table, "class") == sorted(MMIMDB_GENRES, key=lambda name: -support[name])
    drama = as_dicts(table)[column(table, "class").index("Drama")]
    f1 = [next(e["f1"] for e in found if (e["type"], e["class"]) == ("text missing", "Drama")) for found in entries]
    assert drama["f1_text_missing"] == f"{100 * statistics.mean(f1):.4f}"
    assert drama["f1_text_missing std"] == f"{100 * statistics.stdev(f1):.4f}"
    figure = class_bars(dataset, dataset.measured[0], 1)
    assert "No test sample is of Film-Noir." in figure.caption


def test_confusions_are_the_most_frequent_of_each_type(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "food101")
    TestSet("food101").write(run)
    rarest_first = [
        {"type": name, "true": f"dish {count}", "predicted": name, "count": count, "share": count / 40}
        for count in range(1, 13)
        for name in ("complete", "text missing", "image missing")
    ]
    table = confusion_table(dataset_of(edited(run, ROBUSTNESS, confusions=rarest_first)))
    assert table.shown() == [
        ["REP", "R1", name, f"dish {count}", name, str(count), f"{2.5 * count:.2f}"]
        for name in ("complete", "text missing", "image missing")
        for count in range(12, 2, -1)
    ]


def test_the_list_of_runs(runs: Path) -> None:
    read = read_report_runs([runs / "mmimdb"])
    rows = as_dicts(runs_table(read, by_dataset(read)))
    assert [row["folder"] for row in rows] == [f"{name}/version_0" for name in ("rep_seed0", "rep_seed1", "text_seed0")]
    assert [row["name"] for row in rows] == ["rep", HOSTILE, "rep"]
    assert [row["trained_with"] for row in rows] == [*["70 % missing, both"] * 2, "90 % missing, text"]
    assert [row["best_validation"] for row in rows] == ["40.0000"] * 3
    assert [row["test"] for row in rows] == ["40.0000", "41.0000", "52.0000"]
    assert [row["robustness"] for row in rows] == ["yes", "yes", ""]
    assert {row["date"] for row in rows} == {"2026-09-21"}


def test_training_curves_are_averaged_over_equal_parts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    steps = CURVE_POINTS * 4
    lines = [f"0,{step},{step % 4}," for step in range(steps)]
    (run / "metrics.csv").write_text(
        "\n".join(["epoch,step,train/loss,val/f1_macro", *lines, f"0,{steps},,0.25\n0,9,,0.9"])
    )
    assert training_curves(dataset_of(run)) is not None
    found = thinned(np.array([(step, float(step % 4)) for step in range(steps)]))
    assert found[:, 0].tolist() == [4 * part + 1.5 for part in range(CURVE_POINTS)] and set(found[:, 1]) == {1.5}


def test_options_that_differ_from_the_defaults(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, learning_rate=0.01, max_epoch=20, load_path=None)
    write_run(tmp_path / "b", seed=3, learning_rate=0.1, lr_mult=1.0, **at("both", 0.7))
    table = options_table(read_report_runs([tmp_path]), DEFAULTS)
    assert table.shown() == [
        ["seed", "0", "0", "3"],
        ["task", "none", "mmimdb", "mmimdb"],
        ["data_root", "none", "data", "data"],
        ["learning_rate", "0.01", "0.01", "0.1"],
    ]
    assert table.strong == {(0, 3), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)}


# Which runs belong together


def test_another_configuration_is_another_line(tmp_path: Path) -> None:
    for memory_length in (12, 36):
        for seed in (0, 1):
            write_run(tmp_path / f"{memory_length}_{seed}", memory_length=memory_length, seed=seed, num_workers=seed)
    write_run(tmp_path / "text", memory_length=12, **at("text", 0.9))
    series = dataset_of(tmp_path).lines
    assert [(one.label, len(one.runs)) for one in series] == [
        ("REP memory_length=12, trained with 70 % missing, both", 2),
        ("REP memory_length=36, trained with 70 % missing, both", 2),
        ("REP memory_length=12, trained with 90 % missing, text", 1),
    ]
    assert {one.variant for one in series} == {"REP memory_length=12", "REP memory_length=36"}


def test_of_repeated_runs_the_most_complete_and_then_the_latest_counts(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        write_run(tmp_path / "rep" / f"version_{version}", tested=version / 100)
    TestSet().write(write_run(tmp_path / "full" / "version_0", seed=1, tested=None))
    write_run(tmp_path / "full" / "version_1", seed=1)
    dataset = dataset_of(tmp_path)
    (line,) = dataset.lines
    assert [run.place for run in line.runs] == ["rep/version_10", "full/version_0"]
    assert sorted(run.place for run in dataset.repeats) == ["full/version_1", "rep/version_2", "rep/version_9"]
    kinds = dict(zip(*(column(runs_table(dataset.runs, [dataset]), key) for key in ("folder", "kind")), strict=True))
    assert kinds["rep/version_9"] == "repeated" and kinds["rep/version_10"] == "training"


def test_evaluations_are_listed_but_train_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluation", test_only=True, tested=0.25)
    section = section_of(dataset_of(tmp_path))
    assert "R1, reaches a test F1-macro of 25.00 % (70 % missing, both)" in section.summary
    lacking = [one.text for part in section.parts for one in part.missing]
    assert "No run of this dataset trained a model." in lacking


def test_a_resumed_run_is_one_with_the_run_that_it_was_resumed_from(tmp_path: Path) -> None:
    """Its best validation is that of its checkpoint, else of the curves of both."""
    first, run = (write_run(tmp_path / "rep_seed0" / f"version_{number}", tested=None) for number in (0, 1))
    edited(run, "config.json", resume_from=str(first / "last.ckpt"))
    (first / "metrics.csv").write_text("epoch,step,train/loss,val/f1_macro\n0,1,1.5,\n0,7,,0.35\n1,8,0.9,\n1,9,0.8,\n")
    (run / "metrics.csv").write_text("epoch,step,train/loss,val/f1_macro\n1,8,0.5,\n1,8,,0.25\n1,9,,0.3\n")
    shown = []
    for _ in range(2):
        dataset = dataset_of(tmp_path)
        [row] = as_dicts(runs_table(dataset.runs, [dataset]))
        assert row["folder"] == "rep_seed0/version_1"
        curves = dataset.runs[0].run.curves
        assert curves == {"train/loss": [(1, 1.5), (8, 0.5)], "val/f1_macro": [(7, 0.35), (8, 0.25), (9, 0.3)]}
        shown.append(row["best_validation"])
        (run / "best.ckpt").unlink(missing_ok=True)
    assert shown == ["40.0000", "35.0000"]


def test_a_configuration_that_is_none_of_ours_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    top = tmp_path / "runs" / "rep_seed0"
    write_run(top / "version_0")
    for number, content in enumerate((b"[1]", b"{", b"\xff"), start=1):
        (top / f"version_{number}").mkdir()
        (top / f"version_{number}" / "config.json").write_bytes(content)
    (top / "version_9").mkdir()  # cut off before anything was written
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "no run" / "config.json").write_text("{")
    write_run(tmp_path / "runs" / "no run" / "rep_seed1" / "version_0", seed=1)
    with caplog.at_level("WARNING", logger="rep"):
        found = read_report_runs([tmp_path / "runs"])
    assert [run.place for run in found] == ["rep_seed1/version_0", "rep_seed0/version_0"]
    told = [message.removeprefix(f"left out of the report: {top}/") for message in caplog.messages]
    assert told[0] == "version_1/config.json: expected a JSON object, found a list"
    for message, number in zip(told[1:], (2, 3, 9), strict=True):
        assert message.startswith(f"version_{number}/config.json: not readable as JSON: ")
    with pytest.raises(DataError, match=r"version_2/config\.json: not readable as JSON"):
        read_report_runs([top / "version_2"])


def test_a_run_that_is_named_twice_is_there_once(tmp_path: Path) -> None:
    for version in (10, 9):
        write_run(tmp_path / "rep" / f"version_{version}")
    found = read_report_runs([tmp_path / "rep" / "version_10", tmp_path, tmp_path / "rep"])
    assert [run.place for run in found] == ["rep/version_10", "rep/version_9"]


def test_equal_patterns_compare_equal() -> None:
    assert Pattern.of(DATASETS["mmimdb"], "text", 0.7, 0.2) == Pattern.of(DATASETS["mmimdb"], "text", 0.1 * 7, 0.5)
    assert Pattern.of(DATASETS["mmimdb"], "both", 0.7, 0.2) != Pattern.of(DATASETS["mmimdb"], "both", 0.7, 0.5)
    assert Pattern.of(DATASETS["mmimdb"], "both", 0.7, 0.2).available == {"image": 0.86, "text": 0.44}
    assert Pattern.of(DATASETS["mmimdb"], "image", 0.3, 0.5).available == {"image": 0.7, "text": 1.0}


# Samples


def test_samples_that_change_the_most_come_first(runs: Path) -> None:
    (run,) = read_report_runs([runs / "mmimdb" / "rep_seed0"])
    assert run.robustness is not None
    grid = sample_grid(run, run.robustness)
    test_set = TestSet()
    logits = test_set.logits(0)
    probabilities = {name: 1 / (1 + np.exp(-values.astype(float))) for name, values in logits.items()}
    change: dict[int, tuple[float, int]] = {}
    for sample, row in enumerate(test_set.rows):
        moved = [
            sum(abs(probabilities[name][sample][c] - probabilities["complete"][sample][c]) for c in range(23))
            for name in ("text missing", "image missing")
        ]
        change[row] = max(change.get(row, (0.0, 0)), (max(moved), sample))
    expected = sorted(change.values(), reverse=True)[:24]
    assert [card.id for card in grid.cards] == [test_set.ids[sample] for _, sample in expected]
    assert [card.change for card in grid.cards] == pytest.approx([moved for moved, _ in expected])
    for card, (_, sample) in zip(grid.cards, expected, strict=True):
        row = test_set.rows[sample]
        assert card.label == [name for name, there in zip(MMIMDB_GENRES, test_set.labels[sample], strict=True) if there]
        for name, predicted in card.predictions.items():
            assert {p.name for p in predicted} == {MMIMDB_GENRES[c] for c in np.flatnonzero(logits[name][sample] > 0)}
            assert {p.name for p in predicted if p.correct} == {p.name for p in predicted} & set(card.label)
            assert [p.probability for p in predicted] == sorted((p.probability for p in predicted), reverse=True)
        texts = plots()[row]
        assert card.text == texts[sample - test_set.rows.index(row)]
        assert card.thumbnail is not None
        with Image.open(io.BytesIO(card.thumbnail)) as image:
            assert image.size == card.thumbnail_size == (88, 176)
            pixel = image.convert("L").getpixel((40, 80))
        assert isinstance(pixel, int) and abs(pixel - 8 * row) <= 2, "the picture is that of the film"


def test_single_label_samples_have_one_prediction(runs: Path) -> None:
    (run,) = read_report_runs([runs / "others" / "food101_seed0"])
    assert run.robustness is not None
    grid = sample_grid(run, run.robustness)
    logits = TestSet("food101").logits(0)
    for card in grid.cards:
        sample = TestSet("food101").ids.index(card.id)
        number = int(logits["complete"][sample].argmax())
        assert [p.name for p in card.predictions["complete"]] == [f"dish {number:03}"] or card.id == "tt3"
        assert card.predictions["complete"][0].correct == ([f"dish {number:03}"] == card.label) or card.id == "tt3"


def test_logits_that_are_not_there_are_missed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    TestSet().write(run)
    (run / "robustness" / "logits.arrow").unlink()
    part = section_of(dataset_of(run)).parts[-1]
    assert part.grid is None and "no logits.arrow in R1" in part.missing[0].text


@pytest.mark.parametrize("what", ["no longer", "other labels", "other ids", "damaged"])
def test_pictures_that_are_not_there_are_missed(tmp_path: Path, what: str) -> None:
    run = write_run(tmp_path / "run", data_root=str(tmp_path / "films"))
    test_set = TestSet()
    test_set.write(run)
    labels = test_set.labels[[test_set.rows.index(row) for row in range(test_set.films)]]
    if what == "other labels":
        write_films(tmp_path / "films", plots(), 1 - labels)
    elif what == "other ids":
        write_films(tmp_path / "films", plots(), labels, first_id=1)
    elif what == "damaged":
        (tmp_path / "films").mkdir()
        (tmp_path / "films" / "mmimdb_test.arrow").write_bytes(b"ARROW1 or so")
    part = section_of(dataset_of(run)).parts[-1]
    assert part.grid is not None and len(part.grid.cards) == 24
    assert {(card.text, card.thumbnail) for card in part.grid.cards} == {(None, None)}
    (missing,) = part.missing
    assert (
        missing.text.startswith("Images and texts are not available: mmimdb_test.arrow")
        and what.replace("labels", "samples").replace("ids", "samples") in missing.text
    )


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    test_set = TestSet()
    write_films(tmp_path, plots(), test_set.labels[[test_set.rows.index(row) for row in range(test_set.films)]])
    data = (tmp_path / "mmimdb_test.arrow").read_bytes()
    (tmp_path / "mmimdb_test.arrow").write_bytes(data.replace(b"\x89PNG", b"\x89BAD"))
    run = write_run(tmp_path / "run", data_root=str(tmp_path))
    test_set.write(run)
    part = section_of(dataset_of(run)).parts[-1]
    assert part.missing[0].text.startswith("24 images cannot be decoded: ")
    assert part.grid is not None and all(card.text for card in part.grid.cards)


# What is missing


def test_missing_pieces_are_shown_where_they_would_stand(tmp_path: Path) -> None:
    runs = tmp_path / "result"
    write_run(runs / "bare_seed0" / "version_0", tested=None, data_root="films")
    for name in ("environment.json", "metrics.csv"):
        (runs / "bare_seed0" / "version_0" / name).unlink()
    out = tmp_path / "report"
    make_report([runs], out, {})
    page, markdown = Page((out / "index.html").read_text("utf-8")).text, (out / "report.md").read_text("utf-8")
    command = f"python run.py robustness with load_path={runs}/bare_seed0/version_0/best.ckpt task_finetune_mmimdb"
    for line in (
        "Results are missing: 1 run, none of them tested.",
        "R1 (bare_seed0/version_0) has no robustness results. They are made by:",
        f"{command} data_root=films",
        "The curves are missing: no run has robustness results.",
        "The matrix is missing: no run has robustness results.",
        "not measured",
        "No training curves of R1: metrics.csv is not there or is empty.",
        "Results by genre are missing: no run has robustness results with them.",
        "Confidence intervals are missing: no run has robustness results.",
        "Samples are missing: no run has robustness results.",
        "environment.json of R1 is not there: versions and command are not known.",
        "test_results.json of R1 is not there.",
        "The command is not known: environment.json is not there.",
    ):
        assert line in page
        assert line in markdown.replace("\\", ""), line
    assert not (out / "figures").exists()


def test_a_smaller_test_split_than_the_published_one_is_pointed_out(runs: Path) -> None:
    notes = [note for part in section_of(dataset_of(runs / "mmimdb")).parts for note in part.notes]
    assert notes == ["Not like for like: the published results are on a test split of 7,799 items, ours has 29."]


# The files


def test_the_folder_holds_the_page_markdown_tables_and_figures(report: Path) -> None:
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    tables = {f"tables/{name}_{task}.csv" for name in ("matrix", "published", "confidence", "samples")
              for task in ("mmimdb", "food101", "hatememes")}  # fmt: skip
    tables |= {f"tables/{name}.csv" for name in ("runs", "options", "versions", "per_class_mmimdb")}
    tables |= {"tables/confusions_food101.csv"}
    drawn = [f"{name}_{task}" for name in ("curves", "matrix", "training")
             for task in ("mmimdb", "food101", "hatememes")] + ["per_class_mmimdb_1", "roc_hatememes"]  # fmt: skip
    figures = {f"figures/{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    thumbnails = {f"thumbnails/mmimdb_{rank:02}.jpg" for rank in range(1, 25)}
    assert names == {"index.html", "report.md", "report.json"} | tables | figures | thumbnails
    assert [path.name for path in report.parent.iterdir()] == ["report"]


def test_figures_are_whole_files(report: Path) -> None:
    for path in (report / "figures").glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert "<image" not in path.read_text("utf-8"), "drawn as shapes"
    for path in (report / "figures").glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.width == 1440


def test_the_same_runs_give_the_same_files(runs: Path, report: Path, tmp_path: Path) -> None:
    make_report([runs / "others", runs / "mmimdb"], tmp_path / "again", {})
    for path in report.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(report)).read_bytes() == path.read_bytes(), path


def test_markdown_says_the_same(report: Path, page: Page) -> None:
    markdown = (report / "report.md").read_text("utf-8")
    for path in re.findall(r"!\[.*?\]\(((?:figures|thumbnails)/[^)]*)\)", markdown):
        assert (report / path).is_file()
    assert len(re.findall(r"!\[", markdown)) == 11 + 24
    for name in ("published_mmimdb", "matrix_food101", "confidence_hatememes"):
        for row in csv.reader((report / "tables" / f"{name}.csv").open(encoding="utf-8")):
            for cell in row:
                if re.fullmatch(r"\d\d\.\d{4}", cell):
                    assert f"{float(cell):.2f}" in markdown and f"{float(cell):.2f}" in page.text
    tables = [block for block in re.split(r"\n\n+", markdown) if block.lstrip().startswith("|")]
    assert len(tables) == 4 + 3 * 4 + 1 + 1 - 1
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(cells) == 1, "every line of a table has as many cells"


def test_a_report_is_replaced_and_a_foreign_folder_is_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out = tmp_path / "out" / "report"
    make_report([run], out, {})
    (out / "tables" / "old.csv").write_text("of an earlier report")
    make_report([run], out, {})
    assert not (out / "tables" / "old.csv").exists() and (out / "index.html").is_file()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    make_report([run], foreign, {})  # empty
    (foreign / "report.json").unlink()
    before = sorted(foreign.rglob("*"))
    with pytest.raises(UserError, match=r"foreign exists and was not written by `python run.py report` \(no report"):
        make_report([run], foreign, {})
    assert sorted(foreign.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file exists and was not written by .* \(a file\)"):
        make_report([run], tmp_path / "file", {})


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "reports" / "report"
    make_report([run], out, {})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "No space left on device")
        return renamed(path, target)

    renamed = Path.replace
    for method, failing in (("write_bytes", full), ("replace", stuck)):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, failing)
            with pytest.raises(DataError, match="report: cannot be written: No space left on device"):
                make_report([run], out, {})
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert [path.name for path in out.parent.iterdir()] == ["report"]


# The page


def test_the_page_is_self_contained_and_sound(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            target = attributes.get(name)
            if target is not None:
                assert target.startswith("data:") or (target.startswith("#") and target[1:] in ids), (tag, target)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) is None or attributes[reference] in ids
        for reference in re.findall(r"url\(#([^)]*)\)", " ".join(filter(None, attributes.values()))):
            assert reference in ids
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    images = page.all("img")
    assert len(images) == 24 and all(image["alt"] and str(image["src"]).startswith("data:image/") for image in images)
    drawings = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) == 11 and all(drawing["aria-label"] for drawing in drawings)
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_headings_are_in_order_and_tables_have_heads(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes["scope"] == "col" for attributes in page.all("th"))
    assert len(page.all("table")) == len(page.all("thead"))


def test_sections_and_their_parts_are_in_order(page: Page, report: Path) -> None:
    html = (report / "index.html").read_text("utf-8").replace("\N{WORD JOINER}", "")
    headings = [re.sub(r"<.*?>", "", heading) for heading in re.findall(r"<h[123][^>]*>(.*?)</h[123]>", html)]
    common = ["Robustness curves", "Missing type × missing ratio", "Published results and ours", "Training curves"]
    expected = ["Robustness to missing modalities: MM-IMDb, UPMC Food-101 and Hateful Memes"]
    for title, by_class in (
        ("MM-IMDb", "Results by genre"),
        ("UPMC Food-101", "Most frequent confusions"),
        ("Hateful Memes", "ROC curves"),
    ):
        expected += [title, *common, by_class, "Confidence intervals", "Test samples that change the most"]
    expected += ["Runs and configurations", "Runs", "Configurations", "Versions", "How to reproduce this"]
    assert headings[: len(expected)] == expected
    assert "5 runs" in page.text
    assert "2 of 3 trained runs have robustness results, on 30 test samples." in page.text


def test_texts_of_others_have_no_effect(page: Page, report: Path) -> None:
    html, markdown = ((report / name).read_text("utf-8") for name in ("index.html", "report.md"))
    shown = " ".join(HOSTILE.split())
    assert page.text.count(shown) >= 3, "as run name, in the configuration and as a plot"
    outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    for text in (html, outside_code):
        assert "<script" not in text and "<img src=x" not in text
    assert "`code`" not in outside_code.replace(r"\`", "") and "](http://b)" not in outside_code.replace(r"\]", "")
    assert {"R1", "R5"} <= {attributes.get("id", "")[-2:] for attributes in page.all("h3")}  # type: ignore[index]


def test_texts_of_others_reach_no_figure_as_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokenizer=HOSTILE)
    write_run(tmp_path / "other", tokenizer="$\\frac{$")
    content = json.dumps(TestSet().write(run))
    (run / ROBUSTNESS).write_text(content.replace(json.dumps("Drama"), json.dumps(HOSTILE)))
    make_report([tmp_path], tmp_path / "report", {})
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    page = Page(html)
    assert "<script" not in html and not page.all("img") and " ".join(HOSTILE.split()) in page.text
    for path in (tmp_path / "report" / "figures").glob("*.svg"):
        ET.parse(path)


def test_home_folders_stay_at_home(report: Path, runs: Path) -> None:
    (run,) = read_report_runs([runs / "mmimdb" / "rep_seed0"])
    assert run_details(run).commands[0] == (
        "Training",
        "python run.py with task_finetune_mmimdb data_root=/home/somebody/films",
    ), "the command as it was given"
    html = (report / "index.html").read_text("utf-8")
    assert set(re.findall(r"/home/\w+(?:/\w+)?", html)) == {"/home/somebody/films"}
    told = f'x=/home/a.b/data,/Users/c {ROOT_HOME}/d "/home/e", /data/home/f'
    assert without_home(told) == 'x=~/data,~ ~/d "~", /data/home/f'
    assert without_home(r"C:\\Users\\me\\films /rooted") == r"~\\films /rooted"


def test_a_configuration_names_no_home_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "a", data_root="/home/alice/films", vit="/home/alice/clip", log_dir=f"{ROOT_HOME}/result")
    write_run(tmp_path / "b", vit="/Users/alice/other")
    section = section_of(dataset_of(tmp_path))
    runs = read_report_runs([tmp_path])
    told = json.dumps(options_table(runs, DEFAULTS).rows) + "".join(run_details(run).configuration for run in runs)
    told += str(section)
    assert "~/clip" in told
    assert not re.findall(r"/home/|/Users/|/root", re.sub(r"config=\{.*?\}, environment", "", told))


# Bad input


def broken(run: Path, name: str, text: str) -> Path:
    (run / name).write_text(text)
    return run


def edited(run: Path, name: str, **changes: Any) -> Path:
    content = json.loads((run / name).read_text())
    return broken(run, name, json.dumps(content | changes))


ROBUSTNESS = "robustness/robustness.json"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("config.json", "{", "not readable as JSON: Expecting property name"),
        ("config.json", "[]", "expected a JSON object, found a list"),
        ("best.ckpt", "weights", "not readable as a checkpoint: "),
        ("environment.json", "", "not readable as JSON"),
        ("environment.json", '{"command": ["run.py"]}', "KeyError 'packages'"),
        ("environment.json", '{"command": [], "packages": {}}', "command: expected words, found []"),
        ("test_results.json", "nothing", "not readable as JSON"),
        ("test_results.json", '{"task": "mmimdb"}', "KeyError 'metrics'"),
        ("metrics.csv", "epoch,step,train/loss\n0,0,much\n", "line 2: not as written by run.py: could not convert"),
        ("metrics.csv", "epoch,train/loss\n0,1.0\n", "line 2: not as written by run.py: KeyError 'step'"),
        (ROBUSTNESS, "{]", "not readable as JSON"),
        (ROBUSTNESS, '{"format": 1}', "KeyError 'task'"),
        ("robustness/logits.arrow", "ARROW1", "not readable as stored logits"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, found: str) -> None:
    run = write_run(tmp_path / "run")
    TestSet().write(run)
    with pytest.raises(DataError, match=re.escape(found)) as error:
        make_report([broken(run, name, text)], tmp_path / "report", {})
    assert str(run / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"task": "imagenet"},
            "task: expected one of mmimdb, food101, hatememes, custom, found 'imagenet'",
        ),
        (
            "config.json",
            {"missing_type": {"train": "sound", "val": "both", "test": "both"}},
            "expected text or image or",
        ),
        ("config.json", {"missing_ratio": {"train": 7}}, "expected a ratio from 0 to 1, found 7"),
        ("test_results.json", {"task": "food101"}, "results of another dataset: expected mmimdb, found 'food101'"),
        ("test_results.json", {"samples": 31}, "test samples: expected 30, found 31"),
        (ROBUSTNESS, {"format": 2}, "format: expected 1, found 2"),
        (ROBUSTNESS, {"task": "food101"}, "task: expected mmimdb, found 'food101'"),
        (ROBUSTNESS, {"checkpoint_sha256": "0" * 64}, "results of another checkpoint than best.ckpt"),
        (ROBUSTNESS, {"metric": "accuracy"}, "metric: expected f1_macro, found 'accuracy'"),
        (ROBUSTNESS, {"class_names": ["a"]}, "class_names: expected 23, found 1"),
        (ROBUSTNESS, {"samples": 29}, "logits of another test set: expected 29 samples, found '30 samples'"),
        (ROBUSTNESS, {"table_seeds": [0]}, "table_seeds: expected 1 values per cell"),
        (
            ROBUSTNESS,
            {"per_class": [{"type": "complete", "class": "Drama", "f1": float("nan")}]},
            "expected numbers in",
        ),
        (ROBUSTNESS, {"cells": [{"missing_type": "x", "ratio": 0, "both_ratio": 0}]}, "missing_type: expected text or"),
    ],
)
def test_results_that_do_not_belong_to_the_run(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run")
    TestSet().write(run)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        make_report([edited(run, name, **changes)], tmp_path / "report", {})
    assert str(run) in str(error.value) and "\n" not in str(error.value)


def test_logits_that_do_not_belong_to_the_result(tmp_path: Path) -> None:
    run, test_set, other = write_run(tmp_path / "run"), TestSet(), TestSet("food101")
    test_set.write(run)
    path, sha256 = run / "robustness" / "logits.arrow", sha256_of(run / "best.ckpt")
    logits = test_set.logits(0)
    ours, theirs = ((one.ids, one.rows, one.labels) for one in (test_set, other))
    narrow = {name: values[:, :20] for name, values in logits.items()}
    for task, digest, samples, values, found in (
        ("food101", sha256, theirs, other.logits(0), "expected stored logits, with the columns .*found"),
        ("mmimdb", "0" * 64, ours, logits, "logits of another checkpoint"),
        ("mmimdb", sha256, ours, narrow, "row 0: column logits_complete: expected 23"),
    ):
        write_logits(path, task, digest, *samples, values)
        with pytest.raises(DataError, match=rf"logits\.arrow: {found}"):
            read_report_runs([run])
    write_logits(path, "mmimdb", sha256, *ours, logits)
    assert len(read_report_runs([run])) == 1


def test_results_on_another_test_set_do_not_mix(tmp_path: Path) -> None:
    TestSet().write(write_run(tmp_path / "a"))
    b = write_run(tmp_path / "b", seed=1)
    test_set = TestSet()
    test_set.write(b)
    others = [f"other{row}" for row in test_set.rows]
    write_logits(
        b / "robustness" / "logits.arrow", "mmimdb", sha256_of(b / "best.ckpt"), others, test_set.rows,
        test_set.labels, test_set.logits(0),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"b: results on another dataset than .*a, with other ids or labels"):
        read_report_runs([tmp_path])


def test_folders_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, found in (("empty", "no run"), ("absent", "no such folder"), ("file", "a file")):
        with pytest.raises(ConfigError, match=rf"runs=.*{name}: expected a run folder .*found {found}$"):
            make_report([tmp_path / name], tmp_path / "report", {})
    with pytest.raises(ConfigError, match="runs: expected run folders"):
        make_report([], tmp_path / "report", {})


# Texts


def test_excerpts_and_signs() -> None:
    assert excerpt("one  two\nthree", 13) == "one two three"
    assert excerpt("one two three", 12) == "one two…"
    assert excerpt("x" * 20, 10) == "x" * 9 + "…"
    assert [signed(value) for value in (1.234, -0.5, -0.001)] == ["+1.23", "−0.50", "+0.00"]


# A real run, and a real browser


def test_a_real_run(workspace: Workspace, tmp_path: Path) -> None:
    """What run.py leaves is read as it is: no name in it is one that only these tests use."""
    command = workspace.command(f"vit={workspace.backbone}", "exp_name=reported", "max_epoch=1")
    assert command_line(command) == 0
    folder = workspace.results / "reported_seed0" / "version_0"
    page = Page(make_report([folder], tmp_path / "report", {}).read_text("utf-8")).text
    results = json.loads((folder / "test_results.json").read_text())
    assert f"{100 * results['metrics']['f1_macro']:.2f}" in page
    (run,) = read_report_runs([folder])
    assert {"train/loss", "val/f1_macro"} <= set(run.run.curves)
    assert results["missing_pattern"]["ratio"] == 0.7 and "70 % missing, both" in page
    assert f"python {Path(run.environment['command'][0]).name}" in page if run.environment else False
    assert {"torch", "GPUs", "commit"} <= set(page.split())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: the one that Playwright has, or the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(report: Path, browser: Any, width: int, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    address = (report / "index.html").as_uri()
    tab.goto(address)
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    widths = tab.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert widths == [88] * 24
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    drawn = tab.evaluate("[...document.querySelectorAll('svg.plot')].map(svg => svg.getBoundingClientRect().height)")
    shown = tab.evaluate("[...document.querySelectorAll('svg.plot')].filter(svg => !svg.closest('details')).length")
    assert len([height for height in drawn if height > 50]) == shown == 11
    cut = tab.evaluate(
        "[...document.querySelectorAll('p, li, figcaption, h1, h2, h3, dd')]"
        ".filter(element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)"
        ".map(element => element.textContent)"
    )
    assert cut == [], "no text is wider than its place"
    tab.close()
