"""What a GPU does, in minutes: `bash benchmarks/gpu.sh`, which see. One line a figure, as it is measured."""

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from benchmarks import loop, sides
from benchmarks.__main__ import machine
from benchmarks.sides import Data, Side, seconds
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from common.machine import print_anywhere
from demo.backbone import TinyClip, make_backbone
from demo.data import write_pretrain, write_task
from engine.cuda_graphs import GraphedSteps, Losses, Step

SIZES: tuple[int, ...] = (32, 64, 128, 256)
BATCHES, COPIES = 8, 16
VIT_B16 = TinyClip(224, 16, 768, 12, 512, 12, 512, batch=8)
TARGETS = {("training", 32): 2300, ("training", 256): 4500, ("evaluation", 32): 5000, ("evaluation", 256): 11000}
"""Samples per second on one H100 or H200."""
WAYS = {
    "as they are, cuDNN attention": (True, False, False),
    "as they are": (False, False, False),
    "few shapes": (False, True, False),
    "few shapes, graphs": (False, True, True),
}
"""Of batches: with cuDNN's attention, rounded, recorded."""
Rows = Iterator[tuple[str, str]]


def step_of(side: Side, *, graphs: bool) -> Step:
    """What a training step computes, recorded or not."""

    def losses(batch: ModelInput, labels: torch.Tensor, _: int) -> Losses:
        logits, own_losses = side.model.training_outputs(batch, labels)
        return sides.TASK.loss(logits.float(), labels) + sum(own_losses.values()), logits, own_losses

    return GraphedSteps(losses, [p for p in side.model.parameters() if p.requires_grad]) if graphs else losses


def train(side: Side, step: Step, data: Data) -> None:
    """A whole training step."""
    side.model.train()
    with side._autocast(data):
        loss, *_ = step(data.present(), data.labels, len(data.labels))
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad()


def rate(work: Callable[[Data], object], batches: list[Data], *, again: bool) -> str:
    """Samples per second over batches of different shapes, seen before or, but for the first one, not."""
    for data in batches[: len(batches) if again else 1]:
        work(data)
    took = [seconds(partial(work, data)) for data in batches[0 if again else 1 :]]
    mean, median = statistics.mean(took), statistics.median(took)
    return f"{len(batches[0].labels) / mean:,.0f} samples/s, {1000 * median:.1f} ms in the median"


def steps(device: torch.device, sizes: Sequence[int]) -> Rows:
    """The bare step and evaluation on batches as a sampler draws them, shapes seen for the first time or again."""
    on_gpu = device.type == "cuda"
    side = sides.ours(device, torch.bfloat16 if on_gpu else torch.float32)
    for size in sizes:
        batches = list(islice(sides.drawn("both", 0.7, range(77, 78), size, device), BATCHES))
        for way, (cudnn, rounds, graphs) in WAYS.items():
            if (cudnn and size not in (sizes[0], sizes[-1])) or (graphs and not on_gpu):
                continue
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            step = step_of(side, graphs=graphs)
            work = partial(train, side, step)
            with nullcontext() if rounds else mock.patch.object(ClipBackbone, "prepare", lambda _, batch: batch):
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                if not graphs:
                    yield f"training, {size}, {way}, for the first time", rate(work, batches, again=False)
                found = rate(work, batches, again=True)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
            refused = f"; {step.refused}" if isinstance(step, GraphedSteps) and step.refused else ""
            yield f"training, {size}, {way}", found + memory + refused
        if size in (sizes[0], sizes[-1]):
            yield f"evaluation, {size}", rate(side.evaluate, batches, again=True)


def same(device: torch.device, size: int) -> Rows:
    """Gradients of a recorded step beside those of one that is not, in float32, with the same dropout masks."""
    [data] = islice(sides.drawn("both", 0.7, range(77, 78), size, device), 1)
    found = []
    for graphs in (False, True):
        side = sides.ours(device)
        side.model.train()
        torch.manual_seed(0)
        loss, *_ = step_of(side, graphs=graphs)(data.present(), data.labels, size)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in side.model.parameters() if p.grad is not None]))
    plain, recorded = found
    yield "gradients of a recorded step, relative difference", f"{float((plain - recorded).norm() / plain.norm()):.1e}"


def run(folder: Path, device: torch.device, size: int, **more: Any) -> Rows:
    """The loop of run.py on the films, beside the bare step on its batches. Its log says where the time went."""
    for bare, ours in loop.rates(folder, device, 1, per_gpu_batchsize=size, batch_size=size, **more):
        what = f"run.py, {size}{', graphs' if more['cuda_graphs'] else ''}"
        yield what, f"{ours:,.0f} samples/s, bare step {bare:,.0f}: {ours / bare:.0%} (≥ 90 %)"


def prepared(folder: Path, films: Path | None, copies: int, sizes: TinyClip, workers: int) -> None:
    """Films, so many times over, or made-up ones, as arrow files; a random CLIP with a tokenizer."""
    raw = folder / "raw"
    if films is None:
        write_task(raw, 24 * copies, 0)
    else:
        for part in ("images", "labels"):
            (raw / part).mkdir(parents=True)
        split = json.loads((films / "split.json").read_text("utf-8"))
        for path in [*(films / "images").iterdir(), *(films / "labels").iterdir()]:
            for copy in range(copies):
                (raw / path.parent.name / f"{path.stem}{copy:02}{path.suffix}").symlink_to(path.resolve())
        copied = {name: [f"{film}{copy:02}" for copy in range(copies) for film in ids] for name, ids in split.items()}
        (raw / "split.json").write_text(json.dumps(copied), "utf-8")
    write_pretrain(folder / "pretrain", 16, 0)
    make_backbone(folder / "pretrain", folder / "backbone", 1, 0, sizes)
    loop.convert(folder, workers)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--films", type=Path, help="folder in MM-IMDb's layout; default: made-up films")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=400, help="after which nothing more is begun")
    given = parser.parse_args()
    print_anywhere()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, copies, clip, more = SIZES, COPIES, VIT_B16, dict[str, Any]()
    if given.small:
        more = {"memory_length": 6, "memory_depth": 2}
        sizes, copies, clip = (4, 8), 1, TinyClip(32, 16, 64, 2, 64, 2, 64)
        arch = ClipArchitecture(32, 16, 64, 2, 1, 64, 2, 1, 77, 49408, 64, "quick_gelu")
        sides.VIT_B16, sides.SPEC = arch, replace(sides.SPEC, architecture=arch, method=MethodOptions("rep", 6, 2))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{machine(device)}\n\n| what | measured |\n|---|---|", flush=True)
    with TemporaryDirectory() as name:
        folder, cores = Path(name), len(os.sched_getaffinity(0))
        prepared(folder, given.films, copies, clip, 0 if given.small else cores)
        ends = (sizes[0], sizes[-1])
        runs = [
            run(folder, device, size, num_workers=cores - 1, cuda_graphs=graphs, **more)
            for graphs in ((False, True) if device.type == "cuda" else (False,))
            for size in ends
        ]
        bare = [*([same(device, ends[0])] if device.type == "cuda" else []), steps(device, sizes)]
        for part in [*bare[:-1], *runs[:2], bare[-1], *runs[2:]]:
            for what, found in part if time.monotonic() - began < given.seconds else [("the rest", "no time left")]:
                print(f"| {what} | {found} |", flush=True)
    print("\ntargets, samples/s: " + ", ".join(f"{what} {size}: {most:,}" for (what, size), most in TARGETS.items()))


if __name__ == "__main__":
    main()
