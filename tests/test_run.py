"""Training and evaluation on a small dataset, from the command line to the files they write."""

import re
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import pytorch_lightning as pl
import torch

from clip.backbone import load_backbone
from clip.modules.fused import PLAIN
from clip.modules.vision_transformer_memory import ResidualAttentionBlock
from clip.tokenizer import load_tokenizer
from engine import callbacks
from engine.callbacks import Checkpoints
from engine.checkpoint import read_checkpoint, restore_classifier
from engine.cuda_graphs import use_ops
from engine.training import FinetuneModule
from run import command_line
from runs import start, training
from tests.conftest import Captured, Patch, Workspace, read_csv, read_json, refusal
from tests.interrupted import differences
from tests.models import model_input
from vilt.datamodules import EpochSampler, TimedLoader
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS

ROOT = Path(__file__).parents[1]


def command_of(workspace: Workspace, name: str, *options: str, **source: Any) -> list[str]:
    return workspace.command(f"vit={workspace.backbone}", f"exp_name={name}", *options, **source)


@pytest.fixture(scope="module")
def best(fitted: Path) -> str:
    """The option that loads the fitted run's checkpoint."""
    return f"load_path={fitted / 'best.ckpt'}"


def results_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "test_results.json")


def evaluate(workspace: Workspace, name: str, *options: str) -> dict[str, Any]:
    """Results of a test_only run named `name`."""
    assert command_line(workspace.command("test_only=True", f"test_exp_name={name}", *options)) == 0
    return results_of(workspace.results / name / "version_0")


def test_a_command_run_as_a_module_is_recorded_with_m(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/rep/demo/__main__.py", "--seed", "1"])
    for name, words in (("demo.__main__", ["-m", "demo"]), ("demo.vla", ["-m", "demo.vla"]), (None, [sys.argv[0]])):
        spec = None if name is None else ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
        assert start.command() == [*words, "--seed", "1"]


def test_the_run_folder_has_all_files(workspace: Workspace, fitted: Path) -> None:
    files = {"best.ckpt", "last.ckpt", "metrics.csv", "test_results.json"}
    recorded = {"config.json", "environment.json", "contents.json", "tensorboard"}
    assert {path.name for path in fitted.iterdir()} == files | recorded
    config, environment = read_json(fitted / "config.json"), read_json(fitted / "environment.json")
    assert (config["task"], config["memory_length"], config["missing_ratio"]["train"]) == ("mmimdb", 6, 0.7)
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"] == start.command()
    rows = read_csv(fitted / "metrics.csv")
    names, seconds = set(rows[0]), [float(row["seconds"]) for row in rows]
    assert list(rows[0])[:3] == ["epoch", "step", "seconds"] and seconds == sorted(seconds) and seconds[-1] > 0
    assert [int(row["step"]) for row in rows] == list(range(len(rows))) and rows[-1]["test/f1_macro"]
    assert {"train/loss", "train/f1_macro", "val/loss", "val/f1_macro", "val/f1_micro", "test/f1_macro"} <= names
    assert any(path.name.startswith("events.") for path in (fitted / "tensorboard").iterdir())
    results = results_of(fitted)
    assert results["samples"] == sum(results["missing"].values())
    assert results["missing_pattern"] == {"missing_type": "both", "ratio": 0.7, "both_ratio": 0.5, "seed": 0}


def test_evaluating_the_best_checkpoint_repeats_the_test(workspace: Workspace, fitted: Path, best: str) -> None:
    again, first = evaluate(workspace, "again", best, "test_ratio=0.7", "test_type=both"), results_of(fitted)
    assert again["metrics"] == first["metrics"] and again["checkpoint_sha256"] == first["checkpoint_sha256"]


def test_the_test_pattern_is_the_given_one(workspace: Workspace, fitted: Path, best: str, capsys: Captured) -> None:
    results = evaluate(workspace, "image", best, "test_ratio=1", "test_type=image")
    assert results["missing"] == {"complete": 0, "text missing": 0, "image missing": results["samples"]}
    said = capsys.readouterr().out
    assert f"test/f1_macro {results['metrics']['f1_macro']:.4f}" in " ".join(said.split())
    assert "mmimdb test, 100 % missing (image), seed 0" in said and str(fitted / "best.ckpt") in said


def test_results_equal_those_computed_by_hand(workspace: Workspace, fitted: Path, best: str) -> None:
    """The reported F1 equals one computed sample by sample, without loaders or Lightning."""
    checkpoint = read_checkpoint(fitted / "best.ckpt")
    classifier = restore_classifier(checkpoint, load_backbone(str(workspace.backbone))).eval()
    tokenizer = load_tokenizer(str(workspace.backbone))
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "test", 32)
    dataset.tokenize(tokenizer, tokenizer.fingerprint)
    results = evaluate(workspace, "complete", best, "test_ratio=0")
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


