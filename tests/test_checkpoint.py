"""Our checkpoints and published ones: their contents, exact restoring, and refusals."""

import gzip
import io
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip.backbone import FrozenWeights, load_backbone
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import MethodOptions
from common.errors import CheckpointError, UserError
from common.torch_file import check_state, load_inert
from engine.checkpoint import (
    DESCRIPTION,
    ModelSpec,
    build_classifier,
    describe,
    load_saved_state,
    read_checkpoint,
    restore_classifier,
    saved_state,
)
from tests.archives import Touch
from tests.backbones import random_hf_clip
from tests.conftest import Patch
from tests.models import ENDS, TINY, model_input, published_name, published_state, tiny_batch, tiny_classifier
from vilt.missing_tables import MissingPattern, load_missing_table

TYPES = [0, 1, 2, 0, 2]
WEIGHT = "model.memory_learner.text_memory_complete"
BOTH = MissingPattern("both", 0.7, 0.5, 0)
ALPHA = "model.memory_learner.residual_alpha"
COMMON = "model.memory_learner.common_memory_complete"
CONV = "model.image_encoder.conv1.weight"
HEAD = "mmimdb_classifier.weight"


def spec_of(task: str) -> ModelSpec:
    return ModelSpec(task, MethodOptions("rep", 6, 2), TINY)


def trained_classifier(task: str, backbone: FrozenWeights, seed: int = 0) -> MissingModalityClassifier:
    """A classifier on `backbone` whose trained parameters have all been moved."""
    torch.manual_seed(seed)
    classifier = build_classifier(spec_of(task))
    backbone.load_into(classifier.model)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return classifier.eval()


def content_of(classifier: MissingModalityClassifier, task: str, backbone: FrozenWeights) -> dict[str, Any]:
    return {
        "epoch": 3,
        "state_dict": saved_state(classifier),
        DESCRIPTION: describe(spec_of(task), backbone.name, backbone.sha256),
    }


def logits_of(classifier: MissingModalityClassifier) -> Tensor:
    images, tokens = tiny_batch(len(TYPES))
    with torch.no_grad():
        return classifier.eval()(model_input(images, tokens, TYPES))


def test_integer_buffers_are_accepted_but_integer_weights_are_not() -> None:
    """BatchNorm, for example, counts its batches in an integer buffer."""
    expected = {"count": torch.tensor(3), "weight": torch.zeros(2)}
    check_state({"count": torch.tensor(5), "weight": torch.ones(2)}, expected)
    with pytest.raises(ValueError, match=r"weight holds torch\.int64"):
        check_state({"count": torch.tensor(5), "weight": torch.ones(2, dtype=torch.int64)}, expected)


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_a_checkpoint_saves_everything_but_frozen_weights(task: str, backbone: FrozenWeights) -> None:
    """Saved are trained parameters, the dynamic attention and its queries."""
    kept = saved_state(trained_classifier(task, backbone))
    frozen = {f"model.{name}" for name in backbone.state}
    assert frozen & kept.keys() == (ENDS if task == "hatememes" else set())
    assert len([name for name in kept if ".dynamic." in name and ".queries_" in name]) == 6
    assert len([name for name in kept if ".dynamic." in name and ".attention." in name]) == 8
    assert {f"{task}_classifier.weight", "model.memory_learner.residual_alpha"} <= kept.keys()


def test_checkpoints_with_older_names_load(backbone: FrozenWeights, tmp_path: Path) -> None:
    """They keep the dynamic slots in the towers, as published, and store frozen values in 16 bits if that is exact."""
    classifier = trained_classifier("mmimdb", backbone)
    content = content_of(classifier, "mmimdb", backbone)
    weight = content["state_dict"]["model.memory_learner.dynamic.image.attention.in_proj_weight"]
    weight.copy_(weight.bfloat16())
    old = {published_name(name): value for name, value in content["state_dict"].items()}
    assert old.keys() != content["state_dict"].keys()
    name = "model.image_encoder.transformer.resblocks.0.attn_memory.in_proj_weight"
    torch.save({**content, "state_dict": {**old, name: old[name].bfloat16()}}, tmp_path / "old.ckpt")
    restored = restore_classifier(read_checkpoint(tmp_path / "old.ckpt"), backbone)
    assert torch.equal(logits_of(restored), logits_of(classifier))


