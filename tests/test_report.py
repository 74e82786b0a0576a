"""The report's numbers agree with the files it reads; which runs belong together; the samples shown."""

import csv
import io
import json
import re
import statistics
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.errors import DataError
from common.text import AT_OFFSET
from engine.stored_logits import SplitLogits
from runs.pattern import Pattern
from runs.report import figures, make_report, parts, tables
from runs.report.lines import Dataset, by_dataset
from runs.report.parts import section_of
from runs.report.results import listed_runs, read_report_runs
from runs.report.table import Table
from runs.report.text import CAPTIONS, Unit
from runs.stored_results import Robustness
from tests.conftest import Patch
from tests.report_files import (
    HOSTILE,
    PLOTS,
    TestSet,
    at,
    edit_json,
    write_measured,
    write_run,
    write_runs,
)
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES

TYPES = ("complete", "text missing", "image missing")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(runs: Path) -> list[dict[str, Any]]:
    """Robustness results of the two training seeds."""
    folders = [runs / "mmimdb" / f"rep_seed{seed}" / "version_0" for seed in (0, 1)]
    return [json.loads((folder / "robustness" / "robustness.json").read_text()) for folder in folders]


def dataset_of(*folders: Path) -> Dataset:
    (found,) = by_dataset(read_report_runs(folders))
    return found


def notes_in(part: parts.Part) -> list[parts.Note]:
    return [item for item in part.shown if isinstance(item, parts.Note)]


def notes_of(*folders: Path) -> str:
    """Text of all notes in the dataset's section."""
    return "\n".join(note.text for part in section_of(dataset_of(*folders)).parts for note in notes_in(part))


def as_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def rows_of(table: Table) -> list[list[str]]:
    """Texts of the cells shown."""
    return [[cell.text for cell in row.values()] for row in table.cells]


def test_matrix_deviations_are_over_training_seeds_or_else_missing_tables(runs, results):
    for folder, found, spread in (
        ("mmimdb", results, "2 training seeds"),
        ("mmimdb/rep_seed0", results[:1], "2 missing tables"),
    ):
        table = tables.matrix_table(dataset_of(runs / folder))
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


def test_the_published_table_is_shown_as_printed(runs: Path) -> None:
    table = tables.published_table(dataset_of(runs / "mmimdb"))
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


def test_results_of_other_papers_name_their_source(runs: Path) -> None:
    rows = tables.rivals_table(dataset_of(runs / "mmimdb")).cells
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


def test_methods_are_compared_at_their_training_pattern(tmp_path: Path) -> None:
    cost = {"trained_parameters": 1234567, "training_seconds": 60.0}
    for method, seed, kind, tested in (
        *(("rep", 0, "both", 0.5), ("rep", 1, "both", 0.6), ("rep", 0, "text", 0.25), ("rep", 1, "text", 0.25)),
        *(("maple", 0, "both", 0.4), ("maple", 1, "both", 0.5), ("maple", 0, "text", 0.2)),
        ("maple", 2, "both", None),  # not tested yet
    ):
        options = at(kind, 0.7) | {"prompt_type": method, "seed": seed, "tested": tested}
        run = write_run(tmp_path / f"{method}_{kind}_{seed}", **options)
        if method == "rep":
            edit_json(run, "test_results.json", **cost | {"training_seconds": 60.0 * (1 + seed)})
    table = tables.comparison_table(dataset_of(tmp_path))
    assert list(table.columns.values())[2:4] == ["Seeds", "F1-macro"]
    assert "A run's value is its own test's, at the one missing table drawn with its training seed." in table.caption
    assert [row[:4] + row[-2:] for row in rows_of(table)] == [
        ["70 % both", "REP", "2", "55 ± 7", "1,234,567", "1.5"],
        ["70 % both", "MaPLe", "2", "45 ± 7", "not measured", "not measured"],
        ["70 % text", "REP", "2", "25 ± 0", "1,234,567", "1.5"],
        ["70 % text", "MaPLe", "1", "20", "not measured", "not measured"],
    ]
    assert as_csv(table)[0]["f1_macro std"] == "7.0711"
    first = section_of(dataset := dataset_of(tmp_path)).parts[0]
    drawn = figures.comparison_figure(dataset)
    assert first.title == "Methods compared" and first.shown[0] == drawn
    assert all(line.variant in drawn.svg for lines in dataset.compared.values() for line in lines)


