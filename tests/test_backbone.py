"""A random tiny CLIP loaded from every format weights come in, and the refusal of faulty files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from clip import backbone as backbone_module
from clip.backbone import FrozenWeights, architecture_of, load_backbone
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from common.errors import BackboneError
from engine.checkpoint import ModelSpec, build_classifier
from tests import golden
from tests.backbones import hf_config, openai_state, random_hf_clip
from tests.conftest import read_json
from tests.models import REAL, TINY, published_name
from tests.test_tokenizer import SENTENCES, SlowTokenizer, train_merges, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but the format of OpenAI's archives
ROOT = Path(__file__).parents[1]
SCALARS = {"input_resolution": 32, "context_length": 77, "vocab_size": 300}
"""Entries that OpenAI's archives contain in addition to the weights."""


class Tiny:
    """The tiny CLIP: its Hugging Face folder, and its state dict with OpenAI's names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = random_hf_clip(folder)
        with torch.no_grad():  # round to half precision, so that fp16 files hold the same CLIP
            for parameter in self.model.parameters():
                parameter.copy_(parameter.half())
        self.model.save_pretrained(folder)
        self.openai = openai_state(self.model)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def loaded(tiny: Tiny) -> FrozenWeights:
    return load_backbone(str(tiny.folder))


def hf_folder(tiny: Tiny, folder: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, **files: Any) -> str:
    """A copy of the tiny folder. `change` edits the weights; config= edits config.json; pickled=True writes .bin."""
    folder.mkdir(parents=True)
    config = read_json(tiny.folder / "config.json")
    files.get("config", lambda _: None)(config)
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(tiny.folder / "model.safetensors")
    if change is not None:
        change(state)
    if files.get("pickled"):
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def add_position_ids(state: dict[str, Tensor]) -> None:
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]


def compiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames entries as DistributedDataParallel and torch.compile do, on the model and on a block in it."""
    for name in list(state):
        inner = name.replace("resblocks.1.", "resblocks.1._orig_mod.").replace("layers.1.", "layers.1._orig_mod.")
        state[f"module._orig_mod.{inner}"] = state.pop(name)
    return state


def scalars() -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in SCALARS.items()}


def half_like_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts to half precision as in OpenAI's archives: everything but norms, embeddings and the logit scale."""
    return {
        name: value if "ln_" in name or "embedding" in name or name == "logit_scale" else value.half()
        for name, value in state.items()
    }


class _Node(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def torchscript(state: dict[str, Tensor], path: Path) -> Path:
    """Saves a TorchScript archive with the state dict `state`, like OpenAI's archives."""
    root = _Node()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        node: nn.Module = root
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, _Node())
            node = node.get_submodule(part)
        if value.is_floating_point():
            node.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
        else:
            node.register_buffer(leaf, value)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), str(path))
    return path


def open_clip(tiny: Tiny, path: Path, quick: bool | None) -> str:
    """Saves open_clip's state dict of the tiny CLIP; `quick` is for open_clip_config.json, which None leaves out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tiny.openai, path)
    else:
        torch.save(tiny.openai, path)
    if quick is not None:
        entries = {"embed_dim": 64, **({"quick_gelu": True} if quick else {})}
        (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": entries}))
    return str(path)


def halve(state: dict[str, Tensor]) -> None:
    state.update({name: value.half() for name, value in state.items()})


def openai_file(tiny: Tiny, path: Path, change: Callable[[dict[str, Tensor]], Any] = dict, **options: Any) -> str:
    """Saves OpenAI's entries with `change` applied."""
    path.parent.mkdir(exist_ok=True)
    torch.save(change({**tiny.openai, **scalars()}), path, **options)
    return str(path)


