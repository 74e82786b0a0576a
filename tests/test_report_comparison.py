"""The report's comparison of methods at their training pattern, and its summary."""

from pathlib import Path

import numpy as np
import pytest

from runs.report import figures, tables
from runs.report.parts import section_of
from tests.report_files import (
    TestSet,
    at,
    edit_json,
    write_run,
)
from tests.report_parts import as_csv, dataset_of, rows_of


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
