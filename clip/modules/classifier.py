"""The classifier: frozen CLIP, a method's slots in its towers, and a head (METHOD.md sections 3, 4 and 8).

Shape suffixes: B batch, b samples with a modality, L sequence, R image side, D width, V widths of both towers together,
E joint embedding width, C classes.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from clip.modules.heads import HEADS
from clip.modules.method import ALL_TYPES, Method, MethodOptions
from clip.modules.registry import build_method
from clip.modules.vision_transformer_memory import (
    IMAGE_MISSING,
    ClipArchitecture,
    DynamicSlots,
    MemoryPrefix,
    ResidualAttentionBlock,
    TextTransformerMemory,
    TowerMemory,
    Transformer,
    VisionTransformerMemory,
    end_positions,
)


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

    def with_own_images(self) -> "ModelInput":
        """Every sample with an image of its own, for methods that treat samples with the same image differently."""
        if self.image_of_B is None:
            return self
        image_rows = (self.missing_type_B != IMAGE_MISSING).nonzero().flatten()
        places = torch.searchsorted(self.image_rows, self.image_of_B[image_rows])
        return self._replace(image_b3RR=self.image_b3RR[places], image_rows=image_rows, image_of_B=None)


class PromptedCLIP(nn.Module):
    """The two towers with a method's slots: from a batch to its joint features."""

    def __init__(self, arch: ClipArchitecture, options: MethodOptions) -> None:
        super().__init__()
        self.embed_dim = arch.embed_dim
        self.logit_scale = nn.Parameter(torch.tensor(0.0))  # CLIP's own; unused here, part of published checkpoints
        method = build_method(arch, options)
        self._attribute = method.attribute
        self.add_module(method.attribute, method)
        dynamic = None if method.dynamic_names is None else DynamicSlots(options.slots, *method.dynamic_names)
        self.image_encoder = VisionTransformerMemory(arch, dynamic)
        self.text_encoder = TextTransformerMemory(arch, dynamic)
        self._kept: tuple[object, TowerMemory, MemoryPrefix] | None = None
        """What it followed from, the image slots and the text prefix by missing type, between evaluation batches."""

    @property
    def method(self) -> Method:
        """The learner of the slots."""
        method = self.get_submodule(self._attribute)
        assert isinstance(method, Method)
        return method

    def forward(self, batch: ModelInput) -> Tensor:
        """Joint features (B, 2E), image first; the half of a missing modality is zero."""
        return self.features_and_penalty(batch)[0]

    def features_and_penalty(self, batch: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Joint features (B, 2E), and in training the method's own loss, if it has one."""
        if self.method.reads_input:
            batch = batch.with_own_images()
        types_B, image_rows, text_rows = batch.missing_type_B, batch.image_rows, batch.text_rows
        image, text = self.image_encoder, self.text_encoder
        with torch.autocast(types_B.device.type, enabled=False):  # a tower computes in the type its weights are held in
            image_bLD = image.embed(batch.image_b3RR) if len(image_rows) else None
            text_bLD = text.embed(batch.tokens_bL) if len(text_rows) else None
        image_memory: TowerMemory
        text_memory: TowerMemory | MemoryPrefix
        penalty = None
        if self.training or torch.is_grad_enabled() or self.method.reads_input:
            self._kept = None  # what follows may be a step of an optimiser; fused ones leave no trace in `_version`
            input_BV = self._mean_inputs(batch, image_bLD, text_bLD) if self.method.reads_input else None
            memory = self.method(types_B, batch.types, input_BV)
            image_memory, text_memory = memory.image.rows(image_rows), memory.text.rows(text_rows)
            penalty = memory.penalty
        else:
            image_memory_of_type, text_prefix_of_type = self._memory_of_types()
            image_memory = image_memory_of_type.rows(types_B[image_rows])
            text_memory = text_prefix_of_type.rows(types_B[text_rows])
        size_BE = (len(types_B), self.embed_dim)
        with torch.autocast(types_B.device.type, enabled=False):
            if image_bLD is None:
                image_BE = _nothing(image, image_memory).expand(size_BE)
            else:
                image_bE = image.encode(image_bLD, image_memory, types_B[image_rows])
                image_BE = image_bE.new_zeros(size_BE).index_copy(0, image_rows, image_bE)
            if text_bLD is None:
                text_BE = _nothing(text, text_memory).expand(size_BE)
            else:
                end_b = end_positions(batch.tokens_bL)
                text_bE = text.encode(text_bLD, text_memory, types_B[text_rows], end_b, batch.text_length)
                text_BE = text_bE.new_zeros(size_BE).index_copy(0, text_rows, text_bE)
        if batch.image_of_B is not None:
            image_BE = image_BE[batch.image_of_B]
        return torch.cat([image_BE, text_BE], dim=-1), penalty

    def _mean_inputs(self, batch: ModelInput, image_bLD: Tensor | None, text_bLD: Tensor | None) -> Tensor:
        """(B, V): the mean of each sample's input tokens, image tower first, zero for a missing modality."""
        means = []
        for rows, tokens_bLD, tower in (
            (batch.image_rows, image_bLD, self.image_encoder),
            (batch.text_rows, text_bLD, self.text_encoder),
        ):
            position_LD = tower.positional_embedding
            mean_BD = position_LD.new_zeros(len(batch.missing_type_B), position_LD.shape[-1])
            means.append(mean_BD if tokens_bLD is None else mean_BD.index_copy(0, rows, tokens_bLD.mean(dim=1)))
        return torch.cat(means, dim=-1)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and drops what evaluation keeps between batches."""
        self._kept = None
        return super().train(mode)

    def _memory_of_types(self) -> tuple[TowerMemory, MemoryPrefix]:
        """In evaluation, the image tower's slots and the text tower's prefix by missing type.

        Kept from batch to batch until a parameter that they follow from changes.
        """
        parameters = [*self.method.parameters(), *self.text_encoder.transformer.parameters()]
        state = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        device = parameters[0].device.type
        key = (state, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        if self._kept is None or self._kept[0] != key:
            memory = self.method.of_types(ALL_TYPES)
            with torch.autocast(device, enabled=False):
                self._kept = key, memory.image, self.text_encoder.transformer.prefix(memory.text)
        return self._kept[1:]


def _nothing(tower: nn.Module, memory: TowerMemory | MemoryPrefix) -> Tensor:
    """The features of a modality that no sample of the batch has: a zero.

    Gradients are then zero, not absent: what the published code gets by encoding everything and masking, and what
    several processes need, of which another one may have the modality.
    """
    slots = [x for group in memory.groups for x in group] if isinstance(memory, TowerMemory) else []
    parameters = list(tower.parameters())
    zero = parameters[0].new_zeros((), dtype=torch.float32)
    return zero + sum(0.0 * x.sum() for x in (*slots, *(p for p in parameters if p.requires_grad)))


class MissingModalityClassifier(nn.Module):
    """`PromptedCLIP` and a head; state names are those of published checkpoints.

    Args:
        options: which method, and its sizes.
        head_name: attribute of the head, for example `mmimdb_classifier`.
        n_classes: C.
        head: which head, of `clip/modules/heads.py`.

    Raises:
        ValueError: the options do not fit each other or the backbone.
    """

    def __init__(
        self, arch: ClipArchitecture, options: MethodOptions, head_name: str, n_classes: int, head: str = "linear"
    ) -> None:
        super().__init__()
        self.model = PromptedCLIP(arch, options)
        self.head_name = head_name
        self.add_module(head_name, HEADS[head](arch.embed_dim, n_classes))

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
        return self.get_submodule(self.head_name)(self.model(batch), batch.missing_type_B)

    def training_outputs(self, batch: ModelInput, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) as the loss takes them, and the method's own loss, if it has one.

        Args:
            labels: (B, C) of 0 and 1 or (B,) class numbers; some heads ask more of the right classes.
        """
        features_B2E, penalty = self.model.features_and_penalty(batch)
        return self.get_submodule(self.head_name)(features_B2E, batch.missing_type_B, labels), penalty
