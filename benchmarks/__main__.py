"""`make bench`: how fast training, evaluation, loading and the learner are, beside the published algorithm.

    python -m benchmarks [--only PART …] [--pairs 5] [--threads 2] [--device cpu] [--record benchmarks/RESULTS.md]

Prints Markdown tables. `--record` puts them in place of those between the markers of a file, with `--only` each in
place of the table with its caption.
"""

import argparse
import logging
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.loading import made_up_films
from benchmarks.matrix import CELLS, SAMPLED_BATCHES, SAMPLED_CELLS, made_up_matrix
from benchmarks.operations import counted_operations, needed_operations
from benchmarks.sides import (
    MEMORY_DEPTH,
    MEMORY_LENGTH,
    SPEC,
    VIT_B16,
    Data,
    Ours,
    Theirs,
    mixed,
    random_classifier,
    without_image,
)
from benchmarks.timing import Comparison, compare, seconds
from benchmarks.undone import whole_last_block
from common.files import atomic_path
from vilt.missing_tables import IMAGE_MISSING

BATCH = 16
LEARNER_BATCH = 32
MATRIX_FILMS = 32
BEGIN, END = "<!-- measured on {} -->", "<!-- end of {} -->"
CAPTION = r"\n\n([^|`\n].*)\n\n"
"""A paragraph of a section that is neither a table nor a heading, which begins with a command."""