@pytest.mark.parametrize("worse", [True, False])
def test_only_significantly_better_results_are_bold(tmp_path: Path, worse: bool) -> None:
    test_set = TestSet("food101")
    for method in ("rep", "dcp"):
        logits = test_set.logits(0)
        if worse and method == "dcp":
            logits = {name: -values for name, values in logits.items()}
        run = write_run(tmp_path / method, "food101", prompt_type=method)
        test_set.write(run, logits=logits)
    [best, other, *_] = tables.comparison_table(dataset := dataset_of(tmp_path)).cells
    [lines] = dataset.compared.values()
    means = [line.at_own_pattern.mean for line in lines if line.at_own_pattern]
    assert other["difference_to_best"].csv[""] == pytest.approx(100 * (means[1] - means[0]), abs=1e-6)
    assert best["accuracy"].strong == (float(str(other["p"].csv[""])) < 0.05) == worse
    assert not other["accuracy"].strong and best["difference_to_best"].absent
    names = [row["method"].text for row in (best, other)]
    start = "2 configurations trained at 70 % both, "
    level = f"Of {start}{names[0]} has the highest accuracy there, but does not differ significantly from {names[1]}."
    said = section_of(dataset).summary
    assert said.startswith(f"The best of {start}REP, reaches " if worse else f"{level} It reaches ")
    assert "no better than a constant" not in said


def test_the_headline_is_the_line_that_is_best_at_the_training_pattern(tmp_path: Path) -> None:
    """Not the best with nothing missing, nor one that was trained with nothing missing."""
    test_set, wrong = TestSet("food101"), np.float32(-1)
    signs = {"rep": (1, 1, 1), "dcp": (1, wrong, wrong), "maple": (wrong, 1, 1)}
    for method, sign in signs.items():
        pattern = at("text", 0.0 if method == "rep" else 1.0)
        run = write_run(tmp_path / method, "food101", prompt_type=method, **pattern)
        logits = zip(sign, test_set.logits(0).items(), strict=True)
        test_set.write(run, logits={name: factor * values for factor, (name, values) in logits})
    dataset = dataset_of(tmp_path)
    assert dataset.headline.variant == "MaPLe"
    assert dataset.order(dataset.headline.by_type["complete"]) < dataset.order(dataset.lines[0].by_type["complete"])
    said = section_of(dataset).summary
    assert said.startswith("The best of 2 configurations trained at 100 % text, MaPLe, reaches accuracy 0 % with ")
    assert "Not compared with it: 1 configuration trained at other patterns. 3 of 3 trained runs" in said
    said = section_of(dataset_of(tmp_path / "dcp")).summary
    assert said.startswith("DCP reaches accuracy ") and "it is no better than a constant answer. 1 of 1" in said