FORMATS: dict[str, Callable[[Tiny, Path], str]] = {
    "bin folder": lambda tiny, to: hf_folder(tiny, to / "hf", pickled=True),
    "old folder": lambda tiny, to: hf_folder(tiny, to / "hf", add_position_ids),
    "half folder": lambda tiny, to: hf_folder(tiny, to / "hf", halve, config=lambda c: c.update(dtype="float16")),
    "compiled folder": lambda tiny, to: hf_folder(tiny, to / "hf", compiled),
    "openai": lambda tiny, to: openai_file(tiny, to / "clip.pt"),
    "openai half": lambda tiny, to: openai_file(tiny, to / "clip.pt", half_like_openai),
    "openai legacy": lambda tiny, to: openai_file(tiny, to / "clip.pth", _use_new_zipfile_serialization=False),
    "openai parameters": lambda tiny, to: openai_file(
        tiny, to / "clip.pt", lambda state: {name: nn.Parameter(value, False) for name, value in state.items()}
    ),
    "compiled": lambda tiny, to: openai_file(tiny, to / "clip.pt", compiled),
    "model entry": lambda tiny, to: openai_file(tiny, to / "clip.pt", lambda state: {"model": state, "epoch": 1}),
    "open_clip safetensors": lambda tiny, to: open_clip(tiny, to / "open_clip_model.safetensors", quick=True),
    "open_clip bin": lambda tiny, to: open_clip(tiny, to / "open_clip_pytorch_model.bin", quick=True),
    "open_clip training": lambda tiny, to: openai_file(
        tiny, to / "epoch_3.pt", lambda state: {"epoch": 3, "name": "run", "state_dict": compiled(state)}
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_as_the_same_backbone(name: str, tiny: Tiny, loaded: FrozenWeights, tmp_path: Path) -> None:
    assert_same(load_backbone(FORMATS[name](tiny, tmp_path)), loaded, tiny)


def tower_name(name: str) -> str:
    """Our name for OpenAI's entry `name`."""
    if name == "logit_scale":
        return name
    return f"image_encoder.{name[7:]}" if name[:7] == "visual." else f"text_encoder.{name}"


def assert_same(found: FrozenWeights, loaded: FrozenWeights, tiny: Tiny) -> None:
    assert found.architecture == loaded.architecture == TINY
    assert found.sha256 == loaded.sha256
    assert found.state.keys() == loaded.state.keys() == set(map(tower_name, tiny.openai))
    for name, tensor in found.state.items():
        short = name.removeprefix("text_encoder.").replace("image_encoder.", "visual.")
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        assert torch.equal(tensor, tiny.openai[short]), name


def test_the_hash_depends_on_the_values(tiny: Tiny, loaded: FrozenWeights, tmp_path: Path) -> None:
    value = torch.nextafter(tiny.openai["visual.ln_post.bias"], torch.tensor(9.0))
    other = openai_file(tiny, tmp_path / "other.pt", lambda state: {**state, "visual.ln_post.bias": value})
    assert load_backbone(other).sha256 != loaded.sha256


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_match_transformers(activation: str, tmp_path: Path) -> None:
    """Checks both towers without memory, also with a head width other than 64, which only a folder specifies."""
    model = random_hf_clip(tmp_path / "hf", activation)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 298, (3, 77))
    tokens[:, 20] = TINY.vocab_size - 1
    for heads in (1, 4):
        config = read_json(tmp_path / "hf" / "config.json")
        config["vision_config"]["num_attention_heads"] = config["text_config"]["num_attention_heads"] = heads
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        model = CLIPModel.from_pretrained(tmp_path / "hf").eval()
        backbone = load_backbone(str(tmp_path / "hf"))
        assert backbone.architecture == replace(TINY, activation=activation, vision_heads=heads, text_heads=heads)
        clip = ClipBackbone(backbone.architecture).eval()
        backbone.load_into(clip)
        with torch.no_grad():
            vision = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
            text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
            assert golden.relative_error(clip.image_encoder(images), vision) < 1e-5
            assert golden.relative_error(clip.text_encoder(tokens), text) < 1e-5


def test_torchscript_runs_only_if_published_or_trusted(tiny, loaded, tmp_path, monkeypatch):
    archive = torchscript({**half_like_openai(tiny.openai), **scalars()}, tmp_path / "ViT-B-16.pt")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    opened: list[str] = []
    load = torch.jit.load

    def recording_load(path: str, **options: Any) -> Any:
        opened.append(path)
        return load(path, **options)

    monkeypatch.setattr(torch.jit, "load", recording_load)
    with pytest.raises(BackboneError, match="trust_backbone=True") as refusal:
        load_backbone(str(archive))
    assert digest in str(refusal.value) and str(archive) in str(refusal.value)
    assert not opened
    assert_same(load_backbone(str(archive), trust=True), loaded, tiny)
    monkeypatch.setitem(backbone_module.OPENAI_SHA256, digest, "ViT-B/16")
    assert_same(load_backbone(str(archive)), loaded, tiny)
    assert len(opened) == 2


def test_torchscript_under_another_suffix_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    refused(str(torchscript({**tiny.openai, **scalars()}, tmp_path / "clip.bin")), "not readable")


def test_a_config_that_names_code_on_the_hub_is_loaded_without_that_code(loaded, tiny, tmp_path):
    """An attention implementation may be a repository whose code transformers downloads and runs."""
    folder = Path(hf_folder(tiny, tmp_path / "hf"))
    config = read_json(folder / "config.json")
    for part in (config, config["text_config"], config["vision_config"]):
        part |= {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
        part["auto_map"] = {"AutoModel": "someone/code--module.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_backbone(str(folder)).sha256 == loaded.sha256


@pytest.mark.parametrize(("quick", "expected"), [(True, "quick_gelu"), (False, "gelu")])
def test_the_activation_is_read_from_the_open_clip_config(
    quick: bool, expected: str, tiny: Tiny, tmp_path: Path
) -> None:
    vit = open_clip(tiny, tmp_path / "open_clip.bin", quick)
    assert load_backbone(vit).architecture == replace(TINY, activation=expected)


@pytest.mark.parametrize("trust", [False, True], ids=["open_clip", "torchscript"])
def test_an_unknown_activation_must_be_given(trust: bool, tiny: Tiny, tmp_path: Path) -> None:
    vit = open_clip(tiny, tmp_path / "open_clip.bin", None)
    if trust:
        vit = str(torchscript(tiny.openai, tmp_path / "archive.pt"))
    refused(vit, "vit_activation=quick_gelu.*vit_activation=gelu.*open_clip_config.json", trust=trust)
    refused(vit, "expected vit_activation=quick_gelu or gelu.*found relu", trust=trust, activation="relu")
    for activation in ("gelu", "quick_gelu"):
        found = load_backbone(vit, trust=trust, activation=activation).architecture
        assert found == replace(TINY, activation=activation)


@pytest.mark.parametrize("name", ["openai", "open_clip bin", "bin folder"])
def test_an_activation_that_contradicts_the_file_is_refused(name: str, tiny: Tiny, tmp_path: Path) -> None:
    vit = FORMATS[name](tiny, tmp_path)
    refused(vit, "vit_activation=(quick_gelu.*found )?gelu", activation="gelu")
    if name != "bin folder":
        assert load_backbone(vit, activation="quick_gelu").architecture == TINY


def refused(vit: str, problem: str, **options: Any) -> None:
    with pytest.raises(BackboneError, match=problem) as refusal:
        load_backbone(vit, **options)
    message = str(refusal.value)
    assert vit in message, "the message does not say which file"
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("vit", "problem"),
    [
        ("ViT-B/8", "found nothing by that name"),
        ("RN50", "found nothing by that name"),
        ("nowhere/clip.pt", "found nothing by that name"),
        (str(ROOT / "pyproject.toml"), "found a file of another kind"),
    ],
)
def test_names_that_lead_to_no_weights_are_refused(vit: str, problem: str) -> None:
    refused(vit, problem)
    refused(vit, "expected one of ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px")


Change = Callable[[dict[str, Tensor]], None]


def set_nan(name: str) -> Change:
    return lambda s: s.update({name: torch.cat([torch.tensor([float("nan")]), s[name].flatten()[1:]]).view_as(s[name])})


def put(name: str, *shape: int) -> Change:
    return lambda s: s.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("logit_scale"), r"1 names missing \(logit_scale\), 0 unexpected"),
        (lambda s: s.pop("vision_model.encoder.layers.1.self_attn.k_proj.bias"), r"1 names missing .*1\.self_attn"),
        (put("visual_projection.weight", 2, 3), r"visual_projection.*\(2, 3\).*\(64, 128\)"),
        (set_nan("visual_projection.weight"), "image_encoder.proj holds values that are not finite"),
    ],
    ids=["missing", "missing in block", "shape", "nan"],
)
def test_a_folder_with_wrong_weights_is_refused(change: Change, problem: str, tiny: Tiny, tmp_path: Path) -> None:
    refused(hf_folder(tiny, tmp_path / "hf", change), problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lambda c: c.update(model_type="bert"), "expected model_type 'clip', found 'bert'"),
        (lambda c: c["text_config"].update(num_hidden_layers=1), "0 names missing , 16 unexpected"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "16 names missing"),
        (lambda c: c["text_config"].update(max_position_embeddings=70), r"\(77, 64\), expected \(70, 64\)"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), r"found relu \(image\) and quick_gelu \(text\)"),
        (lambda c: c["vision_config"].update(hidden_act="gelu"), r"found gelu \(image\) and quick_gelu \(text\)"),
        (lambda c: c["vision_config"].update(num_attention_heads=3), "not readable|heads"),
        (lambda c: c["text_config"].update(layer_norm_eps=0.1), r"layer_norm_eps 1e-05.*0\.1 \(text\)"),
        (lambda c: c["text_config"].update(eos_token_id=7), "eos_token_id 2 or 49407 or 299, found 7"),
        (lambda c: c.update(vision_config=5), "vision_config"),
        (lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "8-bit"),
        (lambda c: c.clear(), "no config.json"),
    ],
)
def test_a_folder_with_a_wrong_config_is_refused(config: Change, problem: str, tiny: Tiny, tmp_path: Path) -> None:
    refused(hf_folder(tiny, tmp_path / "hf", config=config), problem)


