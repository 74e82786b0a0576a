"""`run.py runs` lists every run with its state and results."""

import json
import os
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.text import AT_OFFSET
from config import DEFAULTS
from runs.run_table import describe_runs, list_runs, sort_runs
from runs.sweep.jobs import JOURNAL
from runs.targets import find_checkpoints
from tests.conftest import Captured, Patch, call, read_csv, read_json
from tests.report_files import edit_json

BEGAN = 1_750_000_000


def write_run(folder: Path, *, score: float | None = 0.4, tested: float | None = 0.3, **options: Any) -> Path:
    """Writes a run folder with made-up content; `options` override the defaults."""
    config = json.loads(json.dumps(DEFAULTS)) | {"task": "mmimdb", **options}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    os.utime(folder / "config.json", (BEGAN, BEGAN + config["seed"]))
    if score is not None:
        torch.save({"score": score, "state_dict": {"head": torch.zeros(3)}}, folder / "best.ckpt")
        torch.save({"global_step": 6, "MissingModalityData": {"epoch": 3, "batches": 0}}, folder / "last.ckpt")
    if tested is not None:
        pattern = {"missing_type": "both", "ratio": 0.5, "both_ratio": 0.3, "seed": 0}
        results = {"missing_pattern": pattern, "metrics": {"loss": 1.0, "f1_macro": tested, "accuracy": tested}}
        (folder / "test_results.json").write_text(json.dumps(results))
    return folder


def state_of(folder: Path) -> tuple[str, str]:
    (row,) = list_runs(folder.parent)
    return row.state, row.note


def test_a_finished_run_is_listed_with_its_results(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rep_seed3" / "version_0", exp_name="rep", seed=3, both_ratio=0.25)
    (row,) = list_runs(tmp_path)
    assert row.folder == folder
    assert (row.name, row.method, row.dataset, row.seed, row.metric) == ("rep", "rep", "mmimdb", 3, "f1_macro")
    assert (row.train, row.tested_at, row.validation, row.test) == ("70 % both 0.25", "50 % both 0.3", 0.4, 0.3)
    assert row.date == datetime.fromtimestamp(BEGAN + 3) and (row.state, row.note) == ("finished", "")


def test_a_copied_run_keeps_its_date(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rep_seed3" / "version_0")
    for recorded in ("2025-03-04T05:06:07+00:00", "2025-03-04T07:06:07+02:00"):
        (folder / "environment.json").write_text(json.dumps({"started": recorded}))
        (row,) = list_runs(tmp_path)
        assert row.date is not None and row.date.timestamp() == 1_741_064_767
    (folder / "environment.json").write_text("{}")  # an older run did not record it
    assert list_runs(tmp_path)[0].date == datetime.fromtimestamp(BEGAN)


def test_an_evaluation_is_listed_without_training(tmp_path: Path) -> None:
    write_run(tmp_path / "rep_test_both_0.5" / "version_0", score=None, test_only=True)
    write_run(tmp_path / "rep_test_both_0.6" / "version_0", score=None, tested=None, test_only=True)
    done, broken_off = list_runs(tmp_path)
    assert (done.name, done.train, done.validation, done.test) == ("rep_test_both_0.5", None, None, 0.3)
    assert done.state == "finished" and (broken_off.state, broken_off.note) == ("unfinished", "no test result")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epoch": 20}, ("unfinished", "3 of 20 epochs")),
        ({"max_epoch": 3}, ("unfinished", "not tested")),
        ({"max_epoch": 3, "test_after_fit": False}, ("finished", "not tested")),
        ({"max_epoch": 20, "max_steps": 6, "test_after_fit": False}, ("finished", "not tested")),
        ({"max_epoch": 20, "max_steps": 7, "test_after_fit": False}, ("unfinished", "3 of 20 epochs")),
        ({"score": None}, ("unfinished", "no validation yet")),
    ],
)
def test_an_untested_run_shows_how_far_it_got(tmp_path: Path, options: dict[str, Any], expected) -> None:
    folder = write_run(tmp_path / "a" / "version_0", tested=None, **options)
    assert state_of(folder) == expected


TRACEBACK = """Traceback (most recent call last):
  File "run.py", line 1, in <module>
KeyError: 'x'

The above exception was the direct cause of the following exception:

common.errors.DataError: films.arrow: row 3: not an image
"""


