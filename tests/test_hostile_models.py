"""Hostile and broken weights: checkpoints, backbones, tokenizers, published missing tables.

A result, or an error of ours; nothing in a file runs, and none asks for more memory than it fills.
"""

import gzip
import io
import json
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clip.backbone import Backbone, load_backbone
from clip.checkpoint import (
    DESCRIPTION,
    ModelSpec,
    build_classifier,
    describe,
    kept_state,
    read_checkpoint,
    restore_classifier,
)
from clip.modules.method import MethodOptions
from clip.tokenizer import MOST_BYTES, load_tokenizer
from common.errors import BackboneError, CheckpointError, DataError, UserError
from common.torch_file import check_archive, load_inert
from run import command_line
from tests.backbones import random_hf_clip
from tests.conftest import Workspace
from tests.models import TINY, tiny_classifier
from tests.report_files import write_run
from tests.test_backbone import openai_state
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


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    content = bytearray(whole)
    content[place] ^= 1 << bit
    return bytes(content)


def test_cut_and_flipped_checkpoints_are_refused_or_read_as_they_were(backbone: Backbone, tmp_path: Path) -> None:
    """What is read is never another number: at most a bit that nothing depends on has changed."""
    path = tmp_path / "best.ckpt"
    content = content_of(backbone)
    state = content["state_dict"]
    torch.save(content, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(CheckpointError, match=r"best\.ckpt: not readable as a checkpoint: ."):
            read(path, backbone)
    refused = 0
    for number in range(60):
        # some of the flips where the pickle is, some in the directory, some in the numbers
        first, behind = ((0, 8000), (len(whole) - 8000, len(whole)), (0, len(whole)))[number % 3]
        path.write_bytes(flipped(whole, draw.randrange(first, behind), draw.randrange(8)))
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert checkpoint.spec == SPEC
            assert checkpoint.state.keys() == state.keys()
            assert all(torch.equal(value, state[name]) for name, value in checkpoint.state.items())
    assert 20 < refused < 60


@pytest.mark.parametrize("wanted", ["best.ckpt", "last.ckpt"])
def test_a_flipped_bit_of_a_weight_is_noticed_by_every_command(
    wanted: str, workspace: Workspace, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.load does not look at the checksums, and the value is still a number."""
    path = tmp_path / wanted
    shutil.copy(stopped.with_name(wanted), path)
    weight = torch.load(path, weights_only=True)["state_dict"][WEIGHT]
    whole = path.read_bytes()
    place = whole.index(weight.numpy().tobytes())
    path.write_bytes(flipped(whole, place, 0))
    assert torch.isfinite(torch.load(path, weights_only=True)["state_dict"][WEIGHT]).all()
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    commands = {
        "test": workspace.command(f"load_path={path}", "test_only=True"),
        "warm start": workspace.command(f"load_path={path}"),
        "predict": ["run.py", "predict", "with", f"load_path={path}", f"input={tmp_path / 'in.jsonl'}"],
        "robustness": ["run.py", "robustness", "with", f"load_path={path}", f"data_root={workspace.arrow}"],
    }
    if wanted == "last.ckpt":
        commands["resume"] = workspace.command(f"resume_from={path}")
    for name, command in commands.items():
        told = [*command, f"vit={workspace.backbone}", f"log_dir={tmp_path}"]
        assert command_line(told) == 2, name
        assert f"error: {path}: damaged: the checksum of its entry archive/data/" in capsys.readouterr().err, name


@pytest.mark.parametrize("name", ["tar", "gzip", "zip of text", "pickle", "web page"])
def test_other_kinds_of_files_are_no_checkpoints(name: str, backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    inner = io.BytesIO()
    torch.save(content_of(backbone), inner)
    if name == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("data.pkl")
            info.size = len(inner.getvalue())
            archive.addfile(info, io.BytesIO(inner.getvalue()))
    elif name == "zip of text":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        path.write_bytes(
            {"gzip": gzip.compress(inner.getvalue()), "pickle": pickle.dumps({"state_dict": {}}, 4)}.get(
                name, b"<html>"
            )
        )
    with pytest.raises(CheckpointError, match=r"best\.ckpt: "):
        read(path, backbone)


def odd_tensors() -> dict[str, tuple[Tensor, str]]:
    return {
        "nan": (torch.full((2, 64), float("nan")), "holds values that are not finite"),
        "infinite": (torch.full((2, 64), float("-inf"), dtype=torch.bfloat16), "holds values that are not finite"),
        "integers": (torch.ones(2, 64, dtype=torch.int64), "holds torch.int64"),
        "complex": (torch.ones(2, 64, dtype=torch.complex64), "holds torch.complex64"),
        "sparse": (torch.ones(2, 64).to_sparse(), "torch.sparse_coo"),
        "nowhere": (torch.ones(2, 64, device="meta"), "meta"),
        "terabytes": (
            torch.ones(1).expand(10**6, 10**6),
            r"has the shape \(1000000, 1000000\), but not as many values",
        ),
        "repeated": (torch.ones(1).expand(2, 64), "but not as many values"),
    }


@pytest.mark.parametrize("kind", odd_tensors())
def test_weights_that_are_none_are_refused_by_name(kind: str, clip: Path, backbone: Backbone, tmp_path: Path) -> None:
    tensor, found = odd_tensors()[kind]
    content = content_of(backbone)
    content["state_dict"][WEIGHT] = tensor
    torch.save(content, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=rf"best\.ckpt: {WEIGHT} .*{found}"):
        read_checkpoint(tmp_path / "best.ckpt")
    published = {"state_dict": {**tiny_classifier().state_dict(), WEIGHT: tensor}}
    torch.save(published, tmp_path / "published.ckpt")
    with pytest.raises(CheckpointError, match=rf"published\.ckpt: {WEIGHT} .*{found}"):
        read_checkpoint(tmp_path / "published.ckpt")
    state = openai_state(random_hf_clip(tmp_path / "other"))
    torch.save({**state, "visual.proj": tensor}, tmp_path / "weights.pt")
    with pytest.raises(BackboneError, match=rf"vit=.*weights\.pt: visual\.proj .*{found}"):
        load_backbone(str(tmp_path / "weights.pt"), activation="quick_gelu")


def test_weights_that_are_not_finite_in_safetensors(tmp_path: Path) -> None:
    state = {
        name: value.detach().clone().contiguous() for name, value in openai_state(random_hf_clip(tmp_path)).items()
    }
    state["positional_embedding"][3, 5] = float("inf")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(
        BackboneError, match=r"weights\.safetensors: positional_embedding holds values that are not finite"
    ):
        load_backbone(str(tmp_path / "weights.safetensors"), activation="quick_gelu")


# Memory


def packed(content: object, path: Path) -> None:
    """What `torch.save` writes, with its entries compressed."""
    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


def overlapping(content: object, path: Path) -> None:
    """What `torch.save` writes, with a directory that lists its largest entry a hundred times."""
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(100):
            copied = zipfile.ZipInfo(f"{largest.filename}{number}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copied, name, getattr(largest, name))
            archive.filelist.append(copied)
            archive.NameToInfo[copied.filename] = copied
        archive._didModify = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "found"), [(packed, "its entries are compressed"), (overlapping, "its entries claim")]
)
def test_archives_that_grow_are_not_unpacked(
    make: Callable[[object, Path], None], found: str, clip: Path, backbone: Backbone, tmp_path: Path
) -> None:
    zeros = torch.zeros(10**6)
    path = tmp_path / "best.ckpt"
    make({"state_dict": {"a": zeros}}, path)
    with pytest.raises(ValueError, match=found):
        load_inert(path)
    with pytest.raises(CheckpointError, match=rf"best\.ckpt: not readable as a checkpoint: {found}"):
        read_checkpoint(path)
    make({"a": zeros}, tmp_path / "weights.bin")
    with pytest.raises(BackboneError, match=rf"weights\.bin: not readable as a state dict: {found}"):
        load_backbone(str(tmp_path / "weights.bin"))
    make(zeros, tmp_path / "mmimdb_train_missing_both_07.pt")
    with pytest.raises(DataError, match=rf"both_07\.pt: not readable as a published missing table: {found}"):
        load_missing_table(tmp_path, "mmimdb", "train", BOTH, 10**6)
    folder = tmp_path / "folder"
    random_hf_clip(folder)
    (folder / "model.safetensors").unlink()
    make({"a": zeros}, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=found):
        load_backbone(str(folder))


def test_what_torch_saves_is_no_archive_that_grows(tmp_path: Path) -> None:
    for number, content in enumerate([{}, [1], torch.zeros(3), {"a": torch.zeros(1000), "b": "x" * 5000}]):
        for zipped in (True, False):
            torch.save(content, tmp_path / str(number), _use_new_zipfile_serialization=zipped)
            check_archive(tmp_path / str(number))


def test_descriptions_of_gigantic_models_are_refused_before_any_is_made(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    content = content_of(backbone)
    for length in (3 * 10**12, 3 * 10**30):
        content[DESCRIPTION]["memory_length"] = length
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"best\.ckpt: (.* has shape|no model has its sizes)"):
            read(path, backbone)
    state = tiny_classifier().state_dict()
    state["model.image_encoder.conv1.weight"] = torch.zeros(200_000, 3, 1, 1)  # blocks of this width take 480 GB each
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"best\.ckpt: .* has shape"):
        read(path, backbone)


@pytest.mark.parametrize(
    ("tower", "changes", "found"),
    [
        ("vision_config", {"num_hidden_layers": 10**9}, "num_hidden_layers: expected 1 to 100, found 1000000000"),
        ("text_config", {"vocab_size": 10**9}, "config.json describes .* values, and the weights have"),
        ("vision_config", {"intermediate_size": 10**9}, "config.json describes .* values, and the weights have"),
        ("text_config", {"hidden_size": 10**30}, "not readable"),
    ],
)
def test_configurations_of_gigantic_models_are_refused_before_any_is_made(
    tower: str, changes: dict[str, int], found: str, tmp_path: Path
) -> None:
    random_hf_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[tower] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=found):
        load_backbone(str(tmp_path))


def test_merges_that_grow_when_unpacked_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"a b\n" * (MOST_BYTES // 2)))
    with pytest.raises(BackboneError, match=r"merges\.txt\.gz: .* more than 16,777,216 bytes"):
        load_tokenizer(str(path))


# Values that are slow to compare, to copy or to print


def doubled(depth: int) -> list[Any]:
    """A list that, written out, has 2^depth entries; it has `depth` lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize("place", ["format", "task", "memory_length", "architecture", "backbone", "rep"])
def test_values_within_values_do_not_hold_a_reader_up(place: str, backbone: Backbone, tmp_path: Path) -> None:
    content = content_of(backbone)
    if place == "rep":
        content[DESCRIPTION] = doubled(100)
    else:
        content[DESCRIPTION][place] = doubled(100)
    torch.save(content, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"best\.ckpt: ") as refusal:
        read_checkpoint(tmp_path / "best.ckpt")
    assert len(str(refusal.value)) < 1000


# Code


class Touch:
    """Pickled, it is a call that makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def positions(code: Touch) -> dict[str, Any]:
    return {
        "top": code,
        "value": {"state_dict": {}, "x": code},
        "key": {"state_dict": {}, ("a", code): 1},
        "state": {"state_dict": {"a": code}},
        "state itself": {"state_dict": code},
        "description": {"state_dict": {"a": torch.ones(1)}, DESCRIPTION: code},
        "score": {"score": code},
        "list": [code],
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("position", positions(Touch(Path())))
def test_code_in_any_position_does_not_run_in_any_reader(position: str, zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = positions(Touch(marker))[position]
    run = tmp_path / "runs" / "rep_seed0" / "version_0"
    run.mkdir(parents=True)
    places: dict[Path, Callable[[Path], object]] = {
        run / "best.ckpt": read_checkpoint,
        tmp_path / "weights.pt": lambda path: load_backbone(str(path)),
        tmp_path / "weights.bin": lambda path: load_backbone(str(path)),
        tmp_path / "mmimdb_train_missing_both_07.pt": lambda path: load_missing_table(
            path.parent, "mmimdb", "train", BOTH, 5
        ),
    }
    for path, reader in places.items():
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=path.name):
            reader(path)
    assert not marker.exists()
    with pytest.raises(Exception, match=r".*"):  # torch.load of a bare call gives None, which is no checkpoint
        assert torch.load(run / "best.ckpt", weights_only=False) is NotImplemented
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
        told = [option.format(made / "best.ckpt") for option in options]
        assert command_line(workspace.command(f"vit={workspace.backbone}", *told)) == 2
        assert "which a checkpoint has no need of and which might run code" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    ("ratio", "names"),
    [(1, ("both_10", "both_1")), (1.0, ("both_10", "both_1")), (0, ("both_00", "both_0")), (0.7, ("both_07",))],
)
def test_published_tables_of_a_whole_ratio_have_either_name(
    ratio: float, names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pattern = MissingPattern("both", ratio, 0.5, 0)
    for number, name in reversed(list(enumerate(names))):  # the first name, made last, has precedence
        torch.save(torch.full((4,), float(number + 1)), tmp_path / f"mmimdb_test_missing_{name}.pt")
        with caplog.at_level("INFO"):
            assert load_missing_table(tmp_path, "mmimdb", "test", pattern, 4).tolist() == [number + 1] * 4
        assert f"mmimdb_test_missing_{name}.pt" in caplog.text


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**6)])
def test_a_published_table_that_claims_terabytes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "mmimdb_train_missing_both_07.pt"
    torch.save(torch.zeros(1).expand(shape), path)
    with pytest.raises(DataError, match=r"both_07\.pt: expected a tensor of 10 entries, .*, found \(10"):
        load_missing_table(tmp_path, "mmimdb", "train", BOTH, 10)


# Going on with a damaged training


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
        (having(lr_schedulers=5), NOT_RESUMABLE),
        (having(global_step="3"), NOT_RESUMABLE),
        (having(optimizer_states=[{}]), "not to be resumed: KeyError 'param_groups'"),
        (having(loops={"a": 1}), "not to be resumed: KeyError 'fit_loop'"),
        (having(lr_schedulers=[5]), "not to be resumed"),
        (having(MissingModalityData={"epoch": 1}), "was trained with samples per batch = None, now it is 4"),
        (lambda c: c["callbacks"].update(Checkpoints={"best": 5}), "expected the best model so far in it"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "different number of parameter groups"),
        (lambda c: c["state_dict"].popitem(), "1 names missing"),
        (lambda c: c["state_dict"][WEIGHT].fill_(float("nan")), f"{WEIGHT} holds values that are not finite"),
    ],
)
def test_a_training_that_cannot_go_on_is_an_error(
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
    told = [f"vit={workspace.backbone}", f"log_dir={tmp_path}", "max_epoch=2", f"resume_from={tmp_path / 'last.ckpt'}"]
    assert command_line(workspace.command(*told)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and found in errors[0] and ("last.ckpt" in errors[0] or "resume_from" in errors[0])


@pytest.fixture(scope="module")
def stopped(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.ckpt of a training of one epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    told = [f"vit={workspace.backbone}", f"log_dir={folder}", "max_epoch=1", "test_after_fit=False"]
    assert command_line(workspace.command(*told)) == 0
    return next(folder.rglob("last.ckpt"))
