"""Settings in the files next to the weights are used, or refused with file, entry and value."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clip.backbone import load_backbone
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipBackbone
from clip.preprocessing import image_statistics
from clip.tokenizer import load_tokenizer
from common.errors import BackboneError
from engine.checkpoint import ModelSpec, describe, read_checkpoint
from engine.families import BackboneChoice, family_of
from run import command_line
from tests.backbones import openai_state, random_hf_clip
from tests.conftest import Workspace, error_line, read_json
from tests.models import tiny_classifier

HALF, ODD = [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]
PREPROCESSOR, PROCESSOR, OPEN_CLIP = "preprocessor_config.json", "processor_config.json", "open_clip_config.json"


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (PREPROCESSOR, {"image_mean": HALF, "image_std": ODD}),
        (PROCESSOR, {"image_processor": {"image_mean": HALF, "image_std": ODD}}),
        (OPEN_CLIP, {"model_cfg": {}, "preprocess_cfg": {"mean": HALF, "std": ODD}}),
    ],
)
def test_mean_and_std_of_images_are_used(name: str, content: Any, tmp_path: Path) -> None:
    write(tmp_path, name, content)
    assert image_statistics(tmp_path, 32) == {"image_mean": tuple(HALF), "image_std": tuple(ODD)}
    model = random_hf_clip(tmp_path)
    torch.save(openai_state(model), tmp_path / "weights.bin")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (images.float() / 255 - torch.tensor(HALF).view(3, 1, 1)) / torch.tensor(ODD).view(3, 1, 1)
    for vit in (tmp_path, tmp_path / "weights.bin"):  # the folder with the settings, and a file in it
        activation = "gelu" if vit.is_file() else None
        backbone = load_backbone(str(vit), activation=activation)
        tower = ClipBackbone(backbone.architecture).image_encoder
        assert torch.allclose(tower.embed(images), tower.embed(normalised), atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"size": 32, "crop_size": 32, "resample": 3, "do_convert_rgb": True, "processor_class": "CLIPProcessor"},
        {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "rescale_factor": 0.00392156862745098,
        },
        {"image_processor_type": "CLIPImageProcessorFast", "do_pad": None, "data_format": "channels_first"},
    ],
)
def test_settings_that_clip_always_uses_are_accepted(content: Any, tmp_path: Path) -> None:
    assert image_statistics(write(tmp_path, PREPROCESSOR, content), 32) == {}


REFUSED = [
    *((PREPROCESSOR, {f"do_{step}": False}, f"do_{step}.*True.*False")
      for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")),
    (PREPROCESSOR, {"do_pad": True}, "do_pad"),
    (PREPROCESSOR, {"resample": 2}, "resample.*3.*2"),
    (PREPROCESSOR, {"rescale_factor": 1}, "rescale_factor"),
    (PREPROCESSOR, {"size": {"height": 32, "width": 32}}, "size.*shortest_edge"),
    (PREPROCESSOR, {"size": 32, "default_to_square": True}, "size.*shortest_edge"),
    (PREPROCESSOR, {"size": {"shortest_edge": 36}, "crop_size": 32}, "size.*32.*36"),
    (PREPROCESSOR, {"crop_size": {"height": 30, "width": 32}}, "crop_size.*32.*30"),
    (PREPROCESSOR, {"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
    (PREPROCESSOR, {"size": {"shortest_edge": [32]}}, "size.*32"),
    (PREPROCESSOR, {"image_mean": 0.5}, "image_mean.*three numbers.*0.5"),
    (PREPROCESSOR, {"image_std": [0.5, 0, 0.5]}, "image_std.*three numbers"),
    (PREPROCESSOR, "[1]", "JSON object"),
    (PREPROCESSOR, "{", "JSON"),
    (PROCESSOR, {"image_processor": {"resample": 0}}, "resample"),
    (PROCESSOR, {"image_processor": [1]}, "image_processor.*object"),
    *((OPEN_CLIP, {"model_cfg": {}, "preprocess_cfg": entry}, "preprocess_cfg.*" + next(iter(entry)))
      for entry in ({"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"size": 36}, {"mean": [0.5]})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "found"), REFUSED)
def test_unsupported_settings_are_refused(name: str, content: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{found}") as refusal:
        image_statistics(write(tmp_path, name, content), 32)
    assert len(str(refusal.value).splitlines()) == 1


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, PREPROCESSOR, {"image_mean": HALF})
    write(tmp_path, OPEN_CLIP, {"model_cfg": {}, "preprocess_cfg": {"mean": ODD}})
    with pytest.raises(ValueError, match=r"mean: expected .*0\.5.*found .*0\.1"):
        image_statistics(tmp_path, 32)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type.*tok.*avg"),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "norm_kwargs.*1e-06"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"context_length": 64}}, "context_length.*77.*64"),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs.*tanh"),
        ({"embed_dim": 32}, "embed_dim.*64.*32"),
        ({"vision_cfg": {"image_size": 64, "width": 128}}, "vision_cfg.image_size.*32.*64"),
        ({"text_cfg": {"hf_tokenizer_name": "some/tokenizer"}}, "hf_tokenizer_name.*some/tokenizer"),
    ],
)
def test_open_clip_towers_with_other_settings_are_refused(entry: Any, found: str, tmp_path: Path) -> None:
    torch.save(openai_state(random_hf_clip(tmp_path / "hf")), tmp_path / "weights.bin")
    write(tmp_path, OPEN_CLIP, {"model_cfg": entry})
    with pytest.raises(BackboneError, match=f"{OPEN_CLIP}.*{found}"):
        load_backbone(str(tmp_path / "weights.bin"))


def test_head_counts_come_from_open_clip(tmp_path: Path) -> None:
    torch.save(openai_state(random_hf_clip(tmp_path / "hf")), tmp_path / "weights.bin")
    write(tmp_path, OPEN_CLIP, {"model_cfg": {"vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 4}}})
    found = load_backbone(str(tmp_path / "weights.bin")).architecture
    assert (found.vision_heads, found.text_heads) == (4, 4)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("added_tokens.json", {"<sks>": 5000}, "added tokens.*<sks>"),
        ("tokenizer_config.json", {"pad_token": "!"}, "added tokens.*!"),
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case"),
        ("tokenizer_config.json", {"model_max_length": 32}, "model_max_length.*77.*32"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side.*left"),
    ],
)
def test_a_tokenizer_with_other_settings_is_refused(name, change, found, workspace, tmp_path):
    folder = Path(shutil.copytree(workspace.backbone, tmp_path / "copy"))
    before = read_json(folder / name) if (folder / name).is_file() else {}
    write(folder, name, {**before, **change})
    with pytest.raises(BackboneError, match=found):
        load_tokenizer(str(folder))


def test_the_tokenizer_next_to_a_weights_file_is_used(workspace: Workspace, tmp_path: Path) -> None:
    for path in workspace.backbone.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "weights.bin").touch()
    inputs = family_of("mmimdb").inputs(BackboneChoice(str(tmp_path / "weights.bin")), None)
    assert inputs.fingerprint == load_tokenizer(str(workspace.backbone)).fingerprint


def test_a_checkpoint_records_the_normalisation_of_its_backbone(fitted, workspace, tmp_path, capsys):
    """The same weights with another normalisation are another backbone."""
    half = write(Path(shutil.copytree(workspace.backbone, tmp_path / "half")), PREPROCESSOR, {"image_mean": HALF})
    spec = ModelSpec("mmimdb", MethodOptions("none"), load_backbone(str(half)).architecture)
    content = {"state_dict": {"mmimdb_classifier.bias": torch.zeros(23)}, "rep": describe(spec, "half", "ab" * 32)}
    torch.save(content, tmp_path / "of_half.ckpt")
    assert read_checkpoint(tmp_path / "of_half.ckpt").spec.architecture.image_mean == tuple(HALF)
    options = ("test_only=True", f"load_path={fitted / 'best.ckpt'}", f"log_dir={tmp_path}", f"vit={half}")
    assert command_line(workspace.command(*options)) == 2
    assert "image_mean (there (0.48145466" in (said := error_line(capsys)) and "here (0.5, 0.5, 0.5)" in said


def test_a_published_checkpoint_of_a_compiled_model_can_be_read(tmp_path: Path) -> None:
    state = tiny_classifier().state_dict()
    content = {f"module.{name.replace('_encoder.', '_encoder._orig_mod.')}": value for name, value in state.items()}
    torch.save({"state_dict": content}, tmp_path / "compiled.ckpt")
    assert read_checkpoint(tmp_path / "compiled.ckpt").state.keys() == state.keys()
