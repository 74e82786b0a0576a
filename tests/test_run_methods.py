"""Methods and heads that affect a whole run, through run.py: training, evaluation, resuming and warm starts.

The others differ only in their slots (test_methods.py).
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip.modules.aoept import AOEPT
from clip.modules.dpl import DecoupledPrototypes
from clip.modules.interfaces import ModelInput
from config import DEFAULTS
from engine import cuda_graphs
from engine.callbacks import Checkpoints
from engine.cuda_graphs import STEPS, CapturedGraphs, Forward, GraphedForward, GraphedSteps, Step
from engine.predict import load_model
from run import command_line
from runs.check_options import resolve
from runs.training import fit_depths
from tests.conftest import Captured, Patch, Workspace, read_json
from tests.custom_files import read_arrow
from tests.interrupted import assert_same_end, differences
from tests.models import TINY
from tests.test_cuda_graphs import tape

DESCRIBED = ("memory_depth=1", "replay_depth=1", "dynamic_init=True", "decoupling_weight=0.1")
VARIANTS = {
    "mora": ("prompt_type=mora",),
    "aoept": ("prompt_type=aoept", "aoept_prototypes=4"),
    "described": DESCRIBED,
    "baseline of the ablation": ("far=False", "fmb=False"),
    "dpl": ("head=dpl", "dpl_contrast_weight=0.9", "dpl_margins=[0.1,0.15,0.15]"),
    "neighbours": ("prompt_type=none", "neighbours=4"),
    "neighbours of windows": ("prompt_type=none", "neighbours=4", "text_windows=3", "group_texts=True"),
    "windows": ("text_windows=3", "group_texts=True"),
    "linear by type": ("head=linear_by_type", "prompt_type=none", "train_ends=True"),
}


def run(workspace: Workspace, tmp_path: Path, *options: str, status: int = 0) -> None:
    common = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_epoch=1", "val_check_interval=1.0")
    assert command_line(workspace.command(*common, *options)) == status


def result(folder: Path) -> dict[str, Any]:
    return read_json(folder / "version_0" / "test_results.json")


def state_of(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "version_0" / name, weights_only=True)["state_dict"]
    return found


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "windows"])
def test_evaluating_a_checkpoint_repeats_the_test(workspace: Workspace, tmp_path: Path, variant: str) -> None:
    run(workspace, tmp_path, *VARIANTS[variant], "exp_name=m")
    best = tmp_path / "m_seed0" / "version_0" / "best.ckpt"
    trained = result(tmp_path / "m_seed0")
    state = torch.load(best, weights_only=True)["state_dict"]
    assert trained["trained_parameters"] <= sum(value.numel() for value in state.values())
    assert trained["training_seconds"] > 0
    evaluation = workspace.command(f"load_path={best}", "test_only=True", "test_exp_name=again", f"log_dir={tmp_path}")
    evaluation = [option for option in evaluation if not option.startswith("memory_")]
    assert command_line(evaluation) == 0
    assert result(tmp_path / "again")["metrics"] == pytest.approx(trained["metrics"], rel=1e-6)
    assert "trained_parameters" not in result(tmp_path / "again")
    configs = (read_json(tmp_path / name / "version_0" / "config.json") for name in ("m_seed0", "again"))
    assert len({tuple(one[n] for n in ("prompt_type", "head", "memory_length", "far", "vit")) for one in configs}) == 1


def test_every_command_reads_whole_texts(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    """All plots of a film form one sample, in the test, in robustness at the same pattern, and in predictions."""
    run(workspace, tmp_path, *VARIANTS["windows"], "exp_name=m")
    tested, best = result(tmp_path / "m_seed0"), tmp_path / "m_seed0" / "version_0" / "best.ckpt"
    assert tested["other_input"] == ["text_windows=3", "group_texts=True"] and tested["samples"] == tested["rows"] == 13
    small = ("bootstrap=0", "robustness_seeds=[0]", "robustness_ratios=[0.7]")
    assert command_line(workspace.command(f"load_path={best}", *small, name="robustness")) == 0
    found = read_json(best.parent / "robustness" / "robustness.json")
    [cell] = [cell for cell in found["cells"] if cell["missing_type"] == "both"]
    for metric, figures in cell["metrics"].items():
        assert figures["mean"] == pytest.approx(tested["metrics"][metric], abs=1e-6), metric
    assert "text_windows=3" in capsys.readouterr().out
    films = read_arrow(workspace.arrow / "mmimdb_test.arrow").to_pylist()
    logits = read_arrow(best.parent / "robustness" / "logits.arrow")["logits_image_missing"].to_pylist()
    assert len(films) == len(logits) < sum(len(film["plots"]) for film in films)
    alone = [number for number, film in enumerate(films) if len(film["plots"]) == 1]
    for one, number in zip(load_model(best).predict(texts=[films[n]["plots"][0] for n in alone]), alone, strict=True):
        expected = torch.tensor(logits[number]).sigmoid()
        assert torch.allclose(torch.tensor(list(one.probabilities.values())), expected, atol=1e-6)
    assert command_line(workspace.command(f"load_path={best}", "test_only=True", "text_windows=1")) == 2
    assert "text_windows: 1 contradicts the checkpoint" in capsys.readouterr().err


def test_a_run_of_captured_steps_ends_as_a_plain_one(workspace: Workspace, tmp_path: Path, monkeypatch: Patch) -> None:
    """Bit for bit, despite decisions that Python makes in a step and validations between the steps."""
    monkeypatch.setattr(cuda_graphs, "capture", tape)
    graphs = CapturedGraphs()

    def rounded(step: Step, forward: Forward, *_: Any) -> tuple[Step, Forward]:
        return lambda batch, *rest: step(batch.rounded(), *rest), lambda batch: forward(batch.rounded())

    def replayed(step: Step, forward: Forward, model: nn.Module, *_: Any) -> tuple[Step, Forward]:
        trained = [each for each in model.parameters() if each.requires_grad]
        return GraphedSteps(step, trained, graphs), GraphedForward(forward, graphs)

    for name, how in (("plain", rounded), ("replayed", replayed)):
        monkeypatch.setattr("runs.training.captured", how)
        run(workspace, tmp_path, *DESCRIBED, "max_epoch=3", "missing_ratio=0", f"exp_name={name}")
    assert not graphs.refused and len(graphs.by_shape[STEPS]) < 12
    assert_same_end(*(tmp_path / f"{name}_seed0" / "version_0" for name in ("plain", "replayed")))


def test_prototypes_use_the_whole_training_split(workspace, tmp_path, monkeypatch):
    """Inputs that an epoch drops count too."""
    seen: Counter[str] = Counter()

    def count(_: AOEPT, __: Any, batches: Iterable[ModelInput]) -> None:
        for batch in batches:
            seen.update({name: len(values) for name, values in batch.inputs.items()})

    monkeypatch.setattr(AOEPT, "see", count)
    run(workspace, tmp_path, *VARIANTS["aoept"], "missing_ratio=0", "modality_dropout=0.5", "simulate_missing=True")
    assert seen == {"image": 45, "text": 45}


@pytest.mark.parametrize("variant", ["described", "dpl", "aoept", "windows"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(workspace, tmp_path, variant, monkeypatch):
    """Resumed from the checkpoint of the first validation."""
    copies: list[Path] = []
    on_validation_end = Checkpoints.on_validation_end

    def copy_checkpoint(self: Checkpoints, trainer: Any, *rest: Any) -> None:
        on_validation_end(self, trainer, *rest)
        self._finish(trainer)
        copies.append(Path(shutil.copy(self.folder / "last.ckpt", tmp_path / f"{len(copies)}.ckpt")))

    options = (*VARIANTS[variant], "max_epoch=2", "test_after_fit=False")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_is_due", lambda _, trainer: trainer.validating)
        patch.setattr(Checkpoints, "on_validation_end", copy_checkpoint)
        run(workspace, tmp_path, *options, "exp_name=whole")
    assert len(copies) == 2
    run(workspace, tmp_path, *options, "exp_name=on", f"resume_from={copies[0]}")
    assert not differences(state_of(tmp_path / "on_seed0"), state_of(tmp_path / "whole_seed0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "load_path={0}/best.ckpt test_only=True prompt_type=maple",
            "prompt_type: maple contradicts the checkpoint {0}",
        ),
        (
            "load_path={0}/best.ckpt test_only=True head=dpl",
            "head: dpl contradicts the checkpoint {0}/best.ckpt, which",
        ),
        ("load_path={0}/best.ckpt test_only=True replay_depth=1 prompt_type=rep", "contradicts the checkpoint {0}"),
        ("load_path={0}/best.ckpt test_only=True prompt_type=dcp memory_length=9", "memory_length: 9 contradicts the"),
        ("load_path={0}/best.ckpt test_only=True prompt_type=dcp memory_depth=1", "memory_depth: 1 contradicts the ch"),
        ("load_path={0}/best.ckpt", ": a run with other options: prompt_type (there dcp, here rep)"),
        ("resume_from={0}/last.ckpt", "its run has other options: prompt_type (there dcp, here rep)"),
        (
            "rep_described",
            "error: memory_depth=2 with replay_depth=1 needs more blocks than the backbone has (2 in the im",
        ),
    ],
)
def test_options_that_contradict_checkpoint_or_backbone_are_refused(workspace, dcp, tmp_path, capsys, options, message):
    run(workspace, tmp_path, *options.format(dcp.parent).split(" "), status=2)
    assert message.format(dcp.parent) in capsys.readouterr().err


@pytest.fixture(scope="module")
def dcp(workspace: Workspace) -> Path:
    return workspace.train("dcp", "prompt_type=dcp", "max_epoch=1", "test_after_fit=False") / "best.ckpt"


def test_aoept_draws_its_clusters_after_a_warm_start_from_another_method(workspace, tmp_path):
    """They would all be 0 otherwise; a checkpoint of AOEPT already has them."""
    short = ("test_after_fit=False", "max_steps=1", "warmup_steps=0")
    run(workspace, tmp_path, "prompt_type=none", *short, "exp_name=m")
    states: list[dict[str, torch.Tensor]] = []
    start = tmp_path / "m_seed0"
    for seed, name in enumerate(("a", "b")):
        load = f"load_path={start / 'version_0' / 'best.ckpt'}"
        run(workspace, tmp_path, *VARIANTS["aoept"], *short, load, f"exp_name={name}", f"seed={seed}")
        start = tmp_path / f"{name}_seed{seed}"
        states.append(state_of(start, "best.ckpt"))
    for name in ("model.prompt_learner.text_init_tokens", "model.prompt_learner.vision_init_tokens"):
        assert states[0][name].abs().amin(dim=-1).sum() > 0
        assert torch.equal(states[0][name], states[1][name])


def test_a_warm_start_with_the_head_keeps_the_gates_of_neighbours(workspace: Workspace, tmp_path: Path) -> None:
    """Without the head, they start at 0. The neighbours are those of the new training split."""
    options = ("prompt_type=none", "neighbours=2", "test_after_fit=False", "max_steps=1", "warmup_steps=0")
    run(workspace, tmp_path, *options, "exp_name=start")
    start = state_of(tmp_path / "start_seed0", "best.ckpt")
    again = (*options, f"load_path={tmp_path / 'start_seed0' / 'version_0' / 'best.ckpt'}", "learning_rate=1e-12")
    for with_head in (True, False):
        name = f"with_head_{with_head}"
        run(workspace, tmp_path, *again, f"finetune_first={with_head}", "seed=1", f"exp_name={name}")
        found = state_of(tmp_path / f"{name}_seed1", "best.ckpt")
        for gate in ("neighbours.vote_gate_C", "neighbours.feature_gate_M"):
            expected = start[gate] if with_head else torch.zeros_like(start[gate])
            torch.testing.assert_close(found[gate], expected, rtol=0, atol=1e-9)
            assert start[gate].abs().max() > 1e-6
        assert not torch.equal(found["neighbours.present_NM"], start["neighbours.present_NM"])
    run(
        workspace, tmp_path, *again, "neighbours=0", "finetune_first=True", "exp_name=without"
    )  # nor the other way round
    back = f"load_path={tmp_path / 'without_seed0' / 'version_0' / 'best.ckpt'}"
    run(workspace, tmp_path, *again, back, "finetune_first=True", "exp_name=back")


@pytest.mark.parametrize(
    ("blocks", "wanted", "given", "expected"),
    [
        (12, {"replay_depth": 6}, (), (6, 6)),
        (8, {}, (), (6, 0)),
        (8, {"replay_depth": 6}, (), (4, 4)),
        (4, {}, (), (2, 0)),
        (1, {}, (), (1, 0)),
        (4, {"memory_depth": 3, "replay_depth": 6}, ("memory_depth",), (3, 1)),
        (4, {"replay_depth": 3}, ("replay_depth",), (1, 3)),
        (4, {"memory_depth": 6}, ("memory_depth",), (6, 0)),
        (4, {"prompt_type": "coop"}, (), (6, 0)),
    ],
)
def test_unset_depths_are_fitted_to_the_backbone(caplog, blocks, wanted, given, expected):
    """As in the published model, half of the blocks have slots of their own; given depths are not changed."""
    options = resolve({**DEFAULTS, "task": "mmimdb", **wanted})
    with caplog.at_level("INFO"):
        fitted = fit_depths(options, given, dataclasses.replace(TINY, vision_layers=blocks, text_layers=12))
    assert (fitted.memory_depth, fitted.replay_depth) == expected
    changed = {name for name in ("memory_depth", "replay_depth") if getattr(fitted, name) != getattr(options, name)}
    assert {record.getMessage().partition("=")[0] for record in caplog.records} == changed
    assert all(f"the backbone has {blocks} blocks" in record.getMessage() for record in caplog.records)


def test_a_resumed_run_keeps_its_depth(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = workspace.command(f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_steps=1")
    command = [option for option in command if not option.startswith("memory_depth")]
    assert command_line([*command, "exp_name=m", "prompt_type=msp"]) == 0
    said = capsys.readouterr().err
    assert f"warning: {workspace.arrow / 'mmimdb_train.arrow'}: no sample is of class " in said and "'War'" in said
    assert read_json(tmp_path / "m_seed0" / "version_0" / "config.json")["memory_depth"] == 1
    assert command_line([*command, "exp_name=m", "prompt_type=msp", "resume_from=auto"]) == 0
    assert "nothing left to do" in capsys.readouterr().err


def test_a_head_is_told_the_missing_type_of_training(workspace, tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(DecoupledPrototypes, "trained_on", lambda _, missing_type: told.append(missing_type))
    types = ("missing_type=text", "test_type=image")
    run(workspace, tmp_path, "head=dpl", "prompt_type=none", *types, "fast_dev_run=True")
    assert set(told) == {"text"}
