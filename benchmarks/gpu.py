"""Benchmarks a GPU in minutes: see `benchmarks/gpu.sh`. Prints each figure on a line as it is measured."""

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import loop, sides
from benchmarks.__main__ import machine
from benchmarks.sides import Data, Side, seconds
from clip.modules.fused import PLAIN, compiled
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from common.machine import print_anywhere
from demo.backbone import TinyClip, make_backbone
from demo.data import write_pretrain, write_task
from engine import cuda_graphs
from engine.cuda_graphs import CapturedGraphs, Forward, GraphedForward, GraphedSteps, Losses, Step, use_ops

SIZES: tuple[int, ...] = (32, 64, 128, 256)
BATCHES, COPIES, EPOCHS = 8, 16, 6
"""Batches of each size; copies of the films; epochs timed after a first one (later ones have few new shapes)."""
PARTS = "steps", "loop", "cells"
COPIES_FOR_CELLS = 29
"""Makes the 902 films that these scripts were written for as many as MM-IMDb has."""
VIT_B16 = TinyClip(224, 16, 768, 12, 512, 12, 512, batch=8)
TARGETS = {("training", 32): 2300, ("training", 256): 4500, ("evaluation", 32): 5000, ("evaluation", 256): 11000}
"""Samples per second on one H100 or H200."""
WAYS = {
    "exact shapes, cuDNN attention": (True, False, False),
    "exact shapes": (False, False, False),
    "few shapes": (False, True, False),
    "captured": (False, True, True),
}
"""Ways to run batches: with cuDNN's attention or not, rounded to few shapes or not, captured and compiled or not."""
Rows = Iterator[tuple[str, str]]


def losses_of(side: Side) -> Step:
    """The losses and logits computed by a training step."""

    def losses(batch: ModelInput, labels: Tensor, _: int) -> Losses:
        logits, own_losses = side.model.training_outputs(batch, labels)
        return sides.TASK.loss(logits.float(), labels) + sum(own_losses.values()), logits, own_losses

    return losses


def captured(side: Side) -> tuple[GraphedSteps, GraphedForward]:
    """Training step and evaluation as used by a training run on a GPU."""
    use_ops(side.model, compiled())
    graphs, trained = CapturedGraphs(), [p for p in side.model.parameters() if p.requires_grad]
    return GraphedSteps(losses_of(side), trained, graphs), GraphedForward(side.model.__call__, graphs)


def train(side: Side, step: Step, data: Data) -> None:
    """Runs a whole training step."""
    side.model.train()
    with side._autocast(data):
        loss, *_ = step(data.present(), data.labels, len(data.labels))
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad()


def evaluate(side: Side, forward: Forward, data: Data) -> Tensor:
    """Computes the logits of a batch."""
    side.model.eval()
    with torch.inference_mode(), side._autocast(data):
        return forward(data.present())


def rate(work: Callable[[Data], object], batches: list[Data], *, again: bool) -> str:
    """Samples per second over batches of different shapes, run back to back without waiting for the GPU.

    Args:
        again: whether all shapes have been seen before; otherwise only the first has.
    """

    def run_all() -> None:
        for data in timed:
            work(data)

    for data in batches[: len(batches) if again else 1]:
        work(data)
    timed = batches[0 if again else 1 :]
    took = seconds(run_all) / len(timed)
    return f"{len(batches[0].labels) / took:,.0f} samples/s, {1000 * took:.1f} ms"


def steps(device: torch.device, sizes: Sequence[int]) -> Rows:
    """The bare step and evaluation on batches drawn by a sampler, with new and with known shapes."""
    on_gpu = device.type == "cuda"
    side = sides.ours(device, torch.bfloat16 if on_gpu else torch.float32)
    for size in sizes:
        use_ops(side.model, PLAIN)
        batches = list(islice(sides.drawn("both", 0.7, range(77, 78), size, device), BATCHES))
        for way, (cudnn, rounds, graphs) in WAYS.items():
            if (cudnn and size not in (sizes[0], sizes[-1])) or (graphs and not on_gpu):
                continue
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            step, forward = captured(side) if graphs else (losses_of(side), side.model.__call__)
            work = partial(train, side, step)
            with nullcontext() if rounds else mock.patch.object(ClipBackbone, "prepare", lambda _, batch: batch):
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                if not graphs:
                    yield f"training, {size}, {way}, new shapes", rate(work, batches, again=False)
                found = rate(work, batches, again=True)
            memory = f", {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB" if on_gpu else ""
            refused = f"; {step.graphs.refused}" if isinstance(step, GraphedSteps) and step.graphs.refused else ""
            yield f"training, {size}, {way}", found + memory + refused
            if rounds:
                yield f"evaluation, {size}, {way}", rate(partial(evaluate, side, forward), batches, again=True)


