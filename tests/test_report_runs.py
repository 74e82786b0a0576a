"""Which runs the report reads, which of them belong together, and which files it refuses."""

import re
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError
from run import command_line
from runs.pattern import Pattern
from runs.report import tables
from runs.report.page import make_report
from runs.report.parts import section_of
from runs.report.results import listed_runs, read_report_runs
from tests.conftest import Captured
from tests.report_files import (
    TestSet,
    at,
    edit_json,
    write_run,
)
from tests.report_parts import as_csv, dataset_of, rows_of
from vilt.datasets.specs import DATASETS

ROBUSTNESS, LOGITS = "robustness/robustness.json", "robustness/logits.arrow"


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


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("config.json", "{", "not readable as JSON: Expecting property name"),
        ("config.json", "[]", "expected a JSON object, found a list"),
        ("config.json", {"task": "imagenet"}, "task: expected one of mmimdb, food101, hatememes"),
        ("config.json", {"missing_type": {"train": "x", "val": "both", "test": "both"}}, "expected text or image or"),
        ("config.json", {"missing_ratio": {"train": 7}}, "expected a ratio from 0 to 1, found 7"),
        ("best.ckpt", "weights", "not readable as a checkpoint: "),
        ("environment.json", "", "not readable as JSON"),
        ("environment.json", {"command": []}, "command: expected words, found []"),
        ("environment.json", {"machine": []}, "environment.json: not as written by run.py"),
        ("metrics.csv", "step,val/f1_macro\n1,high\n", "metrics.csv: not as written by run.py: could not convert"),
        ("metrics.csv", "1\n1,2,3\n", "metrics.csv: not as written by run.py"),
        ("test_results.json", "nothing", "not readable as JSON"),
        ("test_results.json", '{"task": "mmimdb"}', "KeyError 'metrics'"),
        ("test_results.json", {"task": "food101"}, "another dataset: expected mmimdb, found 'food101'"),
        ("test_results.json", {"samples": 31}, "test samples: expected 30, found 31"),
        (ROBUSTNESS, "{]", "not readable as JSON"),
        (ROBUSTNESS, '{"format": 1}', "KeyError 'task'"),
        (ROBUSTNESS, {"format": 2}, "format: expected 1, found 2"),
        (ROBUSTNESS, {"rows_before": [7]}, "rows_before: expected an empty list or two numbers of rows, found [7]"),
        (ROBUSTNESS, {"rows_before": "x"}, "rows_before: expected an empty list or two numbers of rows, found 'x'"),
        (ROBUSTNESS, {"task": "food101"}, "task: expected mmimdb, found 'food101'"),
        (ROBUSTNESS, {"checkpoint_sha256": "0" * 64}, "another checkpoint than best.ckpt"),
        (ROBUSTNESS, {"metric": "accuracy"}, "metric: expected f1_macro, found 'accuracy'"),
        (ROBUSTNESS, {"class_names": ["a"]}, "class_names: expected 23, found 1"),
        (ROBUSTNESS, {"samples": 29}, "logits of another test set: expected 29 samples, found '30 samples'"),
        (ROBUSTNESS, {"cells": [{"missing_type": "x", "ratio": 0, "both_ratio": 0}]}, "missing_type: expected text or"),
        (LOGITS, "ARROW1", "not readable as stored logits"),
    ],
)
def test_a_damaged_or_mismatched_file_is_named(tmp_path, name, content, found):
    run = write_run(tmp_path / "run")
    TestSet().write(run)
    if isinstance(content, dict):
        edit_json(run, name, **content)
    else:
        (run / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(found)) as error:
        make_report([run], tmp_path / "report")
    assert str(run if "test set" in found or "samples" in found else run / name) in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_logits_of_other_results_are_refused(tmp_path: Path) -> None:
    run, test_set, other = write_run(tmp_path / "run"), TestSet(), TestSet("food101")
    test_set.write(run)
    logits = test_set.logits(0)
    narrow = {name: values[:, :20] for name, values in logits.items()}
    for samples, values, sha256, found in (
        (other, other.logits(0), "", "expected logits stored by `run.py robustness`"),
        (test_set, logits, "0" * 64, "logits of another checkpoint"),
        (test_set, narrow, "", "expected .*logits_complete: expected 23 numbers"),
    ):
        samples.write_logits(run, values, sha256)
        with pytest.raises(DataError, match=rf"logits\.arrow: {found}"):
            read_report_runs([run])
    test_set.write_logits(run, logits)
    assert len(read_report_runs([run])) == 1
    second = write_run(tmp_path / "second", seed=1)
    test_set.write(second)
    TestSet(first_id=1).write_logits(second, logits)
    with pytest.raises(DataError, match=r"second: results on another dataset .*run, with other test samples, by id"):
        read_report_runs([tmp_path])


def test_folders_without_runs_are_refused(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, found in (("empty", "no run"), ("absent", "no such folder"), ("file", "a file")):
        with pytest.raises(ConfigError, match=rf"runs=.*{name}: expected a run folder .*found {found}$"):
            make_report([tmp_path / name], tmp_path / "report")
    with pytest.raises(ConfigError, match="runs: expected run folders"):
        make_report([], tmp_path / "report")
    assert command_line(["run.py", "report", "with", f"runs={tmp_path / 'empty'}", f"out={tmp_path / 'report'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ") and not (tmp_path / "report").exists()
