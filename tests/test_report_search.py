"""The report's section on a search: trials, best score so far, importances, missing and damaged parts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from common.errors import DataError
from engine.tasks import TASKS
from runs.report.page import make_report
from runs.report.search import _history
from runs.report.text import Unit
from runs.sweep.jobs import JOURNAL
from runs.sweep.search import open_study
from tests.conftest import Patch, read_csv
from tests.report_files import HOSTILE, TestSet, at, edit_json, page_text, write_run

SPACE = {"learning_rate": FloatDistribution(1e-4, 0.1, log=True), "tokenizer": CategoricalDistribution(["a", HOSTILE])}
TRIALS = [(0.01, "a", 0.31), (0.1, HOSTILE, None), (0.001, "a", 0.42), (0.001, "a", 0.42), (0.02, HOSTILE, 0.4)]
"""(values, score) of each trial; one failed, and one repeats the values of the trial before."""


def write_search(folder: Path, task: str = "mmimdb", trials: Sequence[tuple[Any, ...]] = TRIALS) -> Path:
    folder.mkdir(parents=True)
    pattern = at("some", 0.7) if task == "mosi" else {}
    study = open_study(folder / JOURNAL, folder.name, TASKS[task].monitor)
    for number, (*values, score) in enumerate(trials):
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        given = dict(zip(SPACE, values, strict=True))
        study.add_trial(create_trial(params=given, distributions=SPACE, value=score, state=state))
        place = folder / f"{folder.name}_trial_{number}_seed0" / "version_0"
        run = write_run(place, task, tested=None, **pattern, **given)
        edit_json(run, "environment.json", command=["run.py", "with", f"exp_name={folder.name}_trial_{number}"])
    return folder


def test_a_search_has_its_own_section(tmp_path: Path) -> None:
    search, report = write_search(tmp_path / "runs" / "s"), tmp_path / "report"
    write_search(tmp_path / "runs" / "low", "mosi", [*TRIALS, (0.03, "a", 0.5)])
    write_run(tmp_path / "runs" / "rep_seed0" / "version_0")
    journal = (search / JOURNAL).read_bytes()
    make_report([tmp_path / "runs"], report)
    page = page_text(report)
    assert (search / JOURNAL).read_bytes() == journal
    for fact in (
        "5 trials (4 complete, 1 failed)",
        "trial 2, reaches a validation F1-macro of 42.0 % with learning_rate=0.001",
        *("trial 0, reaches a validation MAE of 0.310", "exp_name=s_trial_2", "exp_name=low_trial_0"),
    ):
        assert fact in page, fact
    trials = read_csv(report / "tables" / "search_2_trials.csv")
    assert [trial["val/f1_macro"] for trial in trials] == ["31.0000", "", "42.0000", "42.0000", "40.0000"]
    assert [trial["tokenizer"] == HOSTILE for trial in trials] == [tokenizer == HOSTILE for _, tokenizer, _ in TRIALS]
    table = read_csv(report / "tables" / "search_1_importances.csv")
    shares = {row["option"]: float(row["importance"]) for row in table}
    assert shares.keys() == SPACE.keys() and sum(shares.values()) == pytest.approx(100, abs=1e-3)
    assert "Missing: this needs 4 trials with different values" in page, "of the other search"
    assert {path.name for path in (report / "figures").glob("*.png")} >= {f"search_{n}_history.png" for n in (1, 2)}
    kinds = Counter(row["kind"] for row in read_csv(report / "tables" / "runs.csv"))
    assert kinds == {"training": 1, "trial": 11}
    (search / JOURNAL).write_text("{\n{\n")
    with pytest.raises(DataError, match=f"s/{JOURNAL}: not readable as Optuna's journal"):
        make_report([search], report)


@pytest.mark.parametrize(("metric", "best"), [("f1_macro", [31, 42, 42, 42]), ("mae", [0.31, 0.31, 0.31, 0.31])])
def test_the_history_shows_the_best_score_so_far(monkeypatch: Patch, metric: str, best: list[float]) -> None:
    drawn: list[tuple[list[int], list[float]]] = []
    monkeypatch.setattr(Axes, "step", lambda self, x, y, **how: drawn.append((list(x), list(y))))
    trials = []
    for number, (*_, score) in enumerate(TRIALS):
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        trials.append(create_trial(params={}, value=score, state=state))
        trials[-1].number = number
    _history(trials, metric, Unit.of(metric, 100), "name")
    assert drawn[0][0] == [0, 2, 3, 4] and drawn[0][1] == pytest.approx(best)


def test_a_trial_given_by_its_own_folder_is_an_ordinary_run(tmp_path: Path) -> None:
    search = write_search(tmp_path / "s", trials=[(0.01, "a", None)])
    TestSet().write(trial := search / "s_trial_0_seed0" / "version_0")
    for place, kind, curves in ((search, "trial", 0), (trial, "training", 1)):
        make_report([place], tmp_path / "report")
        assert [row["kind"] for row in read_csv(tmp_path / "report" / "tables" / "runs.csv")] == [kind]
        assert len(list((tmp_path / "report").glob("figures/curves_*.png"))) == curves
        assert ("1 trial (1 failed)" in page_text(tmp_path / "report")) == (kind == "trial")
