"""Damaged run folders and sweeps, as `runs`, `report`, `robustness`, `sweep` and resume_from=auto read them.

A result, or an error of ours that names the file. Damage that other tests have too is not here: damaged bytes, entries
of a record that are missing, results of something else.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from common.errors import DataError
from engine import resume
from engine.resume import Progress, Training
from run import command_line
from runs.comparable import NOT_THE_TRAINING
from runs.report.results import read_report_runs
from runs.run_table import list_runs
from tests.damage import outcome, with_odd_values
from tests.report_files import TestSet, write_run
from tests.test_sweep import SetUp, Sweep, error_line, stand_in, sweep  # noqa: F401 - two fixtures

Captured = pytest.CaptureFixture[str]


def find_progress(parent: Path, config: dict[str, Any]) -> Progress:
    return resume.find_progress(Training(parent, config, NOT_THE_TRAINING, 4, {}))


LOGITS = "robustness/logits.arrow"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A made-up run with results and logits."""
    folder = write_run(tmp_path / "result" / "rep_seed0" / "version_0")
    TestSet().write(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "odd_values"),
    [("config.json", 3), ("environment.json", 15), ("test_results.json", 15), ("robustness/robustness.json", 1)],
)
def test_odd_values_in_the_files_of_a_run(run: Path, name: str, odd_values: int) -> None:
    outcomes, whole = set(), (run / name).read_bytes()
    for told, content in with_odd_values(json.loads(whole), odd_values):
        (run / name).write_text(json.dumps(content))
        try:
            outcomes.add(outcome(lambda: read_report_runs([run]), run))
            assert all(len(row.note) < 1000 for row in list_runs(run.parents[1]))
            find_progress(run.parent, {"test_after_fit": True, "seed": 0})
        except Exception as error:
            raise AssertionError(f"{name}: {told}") from error
    assert outcomes == {"read", "refused"}


def test_stored_logits_that_are_compressed_are_refused(run: Path) -> None:
    with pa.OSFile(str(run / LOGITS)) as file:
        table = pa.concat_tables([pa.ipc.open_file(file).read_all()] * 50)
    with pa.ipc.new_file(str(run / LOGITS), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"logits\.arrow: not readable as stored logits: it is compressed"):
        read_report_runs([run])


def test_odd_values_in_the_record_and_the_results_of_a_sweep(
    sweep: Sweep,  # noqa: F811
    stand_in: SetUp,  # noqa: F811
    capsys: Captured,
) -> None:
    """Options that another run of the sweep had are those of another sweep; else the record is damaged."""

    def run_grid() -> int:
        return sweep.grid(types="[text]", ratios="[0.5]", seeds="[0]")

    assert run_grid() == 0
    [results] = sweep.folder.rglob("test_results.json")
    for path, odd_values in ((sweep.folder / "sweep.json", 1), (results, 15)):
        outcomes, whole = set(), path.read_bytes()
        for told, content in with_odd_values(json.loads(whole), odd_values):
            path.write_text(json.dumps(content))
            status = run_grid()
            said = capsys.readouterr().err
            assert status in (0, 2), f"{told}: {said[-1000:]}"
            assert status == 0 or len(error_line(said)) < 3000, told
            outcomes.add(status)
            if path.name == "sweep.json" and status == 0:
                path.unlink()  # it was written anew
        path.write_bytes(whole)
        assert outcomes == {0, 2}
    assert sweep.versions() == {"s_text_0.5_seed0": 1}, "a run was made again"


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (5, "not as written by run.py"),
        ([], "sweep.json is of a sweep over a search, not over sweep_types"),
        ({"sweep_types": 5}, "grid: expected lists of values by name, found {{'sweep_types': 5}}"),
        ({"sweep_types": [[]], "sweep_ratios": [], "sweep_seeds": []}, "sweep_types: expected at least"),
    ],
)
def test_a_grid_that_is_none(
    sweep: Sweep,  # noqa: F811
    stand_in: SetUp,  # noqa: F811
    capsys: Captured,
    grid: Any,
    problem: str,
) -> None:
    assert sweep.grid() == 0
    path = sweep.folder / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "grid": grid}))
    assert sweep.grid() == 2
    assert problem.format(folder=sweep.folder) in error_line(capsys.readouterr().err)


def test_a_run_whose_options_are_no_numbers_is_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: Captured
) -> None:
    """Multiplied, this text would fill any memory."""
    config = json.loads((run / "config.json").read_text())
    odd = {"per_gpu_batchsize": "x" * 1000, "num_nodes": 10**15, "num_gpus": 1}
    (run / "config.json").write_text(json.dumps({**config, **odd}))
    with caplog.at_level("WARNING", "rep"):
        assert find_progress(run.parent, config) == Progress()
    assert f"{run}: passed over: samples per batch: expected whole numbers" in caplog.text
    assert command_line(["run.py", "runs", "with", f"log_dir={run.parents[1]}"]) == 0