def test_model_options_come_from_the_checkpoint(workspace: Workspace, fitted: Path, best: str) -> None:
    """Options such as memory_length need not be repeated, and their defaults do not count as contradictions."""
    command = workspace.command("test_only=True", "test_exp_name=bare", best)
    assert command_line([argument for argument in command if "memory_" not in argument]) == 0
    assert results_of(workspace.results / "bare" / "version_0")["metrics"] == results_of(fitted)["metrics"]


def test_another_task_or_backbone_is_refused(workspace, best, tmp_path, golden_arrow, capsys):
    command = workspace.command("test_only=True", best, task="food101", data_root=golden_arrow)
    assert "task: food101 contradicts the checkpoint" in refusal(command, capsys)
    other = other_backbone(workspace, tmp_path)
    said = refusal(workspace.command("test_only=True", best, f"vit={other}"), capsys)
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


def test_a_warm_start_loads_the_memory_and_with_finetune_first_the_head(workspace, fitted, capsys, monkeypatch):
    started: list[dict[str, torch.Tensor]] = []

    def keep_start(trainer: Any, module: Any, **_: Any) -> None:
        started.append({name: value.clone() for name, value in module.classifier.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.Trainer, "fit", keep_start)
    # Without vit, the checkpoint's backbone is used.
    base = workspace.command("exp_name=warm", f"load_path={fitted / 'last.ckpt'}")
    source = read_checkpoint(fitted / "last.ckpt").state
    for with_head in (False, True):
        assert command_line([*base, f"finetune_first={with_head}"]) == 130
        for name, value in source.items():
            same = torch.equal(started[-1][name], value.float())
            assert same is (with_head or not name.startswith("mmimdb_classifier.")), name
        assert ("the head too" in capsys.readouterr().err) is with_head


@pytest.mark.parametrize(("option", "file"), [("load_path", "best.ckpt"), ("resume_from", "last.ckpt")])
def test_a_folder_given_as_a_checkpoint_is_refused_with_a_suggestion(workspace, fitted, tmp_path, option, file, capsys):
    error = refusal(command_of(workspace, "folder", f"{option}={fitted.parent}"), capsys)
    assert f"found the folder {fitted.parent}; did you mean {option}={fitted / file}?" in error
    for number in (9, 10):
        (newest := tmp_path / f"version_{number}").mkdir()
        (newest / file).touch()
    assert f"did you mean {option}={newest / file}?" in refusal(
        command_of(workspace, "folder", f"{option}={tmp_path}"), capsys
    )
    assert "no best.ckpt" in refusal(command_of(workspace, "folder", f"load_path={workspace.arrow}"), capsys)


@pytest.mark.parametrize(
    "options",
    [("num_workers=1", "val_check_interval=0.4"), ("max_steps=14", "max_epoch=3", "val_check_interval=1.0")],
    ids=["a worker", "steps in a third epoch"],
)
def test_a_run_resumed_mid_epoch_ends_as_the_uninterrupted_one(workspace, tmp_path, monkeypatch, options):
    """Bit for bit, from each of its checkpoints: the same samples, dropout masks and optimiser state."""
    kept: list[Path] = []
    save = Checkpoints._write_last

    def save_and_keep(self: Any, trainer: Any) -> None:
        save(self, trainer)
        self._finish(trainer)
        kept.append(tmp_path / f"at_{len(kept)}.ckpt")
        kept[-1].write_bytes((self.folder / "last.ckpt").read_bytes())

    options = ("simulate_missing=True", f"log_dir={tmp_path}", *options)
    found: list[tuple[Any, Any]] = []

    def run(name: str, *more: str) -> None:
        assert command_line(command_of(workspace, name, *options, *more)) == 0
        folder = tmp_path / f"{name}_seed0" / "version_0"
        found.append((torch.load(folder / "last.ckpt", weights_only=True)["state_dict"], results_of(folder)["metrics"]))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write_last", save_and_keep)
        # After validations, and once between two steps without one.
        patch.setattr(Checkpoints, "_is_due", lambda _, trainer: trainer.validating or trainer.global_step == 5)
        run("uninterrupted")
    places = [torch.load(path, weights_only=True)["MissingModalityData"] for path in kept]
    assert len(places) >= 4 and any(place["batches"] > 0 for place in places)
    for number, path in enumerate(kept[:-1]):
        run(f"resumed_{number}", f"resume_from={path}")
        assert not differences(found[-1], found[0]), places[number]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("per_gpu_batchsize=2", "samples per batch = 4, now it is 2"),
        ("memory_depth=1", "memory_depth (there 2, here 1)"),
        ("optim_type=sgd", "last.ckpt: expected optim_type=adamw"),
    ],
)
def test_resuming_with_other_batches_or_options_is_refused(workspace, fitted, option, said, capsys):
    command = command_of(workspace, "other", f"resume_from={fitted / 'last.ckpt'}", "max_epoch=3", option)
    assert said in refusal(command, capsys)


