"""The golden numbers: the published implementation's results, with the weights and inputs that gave them.

They lie in `tests/data/golden`, or in the folder the environment variable GOLDEN_DIR names; the folder's `weights.py`
makes the weights from a tag and a checkpoint name.
"""

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "data" / "golden")
PATCH = 16
WIDTHS = {"image": 768, "text": 512}

EXPECTED = (
    "memory_image_0",  # (B, 2m, d_v)
    "memory_text_0",  # (B, 2m, d_t)
    "memory_image_last",  # (B, m, d_v)
    "memory_text_last",  # (B, m, d_t)
    "features_unmasked",  # (B, 2E)
    "features",  # (B, 2E)
    "logits",  # (B, C)
)


@dataclass(frozen=True)
class Golden:
    """One golden file: a whole model, a batch, and what the published code made of them in evaluation mode."""

    path: Path
    prompt_type: str
    task: str
    vision_layers: int
    text_layers: int
    resolution: int
    memory_length: int  # 3m
    memory_depth: int
    missing_types: list[int]  # (B,)
    state: dict[str, Tensor]  # checkpoint name -> float32 value, dynamic queries included; nothing requires grad
    images: Tensor  # (B, 3, R, R)
    tokens: Tensor  # (B, 77) int64
    labels: Tensor  # (B, 23) float32 for mmimdb, else (B,) int64
    expected: dict[str, Tensor]  # the arrays named in EXPECTED
    loss: float
    grad_norm: dict[str, float]  # norm of the gradient of each parameter that got one
    grad_head: dict[str, list[float]]  # its first four values
    trainable_without_grad: list[str]  # trained by the task, but the loss does not depend on them


def rep_files() -> list[Path]:
    """The golden files of the REP model, sorted."""
    return sorted(GOLDEN_DIR.glob("rep_*.npz"))


