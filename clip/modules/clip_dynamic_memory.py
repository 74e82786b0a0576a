"""The memory learner and the classifier around the two towers (METHOD.md sections 2 and 4).

Shape suffixes: B batch, N rows of the learner, L sequence, D width, m slots of one group, E joint embedding width,
C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import (
    ClipArchitecture,
    TextTransformerMemory,
    TowerMemory,
    VisionTransformerMemory,
)

RDN_HIDDEN = 256
RDN_DROPOUT = 0.1
RESIDUAL_ALPHA = 0.5
HEAD_STD = 0.02
START_MEMORY = (
    ("visual_memory_complete", "text_memory_complete", "common_memory_complete"),
    ("visual_memory_complete", "text_memory_missing", "common_memory_image"),
    ("visual_memory_missing", "text_memory_complete", "common_memory_text"),
)
"""By missing type (0 complete, 1 text missing, 2 image missing): the slots that the private chains start from and
the slots that both towers share."""


class Memory(NamedTuple):
    """Output of the memory learner for a batch."""

    image: TowerMemory
    text: TowerMemory


class ModelInput(NamedTuple):
    """A batch as the model takes it. A modality that a sample lacks is not in it, so it costs nothing.

    b counts the samples that have the modality, B all of them.
    """

    image_b3RR: Tensor
    """Normalised images of the samples `image_rows`, in that order."""
    tokens_bL: Tensor
    """Token ids of the samples `text_rows`, in that order."""
    missing_type_B: Tensor
    image_rows: Tensor
    text_rows: Tensor
    types: tuple[int, ...]
    """The missing types that occur in the batch, ascending, known without asking the device."""


class RDN(nn.Module):
    """Residual bottleneck: fc2(dropout(gelu(layernorm(fc1(x))))) + skip(x)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, RDN_HIDDEN)
        self.fc2 = nn.Linear(RDN_HIDDEN, width_out)
        self.layernorm = nn.LayerNorm(RDN_HIDDEN)
        self.dropout = nn.Dropout(RDN_DROPOUT)
        self.skip = nn.Linear(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.layernorm(self.fc1(x))))) + self.skip(x)


class MemoryLearner(nn.Module):
    """Private and shared slots for each layer of the memory depth (METHOD.md section 2).

    Args:
        memory_length: slots in all; a third each for the private, shared and dynamic group.
        memory_depth: number of blocks, from the first one on, that get private slots.

    Raises:
        ValueError: `memory_length` is no positive multiple of 3, or `memory_depth` is not positive.
    """

    def __init__(self, arch: ClipArchitecture, memory_length: int, memory_depth: int) -> None:
        super().__init__()
        m = slots_per_group(memory_length)
        if memory_depth < 1:
            raise ValueError(f"memory_depth must be at least 1, found {memory_depth}")
        d_v, d_t, E = arch.vision_width, arch.text_width, arch.embed_dim
        for name in ("text_memory_complete", "text_memory_missing"):
            self.register_parameter(name, nn.Parameter(0.2 * _unit_rows(m, d_t)))
        for name in ("visual_memory_complete", "visual_memory_missing"):
            self.register_parameter(name, nn.Parameter(0.2 * _unit_rows(m, d_v)))
        for name in ("common_memory_complete", "common_memory_image", "common_memory_text"):
            self.register_parameter(name, nn.Parameter(_unit_rows(m, E) + 0.2 * torch.randn(m, E)))
        self.residual_alpha = nn.Parameter(torch.tensor(RESIDUAL_ALPHA))
        # Part of published checkpoints; the released model never calls it (METHOD.md section 7).
        self.dynamic_common_token_net = RDN(d_v + d_t, E)
        self.compound_memory_projections_text = nn.ModuleList(RDN(d_v + d_t, d_t) for _ in range(memory_depth))
        self.compound_memory_projections_image = nn.ModuleList(RDN(d_v + d_t, d_v) for _ in range(memory_depth))
        self.common_memory_projection_image = RDN(E, d_v)
        self.common_memory_projection_text = RDN(E, d_t)
        self.layernorm_text = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(memory_depth))
        self.layernorm_image = nn.ModuleList(nn.LayerNorm(d_v + d_t) for _ in range(memory_depth))

    @torch.no_grad()
    def start_from(self, class_embedding_D: Tensor, end_embedding_D: Tensor) -> None:
        """Adds the backbone's class embedding and its embedding of `<end>` to every private start slot."""
        for name in ("text_memory_complete", "text_memory_missing"):
            self.get_parameter(name).add_(end_embedding_D)
        for name in ("visual_memory_complete", "visual_memory_missing"):
            self.get_parameter(name).add_(class_embedding_D)

    def forward(self, missing_type_B: Tensor, types: tuple[int, ...]) -> Memory:
        """Slots of every sample of a batch.

        In training each sample has its own dropout masks, so the chain runs on B rows; in evaluation all samples of a
        missing type share one row. Start slots of types that do not occur get no gradient, as published.

        Args:
            missing_type_B: 0 complete, 1 text missing, 2 image missing.
            types: the values that occur in it, ascending.
        """
        row_of_type = torch.zeros(3, dtype=torch.long, device=missing_type_B.device)
        for row, missing_type in enumerate(types):
            row_of_type[missing_type] = row
        row_B = row_of_type[missing_type_B]
        visual_NmD, text_NmD, common_NmE = (
            torch.stack([self.get_parameter(START_MEMORY[missing_type][part]) for missing_type in types])
            for part in range(3)
        )
        if self.training:
            return self._chain(visual_NmD[row_B], text_NmD[row_B], common_NmE[row_B])
        memory = self._chain(visual_NmD, text_NmD, common_NmE)
        return Memory(memory.image.rows(row_B), memory.text.rows(row_B))

    def _chain(self, visual_NmD: Tensor, text_NmD: Tensor, common_NmE: Tensor) -> Memory:
        """The private chain with its residual bypass, and the shared projections."""
        image_layers: list[Tensor] = []
        text_layers: list[Tensor] = []
        layers = zip(
            self.compound_memory_projections_image,
            self.layernorm_image,
            self.compound_memory_projections_text,
            self.layernorm_text,
            strict=True,
        )
        for depth, (project_image, norm_image, project_text, norm_text) in enumerate(layers):
            pair_NmD = torch.cat([visual_NmD, text_NmD], dim=-1)
            projected_visual_NmD = project_image(norm_image(pair_NmD))
            projected_text_NmD = project_text(norm_text(pair_NmD))
            if depth == 0:
                visual_NmD, text_NmD = projected_visual_NmD, projected_text_NmD
            else:
                alpha = self.residual_alpha
                visual_NmD = alpha * projected_visual_NmD + (1 - alpha) * visual_NmD
                text_NmD = alpha * projected_text_NmD + (1 - alpha) * text_NmD
            image_layers.append(visual_NmD)
            text_layers.append(text_NmD)
        return Memory(
            TowerMemory(image_layers, self.common_memory_projection_image(common_NmE)),
            TowerMemory(text_layers, self.common_memory_projection_text(common_NmE)),
        )


