"""The golden numbers: the published implementation's results, with the weights and inputs that produced them.

They are in `tests/data/golden`, or in the folder named by the environment variable GOLDEN_DIR; its `weights.py`
generates the weights from a tag and a checkpoint name.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from engine.checkpoint import ModelSpec, build_classifier
from tests.models import REAL, published_state

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "data" / "golden")


EXPECTED = (
    *("memory_image_0", "memory_text_0"),  # (B, 2m, width)
    *("memory_image_last", "memory_text_last"),  # (B, m, width)
    *("features_unmasked", "features", "logits"),  # (B, 2E), (B, 2E), (B, C)
)


@dataclass(frozen=True)
class Golden:
    """One golden file: a whole model, a batch, and the published code's results for them in evaluation mode."""

    options: MethodOptions
    task: str
    missing_types: list[int]  # (B,)
    state: dict[str, Tensor]  # checkpoint name -> float32 value, dynamic queries included; nothing requires grad
    images: Tensor  # (B, 3, R, R)
    tokens: Tensor  # (B, 77) int64
    labels: Tensor  # (B, 23) float32 for mmimdb, else (B,) int64
    expected: dict[str, Tensor]  # the arrays named in EXPECTED
    loss: float
    grad_norm: dict[str, float]  # gradient norm of each parameter that received a gradient
    grad_head: dict[str, list[float]]  # the gradient's first four values
    trainable_without_grad: list[str]  # trained for the task, though the loss does not depend on them


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


def assert_gradients(
    found: Mapping[str, Tensor | None], meta: Mapping[str, Any], tolerance: float = 1e-3, floor: float = 0.0
) -> None:
    """The gradients' norms and first four values match those in `meta`.

    Args:
        floor: the most that rounding may leave of a gradient that is exactly 0.
    """
    for name, norm in meta["grad_norm"].items():
        gradient, head = found[name], torch.tensor(meta["grad_head"][name])
        if gradient is None:
            assert norm <= floor, name
            continue
        assert float(gradient.norm()) == pytest.approx(norm, rel=tolerance, abs=floor), name
        assert (
            float((gradient.flatten()[:4] - head).norm()) <= tolerance * max(float(head.norm()), 1e-3 * norm) + floor
        ), name


def load_module(path: Path) -> ModuleType:
    """A script of a golden folder, imported by path."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def architecture(vision_layers: int, text_layers: int, resolution: int) -> ClipArchitecture:
    """The towers of a golden file: ViT-B/16 with fewer blocks and smaller images."""
    return replace(REAL["ViT-B/16"], image_size=resolution, vision_layers=vision_layers, text_layers=text_layers)


def shapes(task: str, options: MethodOptions, arch: ClipArchitecture) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's entries by published name; test_backbone.py checks the names against the published ones."""
    with torch.device("meta"):
        classifier = build_classifier(ModelSpec(task, options, arch))
    return {name: tuple(value.shape) for name, value in published_state(classifier).items()}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a golden file and its parsed entry `meta`."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def load_golden(path: Path) -> Golden:
    """Reads a `rep_*.npz` or `dcp_*.npz` and regenerates its weights and inputs with the `weights.py` next to it.

    Raises ValueError if the generated inputs differ from those in the file.
    """
    arrays, meta = read(path)
    task, tag, missing_types = meta["task"], meta["tag"], meta["missing_type"]
    options = MethodOptions(path.name.partition("_")[0], meta["memory_length"], meta["memory_depth"])
    arch = architecture(*(meta[name] for name in ("vision_layers", "text_layers", "resolution")))
    weights = load_module(path.parent / "weights.py")
    state = {
        name: torch.from_numpy(np.asarray(weights.parameter(tag, name, shape)))
        for name, shape in shapes(task, options, arch).items()
    }
    inputs = weights.inputs(tag, missing_types, meta["resolution"], task, arrays["logits"].shape[1])
    tokens, images, labels = map(torch.from_numpy, inputs)
    for made, name in ((tokens, "tokens"), (labels, "label")):
        if not np.array_equal(made, arrays[name]):
            raise ValueError(f"{path}: array {name!r} differs from what weights.py makes for tag {tag!r}")
    expected = {name: torch.from_numpy(arrays[name]) for name in EXPECTED}
    gradients = {name: meta[name] for name in ("loss", "grad_norm", "grad_head", "trainable_without_grad")}
    return Golden(options, task, missing_types, state, images, tokens, labels, expected, **gradients)