def same(device: torch.device, size: int) -> Rows:
    """Compares the gradients of a captured and a plain step, in float32, with the same dropout masks."""
    [data] = islice(sides.drawn("both", 0.7, range(77, 78), size, device), 1)
    found = []
    for graphs in (False, True):
        side = sides.ours(device)
        side.model.train()
        torch.manual_seed(0)
        step = captured(side)[0] if graphs else losses_of(side)
        loss, *_ = step(data.present(), data.labels, size)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in side.model.parameters() if p.grad is not None]))
    difference = float((found[0] - found[1]).norm() / found[0].norm())
    yield "gradients of a captured step, relative difference", f"{difference:.1e}"


def run(folder: Path, device: torch.device, size: int, ready: Future[None], **more: Any) -> Rows:
    """The loop of run.py on the films compared with the bare step on its batches; the log says how time was spent."""
    ready.result()
    with mock.patch.object(cuda_graphs, "MIN_BATCHES", 0):
        found = loop.rates(folder, device, EPOCHS, per_gpu_batchsize=size, batch_size=size, **more)
    for epoch, (bare, ours) in enumerate(found, start=2):
        what = f"run.py, {size}, epoch {epoch}{'' if more['cuda_graphs'] else ', cuda_graphs=False'}"
        yield what, f"{ours:,.0f} samples/s, bare step {bare:,.0f}: {ours / bare:.0%} (≥ 90 %)"


def cells(folder: Path, ready: Future[None], *more: str) -> Rows:
    """A whole cell of the published table by the command, then the gain from computing two at once."""
    ready.result()
    places = {"data_root": "arrow", "vit": "backbone", "log_dir": "result", "missing_table_root": "tables"}
    options = ["task_finetune_mmimdb", *(f"{name}={folder / place}" for name, place in places.items())]
    options += ["per_gpu_batchsize=32", "image_cache=True", *more]
    of_sweep = ("sweep_types=[both]", "sweep_ratios=[0.7]", "sweep_parallel=2", "max_epoch=5")

    def took(command: str, *own: str) -> float:
        words = [sys.executable, "run.py", *command.split(), "with", *options, *own]
        return seconds(lambda: subprocess.run(words, check=True, stdout=sys.stderr))

    yield "a whole cell, including the decoding of its images", f"{took('', 'exp_name=cell'):.0f} s (< 300 s)"
    alone, two = (
        took("sweep", f"sweep_name=of_{name}", f"sweep_seeds={seeds}", *of_sweep)
        for name, seeds in (("one", "[0]"), ("two", "[0,1]"))
    )
    found = f"one {alone:.0f} s, two {two:.0f} s: {2 * alone / two:.2f} × as fast"
    yield "5 epochs and the test, sweep_parallel=2", found


def prepared(folder: Path, films: Path | None, copies: int, sizes: TinyClip, workers: int) -> None:
    """Prepares `copies` of the films, or synthetic ones, as arrow files, and a random CLIP with a tokenizer."""
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
    with redirect_stdout(sys.stderr):
        make_backbone(folder / "pretrain", folder / "backbone", 1, 0, sizes)
        loop.convert(folder, workers)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--films", type=Path, help="folder in MM-IMDb's layout; default: synthetic films")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2], help="default: steps loop")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=400, help="time after which no further part is started")
    given = parser.parse_args()
    print_anywhere()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, copies, clip, more = SIZES, COPIES, VIT_B16, dict[str, Any]()
    if "cells" in given.parts:
        copies = COPIES_FOR_CELLS
    if given.small:
        more = {"memory_length": 6, "memory_depth": 2}
        sizes, copies, clip = (4, 8), 1, TinyClip(32, 16, 64, 2, 64, 2, 64)
        arch = ClipArchitecture(32, 16, 64, 2, 1, 64, 2, 1, 77, 49408, 64, "quick_gelu")
        sides.VIT_B16, sides.SPEC = arch, replace(sides.SPEC, architecture=arch, method=MethodOptions("rep", 6, 2))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{machine(device)}\n\n| what | measured |\n|---|---|", flush=True)
    with TemporaryDirectory() as name, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        folder, cores, ends = Path(name), len(os.sched_getaffinity(0)), (sizes[0], sizes[-1])
        ready = beside.submit(prepared, folder, given.films, copies, clip, 0 if given.small else cores - 2)
        on_gpu, parts = device.type == "cuda", list[Rows]()
        if "steps" in given.parts:
            parts += [*([same(device, ends[0])] if on_gpu else []), steps(device, sizes)]
        if "loop" in given.parts:
            parts += [
                run(folder, device, size, ready, num_workers=cores - 1, cuda_graphs=graphs, **more)
                for graphs in ((True, False) if on_gpu else (False,))
                for size in ends
            ]
        if "cells" in given.parts:
            parts.append(cells(folder, ready, *(f"{name}={value}" for name, value in more.items())))
        for part in parts:
            for what, found in part if time.monotonic() - began < given.seconds else [("the rest", "no time left")]:
                print(f"| {what} | {found} |", flush=True)
    if "steps" in given.parts:
        asked = (f"{what} {size}: {most:,}" for (what, size), most in TARGETS.items())
        print(f"\ntargets, samples/s: {', '.join(asked)}")


if __name__ == "__main__":
    main()