def test_the_throughput_is_logged_after_each_epoch(workspace: Workspace, capsys: Captured, monkeypatch: Patch) -> None:
    """Each second is counted once, even if a slow checkpoint is written between two steps."""
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda *_: time.sleep(0.3))
    workspace.train("timed", "test_after_fit=False", "val_check_interval=1.0")
    said = capsys.readouterr().err
    found = re.findall(r"epoch (\d): 4\d training samples in ([\d.]+) s, [\d.]+ per second\n  (.*)\n", said)
    assert [epoch for epoch, *_ in found] == ["0", "1"], said
    for _, total, parts in found:
        seconds = {name: float(value) for name, value, _ in (part.split() for part in parts.split(", "))}
        assert list(seconds) == ["data", "step", "validation", "checkpoints", "rest"]
        assert sum(seconds.values()) == pytest.approx(float(total), abs=0.31)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_run_with_file_and_row(workspace, golden_arrow, capsys, workers):
    """Also in a loader worker, whose errors torch wraps in tracebacks."""
    path = golden_arrow / "food101_train.arrow"
    table = pa.ipc.open_file(path).read_all()
    images = table["image"].to_pylist()
    images[3] = images[3][:500]
    broken = table.set_column(0, table.schema.field("image"), pa.array(images, pa.binary()))
    with pa.ipc.new_file(path, broken.schema) as writer:
        writer.write_table(broken)
    options = ("batch_size=2", "per_gpu_batchsize=2", "missing_ratio=0.0", f"num_workers={workers}")
    command = command_of(workspace, "bad", *options, task="food101", data_root=golden_arrow)
    assert refusal(command, capsys).startswith(f"error: {path}: row 3: the image cannot be decoded: ")


def test_loader_workers_prefetch_the_next_epoch_or_validation(workspace: Workspace, monkeypatch: Patch) -> None:
    """With two epochs of 12 batches and two validations each, the second epoch and later validations are prefetched."""
    begun = []

    def record(loader: TimedLoader, begin: Any = TimedLoader.begin) -> None:
        assert isinstance(loader.sampler, EpochSampler) and isinstance(loader.dataset, ArrowDataset)
        begun.append((loader.dataset.split, loader.sampler.epoch))
        begin(loader)

    monkeypatch.setattr(TimedLoader, "begin", record)
    options = ("num_workers=1", "val_check_interval=0.5", "test_after_fit=False")
    workspace.train("ahead", *options)
    assert begun == [("val", 0), ("train", 1), ("val", 0), ("val", 1)]
    begun.clear()
    workspace.train("ahead_limited", *options, "max_steps=3")
    assert begun == [], "the run ends with its first validation"


