"""Sweeps: the runs they start, skip, resume and refuse, and the files they write; mostly with a stand-in for run.py."""

import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
import torch
from optuna.trial import TrialState

from common.locks import locked
from common.strict_json import write_json
from run import command_line
from runs.command_line import is_of_sweep, read_command_line
from runs.sweep import command, jobs
from runs.sweep.jobs import Job, Outcome, Progress, error_in, run_here
from runs.sweep.launchers import Submission, _run_submitted
from tests.conftest import LONG, Captured, Patch, Workspace, error_line, read_csv, read_json
from tests.custom_files import convert, write_labelled
from vilt.datasets.custom import CustomData
from vilt.datasets.specs import custom_spec

STAND_IN = """
import json, os, pathlib, shutil, signal, sys, time
options = dict(argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument)
parent = pathlib.Path(options["log_dir"]) / f"{options['exp_name']}_seed{options.get('seed', 0)}"
folder = parent / f"version_{len(list(parent.glob('version_*')))}"
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps(sys.argv[1:]))
print("at work", flush=True)
here = pathlib.Path(__file__).parent
BEHAVIOUR
if options.get("test_after_fit") != "False":
    score = float(options["missing_ratio"]) + float(options["seed"]) ** 2 / 10
    result = {"metrics": {"f1_macro": score, "f1_micro": score / 2, "accuracy": score / 4}}
    (folder / "test_results.json").write_text(json.dumps(result))
"""
"""Script that writes a run folder as run.py does: F1-macro is the missing ratio plus a tenth of the squared seed,
and accuracy a quarter of that."""

SetUp = Callable[[str], None]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: Patch) -> SetUp:
    """Replaces run.py by a quick script; the function returned adds the given lines to it."""
    path = tmp_path / "stand in" / "run.py"
    path.parent.mkdir()
    monkeypatch.setattr(jobs, "RUN", path)

    def set_up(behaviour: str) -> None:
        path.write_text(STAND_IN.replace("BEHAVIOUR", behaviour))

    set_up("")
    return set_up


def job_in(folder: Path) -> Job:
    """A job that runs the stand-in."""
    options = ("exp_name=run", f"log_dir={folder}", "missing_ratio=0", "seed=0")
    return Job("run_seed0", folder, options, tested=True)


class Sweep:
    """A sweep named `s` with its own log_dir."""

    def __init__(self, workspace: Workspace, log_dir: Path) -> None:
        self.workspace = workspace
        self.log_dir = log_dir
        self.folder = log_dir / "s"

    def command(self, *options: str) -> list[str]:
        common = (f"vit={self.workspace.backbone}", f"log_dir={self.log_dir}", "sweep_name=s", "max_epoch=1")
        return self.workspace.command(*common, *options, name="sweep")

    def run(self, *options: str) -> int:
        return command_line(self.command(*options))

    def grid(self, *options: str, types: str = "[text,both]", ratios: str = "[0.5,0.9]", seeds: str = "[0,1]") -> int:
        return self.run(f"sweep_types={types}", f"sweep_ratios={ratios}", f"sweep_seeds={seeds}", *options)

    def versions(self) -> dict[str, int]:
        """Number of runs so far, keyed by name."""
        return {path.name: len(list(path.glob("version_*"))) for path in self.folder.glob("s_*") if path.is_dir()}

    def arguments(self, run: str, version: int = 0) -> list[str]:
        """The command line that the stand-in received."""
        return read_json(self.folder / run / f"version_{version}" / "config.json")

    def table(self, name: str = "table.csv") -> list[dict[str, str]]:
        return read_csv(self.folder / name)


@pytest.fixture
def sweep(workspace: Workspace, tmp_path: Path) -> Sweep:
    return Sweep(workspace, tmp_path / "result s")


def single_spaced(said: str) -> list[str]:
    """The lines of a table, with runs of spaces reduced to one."""
    return [" ".join(line.split()) for line in said.splitlines()]


def test_published_sensor_tables_count_as_contents_of_a_sweep(tmp_path: Path) -> None:
    """Their names state the modalities."""
    sizes = (3, 2, 4, 4, 10.0)
    spec = custom_spec(CustomData("x", "single", ("a", "b"), "accuracy", (("acc", *sizes), ("gyr", *sizes))))
    (tmp_path / "sensors+acc+gyr_train_missing_both_07.pt").write_bytes(b"1")
    places = {"data_root": tmp_path, "missing_table_root": tmp_path, "vit": None, "tokenizer": None, "teacher": None}
    found = command._contents(SimpleNamespace(task="sensors", load_paths=(), **places), spec)  # type: ignore[arg-type]
    assert list(found) == ["missing_table_root/sensors+acc+gyr_train_missing_both_07.pt"]


