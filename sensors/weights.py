"""Frozen weights of the sensor backbones, drawn from a seed or read from a published checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.backbone import FrozenWeights
from common.errors import BackboneError, ConfigError
from common.messages import first_line
from common.records import record_of
from common.torch_file import check_state, load_inert, state_dict_of
from sensors.backbone import build, is_unused_entry
from sensors.sizes import MOD_SIZES, NETWORKS, OF_NETWORK, SWT, ModalitySizes, SensorSizes
from vilt.datasets.specs import DatasetSpec

RANDOM = "random"
"""Value of `vit` for weights drawn from the seed; `random:SEED` in checkpoints."""
NOT_PRETRAINED = ("mod_fusion_layers.", "class_layer.", "mod_projectors.")
"""Prefixes of entries that are trained from scratch on top of a pretrained backbone."""
WEARABLE: dict[str, Any] = {"width": 32, "blocks": [2, 2, 2], "feature_width": 128, "projection_width": 128}
KNOWN: dict[str, dict[str, Any]] = {
    "mod": {"location": "shake", "width": 64, "feature_width": 256, "projection_width": 256},
    "pamap2": {**WEARABLE, "location": "hand", "window": [3, 5], "patch": [1, 2], "temperature": 0.5},
    "rwhar": {**WEARABLE, "location": "waist", "window": [3, 3], "patch": [1, 2], "projection_width": 256},
    "sensors": {**WEARABLE, "location": "sensors", "window": [3, 3], "patch": [1, 1]},
}
"""Sizes of the SW-Transformer, keyed by task."""
KNOWN_DEEPSENSE: dict[str, dict[str, Any]] = {
    "mod": {"width": 128, "recurrent_width": 256, "projection_width": 256, "temperature": 0.5},
    "pamap2": {"width": 64, "inner_layers": 2, "recurrent_width": 64, "kernel": 5, "inner_kernel": 5},
    "rwhar": {"width": 128, "recurrent_width": 256},
    "sensors": {"width": 64, "inner_layers": 2, "recurrent_width": 64},
}
"""Sizes that differ for DeepSense, keyed by task."""


def sizes_for(data: DatasetSpec, network: Mapping[str, Any], scale: Mapping[str, float]) -> SensorSizes:
    """The sizes for a dataset, overridden by the option `network`, for all modalities or with `{NAME: value}` for one.

    Raises:
        ConfigError: an entry is unknown, has the wrong type, or does not fit.
    """
    kind = network.get("type", SWT)
    if kind not in NETWORKS:
        raise ConfigError(f"network.type: expected {' or '.join(NETWORKS)}, found {kind!r}")
    common, own = (each.get(data.name, each["sensors"]) for each in (KNOWN, KNOWN_DEEPSENSE))
    wanted = {**common, **(own if kind != SWT else {}), **network}
    per_modality = [field.name for field in fields(ModalitySizes) if field.name not in ("channels", "samples")]
    measured = ("network", "intervals", "modalities", "input_scale")  # by the data, or named differently
    general = [field.name for field in fields(SensorSizes) if field.name not in measured]
    if unknown := [name for name in network if name not in (*per_modality, *general, "type")]:
        known = ", ".join(sorted(["type", *per_modality, *general]))
        raise ConfigError(f"network: expected {known}, found {unknown[0]!r}")
    for entry, value in network.items():
        if owner := next((other for other in NETWORKS if other != kind and entry in OF_NETWORK[other]), None):
            raise ConfigError(f"network.{entry}: is a size of network.type={owner}, found network.type={kind}")
        if isinstance(value, dict) and (others := [name for name in value if name not in data.modalities]):
            raise ConfigError(f"network.{entry}: expected {' or '.join(data.modalities)}, found {others[0]!r}")
    modalities = {}
    intervals = 1
    for name, modality in data.modalities.items():
        channels, intervals, samples = (int(size or 1) for size in modality.shape)
        sizes = {**(MOD_SIZES[name] if data.name == "mod" else {}), "channels": channels, "samples": samples}
        for entry in per_modality:
            if entry in wanted:
                value = wanted[entry]
                sizes |= {entry: value.get(name, sizes.get(entry)) if isinstance(value, dict) else value}
        modalities[name] = {entry: value for entry, value in sizes.items() if value is not None}
    values = {entry: wanted[entry] for entry in general if entry in wanted}
    try:
        given = {"network": kind, "intervals": intervals, "modalities": modalities, "input_scale": dict(scale)}
        sizes_found = record_of(SensorSizes, {**values, **given})
        filled = {name: asdict(sizes_found.of(name)) for name in modalities}
        build_on_meta(replace(sizes_found, modalities=filled))
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(f"network: {first_line(error)}") from error
    return replace(sizes_found, modalities=filled)


def build_on_meta(sizes: SensorSizes) -> dict[str, Tensor]:
    """The frozen weights for these sizes as tensors without memory; building them raises an error for a wrong size."""
    with torch.device("meta"):
        return {name: x for name, x in build(sizes).state_dict().items() if not name.startswith(NOT_PRETRAINED)}


def random_weights(sizes: SensorSizes, seed: int) -> FrozenWeights:
    """Weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return frozen(f"{RANDOM}:{seed}", sizes, build(sizes).state_dict())


def frozen(name: str, sizes: SensorSizes, state: Mapping[str, Tensor]) -> FrozenWeights:
    """The frozen weights in a state dict, without the entries that are not pretrained."""
    kept = {entry: value for entry, value in state.items() if not entry.startswith(NOT_PRETRAINED)}
    return FrozenWeights(name, sizes, kept)


def silences(weights: FrozenWeights) -> dict[str, Tensor]:
    """The token (C,) of a patch of zeros, keyed by modality; empty for DeepSense."""
    sizes, state = weights.architecture, weights.state
    if sizes.network != SWT:
        return {}
    prefixes = {name: f"patch_embed.{sizes.location}.{name}" for name in sizes.modalities}
    return {
        name: F.layer_norm(
            state[f"{prefix}.proj.bias"], (sizes.width,), state[f"{prefix}.norm.weight"], state[f"{prefix}.norm.bias"]
        )
        for name, prefix in prefixes.items()
    }


def published_weights(path: Path, sizes: SensorSizes) -> FrozenWeights:
    """The weights pretrained by the published code; BackboneError if a name or shape does not fit."""
    try:
        raw = state_dict_of(load_inert(path))
        state = {name: x.float() for name, x in raw.items() if not is_unused_entry(name)}
        kept = {name: x for name, x in state.items() if not name.startswith(NOT_PRETRAINED)}
        check_state(kept, build_on_meta(sizes))
    except Exception as error:  # torch.load raises many types on damaged files
        raise BackboneError(f"vit={path}: not readable as a pretrained state: {first_line(error)}") from error
    return frozen(str(path), sizes, kept)
