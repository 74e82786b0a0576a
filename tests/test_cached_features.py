"""Cached features of frozen towers: the same batches and numbers as without, never those of other data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clip.backbone import FrozenWeights
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipBackbone, Transformer
from clip.trainable import freeze
from engine import cached_features
from engine.cached_features import cache_features, has_constant_features
from engine.checkpoint import ModelSpec, build_classifier
from engine.training import model_input
from run import command_line
from tests.conftest import Patch
from tests.data_files import Tokenizer, assert_equal, data_settings, films, write
from tests.models import TINY, tiny_classifier
from vilt.datamodules import MissingModalityData
from vilt.datasets.kinds import InputFormat
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.missing_tables import MissingPattern

CPU = torch.device("cpu")
PLOTS = [["a", "a longer plot"], [], ["b"], ["c"], ["d", "e", "f"], ["g"], ["h"], ["i"], [], ["j"]]


def open_data(folder: Path, windows: int = 1, group: bool = False, **changes: Any) -> MissingModalityData:
    """Opens films with several plots or none, in all splits."""
    for split in SPLITS:
        if not (path := folder / DATASETS["mmimdb"].file_name(split)).exists():
            write(path, films(PLOTS))
    settings = data_settings("mmimdb", folder, MissingPattern("both", 0.6, 0.5, 0), per_gpu_batchsize=4, **changes)
    return MissingModalityData(settings, SPLITS, InputFormat(32, Tokenizer(), "tokenizer", windows, group))


@pytest.fixture(scope="module")
def backbone() -> FrozenWeights:
    torch.manual_seed(0)
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in ClipBackbone(TINY).state_dict().items()}
    return FrozenWeights("random", TINY, state)


def keep(data: MissingModalityData, backbone: FrozenWeights, precision: str = "32", **changes: Any) -> None:
    cache_features(data, backbone, "tokenizer", precision, CPU, **changes)


def gradients(classifier: MissingModalityClassifier, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    classifier.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in classifier.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"simulate_missing": True}, {"modality_dropout": 0.5}])
@pytest.mark.parametrize(
    ("head", "reading"),
    [("linear", {}), ("dpl", {}), ("linear", {"windows": 3}), ("linear", {"windows": 2, "group": True})],
)  # DPL trains the towers' ends
def test_batches_logits_and_gradients_match_those_without_cached_features(tmp_path, backbone, head, reading, changes):
    # DPL multiplies cosines by 32.
    tolerance: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6 if head == "linear" else 32e-6}
    method = MethodOptions("none", text_windows=reading.get("windows", 1), train_ends=bool(reading) or None)
    classifier = build_classifier(ModelSpec("mmimdb", method, TINY, head))
    backbone.load_into(classifier.model)
    plain, kept = open_data(tmp_path, **reading, **changes), open_data(tmp_path, **reading, **changes)
    keep(kept, backbone)
    counts = {name: len(x) for name, x in (kept.datasets["train"].cached or {}).items()}
    assert counts == {"image": 10, "text": 8 if "group" in reading else 11}
    for loader in ("train_dataloader", "val_dataloader"):
        seen = set()
        for with_inputs, without in zip(getattr(plain, loader)(), getattr(kept, loader)(), strict=True):
            seen |= set(with_inputs.types)
            for field in set(with_inputs._fields) - {"inputs", "lengths", "length_b", "cached"}:
                assert_equal([getattr(with_inputs, field)], [getattr(without, field)])
            outputs = [classifier.training_outputs(model_input(batch), batch.label) for batch in (with_inputs, without)]
            torch.testing.assert_close(outputs[0][0], outputs[1][0], **tolerance)
            found = [gradients(classifier, logits.square().mean() + sum(own.values())) for logits, own in outputs]
            assert found[0].keys() == found[1].keys()
            for name in found[0]:
                torch.testing.assert_close(found[0][name], found[1][name], **tolerance)
        assert len(seen) > 1


def test_features_are_constant_only_for_frozen_towers_without_prompts() -> None:
    options: dict[str, Any] = {"task": "mmimdb", "prompt_type": "none"}
    assert has_constant_features(tiny_classifier(**options))
    assert has_constant_features(tiny_classifier(**options, head="dpl"))
    assert not has_constant_features(tiny_classifier("mmimdb"))
    for method in ("mora", "lora", "aoept", "coop"):
        assert not has_constant_features(tiny_classifier("mmimdb", prompt_type=method))
    classifier = tiny_classifier(**options)
    classifier.model.get_parameter("text_encoder.transformer.resblocks.1.ln_2.bias").requires_grad_()
    assert not has_constant_features(classifier)
    freeze(classifier, "mmimdb")
    assert has_constant_features(classifier)


def test_a_file_is_reused_unless_data_weights_or_precision_differ(tmp_path, backbone, monkeypatch):
    passes: list[int] = []
    forward = Transformer.forward

    def counted(self: Transformer, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        passes.append(len(tokens))
        return forward(self, tokens, *others)

    monkeypatch.setattr(Transformer, "forward", counted)

    def kept(backbone: FrozenWeights = backbone, precision: str = "32") -> int:
        """Caches features; returns the number of inputs encoded."""
        passes.clear()
        keep(open_data(tmp_path), backbone, precision)
        return sum(passes)

    assert kept() == 3 * 21
    assert kept() == 0
    other = {name: value + 0.1 for name, value in backbone.state.items()}
    assert kept(replace(backbone, state=other)) == 3 * 21
    assert kept(precision="bf16") == 3 * 21
    assert kept() == 0
    path = tmp_path / DATASETS["mmimdb"].file_name("val")
    before = set(tmp_path.glob("*.safetensors"))
    write(path, films([*PLOTS[1:], ["changed"]]))
    assert kept() == 10 + 10
    [damaged] = set(tmp_path.glob("*.safetensors")) - before
    assert len(before - set(tmp_path.glob("*.safetensors"))) == 1, "only the file of the old data is removed"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert kept() == 10 + 10
    image = load_file(next(iter(tmp_path.glob("mmimdb_train_features_*"))))["image.features"]
    assert image.dtype == torch.float32 and image.shape == (10, TINY.embed_dim)


def test_features_saved_by_a_killed_run_are_reused(tmp_path: Path, backbone: FrozenWeights, monkeypatch: Patch) -> None:
    monkeypatch.setattr(cached_features, "PART", 4)
    monkeypatch.setattr(cached_features, "ROWS", 2)
    (tmp_path / "other").mkdir()
    whole, data = open_data(tmp_path / "other"), open_data(tmp_path)
    keep(whole, backbone)
    run, parts = cached_features._Maker._run, []

    def killed(self: Any, name: str, *others: Any) -> Any:
        parts.append(name)
        if len(parts) == 3:
            raise KeyboardInterrupt
        return run(self, name, *others)

    monkeypatch.setattr(cached_features._Maker, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(data, backbone)
    keep(data, backbone)
    assert parts[:3] == ["image"] * 3 and parts[3:].count("image") == 1 + 2 * 3, "two parts had been saved"
    for split in SPLITS:
        assert_equal(data.datasets[split].cached, whole.datasets[split].cached)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_disk_space_a_training_computes_features_in_memory(tmp_path, backbone, monkeypatch, caplog):
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cached_features, "atomic_path", full)
    data = open_data(tmp_path)
    with caplog.at_level("INFO"):
        keep(data, backbone)
    assert "cannot be saved" in caplog.text and "space" in caplog.text and not list(tmp_path.glob("*.safetensors"))
    assert data.datasets["test"].cached is not None
    with pytest.raises(OSError, match="space"):
        keep(data, backbone, must_keep=True)


def test_a_training_ends_at_the_same_weights_with_and_without_cached_features(workspace, tmp_path, monkeypatch, capsys):
    """Runs whole trainings, the first on features cached by `run.py features`."""
    small = ("prompt_type=none", "train_ends=True", "max_epoch=1", "test_after_fit=False")
    common = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", *small)
    assert command_line(["run.py", "features", *workspace.command(*common)[1:]]) == 0
    states = []
    for name in ("kept", "plain"):
        if name == "plain":
            monkeypatch.setattr("runs.training.has_constant_features", lambda _: False)
        else:
            monkeypatch.setattr(cached_features._Maker, "_run", None)  # all cached by `features`
        assert command_line(workspace.command(*common, f"exp_name={name}")) == 0
        folder = tmp_path / f"{name}_seed0" / "version_0"
        states.append(torch.load(folder / "best.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6)