class Bench:
    """The parts of the benchmark on one device."""

    def __init__(self, device: torch.device, pairs: int) -> None:
        self.device = device
        self.pairs = pairs

    def steps(self) -> Iterable[str]:
        """The table of required ratios."""
        short = [15 + row % 11 for row in range(BATCH)]
        long = [VIT_B16.context_length] * BATCH
        both, no_image = Data(mixed(BATCH), long, self.device), Data(without_image(BATCH, 0.9), long, self.device)
        both_short = Data(mixed(BATCH), short, self.device)
        yield from _header("case", "baseline", "ours", "ratio", "lowest to highest", "required")
        theirs, ours = Theirs(self.device), Ours(self.device)
        for name, data, required in (
            ("training step, float32, 70 % both, 77-token texts", both, 2.3),
            ("training step, float32, 70 % both, texts of 15 to 25 tokens", both_short, 2.3),
            ("training step, float32, 90 % image missing", no_image, 5),
        ):
            yield self._row(name, partial(theirs.train, data), partial(ours.train, data), required)
        halved = Ours(self.device, torch.bfloat16)
        yield self._row(
            "training step, 70 % both, bf16 against the baseline's float32",
            partial(theirs.train, both),
            partial(halved.train, both),
            6,
        )
        theirs_halved = Theirs(self.device, torch.bfloat16)
        yield self._row(
            "training step, 70 % both, bf16 against the baseline's bf16 (autocast)",
            partial(theirs_halved.train, both),
            partial(halved.train, both),
            None,
        )
        yield self._row(
            "evaluation, float32, 70 % both", partial(theirs.evaluate, both), partial(ours.evaluate, both), 1.8
        )
        yield self._row(
            "evaluation, 70 % both, bf16 against the baseline's float32",
            partial(theirs.evaluate, both),
            partial(halved.evaluate, both),
            None,
        )
        plain, fast = theirs.model.model.memory_learner.train(), ours.classifier.method.train()
        learning = Data(mixed(LEARNER_BATCH), [VIT_B16.context_length] * LEARNER_BATCH, self.device)
        no_tokens: dict[str, torch.Tensor] = {}
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16 on both sides")):
            yield self._row(
                f"memory learner, forward and backward, batch {LEARNER_BATCH}, {name}",
                partial(_learn, plain, dtype, learning.missing_type_B),
                partial(_learn, fast, dtype, learning.present(), no_tokens),
                None,
            )
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            with made_up_films() as films:
                yield self._row("loading samples, 70 % image missing, one core", films.theirs, films.ours, 3)
            torch.set_num_threads(threads)

    def rates(self) -> Iterable[str]:
        """Achieved rates beside that of a plain matrix product."""
        data = Data(mixed(BATCH), [VIT_B16.context_length] * BATCH, self.device)
        samples = list(zip(data.types, data.lengths, strict=True))
        yield from _header("step", "needed Gflop", "seconds", "Gflop/s", "plain product Gflop/s", "share", "required")
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
            ours = Ours(self.device, dtype)
            for training, required in ((False, "80 %"), (True, "70 %")):
                needed = needed_operations(VIT_B16, MEMORY_LENGTH, MEMORY_DEPTH, samples, training)
                step = partial(ours.train if training else ours.evaluate, data)
                product, flop = self._product(dtype)
                timed = compare(product, step, self.device, 2 * self.pairs)
                plain, took = flop / statistics.median(timed.baseline), statistics.median(timed.ours)
                yield _line(
                    f"{'training' if training else 'evaluation'}, {name}",
                    f"{needed / 1e9:.0f}",
                    f"{took:.3f}",
                    f"{needed / took / 1e9:.0f}",
                    f"{plain / 1e9:.0f}",
                    f"{needed / took / plain:.0%}",
                    required if dtype is torch.float32 else "",
                )

    def pieces(self) -> Iterable[str]:
        """What each piece of work that is left out would cost: operations and time with it put back, over without."""
        long, short = [VIT_B16.context_length] * BATCH, [15 + row % 11 for row in range(BATCH)]
        both, both_short = Data(mixed(BATCH), long, self.device), Data(mixed(BATCH), short, self.device)
        complete = Data([0] * BATCH, long, self.device)
        ours = Ours(self.device)
        yield from _header("left out", "measured on", "expected", "measured", "lowest to highest")

        def row(name: str, step: str, data: Data, more: Callable[[], object], less: Callable[[], object]) -> str:
            expected = counted_operations(more) / counted_operations(less)
            timed = compare(more, less, self.device, self.pairs)
            return _line(name, step, f"{expected:.3f}", f"{timed.ratio:.3f}", "{:.2f} to {:.2f}".format(*timed.spread))

        def train(data: Data) -> Callable[[], object]:
            return partial(ours.train, data)

        def evaluate(data: Data) -> Callable[[], object]:
            return partial(ours.evaluate, data)

        yield row("towers of missing modalities", "training", both, train(complete), train(both))
        yield row("towers of missing modalities", "evaluation", both, evaluate(complete), evaluate(both))
        yield row(
            "text after the last `<end>`",
            "training, texts of 15 to 25 tokens",
            both_short,
            lambda: ours.train(both_short, lengths={}),
            train(both_short),
        )
        lengths = [10 + (row * 29) % 68 for row in range(2 * BATCH)]
        halves = [[*lengths[0::2]], [*lengths[1::2]]]
        by_length = [sorted(lengths)[:BATCH], sorted(lengths)[BATCH:]]
        unsorted_batches, sorted_batches = (
            [Data([IMAGE_MISSING] * BATCH, half, self.device) for half in batches] for batches in (halves, by_length)
        )
        yield row(
            "padding, by sorting evaluation batches",
            "evaluation, texts alone, 10 to 77 tokens",
            both,
            lambda: [ours.evaluate(data) for data in unsorted_batches],
            lambda: [ours.evaluate(data) for data in sorted_batches],
        )
        films = torch.arange(BATCH) // 2 * 2
        yield row(
            "an image that two texts share, once",
            "evaluation, two plots a film",
            complete,
            evaluate(complete),
            lambda: ours.evaluate(
                complete,
                inputs={**complete.present().inputs, "image": complete.present().inputs["image"][::2]},
                rows={**complete.present().rows, "image": complete.image_rows[::2]},
                source_of_B={"image": films.to(self.device)},
            ),
        )

        def train_whole_last_block() -> None:
            with whole_last_block():
                ours.train(both)

        yield row("read-out alone in the last block", "training", both, train_whole_last_block, train(both))

    def robustness(self) -> Iterable[str]:
        """A robustness matrix: its 33 cells, missing type × ratio, of one table seed. Expected: by operations."""
        yield from _header("work", "seconds", "beside", "seconds", "expected", "ratio", "lowest to highest", "required")
        classifier = random_classifier().to(self.device)
        with made_up_matrix(classifier, SPEC, self.device, MATRIX_FILMS, BATCH) as matrix:
            encodings, evaluation = counted_operations(matrix.encodings), counted_operations(matrix.evaluation)
            one_by_one = counted_operations(matrix.sampled_cells) / matrix.share_sampled
            sampled = compare(matrix.sampled_cells, matrix.whole, self.device, self.pairs)
            timed = Comparison([took / matrix.share_sampled for took in sampled.baseline], sampled.ours)
            yield self._beside(
                f"{len(CELLS)} cells one by one, {MATRIX_FILMS} samples, float32: {SAMPLED_BATCHES} batches at each of "
                f"{len(SAMPLED_CELLS)} cells, times {1 / matrix.share_sampled:g}",
                "ours, three encodings and the cells from them",
                one_by_one / encodings,
                timed,
                "≥ 15",
            )
            passes = compare(matrix.encodings, matrix.evaluation, self.device, 2 * self.pairs)
            other = "ours, one evaluation of the complete split"
            yield self._beside("three encodings", other, encodings / evaluation, passes, "≤ 2.2")

    def memory(self) -> Iterable[str]:
        """Peak memory of a training step."""
        yield from _header("training step, batch 16, 70 % both", "at rest, MiB", "peak, MiB", "step alone, MiB")
        sides = (("baseline, float32", "theirs"), ("ours, float32", "ours"), ("ours, bf16", "ours bf16"))
        for name, arguments in sides:
            command = [sys.executable, "-m", "benchmarks.memory", *arguments.split()]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            at_rest, peak = map(float, out.split())
            yield _line(name, f"{at_rest:,.0f}", f"{peak:,.0f}", f"{peak - at_rest:,.0f}")

    def options(self) -> Iterable[str]:
        """What the option activation_checkpointing does to a training step."""
        data = Data(mixed(BATCH), [VIT_B16.context_length] * BATCH, self.device)
        yield from _header("type", "step without / with it", "lowest to highest")
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
            plain, other = Ours(self.device, dtype), Ours(self.device, dtype, checkpointing=True)
            timed = compare(partial(plain.train, data), partial(other.train, data), self.device, self.pairs)
            low, high = timed.spread
            yield _line(name, f"{timed.ratio:.2f}", f"{low:.2f} to {high:.2f}")

    def throughput(self) -> Iterable[str]:
        """Images per second of both sides, at two batch sizes: for GPUs."""
        yield from _header("batch", "step", "baseline, samples/s", "ours, samples/s", "ours, share of the bf16 rate")
        product, flop = self._product(torch.bfloat16)
        for batch in (32, 256):
            data = Data(mixed(batch), [VIT_B16.context_length] * batch, self.device)
            samples = list(zip(data.types, data.lengths, strict=True))
            theirs, ours = Theirs(self.device, torch.bfloat16), Ours(self.device, torch.bfloat16)
            for training in (True, False):
                needed = needed_operations(VIT_B16, MEMORY_LENGTH, MEMORY_DEPTH, samples, training)
                works = [partial(side.train if training else side.evaluate, data) for side in (theirs, ours)]
                timed = compare(works[0], works[1], self.device, self.pairs)
                plain = flop / min(seconds(product, self.device) for _ in range(self.pairs))
                took = statistics.median(timed.ours)
                yield _line(
                    str(batch),
                    "training" if training else "evaluation",
                    f"{batch / statistics.median(timed.baseline):,.0f}",
                    f"{batch / took:,.0f}",
                    f"{needed / took / plain:.0%}",
                )

    def _row(self, name: str, theirs: Callable[[], object], ours: Callable[[], object], required: float | None) -> str:
        timed: Comparison = compare(theirs, ours, self.device, self.pairs)
        times = (f"{statistics.median(side):.3f} s" for side in (timed.baseline, timed.ours))
        spread = "{:.2f} to {:.2f}".format(*timed.spread)
        return _line(name, *times, f"{timed.ratio:.2f}", spread, "" if required is None else f"≥ {required}")

    def _beside(self, name: str, other: str, expected: float, timed: Comparison, required: str) -> str:
        one, two = (f"{statistics.median(side):.1f} s" for side in (timed.baseline, timed.ours))
        spread = "{:.2f} to {:.2f}".format(*timed.spread)
        return _line(name, one, other, two, f"{expected:.2f}", f"{timed.ratio:.2f}", spread, required)

    def _product(self, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        """The towers' commonest product, tokens by MLP weights, alone; and its operations."""
        tokens, D = BATCH * 233, VIT_B16.vision_width
        x, weight = (torch.randn(rows, D, dtype=dtype, device=self.device) for rows in (tokens, 4 * D))
        times = 20 if dtype is torch.bfloat16 else 4

        def work() -> None:
            for _ in range(times):
                F.linear(x, weight)

        return work, times * 2 * tokens * D * 4 * D


def _learn(learner: torch.nn.Module, dtype: torch.dtype, *arguments: Any) -> None:
    """Forward and backward of either learner, with gradients that do not depend on the size of the slots."""
    device = next(learner.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        made = learner(*arguments)
    if isinstance(made, dict):
        slots = [slots for of_tower in made.values() for slots in (*of_tower.replaced_BmD, *of_tower.inserted_BmD)]
    else:
        slots = [slots for of_tower in made for slots in of_tower]
    torch.stack([tensor.float().sum() for tensor in slots]).sum().backward()
    learner.zero_grad()


def _header(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"
    model = "CPU"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    features = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return (
        f"{model}, {torch.get_num_threads()} threads, {features} AVX512-BF16{amx}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def record(path: Path, device: str, heading: str, tables: dict[str, str], whole: bool) -> None:
    """Puts `tables`, by their captions, between the markers of `device` in `path`.

    Args:
        heading: how and on what they were measured.
        whole: whether they replace all that is there; else each replaces the table with its caption, or comes last,
            with a heading of its own.
    """
    begin, end = BEGIN.format(device), END.format(device)
    text = path.read_text("utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{path}: expected the lines {begin} and {end}")
    before, _, rest = text.partition(begin)
    there, _, after = rest.partition(end)
    top, *blocks = re.split(CAPTION, f"\n\n{there.strip()}")
    kept = {} if whole else dict(zip(blocks[::2], blocks[1::2], strict=True))
    own_heading = "" if whole else f"{heading}\n\n"
    kept |= {caption: f"{own_heading}{table}" for caption, table in tables.items()}
    parts = [heading if whole else top.strip(), *(f"{caption}\n\n{block.strip()}" for caption, block in kept.items())]
    section = "\n\n".join(parts).strip()
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{section}\n{end}{after}", "utf-8")


def main() -> None:
    """The command line."""
    parts = ("steps", "rates", "pieces", "robustness", "memory", "options", "throughput")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=parts, help="default: all but throughput, which is for GPUs")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs per comparison")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    device = torch.device(arguments.device)
    bench = Bench(device, arguments.pairs)
    default = parts[:-1] if device.type == "cpu" else [part for part in parts if part != "memory"]
    command = f"python -m benchmarks {' '.join(sys.argv[1:])}".strip()
    heading = f"`{command}` on {date.today()}: {machine(device)}"
    print(heading)
    tables = {}
    for part in arguments.only or default:
        work: Callable[[], Iterable[str]] = getattr(bench, part)
        caption = (work.__doc__ or "").strip()
        print(f"\n{caption}\n")
        lines = []
        for line in work():
            print(line, flush=True)
            lines.append(line)
        tables[caption] = "\n".join(lines)
    if arguments.record:
        record(arguments.record, device.type, heading, tables, whole=not arguments.only)


if __name__ == "__main__":
    main()