def test_a_value_and_its_difference_to_the_best_are_of_the_same_missing_tables(tmp_path: Path) -> None:
    """As where the robustness results lack the training pattern, and the own tests say otherwise than the logits."""
    test_set = TestSet("food101")
    for method, seed, tested in (("rep", 0, 0.1), ("rep", 1, 0.1), ("dcp", 0, 0.9), ("dcp", 1, 0.9)):
        run = write_run(tmp_path / f"{method}{seed}", "food101", tested, prompt_type=method, seed=seed)
        logits = test_set.logits(seed)
        found = test_set.write(run, logits={k: v * (-1) ** (method == "dcp") for k, v in logits.items()})
        cells = found["cells"]
        edit_json(run, "robustness/robustness.json", cells=[cell for cell in cells if cell["ratio"] in (0, 1)])
    table = tables.comparison_table(dataset_of(tmp_path))
    [best, other, *_] = table.cells
    assert "mean over the missing tables of seeds 0 and 1. Diff" in table.caption and "own test" not in table.caption
    assert [best["method"].text, other["method"].text] == ["REP", "DCP"]
    [value, less] = [float(str(row["accuracy"].csv[""])) for row in (best, other)]
    assert other["difference_to_best"].csv[""] == pytest.approx(less - value) and less < value
    [cell] = [cell for cell in cells if (cell["missing_type"], cell["ratio"]) == ("both", 0.7)]
    own = dataset_of(run).lines[0].at_own_pattern
    assert own and own.mean == pytest.approx(cell["metrics"]["accuracy"]["mean"])
    write_run(tmp_path / "maple", "food101", 0.95, prompt_type="maple")
    table = tables.comparison_table(dataset_of(tmp_path))
    *_, last = table.cells[:3]
    assert last["method"].text == "MaPLe" and last["difference_to_best"].absent, "its own test, at another table"
    assert last["accuracy"].text.endswith(" (own test)") and "For lines marked as own test, it is " in table.caption
    edit_json(run, "robustness/robustness.json", table_seeds=[0, 2])
    [best, other, *_] = tables.comparison_table(dataset_of(tmp_path)).cells
    assert other["difference_to_best"].absent, "at other tables, too"


def test_results_with_other_missing_tables_do_not_replace_the_runs_own(tmp_path: Path) -> None:
    """The run's own test counts instead, since it used the run's tables, drawn as published."""
    run = write_run(tmp_path / "a", missing_tables="published", tested=0.875)
    TestSet().write(run)
    for rows_before, at_own in (([], False), ([15552, 2608], True)):
        edit_json(run, "robustness/robustness.json", rows_before=rows_before)
        [found] = dataset_of(tmp_path).runs
        assert (found.at_own_pattern("f1_macro") != 0.875) is at_own


def test_a_comparison_needs_several_tested_methods(tmp_path: Path) -> None:
    write_run(tmp_path / "a", tested=0.6)
    write_run(tmp_path / "b", tested=0.6, seed=1)
    write_run(tmp_path / "c", prompt_type="maple", tested=None)
    assert dataset_of(tmp_path).compared == {}
    assert "Methods compared" not in [part.title for part in section_of(dataset_of(tmp_path)).parts]
    for far in (False, True):
        for fmb in (False, True):
            write_run(tmp_path / "parts" / f"{far}_{fmb}", far=far, fmb=fmb, tested=0.5)
    [lines] = dataset_of(tmp_path / "parts").compared.values()
    assert {line.variant for line in lines} == {"baseline", "baseline + FAR", "baseline + FMB", "REP"}


def test_confidence_intervals_are_those_of_the_results(runs: Path, results: list[dict[str, Any]]) -> None:
    table = tables.confidence_table(dataset_of(runs / "mmimdb"))
    metrics = ("f1_macro", "f1_micro", "f1_samples", "f1_weighted")
    values = [(found["by_type"][name][metric], *found["confidence"][name][metric]) for found in results
              for name in TYPES for metric in metrics]  # fmt: skip
    expected = [f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for value, low, high in values]
    *of_runs, constant, chance = rows_of(table)
    assert [cell for row in of_runs for cell in row[4:]] == expected
    for row, baseline in ((constant, "constant"), (chance, "chance")):
        found = results[0]["baselines"][baseline]
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


def test_results_by_class_are_sorted_by_support(runs: Path, results: list[dict[str, Any]]) -> None:
    dataset = dataset_of(runs / "mmimdb")
    [line] = dataset.measured
    entries = [entry for found in results for entry in found["per_class"]]
    support = {entry["class"]: entry["support"] for entry in entries}
    assert list(line.support) == sorted(MMIMDB_GENRES, key=lambda name: -support[name])
    f1 = [entry["f1"] for entry in entries if (entry["type"], entry["class"]) == ("text missing", "Drama")]
    found = line.f1_of("Drama", "text missing")
    assert found is not None and found[:2] == pytest.approx((statistics.mean(f1), statistics.stdev(f1)))
    drawn = figures.class_figure(dataset, [line])
    assert drawn.svg.count('style="fill: #d55e00"') == len(line.support) - 1, "a bar for each"
    assert "No test sample is of Film-Noir." in drawn.caption


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


