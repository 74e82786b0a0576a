"""Training and evaluation from the command line to the files they leave, on a small dataset."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch

from clip.backbone import load_backbone
from engine.callbacks import Checkpoints
from engine.checkpoint import read_checkpoint, restore_classifier
from run import command_line
from tests.conftest import Workspace
from tests.models import published_state

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fitted(workspace: Workspace) -> Path:
    """The folder of a finished training run."""
    assert command_line(workspace.command(f"vit={workspace.backbone}", "exp_name=fitted")) == 0
    return workspace.results / "fitted_seed0" / "version_0"


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test_results.json").read_text())


def evaluate(workspace: Workspace, name: str, *options: str, status: int = 0) -> dict[str, Any]:
    """Results of a test_only run called `name`."""
    assert command_line(workspace.command("test_only=True", f"test_exp_name={name}", *options)) == status
    return results_of(workspace.results / name / "version_0") if status == 0 else {}


def test_the_run_folder_holds_everything(workspace: Workspace, fitted: Path) -> None:
    assert {path.name for path in fitted.iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "config.json",
        "environment.json",
        "metrics.csv",
        "tensorboard",
        "test_results.json",
    }
    config = json.loads((fitted / "config.json").read_text())
    assert (config["task"], config["memory_length"], config["missing_ratio"]["train"]) == ("mmimdb", 6, 0.7)
    environment = json.loads((fitted / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"][0] == sys.argv[0]
    with (fitted / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0])
    assert {"train/loss", "train/f1_macro", "val/loss", "val/f1_macro", "val/f1_micro", "test/f1_macro"} <= names
    assert any(path.name.startswith("events.") for path in (fitted / "tensorboard").iterdir())
    results = results_of(fitted)
    assert results["samples"] == sum(results["missing"].values())
    assert results["missing_pattern"] == {"missing_type": "both", "ratio": 0.7, "both_ratio": 0.5, "seed": 0}


def test_learning_rate_warms_up_and_decays(fitted: Path) -> None:
    """Per optimiser step: up to the full rate after 10 % of the steps, then down to end_lr at the last one."""
    with (fitted / "metrics.csv").open() as file:
        reader = csv.DictReader(file)
        column = next(name for name in reader.fieldnames or () if name.startswith("lr-AdamW"))
        rate_of_step = {int(row["step"]): float(row[column]) for row in reader if row[column]}
    rates, steps = list(rate_of_step.values()), len(rate_of_step)
    warmup = int(steps * 0.1)
    expected = [step / warmup if step < warmup else (steps - step) / (steps - warmup) for step in range(steps)]
    assert rates == pytest.approx([0.01 * rate for rate in expected])


def test_checkpoints_hold_what_is_trained_and_not_the_backbone(workspace: Workspace, fitted: Path) -> None:
    best, last = (torch.load(fitted / name, weights_only=True) for name in ("best.ckpt", "last.ckpt"))
    assert "optimizer_states" in last and "optimizer_states" not in best
    for checkpoint in (best, last):
        names = checkpoint["state_dict"]
        assert "mmimdb_classifier.weight" in names
        assert "model.memory_learner.dynamic.image.queries_complete" in names
        assert not any("resblocks.1." in name or "conv1" in name or "dynamic_common_token" in name for name in names)
        assert checkpoint["rep"]["backbone"]["name"] == str(workspace.backbone)


def test_evaluation_of_the_best_checkpoint_repeats_the_result(workspace: Workspace, fitted: Path) -> None:
    again = evaluate(workspace, "again", f"load_path={fitted / 'best.ckpt'}", "test_ratio=0.7", "test_type=both")
    assert again["metrics"] == results_of(fitted)["metrics"]
    assert again["checkpoint_sha256"] == results_of(fitted)["checkpoint_sha256"]


def test_the_test_pattern_is_the_one_asked_for(
    workspace: Workspace, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(workspace, "image", f"load_path={fitted / 'best.ckpt'}", "test_ratio=1", "test_type=image")
    assert results["missing"] == {"complete": 0, "text missing": 0, "image missing": results["samples"]}
    said = capsys.readouterr().out
    assert f"test/f1_macro     {results['metrics']['f1_macro']:.4f}" in said
    assert "mmimdb test, 100% missing (image), seed 0" in said and str(fitted / "best.ckpt") in said


def test_results_equal_those_computed_by_hand(workspace: Workspace, fitted: Path) -> None:
    """The reported F1 from the model's own logits, sample by sample, without loaders or Lightning."""
    from clip.tokenizer import load_tokenizer
    from tests.models import model_input
    from vilt.datasets.arrow_dataset import ArrowDataset
    from vilt.datasets.specs import DATASETS

    checkpoint = read_checkpoint(fitted / "best.ckpt")
    classifier = restore_classifier(checkpoint, load_backbone(str(workspace.backbone))).eval()
    tokenizer = load_tokenizer(str(workspace.backbone))
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "test", 32)
    dataset.tokenize(tokenizer, tokenizer.fingerprint)
    results = evaluate(workspace, "complete", f"load_path={fitted / 'best.ckpt'}", "test_ratio=0")
    true_positive, wrong = 0, 0
    for index in range(len(dataset)):
        sample = dataset[0, index]
        batch = model_input(sample.inputs["image"][None], sample.inputs["text"][None], [0])
        with torch.no_grad():
            predicted = classifier(batch)[0].sigmoid() > 0.5
        true_positive += int((predicted & (sample.label > 0)).sum())
        wrong += int((predicted ^ (sample.label > 0)).sum())
    assert len(dataset) == results["samples"]
    expected = 2 * true_positive / max(1, 2 * true_positive + wrong)
    assert results["metrics"]["f1_micro"] == pytest.approx(expected, abs=1e-12)


