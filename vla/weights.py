"""Weights of the backbone for text, audio and vision: drawn, or taken from stage 1; published files too.

Published checkpoints are whole pickled models. They are read without running anything: classes that they mention become
inert stand-ins, whose parameters are looked up by name.
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
"""Of entries of published checkpoints that mean nothing."""
HEAD = "out_layer."


def architecture_for(shapes: Mapping[str, tuple[int | None, ...]], network: Mapping[str, Any]) -> VlaArchitecture:
    """The sizes for data with these shapes (T, D) and what the option `network` says. Raises BackboneError."""
    check_sizes(network)
    steps, dims = ([int(shapes[name][place] or 0) for name in LETTERS] for place in (0, 1))
    return VlaArchitecture(*steps, *dims, **network)  # type: ignore[arg-type]


def check_sizes(network: Mapping[str, Any]) -> None:
    """Raises BackboneError unless the option `network` has sizes alone."""
    if unknown := sorted(set(network) - set(SIZES)):
        raise BackboneError(f"network: expected {', '.join(SIZES)}, found {unknown[0]}")
    for name, value in network.items():
        if type(value) is not int or value < 1:
            raise BackboneError(f"network.{name}: expected a number of 1 or more, found {value!r}")


def random_weights(architecture: VlaArchitecture, seed: int) -> FrozenWeights:
    """Those that stage 1 starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            state = VlaBackbone(architecture).state_dict()
        except ValueError as error:
            raise BackboneError(f"network: {error}") from error
    return FrozenWeights(f"{RANDOM}:{seed}", architecture, state)


def taken_over(name: str, state: Mapping[str, Tensor], theirs: VlaArchitecture, ours: VlaArchitecture) -> FrozenWeights:
    """What stage 2 takes over from stage 1: all but head, method, and the projections, which are the data's.

    Args:
        state: of the whole classifier.
    """
    sizes = {size: getattr(theirs, size) for size in SIZES}
    for size, expected in sizes.items():
        found = getattr(ours, size)
        if found not in (expected, getattr(VlaArchitecture, size)):  # the default leaves it to stage 1
            raise BackboneError(f"network.{size}: expected {expected}, as {name} has, found {found}")
    of_backbone = [entry for entry in VlaBackbone(theirs).state_dict() if not entry.startswith("proj_")]
    own = {entry: state[f"model.{entry}"] for entry in of_backbone}
    left = tuple(entry for entry in state if entry.removeprefix("model.") not in of_backbone)
    architecture = replace(ours, **sizes, project_all=True)
    return FrozenWeights(name, architecture, own, left)


class Module:
    """Takes the place of every class in a published checkpoint, and keeps what it was given."""

    def __init__(self, *_: object) -> None:
        self.entries: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.entries = state if isinstance(state, dict) else {}


def published_state(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters in a pickled model."""
    for kind in ("_parameters", "_buffers"):
        of_kind = module.entries.get(kind) or {}
        for name, value in of_kind.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.detach()
    for name, below in (module.entries.get("_modules") or {}).items():
        if isinstance(below, Module):
            yield from published_state(below, f"{prefix}{name}.")


def published_model(module: Module) -> tuple[VlaArchitecture, str, int, dict[str, Tensor]]:
    """Sizes, method, prompt length, and the state under our names, of a published model of either stage.

    Raises:
        KeyError, ValueError: an entry is missing, or has another shape.
    """
    state = {name: x for name, x in published_state(module) if not name.endswith(UNUSED_ENDS)}
    if f"{HEAD}weight" not in state or "trans_l_mem.layer_norm.weight" not in state:
        raise ValueError("expected a model of MPLMM's code, found other parameters")
    mplmm = "generative_prompt" in state
    dims = {name: state[f"proj_{letter}.weight"].shape[1] for name, letter in LETTERS.items()}
    steps = {name: state[f"prompt{c}_m"].shape[1] if mplmm else 0 for name, c in LETTERS.items()}
    layers = len({name.split(".")[2] for name in state if name.startswith("trans_l_with_a.layers.")})
    heads = next((found for name, found in _attributes(module, "num_heads")), VlaArchitecture.heads)
    of_data = {f"{name}_dim": dims[name] for name in LETTERS} | {f"{name}_steps": steps[name] for name in LETTERS}
    width = state["proj_l.weight"].shape[0]
    architecture = VlaArchitecture(**of_data, width=width, heads=heads, layers=layers, project_all=mplmm)
    length = state["generative_prompt"].shape[2] if mplmm else 16
    own = VlaBackbone(architecture).state_dict().keys()
    ours = {name: name if name.startswith(HEAD) or name in own else f"prompt_learner.{name}" for name in state}
    renamed = {ours[name]: tensor for name, tensor in state.items()}
    return architecture, "mplmm" if mplmm else "full", length, renamed


def _attributes(module: Module, name: str) -> Iterator[tuple[str, int]]:
    if type(found := module.entries.get(name)) is int:
        yield name, found
    for below in (module.entries.get("_modules") or {}).values():
        if isinstance(below, Module):
            yield from _attributes(below, name)
