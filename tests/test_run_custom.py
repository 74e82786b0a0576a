"""Custom datasets from the arrow files to the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import read_checkpoint
from engine.metrics import Metric
from engine.tasks import TASKS, task_of
from run import command_line
from tests.conftest import Captured, Workspace, call, read_csv, read_json, refusal
from tests.custom_files import convert, films_as_custom, read_arrow, write_jsonl, write_labelled
from tests.data_files import LOGIT_COLUMNS
from tests.report_files import page_text
from vilt.datasets.custom import CUSTOM_METRICS, CustomData

ROWS = {"train": 12, "val": 6, "test": 9}
QUICK = ("robustness_ratios=[0.0,0.7]", "robustness_seeds=[0,1]", "bootstrap=10")


def make_arrow_files(folder: Path, labels: list[str], **spec: object) -> Path:
    """Writes the arrow files of a single-label dataset; returns their folder."""
    write_labelled(folder, ROWS, labels, **spec)
    assert convert(folder, folder / "arrow") == 0
    return folder / "arrow"


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrow files of three classes, with F1-macro as the metric."""
    return make_arrow_files(tmp_path_factory.mktemp("pets"), ["cat", "dog", "cow"], name="pets", metric="f1_macro")


@pytest.fixture(scope="module")
def fitted(workspace: Workspace, pets: Path) -> Path:
    """A finished run on the pets."""
    return workspace.train("pets", task="custom", data_root=pets)