def test_folders_without_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "no config.json")
    for content in ("{not", "[]"):
        (tmp_path / "empty" / "config.json").write_text(content)
        refused(str(tmp_path / "empty"), "not readable as a Hugging Face CLIP")
    vit = hf_folder(tiny, tmp_path / "adapter")
    (Path(vit) / "adapter_config.json").write_text("{}")
    refused(vit, "adapter_config.json")
    vit = hf_folder(tiny, tmp_path / "config only")
    (Path(vit) / "model.safetensors").unlink()
    refused(vit, "no file named model.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("logit_scale"), r"1 names missing \(logit_scale\), 0 unexpected"),
        (lambda s: s.pop("visual.conv1.weight"), r"image_encoder.conv1.weight is missing"),
        (lambda s: s.pop("visual.transformer.resblocks.1.ln_2.bias"), r"1 names missing .*resblocks\.1\.ln_2\.bias"),
        (put("extra", 2), r"0 names missing , 1 unexpected \(text_encoder.extra\)"),
        (put("visual.proj", 2, 3), r"image_encoder.proj has shape \(2, 3\).*\(128, 64\)"),
        (put("visual.conv1.weight"), r"conv1.weight has shape \(\), expected 4"),
        (put("text_projection", 4), r"text_projection has shape \(4,\), expected 2"),
        (put("visual.positional_embedding", 7, 128), r"positional_embedding has shape \(7, 128\), expected \(5, 128\)"),
        (put("positional_embedding", 76, 64), "expected a text context of 77, found 76"),
        (set_nan("visual.proj"), r"image_encoder\.proj holds values that are not finite"),
        (lambda s: s.clear() or s.update(a=torch.ones(1)), r"found 1 entries \(text_encoder.a\)"),
    ],
)
def test_a_state_dict_with_wrong_weights_is_refused(change, problem, suffix, tiny, tmp_path):
    state, path = dict(tiny.openai), tmp_path / f"clip{suffix}"
    change(state)
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    refused(str(path), problem, activation="quick_gelu")