def test_a_run_that_ended_with_an_error_has_failed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a_seed0" / "version_0", score=None, tested=None)
    (folder / "error.txt").write_text(TRACEBACK)
    assert state_of(folder) == ("failed", "DataError: films.arrow: row 3: not an image")
    assert call("runs", f"log_dir={tmp_path}") == 0
    [row] = read_csv(tmp_path / "runs.csv")
    assert (row["state"], row["note"]) == ("failed", "DataError: films.arrow: row 3: not an image")
    said = describe_runs(list_runs(tmp_path), tmp_path).splitlines()
    assert "a_seed0/version_0: DataError: films.arrow: row 3: not an image" in said  # below the table, not in it
    (folder / "error.txt").write_text(f"RuntimeError: {'x' * 500}\n")
    assert len(state_of(folder)[1]) == 100
    torch.save({"global_step": 6, "MissingModalityData": {"epoch": 3, "batches": 0}}, folder / "last.ckpt")
    resumed = write_run(folder.with_name("version_1"), score=None, tested=None, resume_from=str(folder / "last.ckpt"))
    assert state_of(resumed) == ("unfinished", "no validation yet")
    shutil.rmtree(resumed)
    write_run(folder.with_name("version_1"), resume_from=str(folder / "last.ckpt"))
    assert state_of(resumed) == ("finished", "")


