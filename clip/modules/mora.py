"""MoRA, low-rank adaptation partly shared by the towers (arXiv 2511.06225; docs/method.md section 8), and plain LoRA.

Shape suffixes: B samples, L sequence, D width of a tower, r rank.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import Backbone, ModelInput, Place, TowerSlots
from clip.modules.method import Method, MethodOptions
from clip.modules.vision_transformer_memory import ClipBackbone
from common.dropout import dropout

ADAPTED_BLOCKS = 2
"""Number of adapted blocks, the last ones that both towers have: 10 and 11 in ViT-B and ViT-L."""
MATRICES = "qkv"
DROPOUT = 0.1
SHORTEST_COLUMN = 1e-5


class LoRA(Method):
    """Low-rank updates of two of the matrices q, k, v in the last blocks: `W + alpha (PQ)^T`.

    The control for MoRA, with the same blocks, matrices, dropout and treatment of missing inputs: a white image or an
    empty text is encoded, and the missing type is not used.
    """

    grey = 1.0

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        if [*places] != ["image", "text"]:
            raise ValueError(f"prompt_type={options.prompt_type} expects image and text, found {', '.join(places)}")
        last = min(place.depth for place in places.values())
        self.blocks = range(max(0, last - ADAPTED_BLOCKS), last)
        self.own = nn.ModuleDict()
        for (tower, place), rank in zip(places.items(), options.lora_rank[1:], strict=True):
            matrices = {
                f"{block}_{matrix}": nn.ParameterDict(self._values(place.width, rank))
                for block in self.blocks
                for matrix in options.lora_matrices
            }
            self.own[tower] = nn.ModuleDict(matrices)

    def _values(self, width: int, rank: int) -> dict[str, nn.Parameter]:
        return {
            "P": nn.Parameter(torch.randn(width, rank) * rank**-0.5),
            "Q": nn.Parameter(torch.zeros(rank, width)),
        }

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """No slots, only adapters for the last blocks."""
        return {
            tower: TowerSlots(adapters={block: partial(self._project, tower, block) for block in self.blocks})
            for tower in self.places
        }

    def _project(self, tower: str, block: int, matrix: int, x_BLD: Tensor, weight_DD: Tensor, bias_D: Tensor) -> Tensor:
        if MATRICES[matrix] not in self.options.lora_matrices:
            return F.linear(x_BLD, weight_DD, bias_D)
        trained = self._own(tower, block, MATRICES[matrix])["P"].dtype  # frozen weights may be in 16 bits
        adapted_DD = self.adapted(tower, block, MATRICES[matrix], weight_DD.to(trained))
        x_BLD = dropout(x_BLD, DROPOUT, self.training)
        return F.linear(x_BLD, adapted_DD.to(weight_DD.dtype), bias_D)

    def adapted(self, tower: str, block: int, matrix: str, weight_DD: Tensor) -> Tensor:
        """The adapted matrix (D, D) that replaces the frozen one."""
        return weight_DD + self.options.lora_alpha * self._own_update(tower, block, matrix)

    def _own(self, tower: str, block: int, matrix: str) -> nn.ParameterDict:
        values = self.own.get_submodule(f"{tower}.{block}_{matrix}")
        assert isinstance(values, nn.ParameterDict)
        return values

    def _own_update(self, tower: str, block: int, matrix: str) -> Tensor:
        own = self._own(tower, block, matrix)
        return (own["P"] @ own["Q"]).T


class MoRA(LoRA):
    """Each adapted matrix is a sum of two: `W` plus an update shared by both towers, and `W` plus an update of its own,
    each with its columns normalised and scaled by learned gains.

    The shared update of a block comes from one pair of factors, `A` of the text tower's width and `B` of the image
    tower's: `A (B^T B) A^T` for texts and `B (A^T A) B^T` for images. An adapted matrix does not start as the frozen
    one, because both gains start at the frozen matrix's column norms.
    """

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        rank = options.lora_rank[0]
        self.shared = nn.ModuleDict({
            str(block): nn.ParameterDict({
                tower: nn.Parameter(torch.randn(places[tower].width, rank) * rank**-0.5) for tower in ("text", "image")
            })
            for block in self.blocks
        })  # fmt: skip

    def _values(self, width: int, rank: int) -> dict[str, nn.Parameter]:
        gains = {f"{update}_gain": nn.Parameter(torch.ones(1, width)) for update in ("shared", "own")}
        return super()._values(width, rank) | gains

    @torch.no_grad()
    def start_on(self, backbone: Backbone) -> None:
        """Sets both gains to the norms of the frozen columns."""
        assert isinstance(backbone, ClipBackbone)
        for tower in self.places:
            for block in self.blocks:
                weight = backbone.get_parameter(f"{tower}_encoder.transformer.resblocks.{block}.attn.in_proj_weight")
                for matrix, frozen_DD in zip(MATRICES, weight.chunk(3), strict=True):
                    if matrix in self.options.lora_matrices:
                        own = self._own(tower, block, matrix)
                        for gain in (own["shared_gain"], own["own_gain"]):
                            gain.copy_(frozen_DD.norm(dim=0, keepdim=True))

    def adapted(self, tower: str, block: int, matrix: str, weight_DD: Tensor) -> Tensor:
        """The adapted matrix (D, D) that replaces the frozen one."""
        own, alpha = self._own(tower, block, matrix), self.options.lora_alpha
        factors = self.shared.get_submodule(str(block))
        assert isinstance(factors, nn.ParameterDict)
        own_Dr, other_Dr = (factors[name] for name in (tower, "image" if tower == "text" else "text"))
        shared_DD, own_DD = (
            F.normalize(weight_DD + alpha * update_DD, dim=0, eps=SHORTEST_COLUMN)
            for update_DD in (own_Dr @ (other_Dr.T @ other_Dr) @ own_Dr.T, self._own_update(tower, block, matrix))
        )
        return own["shared_gain"] * shared_DD + own["own_gain"] * own_DD
