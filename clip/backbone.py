"""Reads CLIP weights in any of their formats, under OpenAI's names.

`vit` may be a model name (weights from the Hugging Face hub), a Hugging Face folder, an OpenAI `.pt` file, or an
open_clip `.safetensors`/`.bin` state dict. Every name in a file is accounted for: anything missing or unexpected is an
error.
"""

import hashlib
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import ACTIVATIONS, ClipArchitecture, ClipBackbone
from clip.preprocessing import check_open_clip_sizes, image_statistics, open_clip_heads, read_open_clip
from clip.pretrained import read_pretrained
from clip.tokenizer import CONTEXT_LENGTH
from common.errors import BackboneError
from common.hashing import file_sha256
from common.messages import first_line
from common.torch_file import check_names, check_state, first_of, load_inert, state_dict_of, unwrapped_names

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
HEAD_WIDTH = 64
WIDEST = 1024
"""Width of ViT-L. open_clip's wider towers (ViT-H, g, bigG) have heads of another width, which no shape reveals."""
LAYER_NORM_EPS = 1e-5
END_ID = 49407
"""Token id of `<end>` in CLIP's vocabulary, where the text tower is read out."""
IGNORED_ENTRIES = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
"""Entries that are not weights: sizes stored in OpenAI's archives, and a constant mask."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Entries of a training checkpoint that may hold its state dict."""

WRAPPED_NAMES = {**{rf"_orig_mod\.{'(?:)' * n}": "" for n in range(4)}, r"^(?:module\.)+": ""}
"""The prefixes that `unwrapped_names` removes, as patterns for transformers, where each entry removes one per name."""