DAMAGE = {
    "config.json": ("{", "config.json: not readable as JSON: "),
    "contents.json": ("{", "contents.json: not readable as JSON: "),
    "best.ckpt": ("weights", "best.ckpt: not readable as a checkpoint: "),
    "test_results.json": ('{"metrics": {}}', "test_results.json: not as written by run.py: KeyError 'f1_macro'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_shown_as_such(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "rep_seed0" / "version_0")
    content, message = DAMAGE[name]
    (folder / name).write_text(content)
    state, note = state_of(folder)
    assert state == "damaged" and note.startswith(message)


def test_other_damage_is_shown_too(tmp_path: Path) -> None:
    (tmp_path / "a" / "version_0").mkdir(parents=True)  # cut off before anything was written
    whole = write_run(tmp_path / "c" / "version_0")
    (whole / "best.ckpt").write_bytes((whole / "best.ckpt").read_bytes()[:-300])
    last_broken = write_run(tmp_path / "d" / "version_0", tested=None)
    torch.save([1, 2], last_broken / "last.ckpt")
    old = write_run(tmp_path / "e" / "version_0")
    (old / "config.json").write_text('{"task": "mmimdb", "exp_name": "e", "test_only": false}')
    write_run(tmp_path / "f" / "version_0", task="imagenet")
    rows = list_runs(tmp_path)
    assert [row.state for row in rows] == ["damaged"] * 5
    assert [row.name for row in rows] == ["a", "rep", "rep", "e", "f"]
    assert rows[0].note.startswith("config.json: not readable as JSON: ")
    assert rows[1].note.startswith("best.ckpt: not readable as a checkpoint: ") and rows[1].validation is None
    assert "expected a checkpoint of a run, with MissingModalityData and global_step" in rows[2].note
    assert rows[3].note == "config.json: not as written by run.py: KeyError 'prompt_type'"


def test_only_run_folders_are_listed(tmp_path: Path) -> None:
    """CLIP's folder and Sacred's records have a config.json too; run folders may be nested deeper or renamed."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text('{"model_type": "clip"}')
    sacred = write_run(tmp_path / "sacred" / "1")
    (sacred / "run.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    renamed = write_run(tmp_path / "kept" / "best of march")
    folders = [write_run(tmp_path / "x" / "rep_seed0" / f"version_{number}") for number in (10, 9)]
    (folders[0] / "robustness").mkdir()
    assert [row.folder for row in list_runs(tmp_path)] == [renamed, folders[1], folders[0]]


def test_a_resumed_run_replaces_the_run_it_was_resumed_from(tmp_path: Path) -> None:
    """Even if both were moved; a run that was tested before it was resumed is listed separately."""
    parent = tmp_path / "moved" / "rep_seed0"
    first = write_run(parent / "version_0", tested=None, score=0.1)
    for number in (1, 2):
        earlier = f"/elsewhere/rep_seed0/version_{number - 1}/last.ckpt"
        write_run(parent / f"version_{number}", seed=1, resume_from=earlier, score=0.2 * number, tested=0.3)
        os.utime(first / "config.json", (BEGAN, BEGAN - 60))
        if number == 1:
            (row,) = list_runs(tmp_path)
            assert (row.folder, row.validation) == (parent / "version_1", 0.2)
            assert row.date == datetime.fromtimestamp(BEGAN - 60), "the start of the first one"
            assert find_checkpoints([tmp_path]) == [parent / "version_1" / "best.ckpt"]
    assert [row.folder.name for row in list_runs(tmp_path)] == ["version_1", "version_2"]


def test_missing_values_are_sorted_last(tmp_path: Path) -> None:
    for seed, score in ((10, 0.2), (9, None), (2, 0.7)):
        write_run(tmp_path / f"rep_seed{seed}" / "version_0", seed=seed, score=score)
    rows = list_runs(tmp_path)
    assert [row.seed for row in rows] == [2, 9, 10]
    for order, seeds in {
        "validation": [10, 2, 9],
        "-validation": [2, 10, 9],
        "seed": [2, 9, 10],
        "-date": [10, 9, 2],
        "folder": [2, 9, 10],
        "-folder": [10, 9, 2],
    }.items():
        assert [row.seed for row in sort_runs(rows, order)] == seeds, order


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: Captured) -> None:
    for seed, tested in ((0, 0.25), (1, 0.75)):
        write_run(tmp_path / f"rep_seed{seed}" / "version_0", exp_name="rep", seed=seed, tested=tested)
    (tmp_path / "cut" / "version_0").mkdir(parents=True)
    assert call("runs", f"log_dir={tmp_path}", "runs_sort=-test") == 0
    lines = capsys.readouterr().out.splitlines()
    header = lines[1]
    assert " ".join(header.split()) == "folder method train validation test tested at date state note"
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(BEGAN))
    expected = f"rep_seed1 rep 70 % both 0.4000 0.7500 50 % both 0.3 {date} finished"
    assert " ".join(lines[3].split()) == expected
    assert lines[4].startswith("rep_seed0 ") and lines[5].startswith("cut ")
    assert "damaged" in lines[5]
    for title, text in (("state", "finished"), ("tested at", "50 %"), ("folder", "rep_seed1")):
        assert header.index(title) == lines[3].index(text)
    assert "validation (the best) and test: f1_macro (mmimdb)" in lines
    rows = read_csv(tmp_path / "runs.csv")
    assert [row["test"] for row in rows] == ["0.75", "0.25", ""]
    assert rows[0]["metric"] == "f1_macro" and rows[0]["folder"] == str(tmp_path / "rep_seed1" / "version_0")


def test_the_method_includes_head_neighbours_and_teacher(tmp_path: Path) -> None:
    write_run(tmp_path / "a_seed0" / "version_0", prompt_type="none", head="dpl", neighbours=8)
    write_run(tmp_path / "b_seed0" / "version_0", teacher="result/large_seed1/version_2/best.ckpt")
    write_run(tmp_path / "c_seed0" / "version_0", label_ratio=0.1)
    write_run(tmp_path / "d_seed0" / "version_0", label_ratio=1.0)
    assert {row.method for row in list_runs(tmp_path)} == {
        "rep",
        "rep label_ratio=0.1",
        "none head=dpl neighbours=8",
        "rep teacher=large_seed1-version_2",
    }


def test_macro_f1_at_the_validation_offset_has_a_column(tmp_path: Path) -> None:
    for seed, found in ((0, {AT_OFFSET: 0.5}), (1, {})):
        run = write_run(tmp_path / f"rep_seed{seed}" / "version_0", seed=seed)
        edit_json(run, "test_results.json", metrics={"f1_macro": 0.25, **found})
    shown = describe_runs(rows := list_runs(tmp_path), tmp_path).splitlines()
    assert "0.2500 0.5000" in " ".join(shown[2].split()) and "0.2500 –" in " ".join(shown[3].split())
    write_run(tmp_path / "windows", text_windows=8, group_texts=True)
    assert list_runs(tmp_path)[-1].method == "rep text_windows=8 group_texts=True", "another input is always named"
    assert "f1 macro at offset" in shown[0] and "offset" not in describe_runs(rows[1:], tmp_path)


def test_the_table_fits_a_narrow_terminal(tmp_path: Path, capsys: Captured, monkeypatch: Patch) -> None:
    """Headings wrap only between words. Values that all runs share, or that the folder states, have no column."""
    monkeypatch.setenv("COLUMNS", "100")
    write_run(tmp_path / ("long_" * 20) / "version_0", max_epoch=20, tested=None)
    for task in ("mmimdb", "food101"):
        write_run(tmp_path / f"finetune_{task}_seed0" / "version_0", task=task)
        assert call("runs", f"log_dir={tmp_path}") == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines[:-3])) <= 100
        heads = " ".join(lines[1:3]).split("─")[0].split()
        assert {"folder", "validation", "test", "state"} <= set(heads) and not {"method", "train"} & set(heads)
        assert ("dataset" in heads) is (task == "food101")
        assert "".join("".join(lines).split()).count("long_") >= 1 and "epochs" in "".join(lines)


def test_undefined_results_and_baselines_are_shown(tmp_path: Path, capsys: Captured) -> None:
    """Undefined results (null in test_results.json) sort last in either order; baselines name their dataset."""
    first = write_run(tmp_path / "a" / "version_0", seed=0, tested=0.3)
    second = write_run(tmp_path / "b" / "version_0", seed=1)
    baselines = {"constant": {"answer": "always Drama", "metrics": {"f1_macro": 0.1893}}}
    edit_json(first, "test_results.json", baselines=baselines)
    edit_json(second, "test_results.json", metrics={"f1_macro": None, "loss": None})
    write_run(tmp_path / "c" / "version_0", task="food101", tested=0.6)
    for order in ("test", "-test"):
        assert call("runs", f"log_dir={tmp_path}", f"runs_sort={order}") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[:3] == ["folder", "dataset", "validation"]
        assert lines[5].split()[0] == "b" and "undefined" in lines[5]
        assert "  always Drama: f1_macro 0.1893 (mmimdb)" in lines
        assert "all 3 runs: method rep, train 70 % both, state finished, folder …/version_0" in lines
    assert [row["test"] for row in read_csv(tmp_path / "runs.csv")] == ["0.6", "0.3", ""]


def test_a_run_that_repeats_a_seed_has_a_note(tmp_path: Path) -> None:
    for number in (0, 1):
        write_run(tmp_path / "a" / f"version_{number}")
    rows = list_runs(tmp_path)
    assert [row.note for row in rows] == ["repeats a/version_1", ""]
    head, *_, repeat, _ = describe_runs(rows, tmp_path).splitlines()
    assert "note" not in head and repeat == "a/version_0: repeats a/version_1"


def test_a_folder_without_runs_gives_an_empty_table(tmp_path: Path, capsys: Captured) -> None:
    assert call("runs", f"log_dir={tmp_path}") == 0
    assert capsys.readouterr().out.splitlines()[1] == f"no runs below {tmp_path}"
    assert read_csv(tmp_path / "runs.csv") == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("log_dir={top}/nowhere", "log_dir: expected a folder of runs, found no folder at {top}/nowhere"),
        ("runs_sort=speed", "runs_sort: expected name, method, dataset, "),
        ("runs_sort=--date", "runs_sort: expected name, method, dataset, "),
        ("run_sort=date", "unknown option run_sort; did you mean runs_sort?"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, capsys: Captured, option: str, message: str) -> None:
    assert call("runs", option.format(top=tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(top=tmp_path)}")


def test_a_real_run_is_listed(fitted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fitted, tmp_path / "version_0"))
    (row,) = list_runs(tmp_path)
    values = [float(line["val/f1_macro"]) for line in read_csv(folder / "metrics.csv") if line["val/f1_macro"]]
    assert row.validation == torch.load(folder / "best.ckpt", weights_only=True)["score"]
    assert any(row.validation == pytest.approx(value, abs=1e-6) for value in values)
    assert row.test == read_json(folder / "test_results.json")["metrics"]["f1_macro"]
    assert (row.state, row.name, row.train) == ("finished", "fitted", "70 % both")
    (folder / "test_results.json").unlink()
    assert state_of(folder) == ("unfinished", "not tested")


def test_checkpoints_below_a_folder_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In natural order; evaluations need no checkpoint, and the trials of a search are left out."""
    caplog.set_level("INFO", "rep")
    folders = [write_run(tmp_path / "rep_seed0" / f"version_{number}") for number in (10, 9)]
    write_run(tmp_path / "rep_test" / "version_0", score=None, test_only=True)
    cut = write_run(tmp_path / "cut" / "version_0", score=None, tested=None)
    empty = tmp_path / "empty" / "version_0"
    empty.mkdir(parents=True)
    assert find_checkpoints([tmp_path]) == [folders[1] / "best.ckpt", folders[0] / "best.ckpt"]
    assert caplog.messages == [f"left out for lack of a checkpoint: {cut}, {empty}"]
    trial = write_run(tmp_path / "search" / "search_trial_0_seed0" / "version_0")
    (tmp_path / "search" / JOURNAL).touch()
    assert trial / "best.ckpt" not in find_checkpoints([tmp_path])
    assert caplog.messages[1].endswith(f": {tmp_path / 'search'}")
    for named in (tmp_path / "search", trial):
        assert find_checkpoints([named]) == [trial / "best.ckpt"]
    assert find_checkpoints([folders[0] / "last.ckpt"]) == [folders[0] / "last.ckpt"]
    with pytest.raises(ConfigError, match=r"found runs without one: .*cut/version_0$"):
        find_checkpoints([tmp_path / "cut"])