def test_a_validation_split_of_one_class_is_remarked_on(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    write_labelled(tmp_path, ROWS | {"val": 1}, ["cat", "dog"], metric="accuracy")
    assert convert(tmp_path, tmp_path / "arrow") == 0
    workspace.train("one_class", "max_epoch=1", task="custom", data_root=tmp_path / "arrow", log_dir=tmp_path)
    expected = f"warning: {tmp_path / 'arrow' / 'custom_val.arrow'}: all samples are of class 'cat', so the best"
    assert expected in capsys.readouterr().err


def test_naturally_missing_inputs_count_in_training_and_evaluation(workspace: Workspace, tmp_path: Path) -> None:
    """They count like simulated ones, which are added to them, and have results of their own."""
    write_labelled(tmp_path, ROWS, ["cat", "dog"])
    records = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        record[("image", "text", "label")[number % 3]] = None if number % 3 < 2 else record["label"]
    write_jsonl(tmp_path / "table.jsonl", records)
    assert convert(tmp_path, tmp_path / "arrow") == 0
    options = ("missing_ratio={'train': 0.5, 'val': 0.0, 'test': 0.0}", "max_epoch=1", "simulate_missing=True")
    folder = workspace.train("holes", *options, task="custom", data_root=tmp_path / "arrow")
    found = read_json(folder / "test_results.json")
    assert found["missing"] == {"complete": 3, "text missing": 3, "image missing": 3}
    by_type = found["by_missing_type"]
    assert {name: of_type["samples"] for name, of_type in by_type.items()} == found["missing"]
    accuracies = [of_type["accuracy"] for of_type in by_type.values()]
    assert found["metrics"]["accuracy"] == pytest.approx(sum(accuracies) / 3)
    places = (f"load_path={folder / 'best.ckpt'}", f"missing_table_root={workspace.root / 'missing_tables'}")
    assert call("robustness", *places, *QUICK, f"data_root={tmp_path / 'arrow'}", "precision=32", "num_workers=0") == 0
    robustness = read_json(folder / "robustness" / "robustness.json")
    assert robustness["natural"] == by_type
    for cell in robustness["cells"]:
        if cell["ratio"] == 0:
            assert cell["metrics"]["accuracy"]["mean"] == found["metrics"]["accuracy"]
            assert cell["image_available"] == cell["text_available"] == pytest.approx(2 / 3)
    # A sample that naturally lacks a modality has, for each type, the logits of its present one.
    logits = read_arrow(folder / "robustness" / "logits.arrow")
    lacking = np.arange(9) % 3
    complete, no_text, no_image = (np.array(logits[name].to_pylist()) for name in LOGIT_COLUMNS)
    assert np.allclose(no_text[lacking < 2], complete[lacking < 2], atol=1e-5)
    assert np.allclose(no_image[lacking < 2], complete[lacking < 2], atol=1e-5)
    assert not np.allclose(no_text[lacking == 2], complete[lacking == 2], atol=1e-3)


def test_a_run_records_the_description_of_the_data(workspace: Workspace, fitted: Path, pets: Path) -> None:
    described = {"name": "pets", "labels": "single", "class_names": ["cat", "cow", "dog"], "metric": "f1_macro"}
    assert read_json(fitted / "config.json")["custom"] == described | {"signals": []}
    spec = read_checkpoint(fitted / "best.ckpt").spec
    assert spec.custom == CustomData("pets", "single", ("cat", "cow", "dog"), "f1_macro")
    checkpoint = torch.load(fitted / "best.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["custom_classifier.weight"].shape[0] == 3
    assert checkpoint["monitor"] == "val/f1_macro"
    results = read_json(fitted / "test_results.json")
    assert results["task"] == "custom" and results["samples"] == 9
    assert set(results["metrics"]) == {"loss", "f1_macro", "accuracy", "balanced_accuracy"}


def test_a_warm_start_loads_only_a_head_of_the_same_classes(workspace, fitted, pets, tmp_path, capsys):
    renamed = make_arrow_files(tmp_path / "renamed", ["cat", "dog", "horse"])
    load = f"load_path={fitted / 'best.ckpt'}"
    said = refusal(
        workspace.command(load, f"vit={workspace.backbone}", "finetune_first=True", task="custom", data_root=renamed),
        capsys,
    )
    assert "trained on the classes of pets, the data's differ: expected 'cow' as class 1, found 'dog'" in said
    workspace.train("pets_memory", load, "max_steps=1", task="custom", data_root=renamed)
    workspace.train("pets_head", load, "finetune_first=True", "max_steps=1", task="custom", data_root=pets)
    assert "the head too" in capsys.readouterr().err


def test_data_of_other_classes_is_refused(workspace: Workspace, fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    load = f"load_path={fitted / 'best.ckpt'}"
    other = make_arrow_files(tmp_path, ["cat", "dog", "horse"])
    message = f"{fitted / 'best.ckpt'}: trained on the classes of pets, the data's differ: expected 'cow' as class 1, "
    assert message in refusal(workspace.command(load, "test_only=True", task="custom", data_root=other), capsys)
    assert command_line(workspace.command(load, *QUICK, name="robustness", task="custom", data_root=other)) == 2
    assert message in capsys.readouterr().err
    resume = (f"resume_from={fitted / 'last.ckpt'}", f"vit={workspace.backbone}")
    assert message.replace("best.ckpt", "last.ckpt") in refusal(
        workspace.command(*resume, task="custom", data_root=other), capsys
    )
    assert command_line(workspace.command(load, "finetune_first=True", f"vit={workspace.backbone}")) == 2
    assert (
        "entries do not fit this model" in (said := capsys.readouterr().err)
        and "task (there custom, here mmimdb)" in said
    )


def test_data_with_another_metric_can_be_tested_but_not_resumed(workspace, fitted, tmp_path, capsys):
    other = make_arrow_files(tmp_path, ["cat", "dog", "cow"])
    said = refusal(
        workspace.command(
            f"resume_from={fitted / 'last.ckpt'}", f"vit={workspace.backbone}", task="custom", data_root=other
        ),
        capsys,
    )
    assert "other options: name (there pets, here custom), metric (there f1_macro, here accuracy)" in said
    options = [f"load_path={fitted / 'best.ckpt'}", "test_only=True", "test_exp_name=other_metric"]
    assert command_line(workspace.command(*options, task="custom", data_root=other)) == 0
    metrics = read_json(workspace.results / "other_metric" / "version_0" / "test_results.json")["metrics"]
    assert metrics["accuracy"] == read_json(fitted / "test_results.json")["metrics"]["accuracy"]
    assert set(metrics) == {"loss", "accuracy", "f1_macro", "balanced_accuracy"}


@pytest.fixture(scope="module")
def measured(workspace: Workspace, pets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with robustness results: three classes, two classes measured by AUROC, and multiple labels."""
    log_dir = tmp_path_factory.mktemp("measured")
    folders, raw = {}, workspace.root / "raw"
    assert convert(raw, log_dir / "films", "--spec", str(films_as_custom(raw, log_dir / "films_data"))) == 0
    memes = make_arrow_files(log_dir / "memes_data", ["fine", "hateful"], name="memes", metric="auroc")
    for name, data in (("pets", pets), ("memes", memes), ("films", log_dir / "films")):
        given = ("max_epoch=1",)
        folders[name] = workspace.train(name, *given, log_dir=log_dir / "runs", task="custom", data_root=data)
        load = (f"load_path={folders[name] / 'best.ckpt'}", f"missing_table_root={log_dir / 'tables'}")
        assert call("robustness", *load, f"data_root={data}", "precision=32", "num_workers=0", *QUICK) == 0
    return folders


def test_robustness_results_suit_the_kind_of_labels(measured: dict[str, Path]) -> None:
    for name, metric, extra in (
        ("pets", "f1_macro", "confusions.csv"),
        ("memes", "auroc", "roc.csv"),
        ("films", "f1_macro", None),
    ):
        folder, tested = measured[name] / "robustness", read_json(measured[name] / "test_results.json")["metrics"]
        results = read_json(folder / "robustness.json")
        assert (results["task"], results["metric"]) == ("custom", metric)
        assert results["class_names"] == read_json(measured[name] / "config.json")["custom"]["class_names"]
        assert metric in results["by_type"]["complete"] and metric in results["confidence"]["complete"]
        files = {path.name for path in folder.iterdir()}
        assert files >= {"logits.arrow", "cells.csv", "matrix.csv", "per_class.csv"}
        assert (extra in files) if extra else not files & {"roc.csv", "confusions.csv"}
        for type_name, curve in results["roc"].items():
            assert curve["auroc"] == results["by_type"][type_name]["auroc"]
        [cell] = [one for one in results["cells"] if (one["missing_type"], one["ratio"]) == ("both", 0.7)]
        for metric_name, found in cell["metrics"].items():  # at the pattern of the test after training
            assert found["values"][0] == pytest.approx(tested[metric_name], abs=1e-12), name


def test_custom_runs_are_listed_by_dataset_name(measured: dict[str, Path], capsys: Captured) -> None:
    log_dir = measured["pets"].parents[1]
    assert call("runs", f"log_dir={log_dir}") == 0
    assert "f1_macro (custom_pets)" in capsys.readouterr().out
    rows = {row["name"]: row for row in read_csv(log_dir / "runs.csv")}
    assert {name: (row["dataset"], row["metric"], row["state"]) for name, row in rows.items()} == {
        "pets": ("custom_pets", "f1_macro", "finished"),
        "memes": ("custom_memes", "auroc", "finished"),
        "films": ("custom_films", "f1_macro", "finished"),
    }
    for name, row in rows.items():
        assert float(row["test"]) == read_json(measured[name] / "test_results.json")["metrics"][row["metric"]]


def test_the_report_has_custom_datasets(measured: dict[str, Path], tmp_path: Path) -> None:
    runs = measured["pets"].parents[1]
    assert call("report", f"runs={runs}", f"out={tmp_path / 'report'}") == 0
    page = page_text(tmp_path / "report")
    headings = page.splitlines()
    for heading in ("pets", "memes", "films", "Confusion matrix", "ROC curves", "Results by class"):
        assert heading in headings
    assert "Published results and ours" not in headings  # there are none
    assert "AUROC" in page
    names = {path.name for path in (tmp_path / "report").rglob("*.csv")}
    assert {"matrix_custom_pets.csv", "matrix_custom_memes.csv", "confusions_custom_pets.csv"} <= names


def test_datasets_of_the_same_name_cannot_share_a_report(measured: dict[str, Path], tmp_path: Path, capsys) -> None:
    for number, (name, folder) in enumerate(measured.items()):
        config = read_json(folder / "config.json")
        config["custom"]["name"] = "same"
        place = tmp_path / "runs" / name / f"version_{number}"
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
    assert call("report", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}") == 2
    assert "results on another dataset than" in capsys.readouterr().err


def test_every_metric_for_custom_data_is_implemented() -> None:
    for labels, metric in [(labels, metric) for labels, metrics in CUSTOM_METRICS.items() for metric in metrics]:
        custom = CustomData("x", labels, ("a", "b"), metric)  # type: ignore[arg-type]
        task = task_of("custom", custom)
        target = torch.tensor([[1, 0], [0, 1], [1, 1]]) if labels == "multi" else torch.tensor([0, 1, 1])
        logits = torch.tensor([[2.0, -1.0], [0.5, 1.0], [3.0, -2.0]])
        assert task.monitor == metric and metric in task.metrics(logits, target)
        assert isinstance(task.metrics, Metric) and (task.n_classes, task.head_name) == (2, "custom_classifier")
        like = "mmimdb" if labels == "multi" else "food101"
        assert task.loss(logits, target) == TASKS[like].loss(logits, target)


def test_doctor_and_sweep_accept_a_custom_dataset(workspace, tmp_path, capsys, pets):
    own: dict[str, Any] = {"task": "custom", "data_root": pets}
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_epoch=1", "val_check_interval=1.0")
    assert command_line(workspace.command(*options, name="doctor", **own)) == 0
    assert "ok   train data: " in capsys.readouterr().out
    grid = ("sweep_types=['both']", "sweep_ratios=[0.7]", "sweep_seeds=[0]", "sweep_name=own")
    assert command_line(workspace.command(*options, *grid, name="sweep", **own)) == 0
    assert "f1_macro" in (tmp_path / "own" / "table.csv").read_text()