def test_a_long_panel_title_is_wrapped() -> None:
    title = "REP, memory_depth 6, learning_rate 0.01, trained at 70 % image"
    drawn = figures.figure("name", "title", "", [(title, lambda axes: None)])
    comments = re.findall(r"<!--(.*?)-->", drawn.svg, re.DOTALL)
    lines = [line.strip() for comment in comments for line in comment.split("\n")]
    assert "REP, memory_depth 6, learning_rate 0.01," in lines and "trained at 70 % image" in lines


def test_the_list_of_runs_has_all_columns(runs: Path) -> None:
    read = read_report_runs([runs / "mmimdb"])
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


def test_sample_intervals_and_baselines_are_shown_with_the_results(runs, results):
    dataset = dataset_of(runs / "mmimdb")
    pattern = Pattern.of(DATASETS["mmimdb"], "text", 0.7, 0.5)
    at_pattern = [c for found in results for c in found["cells"] if (c["missing_type"], c["ratio"]) == ("text", 0.7)]
    ends = [statistics.mean(cell["interval"][end] for cell in at_pattern) for end in ("low", "high")]
    assert dataset.measured[0].interval_at(pattern) == pytest.approx(tuple(ends)) and ends[0] < ends[1]
    answers = [results[0]["baselines"][name]["answer"] for name in ("constant", "chance")]
    assert list(figures.robustness_curves(dataset).legend)[-2:] == answers
    constant = results[0]["baselines"]["constant"]["metrics"]["f1_macro"]
    for said in (section_of(dataset).summary, tables.matrix_table(dataset).caption):
        assert f"{100 * constant:.0f} % ({answers[0]}) and " in said and f"({answers[1]})" in said


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


def test_consecutive_run_tags_are_listed_as_ranges(tmp_path: Path) -> None:
    for number in range(11):
        write_run(tmp_path / f"version_{number}")
    read = read_report_runs([tmp_path])
    assert listed_runs([read[10], *read[:3], read[4]]) == "R1 to R3, R5, R11"


def test_labels_at_a_pattern_are_unique(tmp_path: Path) -> None:
    """Two backbones in different folders may have the same name."""
    for place in ("here", "there"):
        write_run(tmp_path / place, vit=f"/{place}/clip")
    dataset = dataset_of(tmp_path)
    assert [line.label for line in dataset.lines] == ["REP, vit clip (R1)", "REP, vit clip (R2)"]
    assert len(rows_of(tables.comparison_table(dataset))) == 2


def test_each_configuration_has_its_own_line(tmp_path: Path) -> None:
    for memory_length in (12, 36):
        for seed in (0, 1):
            write_run(tmp_path / f"{memory_length}_{seed}", memory_length=memory_length, seed=seed, num_workers=seed)
    write_run(tmp_path / "text", memory_length=12, **at("text", 0.9))
    assert [(line.variant, line.label, len(line.runs)) for line in dataset_of(tmp_path).lines] == [
        ("REP, memory_length 12", "REP, memory_length 12, trained at 70 % both", 2),
        ("REP, memory_length 36", "REP, memory_length 36, trained at 70 % both", 2),
        ("REP, memory_length 12", "REP, memory_length 12, trained at 90 % text", 1),
    ]


