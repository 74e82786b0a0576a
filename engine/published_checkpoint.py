"""Checkpoints of the published code: names, sizes, and reading files that refer to classes of that code.

No file can run code: `torch.load` runs with `weights_only=True`, and inert stand-ins replace the classes that a file
mentions.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip.backbone import architecture_of, shape_of
from clip.modules.method import MethodOptions
from clip.modules.registry import method_class
from clip.modules.vision_transformer_memory import ClipArchitecture
from common.errors import CheckpointError
from common.messages import first_line
from common.torch_file import load_inert
from engine.checkpoint_file import check_intact
from engine.tasks import TASKS
from vla import weights
from vla.backbone import VlaArchitecture
from vla.weights import Module

MODEL_MODULES = ("torch.nn.", "torch._utils.", "src.", "modules.", "collections.", "builtins.set")
"""Modules of the classes mentioned in a model saved as a whole object, as MPLMM's code does."""
STAND_IN_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "pathlib.", "_io.")
"""Modules of the classes mentioned in published checkpoints (callbacks, hyperparameters, paths); others are refused."""
PUBLISHED_NAMES = {
    f"model.{tower}_encoder.transformer.resblocks.0.{published}": f"model.{learner}.dynamic.{tower}.{ours}"
    for learner, slots, attention in (
        ("memory_learner", "memories", "attn_memory"),
        ("prompt_learner", "prompts", "attn_prompt"),
    )
    for published, ours in ((f"{attention}.", "attention."), (f"{slots}_dynamic_", "queries_"))
    for tower in ("image", "text")
}
"""Maps prefixes of names in published checkpoints, and in older ones of ours, to those in the model: there, the dynamic
slots of REP and DCP belong to the towers."""


def model_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the entries of a checkpoint to the model's names (see PUBLISHED_NAMES)."""
    return {model_name(name): tensor for name, tensor in state.items()}


def model_name(name: str) -> str:
    """The model's name for an entry of a published checkpoint."""
    for published, ours in PUBLISHED_NAMES.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def published_model(state: Mapping[str, Tensor]) -> tuple[str, MethodOptions, ClipArchitecture]:
    """Infers task, method and sizes from names and shapes, without the published files' own description.

    Raises:
        KeyError, TypeError, ValueError: an entry is missing or invalid.
    """
    dcp = any(name.startswith("model.prompt_learner.") for name in state)
    prompt_type, slots_name = ("dcp", "common_prompt_complete") if dcp else ("rep", "common_memory_complete")
    learner = f"model.{method_class(prompt_type).attribute}."
    slots, _ = shape_of(state, learner + slots_name, 2)
    architecture = architecture_of({name.removeprefix("model."): state[name] for name in state}, "quick_gelu")
    heads = [task for task in TASKS.values() if f"{task.head_name}.weight" in state]
    if len(heads) != 1:
        expected = " or ".join(task.head_name for task in TASKS.values())
        raise ValueError(f"expected one head named {expected}, found {len(heads)}")
    depth = sum(re.fullmatch(rf"{learner}layernorm_text\.\d+\.weight", name) is not None for name in state)
    return heads[0].name, MethodOptions(prompt_type, 3 * slots, depth), architecture


def published_vla(model: Module) -> tuple[str, MethodOptions, VlaArchitecture, dict[str, Tensor]]:
    """Infers task, method and sizes of a model of MPLMM's code, of either stage; returns its state under our names.

    No entry tells which data the model was trained on; the task is taken to be `mosi`.

    Raises:
        KeyError, ValueError: an entry is missing or invalid.
    """
    architecture, method, length, state = weights.published_model(model)
    head = TASKS["mosi"].head_name
    renamed = {
        f"{head}.{name.removeprefix(weights.HEAD)}" if name.startswith(weights.HEAD) else f"model.{name}": tensor
        for name, tensor in state.items()
    }
    return "mosi", MethodOptions(method, prompt_length=length), architecture, renamed


class _StandIn:
    """Inert replacement for a class that a published checkpoint mentions."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_checkpoint_file(path: Path) -> Any:
    """The content of a checkpoint, ours or a published one. Raises CheckpointError if it cannot be read as one."""
    try:
        mentioned = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # refuses anything but a zip archive
        check_intact(path)
        whole = any(name.startswith("torch.nn.modules.") for name in mentioned)
        allowed = STAND_IN_MODULES + (MODEL_MODULES if whole else ())
        if refused := [name for name in mentioned if not name.startswith(allowed)]:
            raise ValueError(f"it mentions {', '.join(refused)}, which might run code; not opened")
        # Hyperparameters are a subclass of dict; torch's restricted reader can only fill plain dicts.
        stand_in = Module if whole else _StandIn
        stand_ins: list[Any] = [(dict if name.endswith("AttributeDict") else stand_in, name) for name in mentioned]
        with torch.serialization.safe_globals(stand_ins):
            return load_inert(path)
    except Exception as error:  # torch.load raises many types on damaged files
        raise CheckpointError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
