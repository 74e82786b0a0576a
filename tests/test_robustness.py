"""The robustness matrix: equal to evaluating pattern by pattern, and nothing computed twice."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import run
from clip.metrics import multilabel_f1
from clip.sample_statistics import class_figures, confidence, confusions, roc
from clip.tasks import TASKS
from run import command_line
from tests.conftest import Workspace


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Path:
    """A run folder."""
    options = (f"vit={workspace.backbone}", "exp_name=robust", "test_after_fit=False", "max_epoch=1")
    assert command_line(workspace.command(*options)) == 0
    return workspace.results / "robust_seed0" / "version_0"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def robustness(workspace: Workspace, load_path: Path | str, *options: str) -> int:
    small = ("robustness_ratios=[0.0,0.3,0.7,1.0]", "robustness_seeds=[0,1]", "bootstrap=20")
    command = workspace.command(f"load_path={load_path}", *small, *options)
    return command_line([command[0], "robustness", *command[1:]])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "robustness" / "robustness.json").read_text())


def cell(found: dict[str, Any], missing_type: str, ratio: float) -> dict[str, Any]:
    return next(c for c in found["cells"] if (c["missing_type"], c["ratio"]) == (missing_type, ratio))


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("the model was asked for")


def test_a_cell_is_what_test_only_gives(workspace: Workspace, folder: Path) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    found = result(folder)
    assert len(found["cells"]) == 3 * 4 and found["table_seeds"] == [0, 1]
    for number, (missing_type, ratio, seed) in enumerate([("both", 0.7, 0), ("image", 0.3, 1), ("text", 1.0, 0)]):
        options = (f"load_path={folder / 'best.ckpt'}", f"test_type={missing_type}", f"test_ratio={ratio}")
        name = f"one_{number}"
        given = (*options, "test_only=True", f"test_exp_name={name}", f"seed={seed}")
        assert command_line(workspace.command(*given)) == 0
        alone = json.loads((workspace.results / name / "version_0" / "test_results.json").read_text())["metrics"]
        for metric, values in cell(found, missing_type, ratio)["metrics"].items():
            assert values["values"][seed] == pytest.approx(alone[metric], abs=1e-6), (missing_type, metric)


def test_more_ratios_and_seeds_need_no_model(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    first = result(folder)
    monkeypatch.setattr(run, "open_evaluation", no_model)
    assert robustness(workspace, folder, "robustness_ratios=[0.0,0.5,0.7]", "robustness_seeds=[0,1,2,3]") == 0
    second = result(folder)
    assert len(second["cells"]) == 9 and second["table_seeds"] == [0, 1, 2, 3]
    one, more = (cell(found, "both", 0.7)["metrics"]["f1_macro"]["values"] for found in (first, second))
    assert more[:2] == one
    with (folder / "robustness" / "matrix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["n_seeds"] == "4"


def test_an_interrupted_encoding_goes_on_with_the_type_it_was_at(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clip.logit_store import LogitStore

    keep = LogitStore.keep

    def stop_at_the_second(store: LogitStore, missing_type: int, *tensors: torch.Tensor) -> None:
        if missing_type == 1:
            raise KeyboardInterrupt
        keep(store, missing_type, *tensors)

    monkeypatch.setattr(LogitStore, "keep", stop_at_the_second)
    assert robustness(workspace, folder / "best.ckpt") != 0
    monkeypatch.setattr(LogitStore, "keep", keep)
    capsys.readouterr()
    assert robustness(workspace, folder / "best.ckpt") == 0
    assert "needs encodings: text missing, image missing" in capsys.readouterr().err
    assert not list((folder / "robustness").glob("*.part*"))


def test_stored_logits_of_another_checkpoint_are_refused_or_made_anew(
    workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    checkpoint = torch.load(folder / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["mmimdb_classifier.bias"] += 1
    torch.save(checkpoint, folder / "best.ckpt")
    capsys.readouterr()
    assert robustness(workspace, folder / "best.ckpt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "logits.arrow: stored logits of another checkpoint" in error and "robustness_anew=True" in error
    assert robustness(workspace, folder / "best.ckpt", "robustness_anew=True") == 0


@pytest.mark.parametrize("content", [b"", b"no arrow file", None])
def test_a_damaged_store_is_named(
    workspace: Workspace, folder: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    path = folder / "robustness" / "logits.arrow"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    assert robustness(workspace, folder / "best.ckpt") == 2
    assert f"error: {path}: not readable as stored logits" in capsys.readouterr().err


def test_a_folder_without_a_finished_checkpoint(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert robustness(workspace, tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: load_path: expected")


@pytest.mark.parametrize(
    "option",
    ["robustness_ratios=[0.5,1.5]", "robustness_ratios=[0.5,0.5]", "robustness_types=audio", "robustness_seeds=[-1]"],
)
def test_wrong_options(workspace: Workspace, trained: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness(workspace, trained / "best.ckpt", option) == 2
    assert f"error: {option.partition('=')[0]}: expected" in capsys.readouterr().err


def test_runs_are_listed(workspace: Workspace, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["run.py", "runs", "with", f"log_dir={workspace.results}", "runs_sort=-date"]) == 0
    out = capsys.readouterr().out
    assert "robust_seed0/version_0" in out
    with (workspace.results / "runs.csv").open() as file:
        rows = {row["folder"].removeprefix(f"{workspace.results}/"): row for row in csv.DictReader(file)}
    assert rows["robust_seed0/version_0"]["dataset"] == "mmimdb", list(rows)


def test_the_report_is_written(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    assert command_line(["run.py", "report", "with", f"runs={folder}", f"out={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Robustness curves" in page and "default-src 'none'" in page


def test_the_report_says_that_intervals_were_not_asked_for(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    assert robustness(workspace, folder / "best.ckpt", "bootstrap=0") == 0
    assert set(result(folder)["confidence"]["complete"]) == set()
    assert command_line(["run.py", "report", "with", f"runs={folder}", f"out={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "Confidence intervals are missing in R1: made with bootstrap=0." in page


def test_class_figures_equal_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 5, generator=generator), (torch.rand(40, 5, generator=generator) < 0.4).int()
    for c, figures in enumerate(class_figures(logits, labels)):
        said, true = logits[:, c] > 0, labels[:, c] == 1
        hits = int((said & true).sum())
        assert figures.support == int(true.sum())
        assert figures.precision == pytest.approx(hits / int(said.sum()))
        assert figures.recall == pytest.approx(hits / int(true.sum()))
    mean_f1 = sum(figures.f1 for figures in class_figures(logits, labels)) / 5
    assert mean_f1 == pytest.approx(multilabel_f1(logits, labels)["f1_macro"])


def test_confusions_and_roc() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 1, 0, 2]), 3).float()
    pairs = [(pair.true, pair.predicted, pair.count, pair.share) for pair in confusions(logits, labels)]
    assert pairs == [(0, 1, 2, pytest.approx(2 / 3)), (2, 0, 1, 0.5)]
    curve = roc(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -1.0], [0.0, 0.5]]), torch.tensor([1, 1, 0, 0]))
    assert curve is not None and curve.tpr[0] == 0 and curve.tpr[-1] == 1 and curve.fpr[-1] == 1
    assert 1.0 in [tpr for tpr, fpr in zip(curve.tpr, curve.fpr, strict=True) if fpr == 0]


def test_confidence_intervals_repeat_and_hold_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 2, generator=generator), torch.randint(2, (200,), generator=generator)
    task = TASKS["food101"]
    once, again = (confidence(task, [logits], labels, 200)[0] for _ in range(2))
    assert once == again
    low, high = once["accuracy"]
    accuracy = task.metrics(logits, labels)["accuracy"]
    assert low < accuracy < high
    assert high - low == pytest.approx(2 * 1.96 * (accuracy * (1 - accuracy) / 200) ** 0.5, rel=0.2)


def test_stored_logits_have_the_samples_and_labels(workspace: Workspace, folder: Path) -> None:
    assert robustness(workspace, folder / "best.ckpt") == 0
    table = pa.ipc.open_file(folder / "robustness" / "logits.arrow").read_all()
    films = pa.ipc.open_file(workspace.arrow / "mmimdb_test.arrow").read_all()
    row_of = table["row"].to_pylist()
    assert table["id"].to_pylist() == [films["image_id"][row].as_py() for row in row_of]
    assert table["label"].to_pylist() == [films["label"][row].as_py() for row in row_of]
