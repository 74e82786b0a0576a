"""`make bench`: speed of training, evaluation and loading, compared with a plain version of the published algorithm.

    python -m benchmarks [--only PART …] [--pairs 5] [--threads 2] [--device cpu] [--record benchmarks/RESULTS.md]

Prints Markdown tables. `--record` also replaces the tables between the markers in a file.
"""

import argparse
import itertools
import logging
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import baseline, heads, loop, sensors, shapes, sides, vla
from benchmarks.loading import Loading
from benchmarks.sides import Comparison, Data, Side, compare, header, row
from clip.modules.interfaces import TowerSlots
from common.files import atomic_path
from common.machine import keep_freed_memory, print_anywhere

BATCH, LEARNER_BATCH = 16, 32
BF16 = torch.bfloat16


def steps(device: torch.device, pairs: int) -> Iterator[str]:
    """The required ratios. Each pair of timings uses a different batch, drawn as in training."""
    both = partial(sides.drawn, "both", 0.7, range(77, 78), device=device)
    yield from header("case", "baseline", "ours", "ratio", "lowest to highest", "required")

    def compared(name: str, baseline: Any, ours: Any, batches: Iterable[Any], required: str = "") -> str:
        return row(name, *compare(baseline, ours, batches, pairs).cells(), required)

    theirs, ours, theirs_bf16, ours_bf16 = (
        side(device, dtype) for dtype in (torch.float32, BF16) for side in (sides.baseline, sides.ours)
    )
    for case, batches, required in (
        ("70 % both, 77-token texts", both(size=BATCH), "≥ 2.3"),
        ("70 % both, texts of 15 to 25 tokens", sides.drawn("both", 0.7, range(15, 26), BATCH, device), "≥ 2.3"),
        ("90 % image missing", sides.drawn("image", 0.9, range(77, 78), BATCH, device), "≥ 5"),
    ):
        yield compared(f"training step, float32, {case}", theirs.train, ours.train, batches, required)
    case = "training step, 70 % both, bf16 against the baseline's"
    yield compared(f"{case} float32", theirs.train, ours_bf16.train, both(size=BATCH), "≥ 6")
    yield compared(f"{case} bf16 (autocast)", theirs_bf16.train, ours_bf16.train, both(size=BATCH))
    yield compared("evaluation, float32, 70 % both", theirs.evaluate, ours.evaluate, both(size=BATCH), "≥ 1.8")
    case = "evaluation, 70 % both, bf16 against the baseline's float32"
    yield compared(case, theirs.evaluate, ours_bf16.evaluate, both(size=BATCH))
    theirs.model.train(), ours.model.train()
    for name, dtype in (("float32", torch.float32), ("bf16 on both sides", BF16)):
        case = f"memory learner, forward and backward, batch {LEARNER_BATCH}, {name}"
        theirs_alone = partial(_learn, theirs, dtype, lambda of, data: baseline.memory(of, data.missing_type_B))
        ours_alone = partial(_learn, ours, dtype, lambda of, data: of(data.present(), {}).values())
        yield compared(case, theirs_alone, ours_alone, both(size=LEARNER_BATCH))
    if device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with TemporaryDirectory() as folder:
            films = Loading(Path(folder))
            case = "loading samples, 70 % image missing, one core"
            yield compared(case, lambda _: films.theirs(), lambda _: films.ours(), itertools.repeat(None), "≥ 3")
        torch.set_num_threads(threads)


def _learn(side: Side, dtype: torch.dtype, make: Callable[[Any, Data], Iterable[Any]], data: Data) -> None:
    """Forward and backward pass of the learner alone; all slots get the same gradient."""
    with torch.autocast(data.images.device.type, dtype, enabled=dtype is not torch.float32):
        made = make(side.model.method, data)
    slots = [[*t.replaced_BmD, *t.inserted_BmD] if isinstance(t, TowerSlots) else t for t in made]
    torch.stack([tensor.float().sum() for tower in slots for tensor in tower]).sum().backward()
    side.model.zero_grad()