class DynamicMemoryCLIP(nn.Module):
    """The two towers with their memory: from a batch to its joint features."""

    def __init__(self, arch: ClipArchitecture, memory_length: int, memory_depth: int) -> None:
        super().__init__()
        if memory_depth > min(arch.vision_layers, arch.text_layers):
            raise ValueError(
                f"memory_depth={memory_depth} is more than the backbone has blocks "
                f"({arch.vision_layers} in the image tower, {arch.text_layers} in the text tower)"
            )
        m = slots_per_group(memory_length)
        self.embed_dim = arch.embed_dim
        self.logit_scale = nn.Parameter(torch.tensor(0.0))  # CLIP's own; unused here, part of published checkpoints
        self.memory_learner = MemoryLearner(arch, memory_length, memory_depth)
        self.image_encoder = VisionTransformerMemory(arch, m)
        self.text_encoder = TextTransformerMemory(arch, m)

    def forward(self, batch: ModelInput) -> Tensor:
        """Joint features (B, 2E), image first; the half of a missing modality is zero."""
        memory = self.memory_learner(batch.missing_type_B, batch.types)
        image_BE = self._encode(
            self.image_encoder, batch.image_b3RR, memory.image, batch.missing_type_B, batch.image_rows
        )
        text_BE = self._encode(self.text_encoder, batch.tokens_bL, memory.text, batch.missing_type_B, batch.text_rows)
        return torch.cat([image_BE, text_BE], dim=-1)

    def _encode(
        self, tower: nn.Module, input_b: Tensor, memory: TowerMemory, missing_type_B: Tensor, rows: Tensor
    ) -> Tensor:
        size_BE = (len(missing_type_B), self.embed_dim)
        if len(rows) == 0:
            # Nobody has the modality. Gradients are then zero, not absent: what the published code gets by encoding
            # everything and masking, and what several processes need, of which another one may have the modality.
            inputs = [*memory.private_BmD, memory.shared_BmD, *(p for p in tower.parameters() if p.requires_grad)]
            return (0.0 * torch.stack([x.sum() for x in inputs]).sum()).expand(size_BE)
        encoded_bE = tower(input_b, memory.rows(rows), missing_type_B[rows])
        encoded_bE = encoded_bE.to(torch.promote_types(encoded_bE.dtype, torch.float32))  # bf16 stays in the towers
        return encoded_bE.new_zeros(size_BE).index_copy(0, rows, encoded_bE)


class MissingModalityClassifier(nn.Module):
    """`DynamicMemoryCLIP` and a linear head; state names are those of published checkpoints.

    Args:
        head_name: attribute of the head, for example `mmimdb_classifier`.
        n_classes: C.
    """

    def __init__(
        self, arch: ClipArchitecture, memory_length: int, memory_depth: int, head_name: str, n_classes: int
    ) -> None:
        super().__init__()
        self.model = DynamicMemoryCLIP(arch, memory_length, memory_depth)
        self.head_name = head_name
        head = nn.Linear(2 * arch.embed_dim, n_classes)
        nn.init.normal_(head.weight, std=HEAD_STD)
        nn.init.zeros_(head.bias)
        self.add_module(head_name, head)

    def forward(self, batch: ModelInput) -> Tensor:
        """Logits (B, C)."""
        return self.get_submodule(self.head_name)(self.model(batch))


def slots_per_group(memory_length: int) -> int:
    """m; raises ValueError unless `memory_length` is a positive multiple of 3."""
    if memory_length < 3 or memory_length % 3:
        raise ValueError(
            f"memory_length must be a positive multiple of 3 (private, shared and dynamic slots), found {memory_length}"
        )
    return memory_length // 3


def _unit_rows(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)