def test_a_backbone_is_found_relative_to_the_checkpoint(backbone: FrozenWeights, tmp_path: Path) -> None:
    """A relative path is looked up in the folders above the checkpoint, as for a notebook; other names stay."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    path = tmp_path / "result" / "rep_seed0" / "best.ckpt"
    path.parent.mkdir(parents=True)
    classifier = trained_classifier("mmimdb", backbone)
    for name in ("weights", "ViT-B/16", "random:0", "x" * 300):
        torch.save(content_of(classifier, "mmimdb", replace(backbone, name=name)), path)
        found, expected = read_checkpoint(path), str(tmp_path / name) if name == "weights" else name
        assert (found.backbone_place, found.backbone_name) == (expected, name)


def test_a_different_backbone_is_refused(backbone: FrozenWeights, tmp_path: Path) -> None:
    torch.save(content_of(trained_classifier("mmimdb", backbone), "mmimdb", backbone), tmp_path / "best.ckpt")
    checkpoint = read_checkpoint(tmp_path / "best.ckpt")
    random_hf_clip(tmp_path / "other", seed=1)
    other = load_backbone(str(tmp_path / "other"))
    with pytest.raises(CheckpointError) as refusal:
        restore_classifier(checkpoint, other)
    for part in (str(tmp_path / "best.ckpt"), backbone.name, other.name, backbone.sha256, other.sha256):
        assert part in str(refusal.value)
    gelu = replace(backbone, architecture=replace(TINY, activation="gelu"))
    with pytest.raises(CheckpointError, match=r"activation \(there quick_gelu, here gelu\)"):
        restore_classifier(checkpoint, gelu)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["state_dict"].pop(ALPHA), r"1 names missing .*residual_alpha\)"),
        (lambda c: c["state_dict"][ALPHA].fill_(float("nan")), "residual_alpha holds values that are not finite"),
        (lambda c: c["state_dict"].update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (lambda c: c["state_dict"].update({HEAD: torch.ones(2, 128)}), rf"{HEAD} has shape \(2, 128\).*\(23, 128\)"),
        (lambda c: c["state_dict"].update(extra="text"), r"expected a state dict .*'extra' is a str"),
        (lambda c: c["state_dict"].update({7: torch.ones(1)}), r"expected a state dict .*'7' is a Tensor"),
        (lambda c: c.update(state_dict=[]), r"expected a state dict .* found list"),
        (lambda c: c.pop("state_dict"), r"expected a Lightning checkpoint .* state_dict, found a dict \(epoch, rep"),
        (lambda c: c["rep"].update(format=2), "expected checkpoint format 1, found 2"),
        (lambda c: c["rep"].pop("format"), "expected checkpoint format 1, found None"),
        (lambda c: c.update(rep="1"), "expected checkpoint format 1, found '1'"),
        (lambda c: c.update(rep=None), "common_memory_complete has shape|image_encoder.conv1.weight is missing"),
        (lambda c: c["rep"].pop("task"), "task"),
        (lambda c: c["rep"].update(task="other"), "task 'other', expected one of mmimdb, food101, hatememes"),
        (lambda c: c["rep"].update(task=["mmimdb"]), r"task \['mmimdb'\], expected"),
        (lambda c: c["rep"].update(prompt_type="other"), "prompt_type 'other', expected one of rep, dcp"),
        (lambda c: c["rep"].update(head="other"), "head 'other', expected one of linear"),
        (lambda c: c["rep"].update(class_names=["a"]), "class_names: expected 23, found 1"),
        (lambda c: c["rep"].update(memory_length=7), "memory_length must be a positive multiple of 3"),
        (lambda c: c["rep"].update(memory_length="6"), "memory_length: expected int, found '6'"),
        (
            lambda c: c["rep"].update(training={"seed": 0}),
            "TrainingRecord: missing: 'both_ratio', 'missing_type', 'ratio'",
        ),
        (lambda c: c["rep"].update(memory_depth=3), "memory_depth=3 needs more blocks than the backbone has"),
        (lambda c: c["rep"].update(memory_depth=1), "unexpected"),
        (lambda c: c["rep"].update(memory_length=9), "has shape"),
        (lambda c: c["rep"].pop("backbone"), "backbone"),
        (lambda c: c["rep"].update(backbone="x"), "best.ckpt: "),
        (lambda c: c["rep"]["backbone"].update(sha256=None), "sha256 .there None, here"),
        (lambda c: c["rep"].pop("architecture"), "architecture"),
        (lambda c: c["rep"]["architecture"].update(depth=3), "ClipArchitecture: missing: nothing; unknown: 'depth'"),
        (lambda c: c["rep"]["architecture"].pop("patch_size"), "ClipArchitecture: missing: 'patch_size'"),
        (lambda c: c["rep"]["architecture"].update(text_layers=3), "text_layers .there 3, here 2"),
    ],
)
def test_faulty_or_mismatched_content_is_refused(
    change: Change, problem: str, backbone: FrozenWeights, tmp_path: Path
) -> None:
    content = content_of(trained_classifier("mmimdb", backbone), "mmimdb", backbone)
    change(content)
    path = tmp_path / "best.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        restore_classifier(read_checkpoint(path), backbone)
    assert str(path) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_a_refused_state_leaves_the_model_unchanged(backbone: FrozenWeights) -> None:
    classifier = trained_classifier("mmimdb", backbone)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in saved_state(classifier).items()}
    state["mmimdb_classifier.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"here: mmimdb_classifier.bias has shape"):
        load_saved_state(classifier, state, "here")
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_files_other_than_checkpoints_are_refused(backbone: FrozenWeights, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(path)
    torch.save(content_of(trained_classifier("mmimdb", backbone), "mmimdb", backbone), path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"not readable as a checkpoint: ."):
        read_checkpoint(path)
    for other, found in (([1, 2], "list"), (torch.ones(2), "Tensor"), ({"a": 1}, r"dict \(a\)"), ("text", "str")):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match=f"expected a Lightning checkpoint .*, found a {found}"):
            read_checkpoint(path)


ODD_TENSORS: dict[str, tuple[Tensor, str]] = {
    "nan": (torch.full((2, 64), float("nan")), "holds values that are not finite"),
    "infinite": (torch.full((2, 64), float("-inf"), dtype=torch.bfloat16), "holds values that are not finite"),
    "integers": (torch.ones(2, 64, dtype=torch.int64), "holds torch.int64"),
    "complex": (torch.ones(2, 64, dtype=torch.complex64), "holds torch.complex64"),
    "sparse": (torch.ones(2, 64).to_sparse(), "torch.sparse_coo"),
    "nowhere": (torch.ones(2, 64, device="meta"), "expected floating-point numbers"),
    "terabytes": (torch.ones(1).expand(10**6, 10**6), r"has shape \(1000000, 1000000\), expected"),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_invalid_tensors_are_refused_by_name(kind: str, backbone: FrozenWeights, tmp_path: Path) -> None:
    tensor, found = ODD_TENSORS[kind]
    own, path = content_of(trained_classifier("mmimdb", backbone), "mmimdb", backbone), tmp_path / "best.ckpt"
    for content in (own, {"state_dict": tiny_classifier().state_dict()}):  # the second is a published checkpoint
        content["state_dict"][WEIGHT] = tensor
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"best\.ckpt: {WEIGHT} .*{found}"):
            restore_classifier(read_checkpoint(path), backbone)


def test_compressed_archives_are_not_unpacked(tmp_path: Path) -> None:
    intact = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(10**6)}}, intact)
    path = tmp_path / "best.ckpt"
    with zipfile.ZipFile(intact) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match=r"its entries claim .* bytes, but the file has"):
        load_inert(path)


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
def test_no_reader_runs_pickled_code_in_any_position(position, zipped, backbone, tmp_path):
    shutil.copy(Path(backbone.name) / "config.json", tmp_path)
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
    with pytest.raises(Exception, match=r".*"):  # for a bare call, torch.load returns None, which is no checkpoint
        assert torch.load(tmp_path / "best.ckpt", weights_only=False) is NotImplemented
    assert marker.exists(), "the pickle never creates the file, so the test is void"


class Call:
    """Unpickling it makes a call, unless the reader refuses."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_the_error_names_the_refused_code(backbone: FrozenWeights, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.ckpt"
    content = content_of(trained_classifier("mmimdb", backbone), "mmimdb", backbone)
    content["state_dict"]["code"] = Call(os.system, f"touch {marker}")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: .*mentions \S+\.system, "):
        read_checkpoint(path)
    assert not marker.exists()