def test_among_repeated_runs_the_most_complete_then_the_latest_counts(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        write_run(tmp_path / "rep" / f"version_{version}", tested=version / 100)
    read = read_report_runs([tmp_path / "rep" / "version_10", tmp_path, tmp_path / "rep" / "version_2"])
    assert [run.place[-2:] for run in read] == ["10", "_2", "_9"], "each once, however often it is named"
    TestSet().write(write_run(tmp_path / "full" / "version_0", seed=1, tested=None))
    write_run(tmp_path / "full" / "version_1", seed=1)
    dataset = dataset_of(tmp_path)
    (line,) = dataset.lines
    assert [run.place for run in line.runs] == ["rep/version_10", "full/version_0"]
    repeated = ["full/version_1", "rep/version_2", "rep/version_9"]
    kinds = {row["folder"]: row["kind"] for row in as_csv(tables.runs_table(dataset.runs, [dataset]))}
    assert sorted(place for place, kind in kinds.items() if kind == "repeated") == repeated
    assert {kind for place, kind in kinds.items() if place not in repeated} == {"training"}


def test_evaluations_are_listed_but_not_as_trainings(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluation", test_only=True, tested=0.25)
    dataset = dataset_of(tmp_path)
    section = section_of(dataset)
    assert section.summary == "No results: 1 run, none of them with robustness results."
    assert [part.title for part in section.parts] == ["Published results and ours"] and dataset.lines == []
    [row] = as_csv(tables.runs_table(dataset.runs, [dataset]))
    assert (row["kind"], row["trained_at"], row["best_validation"]) == ("evaluation", "", "")


def test_a_resumed_run_includes_the_run_it_was_resumed_from(tmp_path: Path) -> None:
    first, run = (write_run(tmp_path / "rep_seed0" / f"version_{number}", tested=None) for number in (0, 1))
    edit_json(run, "config.json", resume_from=str(first / "last.ckpt"))
    header = "epoch,step,train/loss,val/f1_macro"
    (first / "metrics.csv").write_text(f"{header}\n0,1,1.5,\n0,7,,0.35\n0,8,0.9,\n0,8,,0.2\n")  # step 8 has two rows
    (run / "metrics.csv").write_text(f"{header}\n1,8,,0.25\n1,9,,0.3\n1,10,0.")  # cut off
    [read] = dataset_of(tmp_path).runs
    assert read.curve("train/loss").to_dict() == {1: 1.5, 8: 0.9}, "step 8 is in both runs"
    assert read.curve("val/f1_macro").to_dict() == {7: 0.35, 8: 0.25, 9: 0.3}
    assert read.curve("val/loss").empty
    for best in ("40.0000", ""):
        dataset = dataset_of(tmp_path)
        [row] = as_csv(tables.runs_table(dataset.runs, [dataset]))
        assert (row["folder"], row["best_validation"]) == ("rep_seed0/version_1", best)
        (run / "best.ckpt").unlink(missing_ok=True)


def test_an_unreadable_configuration_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    named = [re.search(r"version_\d/config\.json", message) for message in caplog.messages]
    assert [found and found[0] for found in named] == [f"version_{number}/config.json" for number in (1, 2, 3, 9)]
    with pytest.raises(DataError, match=r"version_2/config\.json: not readable as JSON"):
        read_report_runs([top / "version_2"])


def test_equal_patterns_compare_equal() -> None:
    text, both = (
        [Pattern.of(DATASETS["mmimdb"], kind, 0.7, ratio) for ratio in (0.2, 0.5)] for kind in ("text", "both")
    )
    assert text[0] == text[1] and both[0] != both[1]
    assert [str(pattern) for pattern in both] == ["70 % both 0.2", "70 % both"]


def samples_of(folder: Path) -> tuple[Table, str]:
    """The table of samples for the only run below a folder, and its notes."""
    part = section_of(dataset_of(folder)).parts[-1]
    shown = part.shown[0]
    assert isinstance(shown, Table)
    return shown, "".join(note.text for note in notes_in(part))


def test_samples_whose_predictions_change_most_come_first(runs: Path) -> None:
    table, note = samples_of(runs / "mmimdb" / "rep_seed0")
    test_set = TestSet()
    logits = test_set.logits(0)
    probabilities = {name: 1 / (1 + np.exp(-values.astype(float))) for name, values in logits.items()}
    change: dict[int, tuple[float, int]] = {}
    for sample, row in enumerate(test_set.rows):
        moved = [np.abs(probabilities[name][sample] - probabilities["complete"][sample]).sum() for name in TYPES[1:]]
        change[row] = max(change.get(row, (0.0, 0)), (float(max(moved)), sample))
    expected = sorted(change.values(), reverse=True)[:24]
    assert [shown["change"] for shown in table.rows] == [f"{moved:.2f}" for moved, _ in expected]
    for shown, picture, (_, sample) in zip(table.rows, table.pictures.values(), expected, strict=True):
        row, label = test_set.rows[sample], np.flatnonzero(test_set.labels[sample])
        assert shown["id"] == test_set.ids[sample]
        assert shown["text"] == PLOTS[row][sample - test_set.rows.index(row)]
        assert shown["label"] == (", ".join(MMIMDB_GENRES[number] for number in label) or "none")
        for name in TYPES:
            marks = []
            for number in np.argsort(-probabilities[name][sample]):
                if (probability := probabilities[name][sample][number]) > 0.5:
                    marks.append(f"{'✓' if number in label else '✗'} {MMIMDB_GENRES[number]} {probability:.0%}")
            assert shown[name.replace(" ", "_")] == (", ".join(marks) or "none")
        assert picture is not None
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (88, 176)
            pixel = image.convert("L").getpixel((40, 80))
        assert isinstance(pixel, int) and abs(pixel - 8 * row) <= 2, "the picture is the film's poster"
    assert note == "" and HOSTILE in [shown["text"] for shown in table.rows]


@pytest.mark.parametrize(("task", "better"), [("mosi", "R1"), ("hatememes", "R2")])
def test_samples_are_of_the_best_run(tmp_path: Path, monkeypatch: Patch, task: str, better: str) -> None:
    """The best run has the lowest value if the metric is an error."""
    for seed, tested in ((0, 0.5), (1, 0.75)):
        write_run(tmp_path / f"{seed}", task, tested=tested, seed=seed, **at("text", 0.7))
    runs, spec = read_report_runs([tmp_path]), DATASETS[task]
    by_type = {name: {spec.monitor: 0.5} for name in spec.type_names}
    results = Robustness({"by_type": by_type, "table_seeds": [0]}, cells={}, offset=None)
    for run in runs:
        monkeypatch.setitem(vars(run), "robustness", results)
        monkeypatch.setitem(vars(run), "test_set", ("", 30))
    [dataset] = by_dataset(runs)
    shown = parts.run_of_samples(dataset.headline)
    assert shown is not None and shown.tag == better


def test_single_label_samples_have_one_prediction(runs: Path) -> None:
    table, _ = samples_of(runs / "others" / "food101_seed0")
    test_set = TestSet("food101")
    for shown in table.rows:
        samples = [number for number, name in enumerate(test_set.ids) if name == shown["id"]]
        predicted = [f"dish {test_set.logits(0)['complete'][sample].argmax():03}" for sample in samples]
        mark, dish = str(shown["complete"]).rsplit(" ", 1)[0].split(" ", 1)
        assert dish in predicted and (mark == "✓") == (dish == shown["label"])


@pytest.mark.parametrize(
    "fault", ["no longer exists", "has other samples", "is damaged", "labels", "decoded", "logits"]
)
def test_missing_pictures_are_noted(tmp_path: Path, fault: str) -> None:
    run, test_set = write_run(tmp_path / "run", data_root=str(tmp_path)), TestSet()
    films = tmp_path / "mmimdb_test.arrow"
    test_set.write(run)
    if fault != "no longer exists":
        TestSet(first_id=int(fault == "has other samples")).write_films(tmp_path, PLOTS, fault == "labels")
    if fault == "is damaged":
        films.write_bytes(b"ARROW1 or so")
    if fault == "decoded":
        films.write_bytes(films.read_bytes().replace(b"\x89PNG", b"\x89BAD"))
    if fault == "logits":
        (run / "robustness" / "logits.arrow").unlink()
        assert "no logits.arrow in R1" in notes_of(run)
        return
    table, note = samples_of(run)
    assert len(table.pictures) == 24 and set(table.pictures.values()) == {None}
    texts = {str(shown["text"]) for shown in as_csv(table)}
    assert (texts == {""}) == (fault != "decoded")
    expected = {"labels": "has other samples", "decoded": "24 images cannot be decoded"}.get(fault, fault)
    assert expected in note and ("mmimdb_test.arrow in the data_root of R1" in note) == (fault != "decoded")