def test_a_second_run_gets_its_own_folder(workspace: Workspace, fitted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in fitted.rglob("*")}
    command = workspace.command(f"vit={workspace.backbone}", "exp_name=fitted", "max_epoch=1", "test_after_fit=False")
    assert command_line(command) == 0
    assert (fitted.parent / "version_1" / "best.ckpt").is_file()
    assert not (fitted.parent / "version_1" / "test_results.json").exists()
    assert {path: path.stat().st_mtime_ns for path in fitted.rglob("*")} == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("memory_length=9", "memory_length: 9 contradicts the checkpoint"),
        ("memory_depth=1", "memory_depth: 1 contradicts the checkpoint"),
    ],
)
def test_options_that_contradict_the_checkpoint(
    workspace: Workspace, fitted: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    evaluate(workspace, "contradiction", f"load_path={fitted / 'best.ckpt'}", option, status=2)
    assert f"error: {message}" in capsys.readouterr().err


def test_model_options_come_from_the_checkpoint(workspace: Workspace, fitted: Path) -> None:
    """memory_length and the like need not be repeated, and their defaults do not count as contradictions."""
    command = [
        argument for argument in workspace.command("test_only=True", "test_exp_name=bare") if "memory_" not in argument
    ]
    assert command_line([*command, f"load_path={fitted / 'best.ckpt'}"]) == 0
    assert results_of(workspace.results / "bare" / "version_0")["metrics"] == results_of(fitted)["metrics"]


def test_another_task_or_backbone_is_refused(
    workspace: Workspace, fitted: Path, tmp_path: Path, golden_arrow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = f"load_path={fitted / 'best.ckpt'}"
    assert command_line(workspace.command("test_only=True", best, task="food101", data_root=golden_arrow)) == 2
    assert "error: task: food101 contradicts the checkpoint" in capsys.readouterr().err
    other = other_backbone(workspace, tmp_path)
    assert command_line(workspace.command("test_only=True", best, f"vit={other}")) == 2
    said = capsys.readouterr().err
    assert f"trained on the backbone {workspace.backbone}" in said and f"vit={other} has other weights" in said


def other_backbone(workspace: Workspace, folder: Path) -> Path:
    """The workspace's backbone with one value changed."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(workspace.backbone)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(folder / "other")
    CLIPTokenizer.from_pretrained(workspace.backbone).save_pretrained(folder / "other")
    return folder / "other"


def test_warm_start_takes_the_memory_and_with_finetune_first_the_head(
    workspace: Workspace, fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []

    def keep_start(trainer: Any, module: Any, **_: Any) -> None:
        started.append({name: value.clone() for name, value in module.classifier.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.Trainer, "fit", keep_start)
    base = workspace.command(f"vit={workspace.backbone}", f"load_path={fitted / 'last.ckpt'}", "exp_name=warm")
    assert command_line(base) == 130
    assert command_line([*base, "finetune_first=True"]) == 130
    source = read_checkpoint(fitted / "last.ckpt").state
    for state, with_head in zip(started, (False, True), strict=True):
        for name, value in source.items():
            same = torch.equal(state[name], value.float())
            assert same is (with_head or not name.startswith("mmimdb_classifier.")), name
    said = capsys.readouterr().err
    assert "the head starts anew" in said and "the head too" in said


def test_a_published_checkpoint_evaluates_without_a_backbone(
    workspace: Workspace, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights in the file, no dynamic queries, no description: what the published code wrote."""
    checkpoint = read_checkpoint(fitted / "best.ckpt")
    state = published_state(restore_classifier(checkpoint, load_backbone(str(workspace.backbone))))
    published = {name: value for name, value in state.items() if "memories_dynamic" not in name}
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": published, "epoch": 3, "hyper_parameters": {"config": {"memory_length": 6}}}, path)
    metrics = [
        evaluate(workspace, name, f"load_path={path}", f"tokenizer={workspace.backbone}")["metrics"]
        for name in ("published_1", "published_2")
    ]
    assert metrics[0] == metrics[1]
    assert "dynamic queries as its run with seed 0 drew them" in capsys.readouterr().err


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "options",
    [
        ("num_workers=0", "val_check_interval=0.4"),
        ("num_workers=1", "val_check_interval=0.4"),
        ("max_steps=12", "val_check_interval=0.5"),
        ("max_steps=14", "max_epoch=3", "val_check_interval=1.0"),
        ("max_steps=9", "val_check_interval=0.4"),
    ],
    ids=["no worker", "a worker", "steps of whole epochs", "steps in a third epoch", "steps in mid-epoch"],
)
def test_resuming_in_mid_epoch_ends_where_the_uninterrupted_run_does(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Bit for bit: same samples, same dropout masks, same optimiser state, from each checkpoint on the way."""
    command = workspace.command(f"vit={workspace.backbone}", "simulate_missing=True", *options)
    kept: list[Path] = []
    save = Checkpoints._write_last

    def save_and_keep(self: Any, trainer: Any) -> None:
        save(self, trainer)
        kept.append(tmp_path / f"at_{len(kept)}.ckpt")
        kept[-1].write_bytes((self.folder / "last.ckpt").read_bytes())

    monkeypatch.setattr(Checkpoints, "_write_last", save_and_keep)
    name = f"whole {' '.join(options)}".replace("=", "_")
    assert command_line([*command, f"exp_name={name}"]) == 0
    expected = final_state(workspace.results / f"{name}_seed0" / "version_0")
    metrics = results_of(workspace.results / f"{name}_seed0" / "version_0")["metrics"]
    places = [torch.load(path, weights_only=True)["MissingModalityData"] for path in kept]
    steps = [(place["epoch"], place["batches"]) for place in places]
    assert len(steps) >= 4 and any(batches > 0 for _, batches in steps)
    monkeypatch.setattr(Checkpoints, "_write_last", save)
    for number, path in enumerate(kept[:-1]):
        name = f"resumed {number} {' '.join(options)}".replace("=", "_")
        assert command_line([*command, f"exp_name={name}", f"resume_from={path}"]) == 0
        folder = workspace.results / f"{name}_seed0" / "version_0"
        resumed = final_state(folder)
        assert resumed.keys() == expected.keys()
        for entry, value in expected.items():
            assert torch.equal(resumed[entry], value), (steps[number], entry)
        assert results_of(folder)["metrics"] == metrics


def test_resume_with_other_batches_or_options_is_refused(
    workspace: Workspace, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = workspace.command(f"vit={workspace.backbone}", f"resume_from={fitted / 'last.ckpt'}", "max_epoch=3")
    assert command_line([*base, "per_gpu_batchsize=2"]) == 2
    assert "samples per batch = 4, now it is 2" in capsys.readouterr().err
    assert command_line([*base, "memory_depth=1"]) == 2
    assert "a run with other options: memory_depth (there 2, here 1)" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    command = workspace.command(f"vit={workspace.backbone}", "learning_rate=1e30", "exp_name=explodes")
    assert command_line(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss became nan at step ") and "samples: 1" in error
    assert ", first in the parameter model.memory_learner." in error or ", first in the output of model." in error


def test_an_epoch_ends_with_the_throughput(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    options = (f"vit={workspace.backbone}", "test_after_fit=False", "exp_name=timed")
    assert command_line(workspace.command(*options)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "training samples" in line]
    pattern = r"epoch (\d): 4\d training samples in [\d.]+ s, [\d.]+ per second; (\d+) % of the time waiting for data"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [match and match[1] for match in found] == ["0", "1"], lines
    assert all(match and int(match[2]) <= 100 for match in found)


def test_activation_checkpointing_trains_to_the_same_result(workspace: Workspace, fitted: Path) -> None:
    options = (f"vit={workspace.backbone}", "activation_checkpointing=True", "exp_name=checkpointed")
    assert command_line(workspace.command(*options)) == 0
    other = workspace.results / "checkpointed_seed0" / "version_0"
    assert results_of(other)["metrics"] == results_of(fitted)["metrics"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_run_with_file_and_row(
    workspace: Workspace, golden_arrow: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """Also from a loader process, whose errors torch wraps into tracebacks."""
    path = golden_arrow / "food101_train.arrow"
    table = pa.ipc.open_file(path).read_all()
    images = table["image"].to_pylist()
    images[3] = images[3][:500]
    broken = table.set_column(0, table.schema.field("image"), pa.array(images, pa.binary()))
    with pa.ipc.new_file(path, broken.schema) as writer:
        writer.write_table(broken)
    options = (f"vit={workspace.backbone}", "batch_size=2", "per_gpu_batchsize=2", "missing_ratio=0.0", "exp_name=bad")
    command = workspace.command(*options, f"num_workers={workers}", task="food101", data_root=golden_arrow)
    assert command_line(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: row 3: the image cannot be decoded: ")


def test_max_steps_ends_in_mid_epoch_and_the_rest_can_follow(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 batches an epoch, two of them a step: the run stops at step 4 with a validation, and is then made longer."""
    common = (f"vit={workspace.backbone}", "val_check_interval=0.5", "test_after_fit=False", "decay_power=1")
    assert command_line(workspace.command(*common, "max_steps=4", "exp_name=short")) == 0
    last = workspace.results / "short_seed0" / "version_0" / "last.ckpt"
    place = torch.load(last, weights_only=True)["MissingModalityData"]
    assert (place["epoch"], place["batches"]) == (0, 8)
    assert torch.load(last.with_name("best.ckpt"), weights_only=True)["global_step"] in (3, 4)
    more = ("max_epoch=1", "exp_name=long", f"resume_from={last}", f"load_path={last}")  # of which the first counts
    assert command_line(workspace.command(*common, *more)) == 0
    said = capsys.readouterr().err
    assert "other options than the run had: max_epoch (there 2, here 1), max_steps (there 4, here None)" in said
    longer = torch.load(workspace.results / "long_seed0" / "version_0" / "last.ckpt", weights_only=True)
    assert longer["global_step"] == 6 and longer["MissingModalityData"]["epoch"] == 1


def test_fast_dev_run_writes_nothing(workspace: Workspace) -> None:
    command = workspace.command(f"vit={workspace.backbone}", "fast_dev_run=True", "exp_name=fast")
    assert command_line(command) == 0
    assert not list(workspace.results.glob("fast*"))


@pytest.mark.parametrize(("task", "metric"), [("food101", "accuracy"), ("hatememes", "auroc")])
def test_the_other_tasks_train_on_the_published_converters_files(
    workspace: Workspace, golden_arrow: Path, task: str, metric: str
) -> None:
    options = (f"vit={workspace.backbone}", "batch_size=2", "per_gpu_batchsize=2", "max_epoch=1", f"exp_name={task}")
    assert command_line(workspace.command(*options, task=task, data_root=golden_arrow)) == 0
    folder = workspace.results / f"{task}_seed0" / "version_0"
    results = results_of(folder)
    assert results["samples"] == 3 and metric in results["metrics"]
    names = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert ("model.image_encoder.proj" in names) is (task == "hatememes")


def test_sacred_keeps_its_own_record(workspace: Workspace, fitted: Path, tmp_path: Path) -> None:
    command = workspace.command("test_only=True", f"load_path={fitted / 'best.ckpt'}", "test_exp_name=sacred")
    assert command_line([*command, "-F", str(tmp_path / "sacred")]) == 0
    record = json.loads((tmp_path / "sacred" / "1" / "run.json").read_text())
    assert record["status"] == "COMPLETED"
    assert record["result"]["f1_macro"] == results_of(fitted)["metrics"]["f1_macro"]


def in_processes(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_and_count_every_test_sample_once(workspace: Workspace, fitted: Path) -> None:
    best = f"load_path={fitted / 'best.ckpt'}"
    in_processes(workspace.command("test_only=True", best, "cpu_processes=2", "test_exp_name=two"))
    two, one = results_of(workspace.results / "two" / "version_0"), results_of(fitted)
    assert two["samples"] == one["samples"]
    # The batches are others, so that the last bit of a logit may differ, which no decision here depends on.
    assert two["metrics"] == {**one["metrics"], "loss": pytest.approx(one["metrics"]["loss"], abs=1e-6)}
    # All train samples lose the same modality, so that one tower's memory gets no data at all.
    pattern = ("missing_type.train=image", "missing_ratio.train=1.0")
    options = (f"vit={workspace.backbone}", "exp_name=ddp", "max_epoch=1", *pattern)
    in_processes(workspace.command("cpu_processes=2", *options))
    in_one = workspace.command("per_gpu_batchsize=8", *options, "exp_name=ddp_one")
    assert command_line(in_one) == 0
    folders = [workspace.results / f"{name}_seed0" / "version_0" for name in ("ddp", "ddp_one")]
    assert [path.name for path in folders[0].parent.iterdir()] == ["version_0"]
    assert results_of(folders[0])["samples"] == one["samples"]
    expected_names = set(final_state(folders[1]))
    assert set(final_state(folders[0])) == expected_names
