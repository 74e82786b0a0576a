"""The two sides of a comparison: full-size models, batches, and steps.

The sides are timed alternately, so other load on the machine affects both.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import baseline as published
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture, normalise
from engine.checkpoint import ModelSpec, build_classifier
from engine.optimization import OptimizerSettings, make_optimizer
from engine.tasks import TASKS
from vilt.datamodules import EpochSampler
from vilt.missing_tables import MissingPattern, draw_missing_table

VIT_B16 = ClipArchitecture(224, 16, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "quick_gelu")
TASK = TASKS["mmimdb"]
NO_TEXT, NO_IMAGE = 1, 2
"""Missing types."""
SPEC = ModelSpec(TASK.name, MethodOptions("rep", memory_length=36, memory_depth=6), VIT_B16)
START, END = 49406, 49407
SAMPLES = 4096
"""Samples in the synthetic training split that batches are drawn from."""


class Data:
    """A batch of synthetic samples: in full for the baseline, without missing inputs for ours."""

    def __init__(self, types: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        generator, own = (torch.Generator(each).manual_seed(0) for each in ("cpu", device))
        B, shape = len(types), (len(types), 3, VIT_B16.image_size, VIT_B16.image_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=own)
        tokens = torch.zeros(B, VIT_B16.context_length, dtype=torch.long)
        for row, length in enumerate(lengths):
            tokens[row, : length - 1] = torch.randint(1, START, (length - 1,), generator=generator)
            tokens[row, 0], tokens[row, length - 1] = START, END
        self.tokens = tokens.to(device)
        self.missing_type_B = torch.tensor(types, device=device)
        self.present_BM = torch.tensor([[t != NO_IMAGE, t != NO_TEXT] for t in types], device=device)
        image_rows, text_rows = (present_B.nonzero().flatten() for present_B in self.present_BM.unbind(1))
        self.rows = {"image": image_rows, "text": text_rows}
        self.present_images, self.present_tokens = self.images[image_rows], self.tokens[text_rows]
        self.types = tuple(sorted(set(types)))
        lengths_there = [length for length, t in zip(lengths, types, strict=True) if t != NO_TEXT]
        self.lengths = {"text": max(lengths_there)} if lengths_there else {}
        self.labels = (torch.rand(B, TASK.n_classes, generator=generator) < 0.1).float().to(device)

    def everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """The input of the baseline."""
        return normalise(self.images), self.tokens, self.missing_type_B

    def present(self) -> ModelInput:
        """The input of our classifier."""
        inputs = {"image": self.present_images, "text": self.present_tokens}
        return ModelInput(inputs, self.rows, self.present_BM, self.types, self.lengths)


def drawn(missing_type: str, ratio: float, lengths: range, size: int, device: torch.device) -> Iterator[Data]:
    """Yields batches, epoch after epoch, drawn as in training: missing modalities and the longest text vary.

    Args:
        lengths: range of text lengths, in tokens.
        size: samples per batch.
    """
    table = draw_missing_table(TASK.name, "train", MissingPattern(missing_type, ratio, 0.5, 0), SAMPLES)
    tokens = np.random.default_rng(0).choice(lengths, SAMPLES)
    sampler = EpochSampler(SAMPLES, seed=0, rank=0, world_size=1)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        for start in range(0, SAMPLES - size + 1, size):
            batch = order[start : start + size]
            yield Data(table[batch].tolist(), tokens[batch].tolist(), device)


class Side:
    """A classifier with random weights, identical at every call, and its steps; 16 bits run under autocast."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model, self.dtype = build_classifier(SPEC).to(device), dtype
        settings = OptimizerSettings("adamw", 1e-4, 1.0, 2e-2, warmup_steps=0, end_lr=0, decay_power=1)
        self.optimizer = make_optimizer(self.model, TASK.head_name, settings)

    def logits(self, data: Data) -> Tensor:
        """Our logits of a batch."""
        return self.model(data.present())

    def train(self, data: Data) -> None:
        """Runs one training step."""
        self.model.train()
        with self._autocast(data):
            loss = TASK.loss(self.logits(data).float(), data.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, data: Data) -> Tensor:
        """Computes the logits of a batch in evaluation mode."""
        self.model.eval()
        with torch.inference_mode(), self._autocast(data):
            return self.logits(data)

    def _autocast(self, data: Data) -> torch.autocast:
        return torch.autocast(data.images.device.type, self.dtype, enabled=self.dtype is not torch.float32)


class Baseline(Side):
    """The published algorithm with the same weights."""

    def logits(self, data: Data) -> Tensor:
        """The published algorithm's logits of a batch."""
        return published.logits(self.model, *data.everything())


def ours(device: torch.device, dtype: torch.dtype = torch.float32) -> Side:
    """Our classifier, as used in training."""
    side = Side(device, dtype)
    side.model.compute(dtype)
    return side


def baseline(device: torch.device, dtype: torch.dtype = torch.float32) -> Side:
    """The published algorithm."""
    return Baseline(device, dtype)


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def header(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*names), "|" + "---|" * len(names)]


@dataclass(frozen=True)
class Comparison:
    """Seconds taken by each side in each pair."""

    baseline: list[float]
    ours: list[float]

    @property
    def ratios(self) -> list[float]:
        """Baseline time / our time of each pair."""
        return [theirs / ours for theirs, ours in zip(self.baseline, self.ours, strict=True)]

    def cells(self) -> tuple[str, str, str, str]:
        """Both medians, the median ratio, and its lowest and highest."""
        medians = (f"{statistics.median(side):.3f} s" for side in (self.baseline, self.ours))
        ratio, spread = statistics.median(self.ratios), f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return (*medians, f"{ratio:.2f}", spread)  # type: ignore[return-value]


def compare(
    baseline: Callable[[Any], object], ours: Callable[[Any], object], batches: Iterable[Any], pairs: int
) -> Comparison:
    """Runs both on the first batch to warm up, then alternately on each further batch."""
    first, *others = itertools.islice(batches, 1 + pairs)
    seconds(partial(baseline, first))
    seconds(partial(ours, first))
    timed = [(seconds(partial(baseline, batch)), seconds(partial(ours, batch))) for batch in others]
    return Comparison([first for first, _ in timed], [second for _, second in timed])


def seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, including work queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
