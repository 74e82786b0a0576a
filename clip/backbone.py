"""CLIP weights in every form they come in, under OpenAI's names.

`vit` may be a model name (weights from the Hugging Face hub), a Hugging Face folder, an OpenAI `.pt` file, or an
open_clip `.safetensors`/`.bin` state dict. Every name in a file is accounted for; anything missing or left over ends
the run.
"""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import (
    ACTIVATIONS,
    ClipArchitecture,
    ClipBackbone,
)
from common.errors import BackboneError
from common.hashing import file_sha256
from common.messages import first_line
from common.torch_file import check_archive, fault_of_weights, load_inert

HUB_NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
OPENAI_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}
"""SHA-256 of the TorchScript archives that OpenAI published, which may therefore be run."""
RESNET = re.compile(r"^(RN\d+|resnet)", re.IGNORECASE)
HEAD_WIDTH = 64
WIDEST = 1024
"""Width of ViT-L. Wider towers of open_clip (ViT-H, g, bigG) have heads of another width, which no shape shows."""
MOST_BLOCKS = 100
"""Of a tower. ViT-bigG has 48."""
LAYER_NORM_EPS = 1e-5
PLAIN = {"attn_implementation": "eager"}
"""Else config.json may name one on the hub, which would be fetched and run. Only the weights are taken anyway."""
CONTEXT_LENGTH = 77
IGNORED_ENTRIES = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
"""Not weights: sizes that OpenAI's archives store, and a constant mask."""


@dataclass(frozen=True)
class Backbone:
    """Frozen CLIP weights."""

    name: str
    """What `vit` was."""
    architecture: ClipArchitecture
    state: dict[str, Tensor]
    """float32 tensors named `image_encoder.*`, `text_encoder.*`, `logit_scale`."""
    sha256: str
    """Of the weights' values, the same in whatever format they were read."""

    def load_into(self, model: nn.Module) -> None:
        """Copies the weights into a `ClipBackbone` of the same architecture."""
        own = model.state_dict()
        with torch.no_grad():
            for name, tensor in self.state.items():
                own[name].copy_(tensor)


def load_backbone(vit: str, *, trust: bool = False, activation: str | None = None) -> Backbone:
    """Reads the CLIP weights that `vit` names.

    Args:
        vit: a key of HUB_NAMES, a Hugging Face folder, or a file `.pt`, `.safetensors`, `.bin`.
        trust: run a TorchScript archive even though its SHA-256 is not one that OpenAI published.
        activation: `quick_gelu` or `gelu`, for files that do not say (open_clip state dicts); where the file says,
            it must agree.

    Raises:
        BackboneError: not there, not readable, not a CLIP of two transformers, or names left over or missing.
    """
    path = Path(vit)
    if vit in HUB_NAMES or path.is_dir():
        source = HUB_NAMES.get(vit, vit)
        if activation is not None:
            raise BackboneError(f"vit_activation={activation}: vit={vit} says its activation itself; leave it out")
        state, architecture = _from_hugging_face(vit, source)
    elif RESNET.match(path.name):
        raise BackboneError(f"vit={vit}: ResNet CLIPs have no tokens to put memory among; use one of {_choices()}")
    elif path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raw, activation = _read_file(path, trust, activation)
        state, architecture = _from_openai_names(vit, raw, activation)
    else:
        raise BackboneError(
            f"vit={vit}: expected one of {_choices()}, a Hugging Face folder, or a .pt, .bin or .safetensors file; "
            + ("found a file of another kind" if path.exists() else "found nothing of that name")
        )
    _check_names_and_shapes(vit, state, architecture)
    return Backbone(vit, architecture, state, _sha256(vit, state))


