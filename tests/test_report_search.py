"""The report's section of a search: a real one in small, made-up ones, and what is missing or damaged."""

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sweep.launchers
from report import make_report
from report.collect import read_runs
from report.search_section import all_table, best_so_far, best_table, history, scatter, search_section, training_command
from report.searches import Search, read_searches
from run import command_line
from sweep.jobs import Job, Outcome
from tests.conftest import Workspace
from tests.report_files import write_run

SPACE = {"learning_rate": [0.0001, 0.1], "memory_length": [12, 24], "weight_decay": [0, 0.1]}
TRIALS: list[tuple[Any, ...]] = [
    (0, "complete", 0.01, 12, 0.05, 0.31),
    (1, "failed", 0.1, 24, 0.0, ""),
    (2, "complete", 0.001, 24, 0.1, 0.42),
    (3, "complete", 0.001, 24, 0.1, 0.42),
    (4, "complete", 0.0123456, 12, 0.02, 0.4),
]
"""As search.csv has them; trial 3 has the values of trial 2, and so its run."""


def write_search(folder: Path) -> Path:
    """A search of made-up scores, without Optuna's journal."""
    lines: list[list[Any]] = [["number", "state", *SPACE, "val/f1_macro", "folder"]]
    for number, state, *values, score in TRIALS:
        of = 2 if number == 3 else number
        run = folder / f"{folder.name}_trial_{of}_seed0" / "version_0"
        if not run.exists():
            given = dict(zip(SPACE, values, strict=True))
            write_run(run, tested=None, exp_name=run.parent.name, test_after_fit=False, **given)
            environment = json.loads((run / "environment.json").read_text())
            environment["command"] += [f"{name}={value}" for name, value in given.items()]
            environment["command"] += [
                f"exp_name={folder.name}_trial_{of}",
                f"log_dir={folder}",
                "test_after_fit=False",
            ]
            (run / "environment.json").write_text(json.dumps(environment))
        lines.append([number, state, *values, score, run])
    with (folder / "search.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "grid": None, "options": {"search": SPACE}}))
    return folder


def search_of(*folders: Path) -> Search:
    [search] = read_searches(folders, read_runs(folders))
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
        patch.setattr(sweep.launchers, "run_job", run_job)
        assert command_line([command, "sweep", *options, *searched]) == 0
    write_run(log_dir / "rep_seed0" / "version_0")
    return log_dir


# The numbers


def test_a_real_search_is_told_of(real: Path, tmp_path: Path) -> None:
    make_report([real], tmp_path / "report")
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
    best, score = search.ranked[0]
    command = training_command(search, best)
    assert command is not None
    assert command_line(shlex.split(command)[1:]) == 0
    result = json.loads((real / "s_best_seed0" / "version_0" / "test_results.json").read_text())
    assert result["missing"]
    [run] = read_runs([real / "s_best_seed0"])
    assert run.curves is not None
    assert max(value for _, value in run.curves["val/f1_macro"]) == pytest.approx(score, rel=1e-6)
    shutil.rmtree(real / "s_best_seed0")


def test_trials_are_neither_lines_of_curves_nor_columns(real: Path, tmp_path: Path) -> None:
    make_report([real], tmp_path / "report")
    with (tmp_path / "report" / "tables" / "runs.csv").open() as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    assert sorted(kinds) == ["training", *["trial"] * 4]
    header = (tmp_path / "report" / "tables" / "published_mmimdb.csv").read_text().splitlines()[0]
    assert header.count("(ours)") == 2, "one column, and its deviation"
    with (tmp_path / "report" / "tables" / "options.csv").open() as file:
        assert len(next(csv.reader(file))) == 2 + 2, "the run, and the best trial's"


def test_a_folder_with_nothing_but_a_search(tmp_path: Path) -> None:
    make_report([write_search(tmp_path / "s")], tmp_path / "report")
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
    assert [row[:2] for row in all_table(search, "x").rows] == [list(trial[:2]) for trial in TRIALS]
    assert all_table(search, "x").shown()[3][-1] == "R3", "of the same values, and so of the same run"
    told = search_section(search, 1).summary
    assert told.startswith(
        "5 trials (4 complete, 1 failed). The best, trial 2 (R3), reaches a validation F1-macro of 42.00"
    )
    assert "learning_rate=0.001, memory_length=24 and weight_decay=0.1" in told


def test_a_single_run_of_a_search_brings_no_section(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    assert read_searches([run := folder / "s_trial_0_seed0"], read_runs([run])) == []


def test_a_grid_is_no_search(tmp_path: Path) -> None:
    write_run(tmp_path / "g" / "g_both_0.7_seed0" / "version_0")
    (tmp_path / "g" / "sweep.json").write_text(json.dumps({"format": 1, "grid": {}, "options": {"search": {}}}))
    assert read_searches([tmp_path], read_runs([tmp_path])) == []


def test_the_best_so_far() -> None:
    assert best_so_far([0.3, 0.2, 0.5, 0.4]) == [0.3, 0.3, 0.5, 0.5]
    assert best_so_far([]) == []


def test_figures_say_what_they_show(tmp_path: Path) -> None:
    search = search_of(write_search(tmp_path / "s"))
    assert search.scales == {"learning_rate": "log", "memory_length": "choices", "weight_decay": "linear"}
    shown = scatter(search, "x")
    assert "On a logarithmic axis, as they were drawn: learning_rate." in shown.caption
    assert shown.alt.endswith("The best: 42.00 % with learning_rate=0.001, memory_length=24 and weight_decay=0.1.")
    assert "rises from 31.00 % in trial 0 to 42.00 %" in history(search, "x").alt


def test_the_command_drops_what_is_the_trials_own(tmp_path: Path) -> None:
    search = search_of(write_search(tmp_path / "s"))
    assert training_command(search, search.trials[2]) == (
        "python run.py with task_finetune_mmimdb data_root=~/films learning_rate=0.001 memory_length=24 "
        "weight_decay=0.1 exp_name=s_best"
    )


def test_texts_of_a_search_have_no_effect(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    path = folder / "search.csv"
    path.write_text(path.read_text().replace("weight_decay", "<script>$x$ |").replace(",0.05,", ",<img src=x>,"))
    make_report([folder], tmp_path / "report")
    html, page = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert "&lt;script&gt;$x$ |" in html and "&lt;img src=x&gt;" in html
    for text in (html, page):
        assert "<script" not in text and "<img src=x" not in text


# What is missing


def no_csv(folder: Path) -> None:
    (folder / "search.csv").unlink()


def cut_csv(folder: Path) -> None:
    path = folder / "search.csv"
    path.write_text(path.read_text().replace("0.42,", "0.42 %,"))


def other_csv(folder: Path) -> None:
    (folder / "search.csv").write_text("a,b\n1,2\n")


def short_csv(folder: Path) -> None:
    with (folder / "search.csv").open("a") as file:
        file.write("5,complete\n")


def endless_csv(folder: Path) -> None:
    path = folder / "search.csv"
    path.write_text(path.read_text().replace("0.42,", "inf,"))


def binary_csv(folder: Path) -> None:
    (folder / "search.csv").write_bytes(b"\xff\xfe\x00")


def no_record(folder: Path) -> None:
    (folder / "sweep.json").unlink()


def cut_record(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"format": 1')


def other_record(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"options": {"search": [1]}}')


def record_without_an_option(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"options": {"search": {"learning_rate": [0.1, 1]}}}')


def damaged_journal(folder: Path) -> None:
    (folder / "optuna.journal").write_text("no journal\n{}\n")


def no_environment(folder: Path) -> None:
    (folder / "s_trial_2_seed0" / "version_0" / "environment.json").unlink()


NO_TRIALS = ["The trials are missing", "The history is missing", "The scores are missing", "The command is missing"]
LINEAR = "Which options were drawn log-uniformly is missing: sweep.json: "


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (no_csv, [*NO_TRIALS, "search.csv: is not there"]),
        (
            cut_csv,
            [*NO_TRIALS, "search.csv: line 4: not as a search writes it: could not convert string to float: '0.42 %'"],
        ),
        (other_csv, [*NO_TRIALS, "search.csv: line 1: not as a search writes it: expected the columns number, state"]),
        (short_csv, [*NO_TRIALS, "search.csv: line 7: not as a search writes it: expected a value in each column"]),
        (endless_csv, [*NO_TRIALS, "search.csv: line 4: not as a search writes it: val/f1_macro: expected a number"]),
        (binary_csv, [*NO_TRIALS, "search.csv: not readable: "]),
        (no_record, [f"{LINEAR}is not there"]),
        (cut_record, [f"{LINEAR}not readable as JSON"]),
        (other_record, [f"{LINEAR}not as a search writes it"]),
        (record_without_an_option, [f"{LINEAR}the values of memory_length are not as a search writes them"]),
        (damaged_journal, ["Importances are missing: optuna.journal: not readable as Optuna's journal: "]),
        (no_environment, ["The command is missing"]),
    ],
)
def test_what_is_missing_stands_where_it_would(tmp_path: Path, damage: Callable[[Path], None], told: list[str]) -> None:
    folder = write_search(tmp_path / "s")
    damage(folder)
    (folder / "optuna.journal").touch()  # by which the folder is still one of a search
    section = search_section(search_of(folder), 1)
    missing = [one.text for part in section.parts for one in part.missing]
    for text in told:
        assert any(text in one for one in missing), missing
    assert len(missing) == len({text.partition(":")[0] for text in missing}), "each is told once"
    make_report([folder], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('class="missing"') >= len(missing)
    figures = {path.stem for path in (tmp_path / "report" / "figures").glob("search_1_*.png")}
    assert figures == (set() if NO_TRIALS[0] in told else {"search_1_history", "search_1_options"})


def test_importances_take_some_trials(real: Path, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    journal = (real / "s" / "optuna.journal").read_text().splitlines(keepends=True)
    score = next(number for number, line in enumerate(journal) if re.search(r'"values":\s*\[', line))
    (folder / "optuna.journal").write_text("".join(journal[: score + 1]))
    search = search_of(folder)
    assert search.missing == {"importances": "optuna.journal: importances take at least 4 complete trials, found 1"}


def test_a_search_without_a_complete_trial(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s")
    lines = (folder / "search.csv").read_text().splitlines(keepends=True)
    (folder / "search.csv").write_text(lines[0] + lines[2])
    section = search_section(search_of(folder), 1)
    assert section.summary == "Results are missing: 1 trial (1 failed)."
    assert [len(part.figures) for part in section.parts] == [0] * 5
    make_report([folder], tmp_path / "report")


def test_reading_leaves_the_folder_as_it_was(real: Path) -> None:
    before = {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()}
    assert search_of(real / "s").importances
    assert {path: path.read_bytes() for path in sorted((real / "s").rglob("*")) if path.is_file()} == before
