"""The report's tables: their numbers are those of the files read."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.text import AT_OFFSET
from engine.stored_logits import SplitLogits
from runs.pattern import Pattern
from runs.report import figures, tables
from runs.report.lines import by_dataset
from runs.report.page import make_report
from runs.report.parts import section_of
from runs.report.results import read_report_runs
from runs.report.text import Unit
from tests.conftest import Patch
from tests.report_files import (
    TestSet,
    at,
    edit_json,
    write_measured,
    write_run,
)
from tests.report_parts import as_csv, dataset_of, notes_of, rows_of
from vilt.datasets.specs import DATASETS

TYPES = ("complete", "text missing", "image missing")


def test_matrix_deviations_are_over_training_seeds_or_else_missing_tables(report_runs, report_results):
    for folder, found, spread in (
        ("mmimdb", report_results, "2 training seeds"),
        ("mmimdb/rep_seed0", report_results[:1], "2 missing tables"),
    ):
        table = tables.matrix_table(dataset_of(report_runs / folder))
        rows = as_csv(table)
        assert {row["deviation_over"] for row in rows} == {spread}
        assert [row["missing_type"] for row in rows] == ["text", "image", "both"], "the order of the options"
        for cells in zip(*(one["cells"] for one in found), strict=True):
            kind, column = cells[0]["missing_type"], f"{100 * cells[0]['ratio']:g} %"
            values_of_cells = [cell["metrics"]["f1_macro"]["values"] for cell in cells]
            values = values_of_cells[0] if len(found) == 1 else [statistics.mean(values) for values in values_of_cells]
            mean, std = 100 * statistics.mean(values), 100 * statistics.stdev(values)
            [written] = [row for row in rows if row["missing_type"] == kind]
            assert (written[column], written[f"{column} std"]) == (f"{mean:.4f}", f"{std:.4f}")
            [shown] = [row for row in table.cells if row["missing_type"].text == kind]
            assert shown[column].text == f"{mean:.0f} ± {std:.0f}", "30 samples"


def test_each_row_of_the_matrix_says_what_its_deviations_are_over(tmp_path: Path) -> None:
    """They differ within a row if one of two seeds was measured at fewer patterns."""
    for seed in (0, 1):
        TestSet().write(run := write_run(tmp_path / f"{seed}", seed=seed), seed)
    found = json.loads((run / "robustness" / "robustness.json").read_text())
    left = [cell for cell in found["cells"] if cell["missing_type"] == "text" or cell["ratio"] == 0.7]
    edit_json(run, "robustness/robustness.json", cells=left)
    rows = as_csv(tables.matrix_table(dataset_of(tmp_path)))
    over = {row["missing_type"]: row["deviation_over"] for row in rows}
    assert len({(row["0 %"], row["0 % std"]) for row in rows}) == 1, "all missing types are the same there"
    several = "2 training seeds or 2 missing tables"
    assert over == {"text": "2 training seeds", "image": several, "both": several}


def test_the_published_table_is_shown_as_printed(report_runs: Path) -> None:
    table = tables.published_table(dataset_of(report_runs / "mmimdb"))
    rows = rows_of(table)
    assert [row[:3] for row in rows] == [
        *(["50", "100", "50"], ["50", "50", "100"], ["50", "75", "75"]),
        *(["70", "100", "30"], ["70", "30", "100"], ["70", "65", "65"]),
        *(["90", "100", "10"], ["90", "10", "100"], ["90", "55", "55"]),
    ]
    assert rows[5][3:] == ["46.84", "42.66*", "48.30", "50.32", "50.34", "51.69*", "52.31"]
    assert all(row["REP"].strong and not row["DCP"].strong for row in table.cells), "the best of each row"
    for task, best in (("food101", 88.56), ("hatememes", 70.01)):
        found = tables.read_published(task).query("set == 'rep' and method == 'REP'")
        assert len(found) == 9 and found.value.max() == best


def test_results_of_other_papers_name_their_source(report_runs: Path) -> None:
    rows = tables.rivals_table(dataset_of(report_runs / "mmimdb")).cells
    names = ("method", "missing_type", "missing_ratio", "source")
    shown = {tuple(row[name].text for name in names): row for row in rows}
    assert len(shown) == len(rows), "no row is repeated"
    best = shown["DPL on DCP", "both", "70", "its paper"]
    facts = ("value", "metric", "venue", "read")
    assert [best[name].text for name in facts] == ["55.48", "F1-macro", "CVPR 2026", "notes"]
    assert shown["DCP", "both", "70", "its paper"]["value"].text == "51.42", "not as REP's table quotes it"
    assert shown["RAGPT", "text", "70", "its paper"]["metric"].text == "F1-micro"
    assert "ViLT" in shown["RAGPT", "text", "70", "its paper"]["protocol"].text


NAMED = ("REP, head dpl", "REP, teacher large_seed1-version_2", "REP, label_ratio 0.1")


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({}, ["60", "52.31", "+8"]),
        ({"tested": 0.5}, ["50", "52.31", "−2"]),
        ({"prompt_type": "map"}, ["60", "42.66", "+17"]),
        ({"prompt_type": "new"}, ["60", "—", "not published"]),
        ({"text_windows": 8}, ["60", "52.31", "other input"]),
        ({"head": "dpl"}, ["60", "52.31", "other head or teacher"]),
        ({"teacher": "result/large_seed1/version_2/best.ckpt"}, ["60", "52.31", "other head or teacher"]),
        ({"label_ratio": 0.1}, ["60", "52.31", "fewer labels"]),
        ({"rows": 400}, ["60", "52.31", "other data"]),
        ({"rows": None}, ["60", "52.31", "test split unknown"]),
        ({"vit": "tiny"}, ["60", "52.31", "other backbone"]),
        ({"vit": None}, ["60", "52.31", "backbone unknown"]),
        ({"missing_ratio": {"train": 0.7, "val": 0.7, "test": 0.5}}, None),  # tested elsewhere
    ],
)
def test_our_results_next_to_published_ones(tmp_path: Path, options: dict[str, Any], cells: list[str] | None) -> None:
    """A difference needs the published test split, the published backbone and a published method."""
    run = write_run(tmp_path / "run", **{"tested": 0.6, "rows": 7799} | options)
    if "vit" in options:
        checkpoint = torch.load(run / "best.ckpt", weights_only=True)
        checkpoint["rep"]["architecture"]["vision_layers"] = 4
        torch.save(checkpoint if options["vit"] else {"score": 0.4}, run / "best.ckpt")
    dataset = dataset_of(tmp_path)
    assert [row[3:] for row in rows_of(tables.ours_table(dataset))] == ([cells] if cells else [])
    title = {"rows=400": "MM-IMDb format, other data", "vit=tiny": "MM-IMDb (tiny)"}
    assert {line.variant for line in dataset.lines} <= {"REP", "MAP", "new", "REP, text_windows 8", *NAMED}
    assert dataset.title == title.get("".join(f"{name}={value}" for name, value in options.items()), "MM-IMDb")
    assert ("7,799 items, ours has 400" in notes_of(tmp_path)) == (options.get("rows") == 400)


def test_confidence_intervals_are_those_of_the_results(report_runs: Path, report_results: list[dict[str, Any]]) -> None:
    table = tables.confidence_table(dataset_of(report_runs / "mmimdb"))
    metrics = ("f1_macro", "f1_micro", "f1_samples", "f1_weighted")
    values = [(found["by_type"][name][metric], *found["confidence"][name][metric]) for found in report_results
              for name in TYPES for metric in metrics]  # fmt: skip
    expected = [f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for value, low, high in values]
    *of_runs, constant, chance = rows_of(table)
    assert [cell for row in of_runs for cell in row[4:]] == expected
    for row, baseline in ((constant, "constant"), (chance, "chance")):
        found = report_results[0]["baselines"][baseline]
        baseline_cells = [f"{100 * found['metrics'][metric]:.0f}" for metric in metrics]
        assert row == [found["answer"], "—", "—", "—", *baseline_cells]
    assert "95 % from 1,000 resamples" in table.caption
    first = as_csv(table)[0]
    assert [first[f"f1_macro{part}"] for part in ("", " low", " high")] == [f"{100 * part:.4f}" for part in values[0]]


def test_macro_f1_at_the_validation_offset_is_shown_next_to_the_published_metric(tmp_path: Path) -> None:
    """It is absent for an older run, whose offset was not chosen."""
    found = {}
    for method, offset in (("rep", 0.8), ("dcp", None)):
        run = write_run(tmp_path / method, prompt_type=method, **at("text", 0.5))
        found[method] = TestSet().write(run, offset=offset)
    assert [each["offset"] for each in found.values()] == [0.8, None]
    edit_json(tmp_path / "rep", "test_results.json", metrics={"f1_macro": 0.5, AT_OFFSET: 0.625})
    dataset = dataset_of(tmp_path)
    cells = {row["method"].text: row for row in tables.comparison_table(dataset).cells}
    [cell] = [each for each in found["rep"]["cells"] if (each["missing_type"], each["ratio"]) == ("text", 0.5)]
    for metric in ("f1_macro", AT_OFFSET):
        assert cells["REP"][metric].csv[""] == pytest.approx(100 * cell["metrics"][metric]["mean"])
    assert cells["REP"][AT_OFFSET].csv[""] != cells["REP"]["f1_macro"].csv[""]
    assert cells["DCP"][AT_OFFSET].text == "not measured" and not cells["DCP"]["f1_macro"].absent
    [matrix] = {row["method"].text for row in tables.matrix_table(dataset, AT_OFFSET).cells}
    assert matrix == "REP"
    confidence = {row["method"].text: row for row in tables.confidence_table(dataset).cells}
    assert confidence["DCP"][AT_OFFSET].absent and not confidence["REP"][AT_OFFSET].absent
    tested = {row["method"].text: row[AT_OFFSET] for row in tables.runs_table(dataset.runs, [dataset]).cells}
    assert tested["REP"].csv[""] == 62.5 and tested["DCP"].absent
    assert "F1-macro at offset" in make_report([tmp_path], tmp_path / "report").read_text()


def test_undefined_metrics_are_shown_as_such_and_left_out_of_means(tmp_path: Path) -> None:
    """A metric is undefined if, for example, the test set has only one class."""
    for seed in (0, 1):
        TestSet("hatememes").write(run := write_run(tmp_path / f"{seed}", "hatememes", seed=seed), seed)
    found = json.loads((run / "robustness" / "robustness.json").read_text())
    found["by_type"]["complete"]["auroc"], found["confidence"]["complete"]["auroc"] = None, [None, None]
    for cell in found["cells"]:
        cell["metrics"]["auroc"] = {"mean": None, "std": None, "values": [None, None]}
    edit_json(run, "robustness/robustness.json", **found)
    dataset = dataset_of(tmp_path)
    assert rows_of(tables.confidence_table(dataset))[3][4] == "undefined"
    [line] = dataset.lines
    other = json.loads((tmp_path / "0" / "robustness" / "robustness.json").read_text())
    assert (line.by_type["complete"].n, line.by_type["complete"].mean) == (1, other["by_type"]["complete"]["auroc"])
    assert {found.n for found in line.matrix.values()} == {1}
    make_report([tmp_path], tmp_path / "report")


def test_errors_are_not_percentages_and_the_lowest_is_best(tmp_path: Path) -> None:
    """Sentiment from text, audio and vision is measured by mean absolute error."""
    spec, labels = DATASETS["mosi"], torch.linspace(-3, 3, 30)
    for method, error in (("rep", 0.25), ("none", 1.5)):
        run = write_run(tmp_path / method, "mosi", tested=error, prompt_type=method, **at("some", 0.7))
        split = SplitLogits(np.arange(30), 30, labels, (labels[:, None] + error).expand(len(spec.type_names), -1, -1))
        write_measured(run, split, ("sentiment",), spec.missing_types, (0.0, 0.7), tuple(spec.modalities))
    dataset = dataset_of(tmp_path)
    assert dataset.headline.variant == "REP" and dataset.axis_title == "MAE"
    assert [row[3] for row in rows_of(tables.comparison_table(dataset))[:2]] == ["0.25", "1.50"]
    shades = {row["method"].text: row["70 %"].shade for row in tables.matrix_table(dataset).cells}
    assert shades == {"REP": 1.0, "head alone": 0.0}
    page = make_report([tmp_path], tmp_path / "report").read_text()
    assert "MAE 0.25 with nothing missing" in page and "ROC" not in page
    assert "0.25 without audio, 0.25 without audio + vision, 0.25 without text, 0.25 without text + vision and " in page


def test_confusions_are_a_matrix_or_for_many_classes_the_most_frequent(tmp_path: Path, monkeypatch: Patch) -> None:
    test_set = TestSet("food101")
    test_set.write(run := write_run(tmp_path / "run", "food101"))
    monkeypatch.setattr(tables, "MATRIX_CLASSES", 101)
    table = tables.confusion_table(dataset_of(run))
    assert len(table.rows) == 3 * 101
    true, predicted = test_set.labels, test_set.logits(0)["text missing"].argmax(-1)
    for row, cells in zip(range(101), rows_of(table)[101:202], strict=True):
        counts = [str(int(((true == row) & (predicted == column)).sum())) for column in range(101)]
        assert cells == ["text missing", f"{row + 1}. dish {row:03}", *counts]
    monkeypatch.undo()
    rarest_first = [
        {"type": name, "true": f"dish {count}", "predicted": name, "count": count, "share": count / 40}
        for count in range(1, 13)
        for name in TYPES
    ]
    table = tables.confusion_table(dataset_of(edit_json(run, "robustness/robustness.json", confusions=rarest_first)))
    assert [row[:4] for row in rows_of(table)] == [
        [name, f"dish {count}", name, str(count)] for name in TYPES for count in range(12, 2, -1)
    ]


def test_the_list_of_runs_has_all_columns(report_runs: Path) -> None:
    read = read_report_runs([report_runs / "mmimdb"])
    rows = as_csv(tables.runs_table(read, by_dataset(read)))
    for column, expected in {
        "folder": [f"{name}/version_0" for name in ("rep_seed0", "rep_seed1", "text_seed0")],
        "dataset": ["MM-IMDb format, other data"] * 3,
        "trained_at": [*["70 % both"] * 2, "90 % text"],
        "best_validation": ["40.0000"] * 3,
        "test": ["40.0000", "41.0000", "52.0000"],
        "robustness": ["yes", "yes", ""],
        "date": ["2026-09-21"] * 3,
    }.items():
        assert [row[column] for row in rows] == expected


@pytest.mark.parametrize(
    ("samples", "accuracy", "mae"), [(99, "42", "0.42"), (100, "42.3", "0.423"), (1000, "42.35", "0.4235")]
)
def test_decimals_depend_on_the_number_of_samples(samples: int, accuracy: str, mae: str) -> None:
    assert Unit.of("accuracy", samples).full(0.42346) == f"{accuracy} %"
    assert Unit.of("mae", samples).full(0.42346) == mae


def test_sample_intervals_and_baselines_are_shown_with_the_results(report_runs, report_results):
    dataset = dataset_of(report_runs / "mmimdb")
    pattern = Pattern.of(DATASETS["mmimdb"], "text", 0.7, 0.5)
    at_pattern = [
        c for found in report_results for c in found["cells"] if (c["missing_type"], c["ratio"]) == ("text", 0.7)
    ]
    ends = [statistics.mean(cell["interval"][end] for cell in at_pattern) for end in ("low", "high")]
    assert dataset.measured[0].interval_at(pattern) == pytest.approx(tuple(ends)) and ends[0] < ends[1]
    answers = [report_results[0]["baselines"][name]["answer"] for name in ("constant", "chance")]
    assert list(figures.robustness_curves(dataset).legend)[-2:] == answers
    constant = report_results[0]["baselines"]["constant"]["metrics"]["f1_macro"]
    for said in (section_of(dataset).summary, tables.matrix_table(dataset).caption):
        assert f"{100 * constant:.0f} % ({answers[0]}) and " in said and f"({answers[1]})" in said
