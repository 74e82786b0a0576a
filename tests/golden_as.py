"""The golden numbers of the sensor backbones: published results, with the weights and signals that produced them.

They are in `tests/data/golden_as`, or in the folder named by the environment variable GOLDEN_AS_DIR; `inputs.py` and
the lists of names always come from `tests/data/golden_as`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensors.backbone import SensorBackbone, build
from sensors.focal import projector
from sensors.sizes import DEEPSENSE, SWT, SensorSizes
from tests import golden

HERE = Path(__file__).parent / "data" / "golden_as"
GOLDEN_AS_DIR = Path(os.environ.get("GOLDEN_AS_DIR") or HERE)


INPUTS: Any = golden.load_module(HERE / "inputs.py")


@dataclass(frozen=True)
class Golden:
    """One golden file: its description and its arrays."""

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def sizes(self) -> SensorSizes:
        return sizes_of(self.meta)

    def signals(self, view: int = 0) -> dict[str, Tensor]:
        meta = self.meta
        batch = meta["batch"] if "batch" in meta else len(self.arrays["label"]) if "label" in self.arrays else None
        batch = meta["subsequences"] * meta["seq_len"] if batch is None else batch
        shapes = {
            name: (batch, meta["channels"][name], meta["intervals"], meta["samples"][name]) for name in self.names
        }
        return {name: torch.from_numpy(INPUTS.signal(meta["tag"], name, shapes[name], view)) for name in self.names}

    @property
    def names(self) -> list[str]:
        return list(self.meta["modalities"])

    def fill(self, module: nn.Module, prefix: str = "") -> None:
        """Sets parameters and statistics to the values generated from their names."""
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(torch.as_tensor(INPUTS.parameter(self.meta["tag"], prefix + name, tuple(value.shape))))


def load(path: Path) -> Golden:
    arrays, meta = golden.read(path)
    return Golden(path, meta, arrays)


def files(*prefixes: str) -> list[Path]:
    return sorted(path for name_prefix in prefixes for path in GOLDEN_AS_DIR.glob(f"{name_prefix}*.npz"))


def sizes_of(meta: Mapping[str, Any]) -> SensorSizes:
    """The sizes that a golden file describes."""
    swt = "patch" in meta
    modality_sizes = {
        name: {"channels": meta["channels"][name], "samples": meta["samples"][name]} for name in meta["modalities"]
    }
    for name, own in modality_sizes.items():
        if swt:
            own |= {"patch": meta["patch"][name], "window": meta["window"][name]}
        else:
            kernels = [kernel[1] for kernel in meta["kernels"][name]]
            own |= {"kernel": kernels[0], "stride": meta["stride"][name][1], "inner_kernel": kernels[1]}
    common = (meta["location"], meta["intervals"], modality_sizes)
    if swt:
        blocks = meta["blocks"][meta["modalities"][0]]
        return SensorSizes(SWT, *common, meta["width"], meta["feature_width"], meta["emb_dim"], blocks, meta["heads"])
    own = {"inner_layers": meta["inter_layers"], "recurrent_width": meta["recurrent_width"]}
    return SensorSizes(DEEPSENSE, *common, meta["conv_width"], 2 * meta["recurrent_width"], meta["emb_dim"], **own)


def backbone_of(file: Golden) -> SensorBackbone:
    """The backbone with the file's weights, in evaluation mode."""
    backbone = build(file.sizes)
    file.fill(backbone)
    return backbone.eval()


def projectors_of(file: Golden, backbone: SensorBackbone) -> nn.ModuleDict:
    heads = nn.ModuleDict({name: projector(backbone.embed_dim, file.meta["emb_dim"]) for name in file.names})
    file.fill(heads, "mod_projectors.")
    return heads