def test_the_test_after_training_does_not_use_compiled_passes(workspace: Workspace, monkeypatch: Patch) -> None:
    def compiled(step: Any, forward: Any, classifier: Any, *_: Any) -> tuple[Any, Any]:
        use_ops(classifier, PLAIN._replace(normed=lambda x, norm, dtype: norm(x).to(dtype)))
        return step, forward

    found: list[bool] = []

    def tested(options: Any, trainer: Any, module: Any, *_: Any) -> dict[str, float]:
        found.extend(each.ops is PLAIN for each in module.modules() if isinstance(each, ResidualAttentionBlock))
        return {}

    monkeypatch.setattr(training, "captured", compiled)
    monkeypatch.setattr(training, "test", tested)
    workspace.train("compiled", "max_steps=2")
    assert found and all(found)


def test_max_steps_ends_mid_epoch_and_the_run_can_be_extended(workspace: Workspace, capsys: Captured) -> None:
    """With 12 batches per epoch and two per step, the run stops at step 4 with a validation, and is then extended."""
    common = ("val_check_interval=0.5", "test_after_fit=False", "decay_power=1")
    last = workspace.train("short", *common, "max_steps=4") / "last.ckpt"
    place = torch.load(last, weights_only=True)["MissingModalityData"]
    assert (place["epoch"], place["batches"]) == (0, 8)
    assert torch.load(last.with_name("best.ckpt"), weights_only=True)["global_step"] in (3, 4)
    capsys.readouterr()
    more = (*common, "max_epoch=1", f"resume_from={last}", f"load_path={last}")  # resume_from wins
    longer = torch.load(workspace.train("long", *more) / last.name, weights_only=True)
    assert "max_epoch (there 2, here 1), max_steps (there 4, here None)" in capsys.readouterr().err
    assert longer["global_step"] == 6 and longer["MissingModalityData"]["epoch"] == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_fast_dev_run_trains_one_step_and_writes_nothing(workspace, fitted, monkeypatch, resumed) -> None:
    steps = []
    monkeypatch.setattr(FinetuneModule, "on_before_optimizer_step", lambda *_: steps.append(1))
    workspace.train("fast", "fast_dev_run=True", *([f"resume_from={fitted / 'last.ckpt'}"] if resumed else []))
    assert steps == [1] and not list(workspace.results.glob("fast*"))


@pytest.mark.parametrize(("task", "metric"), [("food101", "accuracy"), ("hatememes", "auroc")])
def test_the_other_tasks_train_on_files_of_the_published_converters(workspace, golden_arrow, task, metric):
    options = ("batch_size=2", "per_gpu_batchsize=2", "max_epoch=1")
    folder = workspace.train(task, *options, task=task, data_root=golden_arrow)
    results = results_of(folder)
    assert results["samples"] == 3 and metric in results["metrics"]
    assert ("model.image_encoder.proj" in torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]) is (
        task == "hatememes"
    )


def test_sacred_records_the_run(workspace: Workspace, fitted: Path, best: str, tmp_path: Path) -> None:
    command = workspace.command("test_only=True", best, "test_exp_name=sacred")
    assert command_line([*command, "-F", str(tmp_path / "sacred")]) == 0
    record = read_json(tmp_path / "sacred" / "1" / "run.json")
    assert record["status"] == "COMPLETED"
    assert record["result"]["f1_macro"] == results_of(fitted)["metrics"]["f1_macro"]


def in_processes(command: list[str]) -> None:
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_even_if_a_tower_gets_no_data(workspace: Workspace, fitted: Path) -> None:
    """All training samples lack the same modality; every test sample counts once."""
    options = ("max_epoch=1", "missing_type.train=image", "missing_ratio.train=1.0")
    in_processes(command_of(workspace, "ddp", "cpu_processes=2", *options))
    folder = workspace.results / "ddp_seed0" / "version_0"
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert results_of(folder)["samples"] == results_of(fitted)["samples"]
    states = [torch.load(each / "last.ckpt", weights_only=True)["state_dict"] for each in (folder, fitted)]
    assert states[0].keys() == states[1].keys()
