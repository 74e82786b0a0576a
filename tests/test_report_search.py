"""The report's section of a search: a real one in small, made-up ones, and what is missing or damaged."""

import csv
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from run import command_line
from runs.report import make_report
from runs.report.results import read_report_runs
from runs.report.search import Search, best_table, read_searches, search_section, training_command
from runs.sweep import launchers
from runs.sweep.jobs import Job, Outcome
from runs.sweep.search import open_study
from tests.conftest import Workspace
from tests.report_files import write_run

SPACE = {
    "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
    "memory_length": CategoricalDistribution([12, 24]),
    "weight_decay": FloatDistribution(0, 0.1),
}
TRIALS: list[tuple[Any, ...]] = [
    (0, "complete", 0.01, 12, 0.05, 0.31),
    (1, "failed", 0.1, 24, 0.0, ""),
    (2, "complete", 0.001, 24, 0.1, 0.42),
    (3, "complete", 0.001, 24, 0.1, 0.42),
    (4, "complete", 0.0123456, 12, 0.02, 0.4),
]
"""Number, state, values and score; trial 3 has the values of trial 2, and so its run."""


def write_search(folder: Path, trials: Sequence[tuple[Any, ...]] = TRIALS) -> Path:
    """A search of made-up scores."""
    folder.mkdir(parents=True)
    study = open_study(folder / "optuna.journal", folder.name)
    for number, state, *values, score in trials:
        given = dict(zip(SPACE, values, strict=True))
        failed = state == "failed"
        study.add_trial(
            create_trial(
                params=given,
                distributions=SPACE,
                value=None if failed else score,
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
            )
        )
        name = f"{folder.name}_trial_{number}"
        if number == 3:
            continue
        run = write_run(
            folder / f"{name}_seed0" / "version_0", tested=None, exp_name=name, test_after_fit=False, **given
        )
        environment = json.loads((run / "environment.json").read_text())
        environment["command"] += [f"{option}={value}" for option, value in given.items()]
        environment["command"] += [f"exp_name={name}", f"log_dir={folder}", "test_after_fit=False"]
        (run / "environment.json").write_text(json.dumps(environment))
    return folder


def search_of(*folders: Path) -> Search:
    [search] = read_searches(folders, read_report_runs(folders))
    return search


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


# The numbers