def test_functions_from_modules_with_stand_ins_are_not_called(tmp_path: Path) -> None:
    """Published files may mention names from `_io` and `pathlib`."""
    marker = tmp_path / "marker"
    content = {"state_dict": {"a": torch.ones(1)}, "file": Call(io.FileIO, str(marker), "w"), "path": marker}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"common_memory_complete is missing"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not marker.exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)["file"].close()
    assert marker.exists(), "the pickle never opens the file, so the test is void"


class ModelCheckpoint:
    """Pickled under the name of Lightning's callback, a class that is a key in published checkpoints."""


class AttributeDict(dict):
    """Pickled under the name of the class of Lightning's hyper-parameters."""


@pytest.fixture
def published_names(monkeypatch: Patch) -> None:
    """Makes pickle write the two classes above under their published names."""
    for module, member in (
        ("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint),
        ("pytorch_lightning.utilities.parsing", AttributeDict),
    ):
        monkeypatch.setattr(f"{module}.{member.__name__}", member)
        monkeypatch.setattr(member, "__module__", module)


def published_content(classifier: MissingModalityClassifier) -> dict[str, Any]:
    """A checkpoint as the published code saves it: everything but the dynamic queries."""
    state = {name: value for name, value in published_state(classifier).items() if "memories_dynamic_" not in name}
    score = torch.tensor(0.5)
    return {
        "epoch": 4,
        "global_step": 634,
        "pytorch-lightning_version": "1.1.4",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"monitor": "val/the_metric", "best_model_score": score, "dirpath": "result"}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "config",
        "hyper_parameters": AttributeDict(memory_length=36, vit="ViT-B/16", loss_names={"mmimdb": 1}),
    }


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
@pytest.mark.usefixtures("published_names")
def test_published_checkpoints_load_without_a_backbone(task, tmp_path, caplog):
    classifier, path = tiny_classifier(task), tmp_path / "published.ckpt"
    content, safe = published_content(classifier), sorted(map(str, torch.serialization.get_safe_globals()))
    torch.save({**content, "state_dict": published_state(classifier)}, path)
    with caplog.at_level(logging.INFO, logger="engine.checkpoint"):
        assert torch.equal(logits_of(restore_classifier(read_checkpoint(path), None)), logits_of(classifier))
    assert not caplog.records, "no message: the checkpoint has its queries"
    torch.save(content, path)
    written = path.read_bytes()
    assert b"pytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint" in written
    assert b"pytorch_lightning.utilities.parsing\nAttributeDict" in written

    checkpoint = read_checkpoint(path)
    assert sorted(map(str, torch.serialization.get_safe_globals())) == safe, "stand-ins are removed after reading"
    assert checkpoint.published and checkpoint.backbone_name is None and checkpoint.spec == spec_of(task)
    with caplog.at_level(logging.INFO, logger="engine.checkpoint"):
        restored = restore_classifier(checkpoint, None, published_seed=4)
    assert "dynamic queries" in caplog.text and "seed 4" in caplog.text and str(path) in caplog.text

    torch.manual_seed(5)
    again = restore_classifier(read_checkpoint(path), None, published_seed=4)
    assert torch.equal(logits_of(again), logits_of(restored))
    queries = {name: value for name, value in classifier.state_dict().items() if ".queries_" in name}
    drawn = [value for name, value in restored.state_dict().items() if name in queries]
    assert len(drawn) == 6 and all(0.005 < value.std() < 0.04 for value in drawn)  # N(0, 0.02²)
    assert not torch.equal(logits_of(restored), logits_of(classifier))
    restored.load_state_dict({**restored.state_dict(), **queries})
    assert torch.equal(logits_of(restored), logits_of(classifier))