def dcp_files() -> list[Path]:
    """The golden files of DCP, sorted."""
    return sorted(GOLDEN_DIR.glob("dcp_*.npz"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, over all elements, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    return float((actual - expected).norm() / expected.norm())


def load_weights_module(folder: Path) -> ModuleType:
    """`weights.py` of a golden folder, imported by path."""
    spec = importlib.util.spec_from_file_location("golden_weights", folder / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rep_shapes(
    folder: Path,
    *,
    task: str,
    classes: int,
    vision_layers: int,
    text_layers: int,
    resolution: int,
    memory_length: int,
    memory_depth: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a REP model of the given sizes, from those of the published ViT-B/16 checkpoint.

    Block 1 of a tower stands for all the later ones (block 0 also has `attn_memory`), element 0 of a list in the
    learner for all of it. The dynamic queries, which published checkpoints lack, are added.
    """
    published = json.loads((folder / "rep_checkpoint_keys_vitb16.json").read_text())
    m = memory_length // 3
    in_block = r"(model\.(image|text)_encoder\.transformer\.resblocks\.)(\d+)(\..+)"
    in_list = r"(model\.memory_learner\.(?:compound_memory_projections|layernorm)_\w+\.)(\d+)(\..+)"
    shapes: dict[str, tuple[int, ...]] = {}
    for name, published_shape in published.items():
        shape = tuple(published_shape)
        block = re.fullmatch(in_block, name)
        listed = re.fullmatch(in_list, name)
        if block and block[3] != "0":
            layers = vision_layers if block[2] == "image" else text_layers
            if block[3] == "1":
                shapes |= {f"{block[1]}{n}{block[4]}": shape for n in range(1, layers)}
        elif listed:
            if listed[2] == "0":
                shapes |= {f"{listed[1]}{k}{listed[3]}": shape for k in range(memory_depth)}
        elif re.fullmatch(r"model\.memory_learner\.(text|visual|common)_memory_[a-z]+", name):
            shapes[name] = (m, shape[1])
        elif name == "model.image_encoder.positional_embedding":
            shapes[name] = (1 + (resolution // PATCH) ** 2, shape[1])
        elif name.startswith("mmimdb_classifier."):
            shapes[name.replace("mmimdb", task)] = (classes, *shape[1:])
        else:
            shapes[name] = shape
    for tower, width in WIDTHS.items():
        for available in ("complete", "image", "text"):
            name = f"model.{tower}_encoder.transformer.resblocks.0.memories_dynamic_{available}"
            shapes[name] = (m, 1, width)
    return shapes


def dcp_shapes(
    folder: Path,
    *,
    task: str,
    classes: int,
    memory_length: int,
    memory_depth: int,
    **sizes: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DCP model: REP's towers, and the prompt learner as docs/method.md section 8 has it."""
    rep = rep_shapes(folder, task=task, classes=classes, memory_length=memory_length, memory_depth=1, **sizes)
    renamed = {
        name.replace("attn_memory", "attn_prompt").replace("memories_dynamic", "prompts_dynamic"): shape
        for name, shape in rep.items()
        if ".memory_learner." not in name
    }
    m, d_v, d_t, E = memory_length // 3, WIDTHS["image"], WIDTHS["text"], 512
    V = d_v + d_t
    learner: dict[str, tuple[int, ...]] = {f"common_prompt_{kind}": (m, E) for kind in ("complete", "image", "text")}

    def bottleneck(name: str, width_in: int, width_out: int) -> None:
        learner.update({f"{name}.0.weight": (width_in // 16, width_in), f"{name}.0.bias": (width_in // 16,)})
        learner.update({f"{name}.2.weight": (width_out, width_in // 16), f"{name}.2.bias": (width_out,)})

    for modality, tower, width in (("visual", "image", d_v), ("text", "text", d_t)):
        learner.update({f"{modality}_prompt_{state}": (m, width) for state in ("complete", "missing")})
        bottleneck(f"common_prompt_projection_{tower}", E, width)
        for k in range(memory_depth):
            bottleneck(f"compound_prompt_projections_{tower}.{k}", V, width)
            learner.update({f"layernorm_{tower}.{k}.{part}": (V,) for part in ("weight", "bias")})
    return renamed | {f"model.prompt_learner.{name}": shape for name, shape in learner.items()}


def load_golden(path: Path) -> Golden:
    """Read a `rep_*.npz` or `dcp_*.npz` and make the weights and inputs behind it, from the files beside it.

    Raises ValueError if the inputs made are not the ones in the file.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"]))
    sizes = {
        name: meta[name] for name in ("vision_layers", "text_layers", "resolution", "memory_length", "memory_depth")
    }
    task, tag, missing_types = meta["task"], meta["tag"], meta["missing_type"]
    classes = arrays["logits"].shape[1]

    prompt_type = path.name.partition("_")[0]
    shapes = {"rep": rep_shapes, "dcp": dcp_shapes}[prompt_type]
    weights = load_weights_module(path.parent)
    state = {
        name: torch.from_numpy(np.asarray(weights.parameter(tag, name, shape)))
        for name, shape in shapes(path.parent, task=task, classes=classes, **sizes).items()
    }
    tokens, images, labels = weights.inputs(tag, missing_types, meta["resolution"], task, classes)
    for made, name in ((tokens, "tokens"), (labels, "label")):
        if not np.array_equal(made, arrays[name]):
            raise ValueError(f"{path}: array {name!r} differs from what weights.py makes for tag {tag!r}")

    return Golden(
        path=path,
        prompt_type=prompt_type,
        task=task,
        **sizes,
        missing_types=missing_types,
        state=state,
        images=torch.from_numpy(images),
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        expected={name: torch.from_numpy(arrays[name]) for name in EXPECTED},
        loss=meta["loss"],
        grad_norm=meta["grad_norm"],
        grad_head=meta["grad_head"],
        trainable_without_grad=meta["trainable_without_grad"],
    )
