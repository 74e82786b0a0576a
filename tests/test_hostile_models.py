"""Hostile and broken weights: checkpoints, backbones, published missing tables.

A result, or an error of ours; nothing in a file runs.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip.backbone import Backbone, load_backbone
from clip.modules.method import MethodOptions
from common.errors import CheckpointError, UserError
from common.torch_file import load_inert
from engine.checkpoint import (
    DESCRIPTION,
    ModelSpec,
    build_classifier,
    describe,
    kept_state,
    read_checkpoint,
    restore_classifier,
)
from run import command_line
from tests.archives import Touch
from tests.backbones import random_hf_clip
from tests.conftest import Workspace, error_of
from tests.models import TINY, tiny_classifier
from tests.report_files import write_run
from vilt.missing_tables import MissingPattern, load_missing_table

SPEC = ModelSpec("mmimdb", MethodOptions("rep", 6, 2), TINY)
WEIGHT = "model.memory_learner.text_memory_complete"
BOTH = MissingPattern("both", 0.7, 0.5, 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    random_hf_clip(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(clip: Path) -> Backbone:
    return load_backbone(str(clip))


def content_of(backbone: Backbone) -> dict[str, Any]:
    """What a checkpoint of a small model holds."""
    torch.manual_seed(0)
    classifier = build_classifier(SPEC)
    backbone.load_into(classifier.model)
    return {"state_dict": kept_state(classifier), DESCRIPTION: describe(SPEC, backbone.name, backbone.sha256)}


def read(path: Path, backbone: Backbone) -> object:
    return restore_classifier(read_checkpoint(path), backbone)


# Damage of any kind


def odd_tensors() -> dict[str, tuple[Tensor, str]]:
    return {
        "nan": (torch.full((2, 64), float("nan")), "holds values that are not finite"),
        "infinite": (torch.full((2, 64), float("-inf"), dtype=torch.bfloat16), "holds values that are not finite"),
        "integers": (torch.ones(2, 64, dtype=torch.int64), "holds torch.int64"),
        "complex": (torch.ones(2, 64, dtype=torch.complex64), "holds torch.complex64"),
        "sparse": (torch.ones(2, 64).to_sparse(), "torch.sparse_coo"),
        "nowhere": (torch.ones(2, 64, device="meta"), "expected floating-point numbers"),
        "terabytes": (torch.ones(1).expand(10**6, 10**6), r"has shape \(1000000, 1000000\), expected"),
    }


@pytest.mark.parametrize("kind", odd_tensors())
def test_weights_that_are_none_are_refused_by_name(kind: str, backbone: Backbone, tmp_path: Path) -> None:
    tensor, found = odd_tensors()[kind]
    own, path = content_of(backbone), tmp_path / "best.ckpt"
    for content in (own, {"state_dict": tiny_classifier().state_dict()}):  # the second as published
        content["state_dict"][WEIGHT] = tensor
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"best\.ckpt: {WEIGHT} .*{found}"):
            read(path, backbone)


def test_archives_that_grow_are_not_unpacked(tmp_path: Path) -> None:
    intact = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(10**6)}}, intact)
    path = tmp_path / "best.ckpt"
    with zipfile.ZipFile(intact) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match=r"its entries claim .* bytes, and it has"):
        load_inert(path)


# Code


def positions(code: Touch) -> dict[str, Any]:
    return {
        "top": code,
        "value": {"state_dict": {}, "x": code},
        "key": {"state_dict": {}, ("a", code): 1},
        "state": {"state_dict": {"a": code}},
        "description": {"state_dict": {"a": torch.ones(1)}, DESCRIPTION: code},
        "list": [code],
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("position", positions(Touch(Path())))
def test_code_in_any_position_does_not_run_in_any_reader(
    position: str, zipped: bool, clip: Path, tmp_path: Path
) -> None:
    shutil.copy(clip / "config.json", tmp_path)
    marker = tmp_path / "marker"
    content = positions(Touch(marker))[position]
    places: dict[Path, Callable[[Path], object]] = {
        tmp_path / "best.ckpt": read_checkpoint,
        tmp_path / "weights.pt": lambda path: load_backbone(str(path)),
        tmp_path / "weights.bin": lambda path: load_backbone(str(path), trust=True),
        tmp_path / "pytorch_model.bin": lambda path: load_backbone(str(path.parent)),
        tmp_path / "mmimdb_train_missing_both_07.pt": lambda path: load_missing_table(
            path.parent, "mmimdb", "train", BOTH, 5
        ),
    }
    for path, reader in places.items():
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=f"{path.name}|vit={tmp_path}: not readable"):
            reader(path)
    assert not marker.exists()
    with pytest.raises(Exception, match=r".*"):  # torch.load of a bare call gives None, which is no checkpoint
        assert torch.load(tmp_path / "best.ckpt", weights_only=False) is NotImplemented
    assert marker.exists(), "the pickle would never have made the file"


def test_code_in_the_checkpoints_of_listed_runs_does_not_run(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    for name, missing in (("best.ckpt", "last.ckpt"), ("last.ckpt", "best.ckpt")):
        made = write_run(tmp_path / "result" / name / "version_0", tested=None)
        (made / missing).unlink(missing_ok=True)
        torch.save({"score": Touch(marker)}, made / name)
    assert command_line(["run.py", "runs", "with", f"log_dir={tmp_path / 'result'}"]) == 0
    assert capsys.readouterr().out.count("not readable as a checkpoint: it mentions") == 2
    made = tmp_path / "result" / "best.ckpt" / "version_0"
    for options in (["load_path={}", "test_only=True"], ["resume_from={}"], ["load_path={}"]):
        given = [option.format(made / "best.ckpt") for option in options]
        assert command_line(workspace.command(f"vit={workspace.backbone}", *given)) == 2
        assert "which might run code; not opened" in capsys.readouterr().err
    assert not marker.exists()


def test_a_configuration_that_names_code_on_the_hub_is_read_without_it(clip: Path, tmp_path: Path) -> None:
    """An attention implementation may be a repository, whose code transformers fetches and runs."""
    random_hf_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part |= {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
        part["auto_map"] = {"AutoModel": "someone/code--module.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(str(tmp_path)).sha256 == load_backbone(str(clip)).sha256


# Missing tables


# Resuming a damaged training


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: [content.pop(name) for name in names]


def having(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


NOT_RESUMABLE = "does not hold where the training stood"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        *((without(name), NOT_RESUMABLE) for name in ("epoch", "loops", "callbacks", "MissingModalityData")),
        (having(optimizer_states=[]), NOT_RESUMABLE),
        (having(lr_schedulers=5), "not to be resumed"),
        (having(optimizer_states=[{}]), "not to be resumed: KeyError 'param_groups'"),
        (having(loops={"a": 1}), "not to be resumed: KeyError 'fit_loop'"),
        (having(lr_schedulers=[5]), "not to be resumed"),
        (having(MissingModalityData={"epoch": 1}), "was trained with samples per batch = None, now it is 4"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "different number of parameter groups"),
        (lambda c: c["state_dict"].popitem(), "1 names missing"),
        (lambda c: c["state_dict"][WEIGHT].fill_(float("nan")), f"{WEIGHT} holds values that are not finite"),
    ],
)
def test_a_training_that_cannot_be_resumed_is_an_error(
    change: Callable[[dict[str, Any]], object],
    found: str,
    workspace: Workspace,
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(stopped, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "last.ckpt")
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_epoch=2")
    assert command_line(workspace.command(*options, f"resume_from={tmp_path / 'last.ckpt'}")) == 2
    error = error_of(capsys)
    assert found in error and ("last.ckpt" in error or "resume_from" in error)


@pytest.fixture(scope="module")
def stopped(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.ckpt of a training of one epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    given = [f"vit={workspace.backbone}", f"log_dir={folder}", "max_epoch=1", "test_after_fit=False"]
    assert command_line(workspace.command(*given)) == 0
    return next(folder.rglob("last.ckpt"))
