"""The report's section of a search: a real one in small, made-up ones, and what is missing or damaged."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from common.errors import DataError
from run import command_line
from runs.report import make_report
from runs.report.results import read_report_runs
from runs.report.search import Search, read_searches, search_section
from runs.report.table import Table
from runs.sweep import launchers
from runs.sweep.jobs import Job, Outcome
from runs.sweep.search import open_study
from tests.conftest import Workspace
from tests.report_files import edited, text_of, write_run

SPACE = {
    "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
    "memory_length": CategoricalDistribution([12, 24]),
    "weight_decay": FloatDistribution(0, 0.1),
}
TRIALS: list[tuple[Any, ...]] = [
    (0, 0.01, 12, 0.05, 0.31),
    (1, 0.1, 24, 0.0, None),
    (2, 0.001, 24, 0.1, 0.42),
    (3, 0.001, 24, 0.1, 0.42),
    (4, 0.0123456, 12, 0.02, 0.4),
]
"""Number, values and score; trial 1 failed, and trial 3 has the values of trial 2, and so its run."""


def write_search(folder: Path, trials: Sequence[tuple[Any, ...]] = TRIALS) -> Path:
    """A search of made-up scores."""
    folder.mkdir(parents=True)
    study = open_study(folder / "optuna.journal", folder.name)
    for number, *values, score in trials:
        given = dict(zip(SPACE, values, strict=True))
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        study.add_trial(create_trial(params=given, distributions=SPACE, value=score, state=state))
        if number != 3:
            own: dict[str, Any] = {"exp_name": f"{folder.name}_trial_{number}", "test_after_fit": False}
            run = write_run(folder / f"{own['exp_name']}_seed0" / "version_0", tested=None, **own, **given)
            words = json.loads((run / "environment.json").read_text())["command"]
            words += [f"{option}={value}" for option, value in (given | own | {"log_dir": folder}).items()]
            edited(run, "environment.json", command=words)
    return folder


def search_of(*folders: Path) -> Search:
    [search] = read_searches(folders, read_report_runs(folders))
    return search


def table_of(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def real(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of four trials with the real model, and beside it a run that is none of its trials."""
    log_dir = tmp_path_factory.mktemp("real")

    def run_job(job: Job) -> Outcome:
        words = ["run.py", *job.command()[2:]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            assert command_line(words) == 0
        return Outcome(None, 0.0)

    command, *options = workspace.command("max_epoch=1", f"vit={workspace.backbone}", f"log_dir={log_dir}")
    searched = ("search.learning_rate=[1e-4,1e-1]", "search.memory_length=[3,6]", "search_trials=4", "sweep_name=s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "run_job", run_job)
        assert command_line([command, "sweep", *options, *searched]) == 0
    write_run(log_dir / "rep_seed0" / "version_0")
    return log_dir


def test_a_real_search(real: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()}
    make_report([real], tmp_path / "report", {})
    assert {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()} == before
    page = text_of(tmp_path / "report")
    with (real / "s" / "search.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda trial: float(trial["val/f1_macro"]))
    first = table_of(tmp_path / "report", "search_1_best")[0]
    score = f"{100 * float(best['val/f1_macro']):.4f}"
    assert (first["number"], first["val/f1_macro"]) == (best["number"], score)
    assert f"learning_rate={float(best['learning_rate']):.4g}" in page
    # Trials are neither lines of curves nor columns.
    assert sorted(row["kind"] for row in table_of(tmp_path / "report", "runs")) == ["training", *["trial"] * 4]
    assert len(table_of(tmp_path / "report", "ours_mmimdb")) == 1
    runs = {row["runs"] for row in table_of(tmp_path / "report", "options")}
    assert len(runs - {"all"}) == 2, "the run, and the best trial's"


def test_the_section_of_a_search(tmp_path: Path) -> None:
    search = search_of(write_search(tmp_path / "s"))
    section = search_section(search, 1)
    [best], [everything] = section.parts[0].shown, section.parts[0].folded.values()
    assert isinstance(best, Table) and isinstance(everything, Table)
    assert [[cell.text for cell in row.values()] for row in best.cells] == [
        ["2", "complete", "0.001", "24", "0.1", "42.0", "R3"],
        ["4", "complete", "0.01235", "12", "0.02", "40.0", "R4"],
        ["0", "complete", "0.01", "12", "0.05", "31.0", "R1"],
    ], "each set of values once"
    states = [(row["number"], row["state"], row["run"]) for row in everything.rows]
    assert states[:4] == [(0, "complete", "R1"), (1, "failed", "R2"), (2, "complete", "R3"), (3, "complete", "R3")]
    for fact in ("5 trials (4 complete, 1 failed)", "trial 2 (R3)", "validation F1-macro of 42.0 %"):
        assert fact in section.summary
    assert "learning_rate=0.001, memory_length=24 and weight_decay=0.1" in section.summary
    [note] = section.parts[0].notes
    assert note.command == f"optuna-dashboard {tmp_path / 's' / 'optuna.journal'}"
    make_report([tmp_path / "s"], tmp_path / "report", {})
    page = text_of(tmp_path / "report")
    assert "Search s (MM-IMDb)" in page and "test_results.json" not in page


def test_a_search_whose_trials_failed(tmp_path: Path) -> None:
    make_report([write_search(tmp_path / "s", TRIALS[1:2])], tmp_path / "report", {})
    assert "Results are missing: 1 trial (1 failed)" in text_of(tmp_path / "report")


def test_what_is_no_search(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    assert read_searches([run := folder / "s_trial_0_seed0"], read_report_runs([run])) == []
    write_run(tmp_path / "g" / "g_both_0.7_seed0" / "version_0")
    (tmp_path / "g" / "sweep.json").write_text(json.dumps({"format": 1, "grid": {}, "options": {"search": {}}}))
    assert read_searches([tmp_path / "g"], read_report_runs([tmp_path / "g"])) == []
    (folder / "optuna.journal").write_text("no journal\n{}\n")
    with pytest.raises(DataError, match=r"optuna\.journal: not readable"):
        make_report([folder], tmp_path / "report", {})