@pytest.mark.usefixtures("published_names")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop(ALPHA), r"1 names missing \(model.memory_learner.residual_alpha\)"),
        (lambda s: s.update({"model.extra": torch.ones(1)}), r"1 unexpected \(model.extra\)"),
        (lambda s: s.pop(CONV), "image_encoder.conv1.weight is missing"),
        (lambda s: s.update({CONV: torch.ones(2)}), r"shape \(2,\), expected 4 dimensions"),
        (lambda s: s.update({COMMON: torch.tensor(1.0)}), "expected 2 dimensions"),
        (lambda s: s.update({COMMON: torch.ones(0, 64)}), "none of them 0"),
        (lambda s: s.update({"mmimdb_classifier.bias": torch.ones(3)}), r"shape \(3,\), expected \(23,\)"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("mmimdb")], "expected one head .*, found 0"),
        (lambda s: s.update({"food101_classifier.weight": torch.ones(101, 128)}), "expected one head .*, found 2"),
        (lambda s: [s.pop(n) for n in list(s) if "layernorm_text" in n], "memory_depth must be at least 1"),
        (lambda s: s.pop("model.prompt_learner.common_prompt_complete"), "common_prompt_complete is missing"),
    ],
)
def test_incomplete_published_checkpoints_are_refused(change: Change, problem: str, tmp_path: Path) -> None:
    content = published_content(tiny_classifier(prompt_type="dcp" if "prompt" in problem else "rep"))
    change(content["state_dict"])
    torch.save(content, tmp_path / "published.ckpt")
    with pytest.raises(CheckpointError, match=problem) as refusal:
        restore_classifier(read_checkpoint(tmp_path / "published.ckpt"), None)
    assert str(tmp_path / "published.ckpt") in str(refusal.value)
