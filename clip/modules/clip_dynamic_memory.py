"""The memory learner and the classifier around the two towers (METHOD.md sections 2 and 4).

Shape suffixes: B batch, N rows of the learner, L sequence, D width, m slots of one group, E joint embedding width,
C classes.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.vision_transformer_memory import (
    ClipArchitecture,
    MemoryPrefix,
    ResidualAttentionBlock,
    TextTransformerMemory,
    TowerMemory,
    Transformer,
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
    text_length: int | None = None
    """Positions up to the last `<end>` of the batch, likewise; None: encode all 77."""
    image_of_B: Tensor | None = None
    """In evaluation, where samples share an image: the row whose image each sample has; `image_rows` has just those."""


class RDN(nn.Module):
    """Residual bottleneck: fc2(dropout(gelu(layernorm(fc1(x))))) + skip(x)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, RDN_HIDDEN)
        self.fc2 = nn.Linear(RDN_HIDDEN, width_out)
        self.layernorm = nn.LayerNorm(RDN_HIDDEN)
        self.dropout = nn.Dropout(RDN_DROPOUT)
        self.skip = nn.Linear(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x_NmD: Tensor, row_B: Tensor | None = None) -> Tensor:
        """Of the rows as they are, or of the rows `row_B`, each with a dropout mask of its own."""
        hidden, skipped = F.gelu(self.layernorm(self.fc1(x_NmD))), self.skip(x_NmD)
        if row_B is not None:
            hidden, skipped = hidden.index_select(0, row_B), skipped.index_select(0, row_B)
        return self.fc2(self.dropout(hidden)) + skipped


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

        In training each sample has its own dropout masks, so that samples of a type part at the first of them; in
        evaluation all samples of a type share one row. Start slots of types that do not occur get no gradient, as
        published.

        Args:
            missing_type_B: 0 complete, 1 text missing, 2 image missing.
            types: the values that occur in it, ascending.
        """
        absent = [missing_type for missing_type in range(3) if missing_type not in types]
        row_B = missing_type_B - sum((missing_type_B > missing_type).long() for missing_type in absent)
        memory = self._chain(types, row_B if self.training else None)
        return memory if self.training else Memory(memory.image.rows(row_B), memory.text.rows(row_B))

    def of_types(self) -> Memory:
        """Slots of each missing type, in evaluation: a row for each."""
        assert not self.training
        return self._chain((0, 1, 2), None)

    def _chain(self, types: tuple[int, ...], row_B: Tensor | None) -> Memory:
        """The private chain with its residual bypass, and the shared projections: for `types`, or for samples.

        The slots stay in the type of the parameters, also where the projections are computed in 16 bits.
        """
        visual_NmD, text_NmD, common_NmE = (
            torch.stack([self.get_parameter(START_MEMORY[missing_type][part]) for missing_type in types])
            for part in range(3)
        )
        dtype = visual_NmD.dtype
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
            first_row_B = row_B if depth == 0 else None
            projected_visual = project_image(norm_image(pair_NmD), first_row_B).to(dtype)
            projected_text = project_text(norm_text(pair_NmD), first_row_B).to(dtype)
            if depth == 0:
                visual_NmD, text_NmD = projected_visual, projected_text
            else:
                visual_NmD = torch.lerp(visual_NmD, projected_visual, self.residual_alpha)
                text_NmD = torch.lerp(text_NmD, projected_text, self.residual_alpha)
            image_layers.append(visual_NmD)
            text_layers.append(text_NmD)
        return Memory(
            TowerMemory(image_layers, self.common_memory_projection_image(common_NmE, row_B).to(dtype)),
            TowerMemory(text_layers, self.common_memory_projection_text(common_NmE, row_B).to(dtype)),
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
        self._kept: tuple[object, TowerMemory, MemoryPrefix] | None = None
        """What it followed from, the image slots and the text prefix by missing type, between evaluation batches."""

    def forward(self, batch: ModelInput) -> Tensor:
        """Joint features (B, 2E), image first; the half of a missing modality is zero."""
        types_B = batch.missing_type_B
        image_memory: TowerMemory
        text_memory: TowerMemory | MemoryPrefix
        if self.training or torch.is_grad_enabled():
            self._kept = None  # what follows may be a step of an optimiser; fused ones leave no trace in `_version`
            memory = self.memory_learner(types_B, batch.types)
            image_memory, text_memory = memory.image.rows(batch.image_rows), memory.text.rows(batch.text_rows)
        else:
            image_memory_of_type, text_prefix_of_type = self._memory_of_types()
            image_memory = image_memory_of_type.rows(types_B[batch.image_rows])
            text_memory = text_prefix_of_type.rows(types_B[batch.text_rows])
        with torch.autocast(types_B.device.type, enabled=False):  # a tower computes in the type its weights are held in
            image_BE = self._encode(self.image_encoder, batch.image_rows, types_B, batch.image_b3RR, image_memory)
            text_BE = self._encode(
                self.text_encoder, batch.text_rows, types_B, batch.tokens_bL, text_memory, batch.text_length
            )
        if batch.image_of_B is not None:
            image_BE = image_BE[batch.image_of_B]
        return torch.cat([image_BE, text_BE], dim=-1)

    def _encode(
        self,
        tower: nn.Module,
        rows: Tensor,
        missing_type_B: Tensor,
        input_b: Tensor,
        memory: TowerMemory | MemoryPrefix,
        *length: int | None,
    ) -> Tensor:
        """(B, E): the tower's features of the samples `rows`, zero for the others."""
        size_BE = (len(missing_type_B), self.embed_dim)
        if len(rows) == 0:
            # Nobody has the modality. Gradients are then zero, not absent: what the published code gets by encoding
            # everything and masking, and what several processes need, of which another one may have the modality.
            slots = [*memory.private_BmD, memory.shared_BmD] if isinstance(memory, TowerMemory) else []
            inputs = [*slots, *(p for p in tower.parameters() if p.requires_grad)]
            nothing = torch.zeros((), device=missing_type_B.device, dtype=self.logit_scale.dtype)
            return (nothing + sum(0.0 * x.sum() for x in inputs)).expand(size_BE)
        encoded_bE = tower(input_b, memory, missing_type_B[rows], *length)
        return encoded_bE.new_zeros(size_BE).index_copy(0, rows, encoded_bE)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and drops what evaluation keeps between batches."""
        self._kept = None
        return super().train(mode)

    def _memory_of_types(self) -> tuple[TowerMemory, MemoryPrefix]:
        """In evaluation, the image tower's slots and the text tower's prefix by missing type.

        Kept from batch to batch until a parameter that they follow from changes.
        """
        parameters = [*self.memory_learner.parameters(), *self.text_encoder.transformer.parameters()]
        state = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        device = parameters[0].device.type
        key = (state, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        if self._kept is None or self._kept[0] != key:
            memory = self.memory_learner.of_types()
            with torch.autocast(device, enabled=False):
                self._kept = key, memory.image, self.text_encoder.transformer.prefix(memory.text)
        return self._kept[1:]


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

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False, compiled: bool = False) -> None:
        """Sets how the towers compute; what they compute stays the same.

        Args:
            dtype: of the blocks' matrix products and the patches' convolution. Their weights, which are frozen, are
                held in it, and never cast again; norms, embeddings and what is trained stay as they are.
            checkpointing: activations within a block are computed again for the gradients instead of kept.
            compiled: torch.compile for what is around the attentions.
        """
        for module in self.modules():
            if isinstance(module, ResidualAttentionBlock):
                module.attn.to(dtype)
                module.mlp.to(dtype)
                if compiled:
                    module.compile_parts()
            elif isinstance(module, nn.Conv2d):
                module.to(dtype)
            elif isinstance(module, Transformer):
                module.checkpointing = checkpointing

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