def test_a_grid_runs_one_seed_of_each_pattern_first(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    stand_in("(here / 'order').open('a').write(options['exp_name'] + options['seed'] + '\\n')")
    assert sweep.grid("learning_rate=0.003", "sweep_launcher=local") == 0
    order = (jobs.RUN.parent / "order").read_text().split()
    patterns = ["s_text_0.5", "s_text_0.9", "s_both_0.5", "s_both_0.9"]
    assert order == [f"{pattern}{seed}" for seed in (0, 1) for pattern in patterns]
    given = sweep.arguments("s_both_0.9_seed1")
    assert given[0] == "with" and "task_finetune_mmimdb" in given and "learning_rate=0.003" in given
    own = ["missing_type=both", "missing_ratio=0.9", "seed=1", "exp_name=s_both_0.9", f"log_dir={sweep.folder}"]
    assert given[-6:] == [*own, "resume_from=auto"] and not any(word.startswith("sweep_") for word in given)
    assert "at work" in (sweep.folder / "logs" / "s_both_0.9_seed1.log").read_text()
    said = capsys.readouterr()
    assert "sweep s: 8 cells, 0 complete" in said.err
    assert "[8/8] s_both_0.9_seed1: f1_macro 1.0000 (" in said.err and " left)" not in said.err.splitlines()[-1]


def test_the_table_has_mean_and_standard_deviation_over_seeds(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    assert sweep.grid(seeds="[0,1,2]", types="[image,both]") == 0
    rows, columns = sweep.table(), ("missing_type", "ratio", "image_available", "text_available")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        *(("image", "0.5", "0.5", "1.0"), ("image", "0.9", "0.1", "1.0")),
        *(("both", "0.5", "0.75", "0.75"), ("both", "0.9", "0.55", "0.55")),
    ]
    # values 0.9, 0.9 + 0.1 and 0.9 + 0.4
    mean = 0.9 + 0.5 / 3
    std = math.sqrt(sum((value - mean) ** 2 for value in (0.9, 1.0, 1.3)) / 2)
    assert float(rows[1]["f1_macro_mean"]) == pytest.approx(mean)
    assert float(rows[1]["f1_macro_std"]) == pytest.approx(std)
    assert float(rows[1]["f1_micro_mean"]) == pytest.approx(mean / 2)
    assert [(row["complete"], row["failed"], row["open"]) for row in rows] == [("3", "0", "0")] * 4
    said = capsys.readouterr().out
    assert f"image 0.9 10 % 100 % {mean:.4f} ± {std:.4f} 3 of 3" in single_spaced(said)
    assert str(sweep.folder / "table.csv") in said


def test_a_second_call_runs_only_added_cells(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    """Without any, it only shows the table again."""
    assert sweep.grid() == 0
    table, shown = (sweep.folder / "table.csv").read_text(), capsys.readouterr().out
    stand_in("sys.exit('error: not to be run again')")
    assert sweep.grid() == 0
    said = capsys.readouterr()
    assert "sweep s: 8 cells, 8 complete" in said.err
    assert (said.out, (sweep.folder / "table.csv").read_text()) == (shown, table)
    stand_in("")
    assert sweep.grid(seeds="[1,0]", types="[text,both,image]", ratios="[0.5,0.7]") == 0
    assert "sweep s: 12 cells, 4 complete" in capsys.readouterr().err
    assert set(sweep.versions().values()) == {1} and len(sweep.versions()) == 16
    grid = read_json(sweep.folder / "sweep.json")["grid"]
    assert (grid["sweep_types"], grid["sweep_ratios"]) == (["text", "both", "image"], [0.5, 0.7])
    assert grid["sweep_seeds"] == [1, 0]


def test_a_grid_may_vary_further_options(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    decay_power = "sweep_over.decay_power=[1,cosine]"
    one_pattern: Any = {"types": "both", "ratios": "0.5"}
    assert sweep.grid("sweep_over.memory_depth=[1,2]", decay_power, **one_pattern) == 0
    names = {f"s_{power}_memory_depth-{depth}_both_0.5" for depth in (1, 2) for power in ("decay_power-1.0", "cosine")}
    assert set(sweep.versions()) == {f"{name}_seed{seed}" for name in names for seed in (0, 1)}
    given = sweep.arguments("s_cosine_memory_depth-2_both_0.5_seed1")
    assert "memory_depth=2" in given and "decay_power=cosine" in given and not any("sweep_over" in g for g in given)
    rows, columns = sweep.table(), ("memory_depth", "decay_power", "complete")
    assert [" ".join(row[name] for name in columns) for row in rows] == [
        "1 1.0 2",
        "2 1.0 2",
        "1 cosine 2",
        "2 cosine 2",
    ]
    said = capsys.readouterr().out
    assert any(line.startswith("decay_power memory_depth missing ratio") for line in single_spaced(said))
    assert sweep.grid("sweep_over.memory_depth=[1,2,3]", decay_power, **one_pattern) == 0
    assert "sweep s: 12 cells, 8 complete" in capsys.readouterr().err
    assert sweep.grid("sweep_name=few", "sweep_over.label_ratio=[0.01,0.1,1]", **one_pattern) == 0
    assert any(line.startswith("label_ratio missing ratio") for line in single_spaced(capsys.readouterr().out))


@pytest.mark.parametrize("described", [(), ("rep_described",)])
def test_the_named_ablation_trains_its_four_cells(sweep: Sweep, described: tuple[str, ...]) -> None:
    """Of REP as described, a cell without FAR has no replay either."""
    words = (*described, "ablation", "memory_depth=1", "sweep_launcher=commands")
    assert sweep.grid(*words, types="both", ratios="0.5", seeds="0") == 0
    lines = (sweep.folder / "commands.txt").read_text().splitlines()
    cells = [(far, fmb) for far in ("far=False", "far=True") for fmb in ("fmb=False", "fmb=True")]
    for line, cell in zip(lines, cells, strict=True):
        words = tuple(shlex.split(line))[1:]
        assert set(cell) <= set(words) and "ablation" not in words
        assert not any(word.startswith("sweep_") for word in words)
        trial = [word for word in words if word != "resume_from=auto"]
        assert command_line([*trial, "fast_dev_run=True"]) == 0


def test_options_of_the_sweep_in_a_file_stay_out_of_its_runs(sweep, stand_in, tmp_path):
    """So do those of a named config; the other options in the file reach the runs."""
    file = tmp_path / "mine.json"
    write_json(file, {"sweep_over": {"memory_depth": [1, 2]}, "sweep_seeds": [5], "learning_rate": 0.003})
    options: list[str] = ["rep_described", str(file), "sweep_types=[text]", "sweep_ratios=[0.5]"]
    assert sweep.run(*options) == 0
    assert set(sweep.versions()) == {f"s_memory_depth-{depth}_text_0.5_seed5" for depth in (1, 2)}
    words = sweep.arguments("s_memory_depth-1_text_0.5_seed5")
    assert "rep_described" in words and str(file) not in words
    asked = read_command_line(words, {"main": None})
    assert not any(map(is_of_sweep, asked.chosen)) and asked.updates["learning_rate"] == 0.003
    write_json(file, {"learning_rate": 0.003})
    assert sweep.run(*options, "sweep_launcher=commands", "sweep_over.memory_depth=[1,2]", "sweep_seeds=[6]") == 0
    lines = (sweep.folder / "commands.txt").read_text().splitlines()
    assert len(lines) == 2 and all(shlex.quote(str(file)) in line for line in lines)


def test_a_search_in_a_file(sweep: Sweep, scores: SetUp, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_json(file, {"search": {"memory_length": [3, 6]}, "search_trials": 2})
    assert sweep.run(str(file)) == 0
    assert not any(map(is_of_sweep, read_command_line(sweep.arguments("s_trial_0_seed0"), {"main": None}).chosen))


def test_other_options_under_the_same_name_are_refused(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    assert sweep.grid() == 0
    before = (sweep.folder / "sweep.json").read_text()
    assert sweep.grid("weight_decay=0.5", "decay_power=cosine") == 2
    differing = "weight_decay (there 0.02, here 0.5), decay_power (there 1, here 'cosine')"
    said = error_line(capsys)
    assert all(fact in said for fact in ("sweep_name=s: ", f"{sweep.folder / 'sweep.json'} describes", differing)), said
    assert sweep.run("search.learning_rate=[1e-3,1e-1]") == 2
    assert "search (there {}, here {'learning_rate': [0.001, 0.1]})" in error_line(capsys)
    assert (sweep.folder / "sweep.json").read_text() == before
    assert sweep.grid("num_workers=1", "sweep_launcher=commands") == 0, "options that do not change results may differ"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable as JSON"),
        ('{"format": 2}', "expected format 1, found 2"),
        ('{"format": 1}', "KeyError 'options'"),
        ("[]", "expected a JSON object, found a list"),
    ],
)
def test_a_damaged_record(sweep: Sweep, stand_in: SetUp, capsys: Captured, content: str, problem: str) -> None:
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "sweep.json").write_text(content)
    assert sweep.grid() == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {sweep.folder / 'sweep.json'}: ") and problem in line
    assert sweep.versions() == {}
    shutil.rmtree(sweep.log_dir)
    sweep.log_dir.touch()
    assert sweep.grid() == 2
    assert error_line(capsys).startswith(f"error: log_dir: cannot write to {sweep.folder}: ")


def test_failed_cells_are_listed_and_the_others_run(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    stand_in(
        "if options['exp_name'] == 's_text_0.9':\n"
        "    sys.exit('warning: odd\\nerror: no films at all' + options['seed'])\n"
        "if options['exp_name'] + options['seed'] == 's_both_0.91': sys.exit(0)\n"
        "if options['exp_name'] + options['seed'] == 's_both_0.50':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert sweep.grid() == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: 4 of 8 cells failed; the same command tries only these again"
    assert "[2/8] s_text_0.9_seed0: failed: no films at all0 (" in said.err
    logs = sweep.folder / "logs"
    assert said.out[said.out.index("failed:\n") :].splitlines() == [
        "failed:",
        "  s_text_0.9_seed0: no films at all0",
        f"    {logs / 's_text_0.9_seed0.log'}",
        "  s_both_0.5_seed0: killed by SIGKILL",
        f"    {logs / 's_both_0.5_seed0.log'}",
        "  s_text_0.9_seed1: no films at all1",
        f"    {logs / 's_text_0.9_seed1.log'}",
        "  s_both_0.9_seed1: it ended without test_results.json",
        f"    {logs / 's_both_0.9_seed1.log'}",
        "",
    ]
    counts = {
        (row["missing_type"], row["ratio"]): (row["complete"], row["failed"], row["open"], row["f1_macro_mean"])
        for row in sweep.table()
    }
    assert counts["text", "0.9"] == ("0", "2", "0", "") and counts["both", "0.5"] == ("1", "1", "0", "0.6")
    shown = single_spaced(said.out)
    assert "text 0.9 100 % 10 % – 0 of 2 2" in shown and "both 0.5 75 % 75 % 0.6000 1 of 2 1" in shown
    stand_in("")
    assert sweep.grid() == 0
    assert "sweep s: 8 cells, 4 complete" in capsys.readouterr().err
    again = {name for name, count in sweep.versions().items() if count == 2}
    assert again == {"s_text_0.9_seed0", "s_text_0.9_seed1", "s_both_0.5_seed0", "s_both_0.9_seed1"}
    log = (logs / "s_text_0.9_seed0.log").read_text()
    assert "no films at all0" in log and log.count("$ ") == 2, "the log keeps both attempts"


RUNS_ELSEWHERE = f"sys.exit('error: {jobs.BUSY} in x (process 77 on host)')"


def test_a_cell_running_elsewhere_has_not_failed(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    """A killed sweep leaves its runs to go on. At the end, it is read again."""
    stand_in(f"if options['seed'] == '1': {RUNS_ELSEWHERE}")
    grid: Any = {"types": "text", "ratios": "0.5"}
    assert sweep.grid(**grid) == 2
    said = capsys.readouterr()
    assert said.err.endswith("error: 1 of 2 cells running elsewhere; the same command reads their results\n")
    assert "[2/2] s_text_0.5_seed1: running elsewhere: process 77 on host (" in said.err
    assert "elsewhere:\n  s_text_0.5_seed1: process 77 on host\n" in said.out and "failed" not in said.out
    assert [(row["complete"], row["failed"], row["open"]) for row in sweep.table()] == [("1", "0", "1")]
    other = "shutil.copytree(folder, parent.parent / 's_text_0.5_seed1' / 'version_9')"
    result = '{"metrics": {"f1_macro": 0.5}}'
    stand_in(
        f"if options['seed'] == '1': {RUNS_ELSEWHERE}\n"
        f"(folder / 'test_results.json').write_text('{result}')\n"
        f"if options['seed'] == '2': {other}"
    )
    assert sweep.grid(seeds="[0,1,2]", **grid) == 0
    assert "running elsewhere" not in capsys.readouterr().out
    assert [(row["complete"], row["failed"], row["open"]) for row in sweep.table()] == [("3", "0", "0")]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("one\nerror: first\nerror: second\nlast", "second"),
        ("Traceback\n  File x\nRuntimeError: bad shape\n", "RuntimeError: bad shape"),
        ("torch.OutOfMemoryError: CUDA\nloading…\n", "torch.OutOfMemoryError: CUDA"),
        ("a test: RuntimeError: quoted\nbye\n\n", "bye"),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("\n", "it ended without output"),
    ],
)
def test_the_most_telling_line_of_the_output_is_the_error(said: str, expected: str) -> None:
    assert error_in(said) == expected


def test_two_sweeps_of_the_same_name_cannot_run_at_once(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    with locked(sweep.folder / ".lock", "never said"):
        assert sweep.grid() == 2
    line = error_line(capsys)
    assert line.startswith(f"error: sweep_name=s: another sweep of this name is running in {sweep.log_dir} (process ")
    assert f"(process {os.getpid()} on " in line
    assert sweep.versions() == {}
    assert sweep.grid() == 0, "the lock ends with its holder"


def test_a_run_completed_meanwhile_is_skipped_and_its_newest_version_counts(tmp_path: Path, stand_in: SetUp) -> None:
    stand_in("sys.exit('error: not to be run')")
    job = job_in(tmp_path)
    assert job.newest("best.ckpt") is None and job.result is None
    for version in ("version_9", "version_10", "version_x"):
        (tmp_path / "run_seed0" / version).mkdir(parents=True)
        (tmp_path / "run_seed0" / version / "test_results.json").touch()
    assert job.result == tmp_path / "run_seed0" / "version_10" / "test_results.json"
    assert Job("run_seed0", tmp_path, (), tested=False).result is None, "a test result does not complete a trial"
    assert [outcome.error for _, outcome in run_here([job])] == [None]
    assert not job.log.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_interrupts_the_run_and_shows_the_command_that_resumes(sweep, stand_in, capsys, number):
    """The sweep alone gets the signal; it interrupts the run, which may shut down properly."""
    stand_in(
        "if options['missing_type'] == 'both':\n"
        "    try:\n"
        f"        os.kill(os.getppid(), {int(number)})\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt: (here / 'asked').touch(); sys.exit(1)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert sweep.grid(seeds="0", ratios="0.5") == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped; ")]
    interpreter, script, *arguments = shlex.split(line.removeprefix("stopped; the same command resumes: "))
    assert (interpreter, script) == (sys.executable, str(jobs.RUN))
    stand_in("")
    assert command_line(["run.py", *arguments]) == 0
    assert (jobs.RUN.parent / "asked").exists()
    assert sweep.versions() == {"s_text_0.5_seed0": 1, "s_both_0.5_seed0": 2}


def test_a_run_that_does_not_stop_is_killed(sweep: Sweep, stand_in: SetUp, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.2)
    stand_in(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "(here / 'pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    assert sweep.grid() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((jobs.RUN.parent / "pid").read_text()), 0)


def test_parallel_cells_are_stopped_together_and_resumed(sweep, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "POLL_S", 0.02)
    stand_in(
        "mark = here / f\"{options['exp_name']}{options['seed']}\"\n"
        "mark.touch()\n"
        "try:\n"
        "    while len(list(here.glob('s_text_0.5*'))) < 2: time.sleep(0.01)\n"
        "    if options['seed'] == '1': os.kill(os.getppid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt: mark.write_text('asked'); sys.exit(1)\n"
    )
    options: Any = {"types": "text", "ratios": "0.5", "seeds": "[0,1,2]"}
    assert sweep.grid("sweep_parallel=2", **options) == 130
    marks = {path.name: path.read_text() for path in jobs.RUN.parent.glob("s_text*")}
    assert marks == {"s_text_0.50": "asked", "s_text_0.51": "asked"}, "the third did not start"
    capsys.readouterr()
    stand_in("if options['seed'] == '2': sys.exit('error: no films')")
    assert sweep.grid("sweep_parallel=2", **options) == 2
    said = capsys.readouterr()
    assert sweep.versions() == {"s_text_0.5_seed0": 2, "s_text_0.5_seed1": 2, "s_text_0.5_seed2": 1}
    assert all(f"[{number}/3] s_text_0.5_seed" in said.err for number in (1, 2, 3))
    [row] = sweep.table()
    assert (row["complete"], row["failed"], row["open"]) == ("2", "1", "0")


@pytest.mark.parametrize(
    ("visible", "wanted", "expected"),
    [
        (None, 1, ["0", "1", "2", "0"]),
        ("4,7", 1, ["4", "7", "4", "7"]),
        (None, 2, ["0,1", "2,0", "1,2", "0,1"]),
        ("5", 1, [None] * 4),
        (None, 0, [None] * 4),
    ],
)
def test_gpus_are_shared_out(monkeypatch: Patch, visible: str | None, wanted: int, expected: list[str | None]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [jobs.gpus_of(place, wanted).get("CUDA_VISIBLE_DEVICES") for place in range(4)] == expected


def test_listed_commands_can_be_run_unchanged(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    stand_in("if options['missing_type'] == 'both': sys.exit(1)")
    # The number of GPUs is checked by the runs themselves, on their machine.
    options = ("sweep_launcher=commands", "num_nodes=2", "batch_size=8", "num_gpus=99", "precision=16")
    assert sweep.grid(*options, seeds="0", ratios="0.5") == 0
    said = capsys.readouterr()
    lines = (sweep.folder / "commands.txt").read_text().splitlines()
    assert said.out.splitlines() == lines and len(lines) == 2
    assert sweep.versions() == {}, "nothing was run"
    statuses = [subprocess.run(line, shell=True, check=False).returncode for line in lines]
    assert statuses == [0, 1]
    assert {"num_nodes=2", "num_gpus=99", "precision=16"} < set(sweep.arguments("s_text_0.5_seed0"))
    assert sweep.grid(*options, seeds="0", ratios="0.5") == 0
    assert "2 cells, 1 complete" in capsys.readouterr().err
    assert (sweep.folder / "commands.txt").read_text() == f"{lines[1]}\n"


def test_submitit_runs_the_cells(sweep: Sweep, capsys: Captured) -> None:
    """The real run.py, through submitit's local executor; a file is in the way of one cell's folder."""
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "s_both_0.5_seed1").touch()
    options = ("sweep_launcher=submitit_local", "sweep_slurm.timeout_min=5", "sweep_slurm.partition=any")
    assert sweep.grid(*options, types="both", ratios="0.5") == 2
    said = capsys.readouterr()
    assert "s_both_0.5_seed0 is job " in said.err
    assert f"  s_both_0.5_seed1: log_dir: cannot write to {sweep.folder / 's_both_0.5_seed1'}: " in said.out
    folder = sweep.folder / "s_both_0.5_seed0" / "version_0"
    config = read_json(folder / "config.json")
    assert config["missing_ratio"] == {"train": 0.5, "val": 0.5, "test": 0.5}
    result = read_json(folder / "test_results.json")
    [row] = sweep.table()
    assert (float(row["f1_macro_mean"]), row["complete"], row["failed"]) == (result["metrics"]["f1_macro"], "1", "1")


def test_jobs_are_reported_as_they_end_and_cancelled_on_exit(tmp_path: Path) -> None:
    trace = RuntimeError("Job (task=0) failed during processing with trace:\n-----\nOSError: disk full\n-----\n")
    results: dict[str, Any] = {"slow": None, "well": Outcome(None, 2.0), "broken": trace}
    handles = {name: Mock(job_id=name, **{"done.return_value": name != "slow"}) for name in results}
    for name, handle in handles.items():
        handle.result.side_effect = [results[name]]
    executor: Any = SimpleNamespace(batch=nullcontext, submit=lambda submission: handles[submission.job.name])
    outcomes = _run_submitted(executor, [Job(name, tmp_path, (), tested=True) for name in results])
    reported = {job.name: outcome for job, outcome in (next(outcomes), next(outcomes))}
    assert reported == {"well": Outcome(None, 2.0), "broken": Outcome("OSError: disk full", 0.0)}
    outcomes.close()
    assert [handle.cancel.called for handle in handles.values()] == [True, False, False]


def test_runs_of_a_sweep_do_not_see_slurm_task_variables(tmp_path: Path, stand_in: SetUp, monkeypatch: Patch) -> None:
    """A cluster job that reaches its time limit is queued again for the same run."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    stand_in("print(os.environ.get('SLURM_NTASKS'), os.environ['SLURM_JOB_ID'])")
    submission = Submission(job_in(tmp_path))
    assert submission.checkpoint().result().error is None and submission.job.result is not None
    assert "None 77" in submission.job.log.read_text().splitlines()


@LONG
def test_the_best_command_of_a_search_repeats_its_score(sweep: Sweep, capsys: Captured) -> None:
    assert sweep.run("search.learning_rate=[1e-3,1e-1]", "search.memory_length=[3,6]", "search_trials=2") == 0
    said = capsys.readouterr().out
    trials = sweep.table("search.csv")
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    for trial in trials:
        folder = Path(trial["folder"])
        config = read_json(folder / "config.json")
        assert config["learning_rate"] == float(trial["learning_rate"])
        assert config["memory_length"] == int(trial["memory_length"])
        assert torch.load(folder / "best.ckpt", weights_only=True)["score"] == float(trial["val/f1_macro"])
        assert not (folder / "test_results.json").exists(), "a search does not use the test split"
    best = max(trials, key=lambda trial: float(trial["val/f1_macro"]))
    line = said[said.index("to train and test with the best values:") :].splitlines()[2]
    interpreter, script, *arguments = shlex.split(line)
    assert (interpreter, Path(script).name) == (sys.executable, "run.py")
    assert command_line(["run.py", *arguments]) == 0
    trained = sweep.log_dir / "s_best_seed0" / "version_0"
    score = torch.load(trained / "best.ckpt", weights_only=True)["score"]
    assert score == float(best["val/f1_macro"])
    assert (trained / "test_results.json").exists()


@pytest.fixture
def scores(stand_in: SetUp) -> SetUp:
    """Trials of the stand-in score their memory_length / 100."""
    for length in (3, 6, 9, 12):
        torch.save({"score": length / 100}, jobs.RUN.parent / f"{length}.ckpt")
    copy = "shutil.copy(here / (options['memory_length'] + '.ckpt'), folder / 'best.ckpt')\n"

    def set_up(behaviour: str) -> None:
        stand_in(f"{behaviour}\n{copy}")

    set_up("")
    return set_up


SPACE = ("search.memory_length=[3,6,9,12]", "search.learning_rate=[1e-4,1e-1]", "search.weight_decay=[0,0.1]")


def test_a_search_tries_values_and_shows_the_best(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    assert sweep.run(*SPACE, "search_trials=12", "missing_ratio=0.5") == 0
    said = capsys.readouterr()
    trials = sweep.table("search.csv")
    columns = ["number", "state", "learning_rate", "memory_length", "weight_decay", "val/f1_macro", "folder"]
    assert list(trials[0]) == columns
    assert [trial["number"] for trial in trials] == [str(number) for number in range(12)]
    for trial in trials:
        assert int(trial["memory_length"]) / 100 == float(trial["val/f1_macro"])
        assert 1e-4 <= float(trial["learning_rate"]) <= 1e-1 and 0 <= float(trial["weight_decay"]) <= 0.1
        assert trial["folder"] == str(sweep.folder / f"s_trial_{trial['number']}_seed0" / "version_0")
    rates = [float(trial["learning_rate"]) for trial in trials]
    assert statistics.median(rates) < 0.02, "log-uniform: a linear one would have its median at 0.05"
    arguments = sweep.arguments("s_trial_7_seed0")
    values = [f"{name}={trials[7][name]}" for name in columns[2:5]]
    trial_options = ["exp_name=s_trial_7", f"log_dir={sweep.folder}", "test_after_fit=False", "resume_from=auto"]
    assert arguments[-7:] == [*values, *trial_options]
    assert "missing_ratio=0.5" in arguments and not any(argument.startswith("search") for argument in arguments)
    best = next(trial for trial in trials if trial["memory_length"] == "12")
    shown = said.out.splitlines()
    first = next(line for line in shown if line.startswith("trial "))
    rate, decay = (f"{float(best[name]):.4g}" for name in ("learning_rate", "weight_decay"))
    assert first.split() == ["trial", best["number"], rate, "12", decay, "0.1200"]
    assert sum(line.startswith("trial ") for line in shown) == 5
    assert str(Path(best["folder"]) / "best.ckpt") in said.out
    command = shlex.split(shown[shown.index("to train and test with the best values:") + 2])
    wanted = [f"learning_rate={best['learning_rate']}", "memory_length=12", f"weight_decay={best['weight_decay']}"]
    assert command[-4:] == [*wanted, "exp_name=s_best"]
    assert f"log_dir={sweep.log_dir}" in command and not any(part.startswith("search") for part in command)
    last = f"[12/12] s_trial_11_seed0: val/f1_macro {float(trials[11]['val/f1_macro']):.4f} with learning_rate="
    assert last in said.err


def test_a_search_in_parts_tries_the_same_values(workspace: Workspace, tmp_path: Path, scores: SetUp) -> None:
    whole, parts = Sweep(workspace, tmp_path / "whole"), Sweep(workspace, tmp_path / "parts")
    assert whole.run(*SPACE, "search_trials=13") == 0
    for trials in (4, 11, 13, 13):
        assert parts.run(*SPACE, f"search_trials={trials}") == 0
        assert len(parts.table("search.csv")) == trials
    assert set(parts.versions().values()) == {1}
    columns = ("number", "state", "memory_length", "learning_rate", "weight_decay", "val/f1_macro")
    at_once, in_parts = (
        [[trial[column] for column in columns] for trial in sweep.table("search.csv")] for sweep in (whole, parts)
    )
    assert at_once == in_parts
    assert len({trial[3] for trial in at_once}) == 13


def test_an_interrupted_trial_is_resumed(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    scores("if 'trial_2' in options['exp_name']: os.kill(os.getppid(), 2); time.sleep(9)")
    assert sweep.run(*SPACE, "search_trials=4") == 130
    scores("")
    capsys.readouterr()
    assert sweep.run(*SPACE, "search_trials=4") == 0
    said = capsys.readouterr().err
    assert "search s: 4 trials wanted; so far 2 complete, 1 cut off" in said and "[4/4] s_trial_3_seed0" in said
    assert sweep.arguments("s_trial_2_seed0", 1) == sweep.arguments("s_trial_2_seed0")
    trials = sweep.table("search.csv")
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    assert trials[2]["folder"] == str(sweep.folder / "s_trial_2_seed0" / "version_1")


def test_a_trial_running_elsewhere_is_read_later(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    scores(f"if 'trial_1' in options['exp_name']: {RUNS_ELSEWHERE}")
    assert sweep.run(*SPACE, "search_trials=3") == 2
    assert [trial["state"] for trial in sweep.table("search.csv")] == ["complete", "cut off", "complete"]
    assert "s_trial_1_seed0: process 77 on host\n" in capsys.readouterr().out
    scores("")
    assert sweep.run(*SPACE, "search_trials=3") == 0
    assert [trial["state"] for trial in sweep.table("search.csv")] == ["complete"] * 3


def test_failed_trials_are_recorded_and_the_search_goes_on(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    """There is no best trial until one is complete."""
    torch.save({"score": float("nan")}, jobs.RUN.parent / "nan.ckpt")
    scores(
        "if options['exp_name'] == 's_trial_0': sys.exit('error: the loss became nan')\n"
        "if options['exp_name'] == 's_trial_1': sys.exit(0)\n"
        "if options['exp_name'] == 's_trial_2': options['memory_length'] = 'nan'\n"
    )
    assert sweep.run(*SPACE, "search_trials=3") == 2
    said = capsys.readouterr()
    assert said.err.endswith("error: 3 of 3 trials failed; the same command tries as many new ones\n")
    assert "best values" not in said.out
    assert said.out[said.out.index("failed:\n") :].splitlines()[1:-1:2] == [
        "  s_trial_0_seed0: the loss became nan",
        "  s_trial_1_seed0: it ended without best.ckpt: no validation gave val/f1_macro",
        "  s_trial_2_seed0: val/f1_macro is not a number",
    ]
    assert sweep.run(*SPACE, "search_trials=3") == 0
    trials = [(trial["state"], trial["val/f1_macro"] == "") for trial in sweep.table("search.csv")]
    assert trials == [("failed", True)] * 3 + [("complete", False)] * 3


def test_repeated_values_are_not_trained_twice(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    assert sweep.run("search.memory_length=[3,12]", "search_trials=6") == 0
    trials = sweep.table("search.csv")
    assert len(trials) == 6 and len(sweep.versions()) == 2
    for trial in trials:
        first = next(other for other in trials if other["memory_length"] == trial["memory_length"])
        assert (trial["val/f1_macro"], trial["folder"]) == (first["val/f1_macro"], first["folder"])
    assert sum(line.startswith("trial ") for line in capsys.readouterr().out.splitlines()) == 2


def test_a_trial_interrupted_while_drawing_its_values_fails(sweep: Sweep, scores: SetUp) -> None:
    assert sweep.run(*SPACE, "search_trials=1") == 0
    journal = optuna.storages.journal.JournalFileBackend(str(sweep.folder / "optuna.journal"))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
    study.ask()
    assert sweep.run(*SPACE, "search_trials=2") == 0
    assert [trial["state"] for trial in sweep.table("search.csv")] == ["complete", "failed", "complete"]
    assert study.get_trials()[1].state == TrialState.FAIL


def test_a_damaged_journal_is_refused(sweep: Sweep, scores: SetUp, capsys: Captured) -> None:
    assert sweep.run(*SPACE, "search_trials=1") == 0
    (sweep.folder / "optuna.journal").write_text("{\n{\n")
    assert sweep.run(*SPACE, "search_trials=1") == 2
    expected = f"error: {sweep.folder / 'optuna.journal'}: not readable as Optuna's journal: "
    assert error_line(capsys).startswith(expected)


WRONG = {
    "sweep_name=a/b": "sweep_name: expected the name of a folder, without slashes, found 'a/b'",
    "sweep_types=[text,audio]": "sweep_types: expected text or image or both, found 'audio'",
    "sweep_ratios=[0.5,0.50]": "sweep_ratios: expected each value once, found 0.5 twice",
    "sweep_seeds=[0,4294967296]": "sweep_seeds: expected an integer of at least 0 and at most 4294967295, found 42949",
    "sweep_slurm=gpu": "sweep_slurm: expected a dictionary, or one entry as in sweep_slurm.NAME=VALUE, found 'gpu'",
    "sweep_slurm.partition=gpu": "sweep_slurm: expected sweep_launcher=slurm or submitit_local, found local",
    "sweep_launcher=slurm": 'sweep_launcher=slurm: Could not detect "srun"',
    "sweep_launcher=submitit_local sweep_slurm.cores=2": "sweep_slurm: Unknown argument 'cores' for executor 'slurm'",
    "sweep_launcher=submitit_local sweep_slurm.timeout_min=long": 'sweep_slurm: Parameter "timeout_min" expected type',
    "sweep_launcher=submitit_local sweep_slurm.nodes=2": "sweep_slurm.nodes: expected 1, since a run starts its proce",
    "sweep_parallel=2 sweep_launcher=slurm": "sweep_parallel: is for the runs of a grid",
    "sweep_parallel=2 sweep_launcher=commands": "sweep_parallel: is for the runs of a grid",
    "sweep_parallel=2 search.learning_rate=[1e-3,1]": "sweep_parallel: is for the runs of a grid",
    "missing_ratio=0.5": "missing_ratio: differs between the cells of a sweep; expected sweep_ratios",
    "missing_type=text": "missing_type: differs between the cells of a sweep; expected sweep_types",
    "test_ratio=0.5": "test_ratio: differs between the cells of a sweep; expected sweep_ratios",
    "seed=3": "seed: differs between the cells of a sweep; expected sweep_seeds",
    "exp_name=x": "exp_name: runs of a sweep get their names from it; expected sweep_name",
    "fast_dev_run=True": "fast_dev_run: contradicts a sweep, which trains and evaluates its runs itself",
    "test_after_fit=False": "test_after_fit: contradicts a sweep",
    "sweep_over.memory_lengt=[3]": "sweep_over: unknown option memory_lengt; did you mean memory_length?",
    "sweep_over.seed=[1,2]": "sweep_over.seed: expected an option of the model or its training, found 'seed'",
    "sweep_over.memory_length=[3,4]": "sweep_over: {'memory_length': 4} is not possible: memory_length: expected a pos",
    "search.memory_length=[3,6] sweep_over.memory_depth=[1,2]": "sweep_over: is for a grid; a search has one missing",
    "num_nodes=2 batch_size=8": "num_nodes: expected 1, since a sweep starts each run on a single machine",
    "search.learning_rate=0.1": "search.learning_rate: expected a list of at least two values, found [0.1]",
    "search.learning_rate=[0,1]": "search.learning_rate: expected a number above 0, found 0",
    "search.learning_rate=[1e-1,1e-4]": "search.learning_rate: expected a range, the lower end first, found [0.1, 0.0",
    "search.warmup_steps=[0.1,10]": "search.warmup_steps: expected a range of shares, all below 1, or of step counts",
    "search.warmup_steps=[0,1]": "search.warmup_steps: expected a range of shares, all below 1, or of step counts",
    "search.memory_length=[12,few]": "search.memory_length: expected an integer of at least 3, found 'few'",
    "search.memory_length=[12,12]": "search.memory_length: expected each value once, found 12 twice",
    "search.memory_length=[6,10]": "search.memory_length: 10 is not possible: memory_length: expected a positive multi",
    "search_trials=5": "search_trials: expected options to search, as in search.learning_rate=[1e-4,1e-1]",
    "search.memory_length=[3,6] sweep_seeds=[1,2]": "sweep_seeds: is for a grid; a search has one missing_type",
    "search.memory_length=[3,6] sweep_launcher=commands": "sweep_launcher: expected local, slurm or submitit",
}


@pytest.mark.parametrize("options", WRONG)
def test_invalid_options_are_refused(sweep: Sweep, capsys: Captured, options: str) -> None:
    assert sweep.run(*options.split(" ")) == 2
    assert error_line(capsys).startswith(f"error: {WRONG[options]}")
    assert sweep.versions() == {} and not (sweep.folder / "sweep.json").exists()


def test_lists_may_be_unquoted_by_the_shell(sweep: Sweep, stand_in: SetUp, capsys: Captured) -> None:
    """The table shows no deviation for a single seed."""
    assert sweep.grid(types="[text, image]", ratios="(0.5,)", seeds="1") == 0
    assert set(sweep.versions()) == {f"s_{kind}_0.5_seed1" for kind in ("text", "image")}
    assert [(row["f1_macro_mean"], row["f1_macro_std"]) for row in sweep.table()] == [("0.6", "0.0")] * 2
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("text ")]
    assert "0.6000" in line and "±" not in line and "1 of 1" in line


@pytest.mark.parametrize(
    ("name", "values", "drawn"),
    [  # two numbers are a range, three are choices; words and numbers may be mixed
        ("learning_rate", "[0.001,0.01,0.1]", {0.001, 0.01, 0.1}),
        ("decay_power", "[1,cosine]", {1.0, "cosine"}),
        ("warmup_steps", "[0,10]", range(11)),
        ("warmup_steps", "[2,40]", range(2, 41)),
        ("warmup_steps", "[1.0,3.0]", range(1, 4)),
        ("warmup_steps", "[0,0.5]", None),
    ],
)
def test_a_search_draws_ranges_and_choices(sweep: Sweep, scores: SetUp, name: str, values: str, drawn: Any) -> None:
    assert sweep.run(f"search.{name}={values}", "search.memory_length=[3,6]", "search_trials=8") == 0
    found = {trial[name] for trial in sweep.table("search.csv")}
    assert len(found) > 1
    if drawn is None:  # below 1, warmup_steps are shares
        assert len(found) == 8 and all(0 <= float(share) <= 0.5 for share in found)
    else:
        assert found <= set(map(str, drawn))


@pytest.fixture
def custom(workspace: Workspace, tmp_path: Path) -> tuple[str, ...]:
    """Options of a sweep on a custom dataset, whose metric is accuracy."""
    write_labelled(tmp_path / "raw", {"train": 8, "val": 4, "test": 4}, ["cat", "dog"], metric="accuracy")
    assert convert(tmp_path / "raw", tmp_path / "custom") == 0
    return ("task_finetune_custom", f"data_root={tmp_path / 'custom'}")


def test_a_grid_uses_the_metric_of_a_custom_dataset(sweep, stand_in, custom, capsys):
    """Even before the first result."""
    stand_in("sys.exit('error: no')")
    assert sweep.grid(*custom, types="text", ratios="0.5") == 2
    [row] = sweep.table()
    assert row["accuracy_mean"] == "" and not any("f1" in name for name in row)
    stand_in("")
    capsys.readouterr()
    assert sweep.grid(*custom, types="text", ratios="0.5") == 0
    said = capsys.readouterr()
    assert "[1/2] s_text_0.5_seed0: accuracy 0.1250 (" in said.err
    [head] = [line for line in said.out.splitlines() if line.startswith("missing")]
    assert head.split()[4] == "accuracy" and "0.1375 ± 0.0177" in said.out
    assert read_json(sweep.folder / "sweep.json")["metric"] == "accuracy"


def test_a_search_uses_the_metric_of_a_custom_dataset(sweep: Sweep, scores: SetUp, custom: tuple[str, ...]) -> None:
    assert sweep.run(*custom, "search.memory_length=[3,6]", "search_trials=2") == 0
    assert [set(trial) >= {"val/accuracy"} for trial in sweep.table("search.csv")] == [True, True]


def test_progress_estimates_the_time_left(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Patch) -> None:
    """Of 10 runs, 4 are complete; after two more in 60 s, the last four will take about 2 minutes."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(10, complete=4)
    job = Job("run", tmp_path, (), tested=True)
    with caplog.at_level("INFO", logger="rep"):
        clock[0] += 20
        progress.report(job, Outcome(None, 20.0), "good")
        clock[0] += 40
        progress.report(job, Outcome("it broke", 40.0), "good")
    assert caplog.messages == [
        "[5/10] run: good (20 s; about 2 min left)",
        "[6/10] run: failed: it broke (40 s; about 2 min left)",
    ]


def test_sweep_options_are_refused_in_a_single_run(workspace: Workspace, capsys: Captured) -> None:
    for option, name in (("search.learning_rate=[1e-3,1e-2]", "search"), ("sweep_seeds=[1,2]", "sweep_seeds")):
        assert command_line(["run.py", *workspace.command(option)[1:]]) == 2
        assert error_line(capsys) == f"error: {name}: is for sweeps; expected `python run.py sweep with …`"