def architecture_of(state: Mapping[str, Tensor], activation: str) -> ClipArchitecture:
    """Sizes read from the shapes of a state dict with names `image_encoder.*` and `text_encoder.*`.

    Raises:
        KeyError: an entry that tells a size is missing.
        ValueError: an entry that tells a size has another number of dimensions, or no elements.
    """
    vision_width, _, _, patch_size = _shape(state, "image_encoder.conv1.weight", 4)
    positions, _ = _shape(state, "image_encoder.positional_embedding", 2)
    text_width, embed_dim = _shape(state, "text_encoder.text_projection", 2)
    context_length, _ = _shape(state, "text_encoder.positional_embedding", 2)
    vocab_size, _ = _shape(state, "text_encoder.token_embedding.weight", 2)
    return ClipArchitecture(
        image_size=math.isqrt(positions - 1) * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=_count_blocks(state, "image_encoder"),
        vision_heads=max(1, vision_width // HEAD_WIDTH),
        text_width=text_width,
        text_layers=_count_blocks(state, "text_encoder"),
        text_heads=max(1, text_width // HEAD_WIDTH),
        context_length=context_length,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        activation=activation,
    )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected {dimensions} dimensions, none of them 0")
    return shape


def _count_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(rf"{tower}\.transformer\.resblocks\.(\d+)\.")
    return len({match[1] for name in state if (match := pattern.match(name))})


def _choices() -> str:
    return ", ".join(HUB_NAMES)


def _from_hugging_face(vit: str, source: str) -> tuple[dict[str, Tensor], ClipArchitecture]:
    from transformers import CLIPConfig, CLIPModel  # seconds to import; not needed for files
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    reason = ""
    for local_files_only in (True, False):  # the cache first: no network where it suffices
        try:
            config = CLIPConfig.get_config_dict(source, local_files_only=local_files_only)[0]
            if not config:  # what transformers gives where the file is not there
                reason = "no config.json there"
                continue
            if config.get("model_type") != "clip":
                raise BackboneError(
                    f"vit={vit}: expected a CLIP (model_type clip), found model_type {config.get('model_type')!r}"
                )
            if Path(source).is_dir():
                _check_sizes(Path(source), config)
            model, info = CLIPModel.from_pretrained(
                source,
                local_files_only=local_files_only,
                dtype=torch.float32,
                output_loading_info=True,
                **PLAIN,
                ignore_mismatched_sizes=True,  # they are in `info`, and refused below with their names
            )
            break
        except BackboneError:
            raise
        except Exception as error:  # on damaged folders: pickle's, ImportError, KeyError, and classes of its own
            reason = first_line(error)
    else:
        if vit in HUB_NAMES:
            raise BackboneError(
                f"vit={vit}: the weights {source} are neither in the Hugging Face cache nor to be had from the hub "
                f"({reason}). On a machine with network run `hf download {source}` and copy the folder it names here; "
                f"then give vit=THAT_FOLDER, or put it into the cache that HF_HOME names"
            )
        raise BackboneError(f"vit={vit}: not readable as a Hugging Face CLIP folder: {reason}")
    left_over = {name for name in info["unexpected_keys"] if not name.endswith("position_ids")}
    _refuse_names(vit, missing=set(info["missing_keys"]), unexpected=left_over)
    if info["mismatched_keys"]:
        found = sorted(f"{name} {tuple(has)}, expected {tuple(wants)}" for name, has, wants in info["mismatched_keys"])
        raise BackboneError(f"vit={vit}: {len(found)} shapes do not fit config.json: {'; '.join(found[:4])}")
    vision, text = model.config.vision_config, model.config.text_config
    if {vision.layer_norm_eps, text.layer_norm_eps} != {LAYER_NORM_EPS}:
        raise BackboneError(
            f"vit={vit}: expected layer_norm_eps {LAYER_NORM_EPS} in both towers, "
            f"found {vision.layer_norm_eps} (image) and {text.layer_norm_eps} (text)"
        )
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ACTIVATIONS:
        raise BackboneError(
            f"vit={vit}: expected hidden_act {' or '.join(ACTIVATIONS)} in both towers, "
            f"found {vision.hidden_act} (image) and {text.hidden_act} (text)"
        )
    architecture = ClipArchitecture(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        embed_dim=model.config.projection_dim,
        activation=vision.hidden_act,
    )
    return _openai_names(model.state_dict()), architecture


def _check_sizes(folder: Path, described: dict[str, Any]) -> None:
    """Raises ValueError where config.json describes more values than the weights files hold: they would all be made."""
    from transformers import CLIPConfig, CLIPModel

    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for path in files:
        check_archive(path)
    config = CLIPConfig(**described)
    for tower in (config.vision_config, config.text_config):
        if not 0 < tower.num_hidden_layers <= MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers: expected 1 to {MOST_BLOCKS}, found {tower.num_hidden_layers}")
    with torch.device("meta"):
        values = sum(parameter.numel() for parameter in CLIPModel._from_config(config, **PLAIN).parameters())
    there = sum(path.stat().st_size for path in files)
    if files and values > there:
        raise ValueError(f"config.json describes {values:,} values, and the weights have {there:,} bytes")


HF_TOWERS = (("vision_model.", "image_encoder."), ("text_model.", "text_encoder."))
HF_NAMES = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.weight", "conv1.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Hugging Face's names and OpenAI's for the same entries."""


def _openai_names(hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face CLIP state dict under OpenAI's names; query, key and value weights become one."""
    projections = {
        "visual_projection.weight": "image_encoder.proj",
        "text_projection.weight": "text_encoder.text_projection",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in hf_state.items():
        if name in projections:
            state[projections[name]] = tensor.T.contiguous()
            continue
        for hf_part, part in (*HF_TOWERS, *HF_NAMES):
            name = name.replace(hf_part, part)
        state[name] = tensor
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return state


def _read_file(path: Path, trust: bool, activation: str | None) -> tuple[dict[str, Tensor], str]:
    """State dict of a weights file under the names it holds, and its activation."""
    if path.suffix in (".pt", ".pth") and _is_torchscript(path):
        digest = file_sha256(path)
        if digest not in OPENAI_SHA256 and not trust:
            raise BackboneError(
                f"vit={path}: a TorchScript archive can run code, and its SHA-256 {digest} is none that OpenAI "
                f"published; if you trust its source, say trust_backbone=True"
            )
        try:
            raw = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        except Exception as error:  # as below, on damaged archives
            raise BackboneError(f"vit={path}: not readable as a TorchScript archive: {first_line(error)}") from error
        return raw, _activation(path, raw, activation, openai=digest in OPENAI_SHA256)
    try:
        raw = load_file(path) if path.suffix == ".safetensors" else load_inert(path)
    except Exception as error:  # torch.load and safetensors raise many types on damaged files
        raise BackboneError(f"vit={path}: not readable as a state dict: {first_line(error)}") from error
    if isinstance(raw, dict) and isinstance(raw.get("state_dict"), dict):
        raw = raw["state_dict"]
    if not isinstance(raw, dict) or not raw:
        raise BackboneError(f"vit={path}: expected a state dict (name to tensor), found {type(raw).__name__}")
    others = [name for name, value in raw.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others:
        raise BackboneError(
            f"vit={path}: expected a state dict (name to tensor); {others[0]!r} is a {type(raw[others[0]]).__name__}"
        )
    raw = {name.removeprefix("module."): value.detach() for name, value in raw.items()}
    for name, value in raw.items():
        if name not in IGNORED_ENTRIES and (fault := fault_of_weights(value)) is not None:
            raise BackboneError(f"vit={path}: {name} {fault}")
    return raw, _activation(path, raw, activation, openai=False)


def _activation(path: Path, raw: Mapping[str, Tensor], wanted: str | None, *, openai: bool) -> str:
    """What the file says its activation is, else `wanted`; BackboneError if both say something and differ."""
    told = "quick_gelu" if openai else _activation_of_file(path, raw)
    if wanted is not None and told is not None and wanted != told:
        raise BackboneError(f"vit_activation={wanted}: vit={path} says itself that it is {told}; leave it out")
    if told is None and wanted is None:
        raise BackboneError(
            f"vit={path}: a state dict does not say its activation; give vit_activation=quick_gelu (OpenAI's weights) "
            f"or vit_activation=gelu (LAION's and DataComp's), or put open_clip_config.json beside the file"
        )
    return told or wanted or ""


def _activation_of_file(path: Path, raw: Mapping[str, Tensor]) -> str | None:
    """OpenAI's state dicts hold `input_resolution`; open_clip's say their activation in open_clip_config.json."""
    if "input_resolution" in raw:
        return "quick_gelu"
    config = path.parent / "open_clip_config.json"
    if config.is_file():
        try:
            quick = json.loads(config.read_text("utf-8"))["model_cfg"].get("quick_gelu", False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BackboneError(f"{config}: expected an object with `model_cfg`: {error!r}") from error
        return "quick_gelu" if quick else "gelu"
    return None


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _from_openai_names(
    vit: str, raw: Mapping[str, Tensor], activation: str
) -> tuple[dict[str, Tensor], ClipArchitecture]:
    if activation not in ACTIVATIONS:
        raise BackboneError(f"vit_activation={activation}: expected {' or '.join(ACTIVATIONS)}")
    if any(name.startswith("visual.layer1") for name in raw):
        raise BackboneError(f"vit={vit}: a ResNet CLIP has no tokens to put memory among; use one of {_choices()}")
    state = {_tower_name(name): tensor.float() for name, tensor in raw.items() if name not in IGNORED_ENTRIES}
    try:
        architecture = architecture_of(state, activation)
    except KeyError as error:
        raise BackboneError(
            f"vit={vit}: not a CLIP of two transformers under OpenAI's names: {error} is not there; "
            f"found {len(raw)} entries, for example {', '.join(list(raw)[:3])}"
        ) from error
    except ValueError as error:
        raise BackboneError(f"vit={vit}: not a CLIP of two transformers: {error}") from error
    if architecture.vision_width > WIDEST:
        raise BackboneError(
            f"vit={vit}: an image tower of width {architecture.vision_width}; those wider than {WIDEST} have heads "
            f"whose number a state dict does not show; use a Hugging Face folder of this model"
        )
    return state, architecture


def _tower_name(name: str) -> str:
    """OpenAI keeps the image tower under `visual.` and the text tower at the top."""
    if name == "logit_scale":
        return name
    return f"image_encoder.{name.removeprefix('visual.')}" if name.startswith("visual.") else f"text_encoder.{name}"


def _check_names_and_shapes(vit: str, state: Mapping[str, Tensor], architecture: ClipArchitecture) -> None:
    if architecture.context_length != CONTEXT_LENGTH:
        raise BackboneError(
            f"vit={vit}: expected a text context of {CONTEXT_LENGTH}, found {architecture.context_length}"
        )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ClipBackbone(architecture).state_dict().items()}
    _refuse_names(vit, missing=shapes.keys() - state.keys(), unexpected=state.keys() - shapes.keys())
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise BackboneError(f"vit={vit}: {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")


def _refuse_names(vit: str, missing: set[str], unexpected: set[str]) -> None:
    if missing or unexpected:
        raise BackboneError(
            f"vit={vit}: the weights do not fit: {len(missing)} names missing {_some(missing)}, "
            f"{len(unexpected)} unexpected {_some(unexpected)}"
        )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:8]
    return f"({', '.join(shown)}{', …' if len(names) > len(shown) else ''})" if names else ""


def _sha256(vit: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        if not torch.isfinite(state[name]).all():
            raise BackboneError(f"vit={vit}: {name} holds values that are not finite")
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