def test_towers_whose_head_count_is_ambiguous_are_refused(tmp_path: Path) -> None:
    """open_clip's ViT-H has 16 heads of width 80; by its shapes it could have 20 heads of width 64."""
    state = shapes_of(replace(TINY, vision_width=1280, vision_layers=1, vision_heads=16))
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "vit_h.bin")
    refused(str(tmp_path / "vit_h.bin"), "width 1280.*Hugging Face folder", activation="gelu")


@pytest.mark.parametrize("name", ["openai", "open_clip bin", "open_clip safetensors", "bin folder", "old folder"])
def test_truncated_and_foreign_files_are_refused(name: str, tiny: Tiny, tmp_path: Path) -> None:
    vit = Path(FORMATS[name](tiny, tmp_path))
    path = next(path for path in vit.iterdir() if path.suffix != ".json") if vit.is_dir() else vit
    intact = path.read_bytes()
    for content in (b"", b"\x00", b"hello, this is no tensor file", intact[:900], intact[: len(intact) - 1000]):
        path.write_bytes(content)
        refused(str(vit), "not readable as (weights|a Hugging Face CLIP): .")


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {}, {"epoch": 3}, {3: torch.ones(2)}, {"state_dict": {"a": "b"}}, torch.ones(3)],
    ids=["list", "empty", "number", "numbered", "text", "tensor"],
)
def test_files_without_a_state_dict_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "clip.pt")
    refused(str(tmp_path / "clip.pt"), r"expected a state dict \(name to tensor\)", activation="quick_gelu")


