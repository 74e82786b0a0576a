"""Counts the batch shapes of an epoch, exact and as rounded on a GPU, and the operations that rounding adds."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.sides import NO_IMAGE, NO_TEXT, SPEC, TASK, VIT_B16, header, row
from clip.modules.interfaces import ModelInput
from vilt.datamodules import EpochSampler
from vilt.missing_tables import MissingPattern, draw_missing_table

FILMS = 15_552
"""Films in MM-IMDb's training split."""
LENGTHS = (18, 23, 26, 29, 33, 35, 38, 41, 44, 48, 53, 59, 66, 75, 77, 77, 77, 77, 77, 77)
"""Lengths in tokens of the plots of 902 films; each value stands for a twentieth of them."""
TITLES = range(15, 26)
"""Lengths of short texts."""


def table() -> Iterator[str]:
    """Yields the lines of the Markdown table."""
    yield from header("batch", "missing", "texts", "batches", "shapes", "on a GPU", "work added", "required")
    for size, most in ((32, 8), (256, 3)):
        for missing_type, ratio, lengths in (
            ("both", 0.7, LENGTHS),
            ("both", 0.9, LENGTHS),
            ("image", 0.7, LENGTHS),
            ("text", 0.9, LENGTHS),
            ("both", 0.7, TITLES),
        ):
            batches = list(epoch(missing_type, ratio, lengths, size))
            few = [batch.rounded() for batch in batches]
            added = sum(map(operations, few)) / sum(map(operations, batches)) - 1
            texts, required = ("plots", f"< {most} %") if lengths is LENGTHS else ("15–25 tokens", "")
            counts = map(str, (len(batches), *(len(set(map(shape, each))) for each in (batches, few))))
            yield row(
                str(size), f"{100 * ratio:.0f} % {missing_type}", texts, *counts, f"{100 * added:.1f} %", required
            )


def epoch(missing_type: str, ratio: float, lengths: tuple[int, ...] | range, size: int) -> Iterator[ModelInput]:
    """The batches of an epoch, with shapes but no content."""
    types = draw_missing_table(TASK.name, "train", MissingPattern(missing_type, ratio, 0.5, 0), FILMS)
    tokens = np.random.default_rng(0).choice(lengths, FILMS)
    sampler = EpochSampler(FILMS, seed=0, rank=0, world_size=1)
    for order in torch.tensor([index for _, index in sampler]).split(size):
        of_batch = torch.from_numpy(types)[order]
        present_BM = torch.stack([of_batch != NO_IMAGE, of_batch != NO_TEXT], dim=1)
        rows = {name: there.nonzero().flatten() for name, there in zip(("image", "text"), present_BM.T, strict=True)}
        inputs = {name: torch.empty(len(rows_b), VIT_B16.context_length) for name, rows_b in rows.items()}
        longest = {"text": int(tokens[order[rows["text"]]].max())} if len(rows["text"]) else {}
        yield ModelInput(inputs, rows, present_BM, tuple(of_batch.unique().tolist()), longest)


def shape(batch: ModelInput) -> tuple[object, ...]:
    """Everything that determines which kernels a step calls."""
    return len(batch.present_BM), *map(len, batch.inputs.values()), *batch.lengths.values(), batch.types


def operations(batch: ModelInput) -> float:
    """Operations per layer in the matrix products of both towers' blocks, padding included."""
    patches = (VIT_B16.image_size // VIT_B16.patch_size) ** 2 + 1
    sizes = {"image": (patches, VIT_B16.vision_width), "text": (batch.lengths.get("text", 0), VIT_B16.text_width)}
    total = 0.0
    for name, (length, width) in sizes.items():
        L = length + SPEC.method.memory_length
        total += len(batch.inputs[name]) * (24 * L * width**2 + 4 * L**2 * width)
    return total