def test_a_real_search_is_told_of(real: Path, tmp_path: Path) -> None:
    make_report([real], tmp_path / "report", {})
    page = (tmp_path / "report" / "report.md").read_text()
    assert "# Robustness to missing modalities: MM-IMDb and Search" not in page
    with (real / "s" / "search.csv").open() as file:
        trials = list(csv.DictReader(file))
    best = max(trials, key=lambda trial: float(trial["val/f1_macro"]))
    told = page[page.index("## Search s (MM-IMDb)") : page.index("## Runs and configurations")]
    assert "Missing" not in told
    with (tmp_path / "report" / "tables" / "search_1_best.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["number"] == best["number"]
    assert first["val/f1_macro"] == f"{100 * float(best['val/f1_macro']):.4f}"
    assert f"learning\\_rate={float(best['learning_rate']):.4g}" in page
    for name in ("history", "options", "importances"):
        assert (tmp_path / "report" / "figures" / f"search_1_{name}.png").is_file()
    with (tmp_path / "report" / "tables" / "search_1_importances.csv").open() as file:
        shares = {row["option"]: float(row["importance"]) for row in csv.DictReader(file)}
    assert shares.keys() == {"learning_rate", "memory_length"}
    assert sum(shares.values()) == pytest.approx(100, abs=1e-3) and min(shares.values()) >= 0
    command = shlex.split(next(line for line in told.splitlines() if "exp_name=s_best" in line))
    assert [f"learning_rate={best['learning_rate']}", f"memory_length={best['memory_length']}"] == command[-3:-1]
    assert f"log_dir={real}" in command and "test_after_fit=False" not in command


def test_the_command_of_the_best_values_gives_the_score_again(real: Path) -> None:
    search = search_of(real / "s")
    best = search.ranked[0]
    command = training_command(search, best)
    assert command is not None
    assert command_line(shlex.split(command)[1:]) == 0
    result = json.loads((real / "s_best_seed0" / "version_0" / "test_results.json").read_text())
    assert result["missing"]
    [run] = read_report_runs([real / "s_best_seed0"])
    assert run.run.best_validation == pytest.approx(best.value, rel=1e-6)
    shutil.rmtree(real / "s_best_seed0")


def test_trials_are_neither_lines_of_curves_nor_columns(real: Path, tmp_path: Path) -> None:
    make_report([real], tmp_path / "report", {})
    with (tmp_path / "report" / "tables" / "runs.csv").open() as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    assert sorted(kinds) == ["training", *["trial"] * 4]
    header = (tmp_path / "report" / "tables" / "published_mmimdb.csv").read_text().splitlines()[0]
    assert header.count("(ours)") == 2, "one column, and its deviation"
    with (tmp_path / "report" / "tables" / "options.csv").open() as file:
        assert len(next(csv.reader(file))) == 2 + 2, "the run, and the best trial's"


def test_a_folder_with_nothing_but_a_search(tmp_path: Path) -> None:
    make_report([write_search(tmp_path / "s")], tmp_path / "report", {})
    page = (tmp_path / "report" / "report.md").read_text()
    assert page.startswith("# Search s (MM-IMDb)\n")
    assert "test\\_results.json" not in page, "the test split has no part in a search"


def test_the_best_trials_have_each_values_once(tmp_path: Path) -> None:
    search = search_of(write_search(tmp_path / "s"))
    assert best_table(search, "x").shown() == [
        ["2", "complete", "0.001", "24", "0.1", "42.00", "R3"],
        ["4", "complete", "0.01235", "12", "0.02", "40.00", "R4"],
        ["0", "complete", "0.01", "12", "0.05", "31.00", "R1"],
    ]
    section = search_section(search, 1)
    [table] = section.parts[0].folded_tables
    assert [row[:2] for row in table.rows] == [list(trial[:2]) for trial in TRIALS]
    assert table.shown()[3][-1] == "R3", "of the same values, and so of the same run"
    told = section.summary
    assert told.startswith(
        "5 trials (4 complete, 1 failed). The best, trial 2 (R3), reaches a validation F1-macro of 42.00"
    )
    assert "learning_rate=0.001, memory_length=24 and weight_decay=0.1" in told


def test_a_single_run_of_a_search_brings_no_section(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    assert read_searches([run := folder / "s_trial_0_seed0"], read_report_runs([run])) == []


def test_a_grid_is_no_search(tmp_path: Path) -> None:
    write_run(tmp_path / "g" / "g_both_0.7_seed0" / "version_0")
    (tmp_path / "g" / "sweep.json").write_text(json.dumps({"format": 1, "grid": {}, "options": {"search": {}}}))
    assert read_searches([tmp_path], read_report_runs([tmp_path])) == []


def test_options_drawn_log_uniformly_have_a_logarithmic_axis(tmp_path: Path) -> None:
    section = search_section(search_of(write_search(tmp_path / "s")), 1)
    [figure] = section.parts[2].figures
    assert "On a logarithmic axis, as they were drawn: learning_rate." in figure.caption


def test_the_command_drops_what_is_the_trials_own(tmp_path: Path) -> None:
    search = search_of(write_search(tmp_path / "s"))
    assert training_command(search, search.trials[2]) == (
        "python run.py with task_finetune_mmimdb data_root=~/films learning_rate=0.001 memory_length=24 "
        "weight_decay=0.1 exp_name=s_best"
    )


# What is missing

NO_TRIALS = ("The trials are missing", "The history is missing", "The scores are missing", "The command is missing")


@pytest.mark.parametrize("journal", [None, "no journal\n{}\n"])
def test_a_search_without_a_journal_that_can_be_read(tmp_path: Path, journal: str | None) -> None:
    folder = write_search(tmp_path / "s")
    (folder / "search.csv").touch()  # by which the folder is still one of a search
    (folder / "optuna.journal").unlink()
    if journal is not None:
        (folder / "optuna.journal").write_text(journal)
    section = search_section(search_of(folder), 1)
    missing = [one.text for part in section.parts for one in part.missing]
    assert [text for text in missing if text.startswith(NO_TRIALS)] == [missing[i] for i in (0, 1, 2, 4)]
    assert "optuna.journal: " + ("is not there" if journal is None else "not readable") in missing[0]
    make_report([folder], tmp_path / "report", {})
    assert (tmp_path / "report" / "index.html").read_text().count('class="missing"') >= len(missing)
    assert not (tmp_path / "report" / "figures").exists()


def test_the_command_is_missing_where_the_run_does_not_say_its_own(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    (folder / "s_trial_2_seed0" / "version_0" / "environment.json").unlink()
    part = search_section(search_of(folder), 1).parts[-1]
    assert part.commands == [] and "environment.json" in part.missing[0].text


@pytest.mark.parametrize(
    ("trials", "told"), [(TRIALS[:1], "at least 4 complete trials, found 1"), (TRIALS[1:2], "1 trial (1 failed)")]
)
def test_a_search_of_few_trials(tmp_path: Path, trials: Sequence[tuple[Any, ...]], told: str) -> None:
    section = search_section(search_of(write_search(tmp_path / "s", trials)), 1)
    assert told in " ".join([section.summary, *(one.text for part in section.parts for one in part.missing)])
    assert [len(part.figures) for part in section.parts] == [0, *[trials[0][1] == "complete"] * 2, 0, 0]
    make_report([tmp_path / "s"], tmp_path / "report", {})


def test_reading_leaves_the_folder_as_it_was(real: Path) -> None:
    before = {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()}
    assert search_of(real / "s").importances
    assert {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()} == before
