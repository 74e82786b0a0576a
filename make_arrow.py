"""Converts a raw dataset to the arrow files that training reads: see DATA.md for layouts and output.

python make_arrow.py --dataset mmimdb --root RAW --target OUT
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.messages import byte_size, printable
from common.text import align
from engine.ending import DONE, INTERRUPTED, TERMINATED, USER_ERROR, end_with_our_fault
from vilt.datasets.specs import EVERY_DATASET

if TYPE_CHECKING:
    from vilt.utils.arrow_writer import BadSample, SplitSummary, Summary

N_SHOWN = 20
"""How many bad samples the terminal shows."""
CONVERTERS = {spec.make_arrow_name: spec for spec in EVERY_DATASET.values()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with status 2 if they contradict each other."""
    parser = argparse.ArgumentParser(
        description="Convert a raw dataset to arrow files. DATA.md describes the layouts of RAW and the files written."
    )
    parser.add_argument("--dataset", required=True, choices=list(CONVERTERS))
    parser.add_argument("--root", required=True, type=Path, metavar="RAW", help="folder of the raw dataset")
    parser.add_argument("--target", type=Path, metavar="OUT", help="folder for the arrow files (default: RAW)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read and check images; 0: none but this one (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad samples out, listed in OUT/NAME_bad_samples.tsv (default: write nothing if there are any)",
    )
    parser.add_argument(
        "--test-split",
        choices=("test", "test_seen", "test_unseen"),
        help="hateful_memes only: the jsonl file to use for testing (default: test)",
    )
    described = parser.add_mutually_exclusive_group()
    described.add_argument(
        "--spec", type=Path, metavar="FILE", help="custom only: what the tables hold (default: RAW/spec.yaml)"
    )
    described.add_argument(
        "--table", type=Path, metavar="FILE", help="custom only: a table with columns image, text, label and split"
    )
    args = parser.parse_args(argv)
    for name, spec in CONVERTERS.items():
        for option in spec.converter_options:
            if getattr(args, option) is not None and args.dataset != name:
                parser.error(f"--{option.replace('_', '-')} belongs to --dataset {name}, not {args.dataset}")
    if args.workers < 0:
        parser.error(f"--workers: expected 0 or more, found {args.workers}")
    return args


def describe_bad(bad: "list[BadSample]") -> str:
    """The bad samples for the terminal: how many for each reason, and the first of them."""
    counts = Counter(sample.reason for sample in bad)
    lines = [f"  {line}" for line in align([(f"{n:,}", reason) for reason, n in counts.most_common()], "><")]
    lines += ["", *(f"  {line}" for line in align([sample.fields() for sample in bad[:N_SHOWN]], "<<><<<"))]
    if len(bad) > N_SHOWN:
        lines.append(f"  ... and {len(bad) - N_SHOWN:,} more")
    return "\n".join(lines)


def label_table(splits: "Sequence[SplitSummary]", class_names: Sequence[str]) -> list[str]:
    """How many samples of each split have each label; in two blocks side by side where there are many labels."""
    header = ("label", *(s.name for s in splits))
    rows = [
        (printable(name), *(f"{s.label_counts[number]:,}" for s in splits)) for number, name in enumerate(class_names)
    ]
    height = len(rows) if len(rows) <= 30 else -(-len(rows) // 2)
    sides = "<" + ">" * len(splits)
    blocks = [align([header, *rows[at : at + height]], sides) for at in range(0, len(rows), height)]
    width = max(map(len, blocks[0]))
    return ["    ".join(line.ljust(width) for line in lines).rstrip() for lines in zip_longest(*blocks, fillvalue="")]


def describe(summary: "Summary", class_names: Sequence[str], seconds: float) -> str:
    """The summary for the terminal: files, label counts per split, what was left out, time."""
    splits = summary.splits

    def row(name: str, parts: "Sequence[SplitSummary]", remark: str) -> tuple[str, ...]:
        n_samples, n_texts = sum(part.n_samples for part in parts), sum(part.n_texts for part in parts)
        return (name, f"{n_samples:,}", f"{n_texts:,}", byte_size(sum(part.n_bytes for part in parts)), remark)

    files = [row(s.path.name, [s], "replaced" if s.replaced else "") for s in splits]
    lines = align([("file", "samples", "texts", "size", ""), *files, row("total", splits, "")], "<>>><")
    lines += ["", *label_table(splits, class_names), ""]
    remarks = {
        "left out, no text": [s.n_without_text for s in splits],
        "left out, bad": [len(s.bad) for s in splits],
        "kept, but with none of the labels": [s.n_without_label for s in splits],
    }
    for remark, counts in remarks.items():
        if any(counts):
            per_split = ", ".join(f"{s.name} {n:,}" for s, n in zip(splits, counts, strict=True))
            lines.append(f"{remark}: {per_split}")
    if summary.report is not None:
        lines.append(f"the bad samples are listed in {summary.report}")
    lines.append(f"written to {summary.target} in {seconds:,.1f} s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 2 for a user error, 1 for a fault of ours, 130 for Ctrl-C."""
    args = parse_args(argv)
    # Here and not above: worker processes import this file, and do not need pyarrow's 40 MB.
    from vilt.utils.arrow_writer import BadSamplesError, convert

    target: Path = args.target or args.root
    start = time.monotonic()
    try:
        spec = CONVERTERS[args.dataset]
        options = {name: getattr(args, name) for name in spec.converter_options if getattr(args, name) is not None}
        dataset = importlib.import_module(spec.converter).open_raw(args.root, **options)
        summary = convert(dataset, target, args.workers, args.skip_bad)
    except BadSamplesError as error:
        print(f"error: {error}; nothing was written to {target}.\n", file=sys.stderr)
        print(describe_bad(error.bad), file=sys.stderr)
        print("\nCorrect them, or leave them out with --skip-bad, which lists all of them in a file.", file=sys.stderr)
        return USER_ERROR
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted; nothing was written to {target}.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return end_with_our_fault(error, None)
    if summary.bad:
        print(f"{len(summary.bad):,} bad samples were left out:\n\n{describe_bad(summary.bad)}\n", file=sys.stderr)
    print(describe(summary, dataset.class_names, time.monotonic() - start))
    return DONE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # an orderly end, which removes unfinished files
    sys.exit(main())
