"""The two sides that are compared: models of full size, batches, and the steps that are timed."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.baseline import PublishedAlgorithm
from clip.checkpoint import ModelSpec, build_classifier
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import COMPLETE, IMAGE_MISSING, TEXT_MISSING, ModelInput
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture
from clip.optimization import OptimizerSettings, make_optimizer
from clip.tasks import TASKS
from vilt.transforms import normalise

VIT_B16 = ClipArchitecture(
    image_size=224,
    patch_size=16,
    vision_width=768,
    vision_layers=12,
    vision_heads=12,
    text_width=512,
    text_layers=12,
    text_heads=8,
    context_length=77,
    vocab_size=49408,
    embed_dim=512,
    activation="quick_gelu",
)
MEMORY_LENGTH, MEMORY_DEPTH = 36, 6
TASK = TASKS["mmimdb"]
SPEC = ModelSpec(TASK.name, MethodOptions("rep", MEMORY_LENGTH, MEMORY_DEPTH), VIT_B16)
START, END = 49406, 49407


class Data:
    """A batch of made-up samples, all of it and without what is missing."""

    def __init__(self, types: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        B, size = len(types), VIT_B16.image_size
        images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, generator=generator)
        tokens = torch.zeros(B, VIT_B16.context_length, dtype=torch.long)
        for row, length in enumerate(lengths):
            tokens[row, : length - 1] = torch.randint(1, START, (length - 1,), generator=generator)
            tokens[row, 0], tokens[row, length - 1] = START, END
        self.types, self.lengths = list(types), list(lengths)
        self.images, self.tokens = images.to(device), tokens.to(device)
        self.missing_type_B = torch.tensor(types, device=device)
        self.present_BM = torch.tensor([[t != IMAGE_MISSING, t != TEXT_MISSING] for t in types], device=device)
        self.image_rows = torch.tensor(
            [row for row, t in enumerate(types) if t != IMAGE_MISSING], dtype=torch.long, device=device
        )
        self.text_rows = torch.tensor(
            [row for row, t in enumerate(types) if t != TEXT_MISSING], dtype=torch.long, device=device
        )
        self.labels = (torch.rand(B, TASK.n_classes, generator=generator) < 0.1).float().to(device)
        self.present_images = self.images[self.image_rows]
        self.present_tokens = self.tokens[self.text_rows]
        present = [length for length, t in zip(lengths, types, strict=True) if t != TEXT_MISSING]
        self.text_length = max(present) if present else None

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the baseline, which the loader gives everything, normalised."""
        return normalise(self.images), self.tokens, self.missing_type_B

    def present(self, **changes: Any) -> ModelInput:
        """For ours: uint8 images come, and are normalised here."""
        batch = ModelInput(
            inputs={"image": normalise(self.present_images), "text": self.present_tokens},
            rows={"image": self.image_rows, "text": self.text_rows},
            present_BM=self.present_BM,
            types=tuple(sorted(set(self.types))),
            lengths={} if self.text_length is None else {"text": self.text_length},
        )
        return batch._replace(**changes)


def mixed(size: int) -> list[int]:
    """Missing types at 70 % both: 30 % complete, 35 % without text, 35 % without image."""
    complete = round(0.3 * size)
    no_text = (size - complete) // 2
    return [COMPLETE] * complete + [TEXT_MISSING] * no_text + [IMAGE_MISSING] * (size - complete - no_text)


def without_image(size: int, share: float) -> list[int]:
    """Missing types where `share` of the samples lack the image."""
    missing = round(share * size)
    return [COMPLETE] * (size - missing) + [IMAGE_MISSING] * missing


class Ours:
    """A classifier of full size with random weights, and its steps."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False
    ) -> None:
        self.classifier = random_classifier().to(device)
        self.classifier.compute(dtype, checkpointing=checkpointing)
        self.device, self.dtype = device, dtype
        self.optimizer = adamw(self.classifier)

    def train(self, data: Data, **changes: Any) -> None:
        """One training step."""
        self.classifier.train()
        with self._precision():
            loss = TASK.loss(self.classifier(data.present(**changes)).float(), data.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, data: Data, **changes: Any) -> Tensor:
        """Logits of a batch, in evaluation."""
        self.classifier.eval() if self.classifier.training else None
        with torch.inference_mode(), self._precision():
            return self.classifier(data.present(**changes))

    def _precision(self) -> Any:
        mixed = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()


class Theirs:
    """The baseline with the same weights, and its steps. In 16 bits it runs under autocast, as published."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.model = PublishedAlgorithm(random_classifier(), VIT_B16, MEMORY_LENGTH, MEMORY_DEPTH).to(device)
        self.device, self.dtype = device, dtype
        self.optimizer = adamw(self.model)

    def train(self, data: Data) -> None:
        """One training step."""
        self.model.train()
        with self._precision():
            loss = TASK.loss(self.model(*data.whole()).float(), data.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, data: Data) -> Tensor:
        """Logits of a batch, in evaluation."""
        self.model.eval()
        with torch.inference_mode(), self._precision():
            return self.model(*data.whole())

    def _precision(self) -> Any:
        mixed = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()


def random_classifier() -> MissingModalityClassifier:
    """The same at every call, frozen as MM-IMDb asks."""
    torch.manual_seed(0)
    return build_classifier(SPEC)


def adamw(model: torch.nn.Module) -> Optimizer:
    """AdamW as the training has it."""
    settings = OptimizerSettings("adamw", 1e-4, 1.0, 2e-2, warmup_steps=0, end_lr=0, decay_power=1)
    return make_optimizer(model, TASK.head_name, settings)