HUB = """
import socket
attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from clip.backbone import load_backbone
from clip.tokenizer import load_tokenizer
from common.errors import BackboneError
print(load_backbone("ViT-B/16").sha256, len(load_tokenizer("openai/clip-vit-base-patch16").fingerprint), len(attempts))
for load, name in ((load_backbone, "ViT-L/14@336px"), (load_tokenizer, "openai/clip-vit-large-patch14-336")):
    try:
        load(name)
    except BackboneError as error:
        print(str(error).replace("\\n", "|"))
print(len(attempts))
"""


def test_hub_names_load_from_the_cache_or_explain_how_to_download(
    tiny: Tiny, loaded: FrozenWeights, tmp_path: Path
) -> None:
    """A cached name needs no network; for any other, the error says how to download it."""
    slow = SlowTokenizer(train_merges(SENTENCES[:1], 20))
    repository = tmp_path / "hub" / "models--openai--clip-vit-base-patch16"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    write_folder(snapshot, slow.vocab, slow.merges)
    for file in tiny.folder.iterdir():
        shutil.copy(file, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    # with telemetry, the hub's library would request a list of agents
    more = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment = {**kept, **more, "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", HUB], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found, *refusals, attempts = ran.stdout.splitlines()
    assert found.split() == [loaded.sha256, "64", "0"]
    assert int(attempts) == 2, "one attempt per name: retries would take most of a minute"
    for line, given in zip(refusals, ("vit=", "tokenizer="), strict=True):
        assert line.startswith(given)
        for advice in ("hf download openai/clip-vit-large-patch14-336", f"{given}THAT_FOLDER", "HF_HOME"):
            assert advice in line


def shapes_of(arch: ClipArchitecture) -> dict[str, Tensor]:
    """OpenAI's names and shapes, on the meta device."""
    with torch.device("meta"):
        return openai_state(CLIPModel(hf_config(arch)))


@pytest.mark.parametrize("name", REAL)
def test_the_architecture_is_inferred_from_the_weights(name: str) -> None:
    arch = REAL[name]
    state = {tower_name(name): value for name, value in shapes_of(arch).items()}
    assert architecture_of(state, "quick_gelu") == arch
    with torch.device("meta"):
        model = ClipBackbone(arch)
    own = {n: v.shape for n, v in model.state_dict().items()}
    assert own == {n: v.shape for n, v in state.items()}
    assert model.image_encoder.transformer.resblocks[0].get_submodule("attn").heads == arch.vision_heads
    assert model.text_encoder.transformer.resblocks[-1].get_submodule("attn").heads == arch.text_heads


def test_vit_b_16_has_the_published_names_and_shapes() -> None:
    """With REP's default options; published checkpoints lack the dynamic queries."""
    published = read_json(golden.GOLDEN_DIR / "rep_checkpoint_keys_vitb16.json")
    with torch.device("meta"):
        classifier = build_classifier(ModelSpec("mmimdb", MethodOptions(), REAL["ViT-B/16"]))
    own = {published_name(name): list(value.shape) for name, value in classifier.state_dict().items()}
    queries = {name for name in own if "memories_dynamic_" in name}
    assert len(queries) == 6 and {name: own[name] for name in own.keys() - queries} == published