@dataclass(frozen=True)
class FrozenWeights:
    """The frozen weights of a backbone."""

    name: str
    """The value of `vit`."""
    architecture: Any
    """The family's description of the sizes."""
    state: dict[str, Tensor]
    """float32 tensors; for CLIP `image_encoder.*`, `text_encoder.*` and `logit_scale`."""
    left: tuple[str, ...] = ()
    """Names of the checkpoint's entries that are not loaded."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights' names and values, independent of the format they were read from."""
        digest = hashlib.sha256()
        for name in sorted(self.state):
            digest.update(name.encode())
            digest.update(self.state[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def load_into(self, model: nn.Module) -> None:
        """Copies the weights into a backbone of the same architecture, which may also contain a method."""
        unexpected = model.load_state_dict(self.state, strict=False).unexpected_keys
        assert not unexpected, unexpected


def load_backbone(vit: str, *, trust: bool = False, activation: str | None = None) -> FrozenWeights:
    """Reads the CLIP weights that `vit` names.

    Args:
        vit: a key of HUB_NAMES, a Hugging Face folder, or a file `.pt`, `.pth`, `.safetensors`, `.bin`.
        trust: run a TorchScript archive even if its SHA-256 is not one that OpenAI published.
        activation: `quick_gelu` or `gelu`, for files that do not record it (open_clip state dicts); must agree with a
            file that does.

    Raises:
        BackboneError: the weights are missing, unreadable, not a CLIP with two transformers, or have missing or
            unexpected names.
    """
    path = Path(vit)
    try:
        if vit in HUB_NAMES or path.is_dir():
            if activation is not None:
                raise ValueError(f"has its activation in config.json; leave out vit_activation={activation}")
            state, architecture = _from_hugging_face(vit)
        elif path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            state, architecture = _from_openai_names(path, _read_file(path, trust), activation)
        else:
            raise ValueError(
                f"expected one of {', '.join(HUB_NAMES)}, a Hugging Face folder, or a .pt, .bin or .safetensors file; "
                f"found {'a file of another kind' if path.exists() else 'nothing by that name'}"
            )
        if architecture.context_length != CONTEXT_LENGTH:
            raise ValueError(f"expected a text context of {CONTEXT_LENGTH}, found {architecture.context_length}")
        if vit not in HUB_NAMES:
            folder = path if path.is_dir() else path.parent
            architecture = replace(architecture, **image_statistics(folder, architecture.image_size))  # type: ignore[arg-type]
        with torch.device("meta"):
            check_state(state, ClipBackbone(architecture).state_dict())
    except ValueError as error:
        raise BackboneError(f"vit={vit}: {error}") from error
    return FrozenWeights(vit, architecture, {name: tensor.float() for name, tensor in state.items()})


def architecture_of(state: Mapping[str, Tensor], activation: str) -> ClipArchitecture:
    """Infers sizes from the shapes in a state dict with names `image_encoder.*` and `text_encoder.*`.

    Raises:
        ValueError: an entry that determines a size is missing, has the wrong number of dimensions, or is empty.
    """
    vision_width, _, _, patch_size = shape_of(state, "image_encoder.conv1.weight", 4)
    positions, _ = shape_of(state, "image_encoder.positional_embedding", 2)
    text_width, embed_dim = shape_of(state, "text_encoder.text_projection", 2)
    context_length, _ = shape_of(state, "text_encoder.positional_embedding", 2)
    vocab_size, _ = shape_of(state, "text_encoder.token_embedding.weight", 2)
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


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of an entry; ValueError if it is missing, has the wrong number of dimensions, or is empty."""
    if name not in state:
        raise ValueError(f"{name} is missing, found {len(state)} entries {first_of(state)}")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected {dimensions} dimensions, none of them 0")
    return shape


def _count_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(rf"{tower}\.transformer\.resblocks\.(\d+)\.")
    return len({match[1] for name in state if (match := pattern.match(name))})


# Hugging Face


def _from_hugging_face(vit: str) -> tuple[dict[str, Tensor], ClipArchitecture]:
    from transformers import CLIPConfig, CLIPModel  # seconds to import; not needed for files
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = HUB_NAMES.get(vit, vit)

    def read(local_files_only: bool) -> tuple[CLIPModel, dict[str, Any]]:
        config, _ = CLIPConfig.get_config_dict(source, local_files_only=local_files_only)  # {} if there is none
        if config.get("model_type") != "clip":
            found = repr(config["model_type"]) if "model_type" in config else "no config.json with a model_type"
            raise ValueError(f"expected model_type 'clip', found {found}")
        return CLIPModel.from_pretrained(
            source,
            local_files_only=local_files_only,
            key_mapping=WRAPPED_NAMES,
            dtype=torch.float32,
            attn_implementation="eager",  # config.json could name code on the hub, which would be fetched and run
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info and refused below by name
        )

    model, info = read_pretrained(f"vit={vit}", source, read, "a Hugging Face CLIP")
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith("position_ids")}
    check_names(info["missing_keys"], unexpected)
    for name, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{name} has shape {tuple(found)}, expected {tuple(expected)}, as in config.json")
    vision, text = model.config.vision_config, model.config.text_config
    for entry, known in (("layer_norm_eps", [LAYER_NORM_EPS]), ("hidden_act", list(ACTIVATIONS))):
        image_value, text_value = getattr(vision, entry), getattr(text, entry)
        if image_value != text_value or image_value not in known:
            raise ValueError(
                f"expected {entry} {' or '.join(map(str, known))} in both towers, "
                f"found {image_value} (image) and {text_value} (text)"
            )
    ends = (2, END_ID, text.vocab_size - 1)  # in old files, 2 stands for the highest id
    if text.eos_token_id not in ends:
        raise ValueError(f"expected eos_token_id {' or '.join(map(str, ends))}, found {text.eos_token_id}")
    if (Path(vit) / "adapter_config.json").is_file():
        raise ValueError("adapter_config.json: adapters are not supported; merge the adapter into the weights")
    state = _openai_names(model.state_dict())
    heads = {"vision_heads": vision.num_attention_heads, "text_heads": text.num_attention_heads}
    return state, replace(architecture_of(state, vision.hidden_act), **heads)


HF_NAMES = (
    ("visual_projection.weight", "image_encoder.proj"),
    ("text_projection.weight", "text_encoder.text_projection"),
    ("vision_model.", "image_encoder."),
    ("text_model.", "text_encoder."),
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
"""Hugging Face's names, or parts of names, and OpenAI's for the same weights."""
TRANSPOSED = ("image_encoder.proj", "text_encoder.text_projection")


def _openai_names(hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a Hugging Face CLIP state dict to OpenAI's names and joins query, key and value weights."""
    state: dict[str, Tensor] = {}
    for name, tensor in hf_state.items():
        for hf_part, part in HF_NAMES:
            name = name.replace(hf_part, part)
        state[name] = tensor.T.contiguous() if name in TRANSPOSED else tensor
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return state


# Files under OpenAI's names


def _read_file(path: Path, trust: bool) -> dict[str, Tensor]:
    """State dict of a weights file, under the file's own names."""
    try:
        if path.suffix == ".safetensors":
            return unwrapped_names(load_file(path))
        if path.suffix != ".bin" and _is_torchscript(path):
            digest = file_sha256(path)
            if digest not in OPENAI_SHA256 and not trust:
                raise BackboneError(
                    f"vit={path}: a TorchScript archive can run code, and its SHA-256 {digest} is not one that OpenAI "
                    f"published; if you trust its source, set trust_backbone=True"
                )
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        raw = load_inert(path)
    except BackboneError:
        raise
    except Exception as error:  # torch and safetensors raise many types on damaged files
        raise ValueError(f"not readable as weights: {first_line(error)}") from error
    for wrapper in WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    return {name: tensor.detach() for name, tensor in unwrapped_names(state_dict_of(raw)).items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _from_openai_names(
    path: Path, raw: Mapping[str, Tensor], activation: str | None
) -> tuple[dict[str, Tensor], ClipArchitecture]:
    state = {}
    for name, tensor in raw.items():  # here the image tower is under `visual.`, the text tower at the top level
        if name not in IGNORED_ENTRIES:
            tower = "" if name == "logit_scale" else "image_encoder." if name.startswith("visual.") else "text_encoder."
            state[tower + name.removeprefix("visual.")] = tensor
    config = read_open_clip(path.parent)
    architecture = architecture_of(state, _activation(raw, config, activation))
    check_open_clip_sizes(config, asdict(architecture))
    heads = open_clip_heads(config, architecture.vision_width)
    if architecture.vision_width > WIDEST and "vision_heads" not in heads:
        raise ValueError(
            f"the image tower has width {architecture.vision_width}, and above {WIDEST} a state dict does not reveal "
            f"the number of heads; put open_clip_config.json, which has head_width, next to the file, or use a Hugging "
            f"Face folder of this model"
        )
    return state, replace(architecture, **heads)  # type: ignore[arg-type]


def _activation(raw: Mapping[str, Tensor], open_clip: Mapping[str, Any], given: str | None) -> str:
    """The activation that the file implies, else `given`.

    OpenAI's files, which contain `input_resolution`, use quick_gelu; for open_clip's, open_clip_config.json states it.
    """
    stated = None
    if "input_resolution" in raw:
        stated = "quick_gelu"
    elif open_clip:
        stated = "quick_gelu" if open_clip["model_cfg"].get("quick_gelu", False) else "gelu"
    if (stated or given) is None:
        raise ValueError(
            "a state dict does not record its activation; set vit_activation=quick_gelu (OpenAI's weights) or "
            "vit_activation=gelu (LAION's and DataComp's), or put open_clip_config.json next to the file"
        )
    known = ACTIVATIONS if stated is None else (stated,)
    if given is not None and given not in known:
        raise ValueError(f"expected vit_activation={' or '.join(known)} for this file, found {given}")
    return stated or given or ""