def robustness(device: torch.device, pairs: int) -> Iterator[str]:
    """The 33 cells of a robustness matrix, missing type × ratio, for a batch of samples."""
    yield from header("33 cells one by one", "from three encodings", "ratio", "lowest to highest", "required")
    every_type = [Data([missing_type] * BATCH, [77] * BATCH, device) for missing_type in (0, 1, 2)]
    theirs, ours = sides.baseline(device), sides.ours(device)

    def encodings(batch: list[Data]) -> None:
        for data in batch:
            ours.evaluate(data)

    # The published algorithm encodes everything, whatever is missing, so each of the 33 cells takes equally long.
    timed = compare(lambda batch: theirs.evaluate(batch[0]), encodings, itertools.repeat(every_type), pairs)
    yield row(*Comparison([33 * took for took in timed.baseline], timed.ours).cells(), "≥ 15")


def training(device: torch.device, pairs: int) -> Iterator[str]:
    """The loop of run.py (loader, Lightning, logging, gradient checks, checkpoints) and a bare step on its batches."""
    yield from header("case", "bare step", "run.py", "share", "lowest to highest", "required")
    case = f"the demo's films and tiny CLIP, batches of {loop.BATCH}, samples/s"
    with TemporaryDirectory() as folder:
        timed = loop.timed(Path(folder), device, pairs)
    bare, ours = (f"{statistics.median(rates):.0f}" for rates in zip(*timed, strict=True))
    shares = sorted(ours / bare for bare, ours in timed)
    share, spread = f"{statistics.median(shares):.2f}", f"{shares[0]:.2f} to {shares[-1]:.2f}"
    yield row(case, bare, ours, share, spread, "≥ 0.90")


def machine(device: torch.device) -> str:
    """The machine and library versions behind the figures."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    cpu = Path("/proc/cpuinfo").read_text("utf-8")
    model = re.search(r"model name\s*: (.*)", cpu)
    bf16 = "with" if "avx512_bf16" in cpu else "without"
    return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads, {bf16} AVX512-BF16, {versions}"


def record(path: Path, device: str, part: str, text: str) -> None:
    """Replaces the text between the markers of a part on `device` in the file `path`."""
    begin, end, found = f"<!-- {part} on {device} -->\n", f"<!-- end of {part} -->", path.read_text("utf-8")
    if not re.search(f"{begin}.*?{end}", found, re.DOTALL):
        raise SystemExit(f"{path}: expected the lines {begin.strip()} and {end}, found no such pair")
    replaced = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", found, count=1, flags=re.DOTALL)
    with atomic_path(path) as temporary:
        temporary.write_text(replaced, "utf-8")


def of_vla(device: torch.device, pairs: int) -> Iterator[str]:
    """Text, audio and vision: compared with a plain version of the published algorithm, at MOSI's sizes, batch 64."""
    yield from header("case", "baseline", "ours", "ratio", "lowest to highest", "required")
    yield from (row(*cells) for cells in vla.rows(pairs))


PARTS: dict[str, Callable[[torch.device, int], Iterator[str]]] = {
    "steps": steps,
    "robustness": robustness,
    "training": training,
    "shapes": lambda device, pairs: shapes.table(),
    "sensors": lambda device, pairs: sensors.table(pairs),
    "heads": lambda device, pairs: heads.table(),
    "vla": of_vla,
}
CAPTIONS = {name: part.__doc__ or "" for name, part in PARTS.items()} | {
    "shapes": "Batch shapes in an epoch of MM-IMDb's 15,552 training samples, and the operations added by rounding.",
    "sensors": "Sensors, CPU time: REP's training step at MOD's sizes against that of `none`, and cached features.",
    "heads": "Heads on cached features, CPU time: run.py's own loop at published sizes, on random features.",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs per comparison")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", type=Path)
    print_anywhere()
    keep_freed_memory()
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    device = torch.device(arguments.device)
    for part in arguments.only or PARTS:
        how = f"`python -m benchmarks {' '.join(sys.argv[1:])}".strip() + f"` on {date.today()}: {machine(device)}"
        lines = [f"{CAPTIONS[part].strip()}\n\n{how}\n"]
        print(f"\n{lines[0]}")
        for line in PARTS[part](device, arguments.pairs):
            print(line, flush=True)
            lines.append(line)
        if arguments.record:
            record(arguments.record, device.type, part, "\n".join(lines))


if __name__ == "__main__":
    main()
