"""Weights of the backbone for text, audio and vision: random, taken over from stage 1, or from published files.

Published checkpoints are whole pickled models. They are read without running any of their code: the classes in them
become inert stand-ins, whose parameters are looked up by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clip.backbone import FrozenWeights
from common.errors import BackboneError
from vla.backbone import LETTERS, VlaArchitecture, VlaBackbone

RANDOM = "random"
SIZES = ("width", "heads", "layers")
UNUSED_ENDS = (".version", "._float_tensor")
"""Suffixes of meaningless entries in published checkpoints."""
HEAD = "out_layer."


def architecture_for(shapes: Mapping[str, tuple[int | None, ...]], network: Mapping[str, Any]) -> VlaArchitecture:
    """The sizes for data with these shapes (T, D) and the option `network`; BackboneError if it is invalid."""
    check_sizes(network)
    steps, dims = ([int(shapes[name][place] or 0) for name in LETTERS] for place in (0, 1))
    return VlaArchitecture(*steps, *dims, **network)  # type: ignore[arg-type]


def check_sizes(network: Mapping[str, Any]) -> None:
    """Raises BackboneError unless the option `network` contains only valid sizes."""
    if unknown := sorted(set(network) - set(SIZES)):
        raise BackboneError(f"network: expected {', '.join(SIZES)}, found {unknown[0]}")
    for name, value in network.items():
        if type(value) is not int or value < 1:
            raise BackboneError(f"network.{name}: expected an integer of at least 1, found {value!r}")


def random_weights(architecture: VlaArchitecture, seed: int) -> FrozenWeights:
    """The weights that stage 1 starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            state = VlaBackbone(architecture).state_dict()
        except ValueError as error:
            raise BackboneError(f"network: {error}") from error
    return FrozenWeights(f"{RANDOM}:{seed}", architecture, state)


def taken_over(name: str, state: Mapping[str, Tensor], theirs: VlaArchitecture, ours: VlaArchitecture) -> FrozenWeights:
    """The weights that stage 2 takes over from stage 1: all but the head, the method and the data's projections.

    Args:
        state: state dict of the whole classifier of stage 1.
        ours: the architecture for our data; its sizes of the network do not count.
    """
    shared = [entry for entry in VlaBackbone(theirs).state_dict() if not entry.startswith("proj_")]
    own = {entry: state[f"model.{entry}"] for entry in shared}
    left = tuple(entry for entry in state if entry.removeprefix("model.") not in shared)
    architecture = replace(ours, **{size: getattr(theirs, size) for size in SIZES}, project_all=True)
    return FrozenWeights(name, architecture, own, left)


class Module:
    """Stands in for every class in a published checkpoint and keeps the state it is given."""

    def __init__(self, *_: object) -> None:
        self.entries: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.entries = state if isinstance(state, dict) else {}


def published_state(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every parameter and buffer in a pickled model."""
    for kind in ("_parameters", "_buffers"):
        tensors = module.entries.get(kind) or {}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.detach()
    for name, child in (module.entries.get("_modules") or {}).items():
        if isinstance(child, Module):
            yield from published_state(child, f"{prefix}{name}.")


def published_model(module: Module) -> tuple[VlaArchitecture, str, int, dict[str, Tensor]]:
    """Sizes, method, prompt length, and state under our names, of a published model from either stage.

    Raises:
        KeyError, ValueError: an entry is missing or has the wrong shape.
    """
    state = {name: x for name, x in published_state(module) if not name.endswith(UNUSED_ENDS)}
    if f"{HEAD}weight" not in state or "trans_l_mem.layer_norm.weight" not in state:
        raise ValueError("expected a model saved by MPLMM's code, found other parameters")
    mplmm = "generative_prompt" in state
    dims = {name: state[f"proj_{letter}.weight"].shape[1] for name, letter in LETTERS.items()}
    steps = {name: state[f"prompt{c}_m"].shape[1] if mplmm else 0 for name, c in LETTERS.items()}
    layers = len({name.split(".")[2] for name in state if name.startswith("trans_l_with_a.layers.")})
    heads = next((found for name, found in _attributes(module, "num_heads")), VlaArchitecture.heads)
    data_sizes = {f"{name}_dim": dims[name] for name in LETTERS} | {f"{name}_steps": steps[name] for name in LETTERS}
    width = state["proj_l.weight"].shape[0]
    architecture = VlaArchitecture(**data_sizes, width=width, heads=heads, layers=layers, project_all=mplmm)
    length = state["generative_prompt"].shape[2] if mplmm else 16
    own = VlaBackbone(architecture).state_dict().keys()
    ours = {name: name if name.startswith(HEAD) or name in own else f"prompt_learner.{name}" for name in state}
    renamed = {ours[name]: tensor for name, tensor in state.items()}
    return architecture, "mplmm" if mplmm else "full", length, renamed


def _attributes(module: Module, name: str) -> Iterator[tuple[str, int]]:
    if type(found := module.entries.get(name)) is int:
        yield name, found
    for child in (module.entries.get("_modules") or {}).values():
        if isinstance(child, Module):
            yield from _attributes(child, name)
