"""Converts a raw dataset to the arrow files that training reads: see DATA.md for layouts and output.

python make_arrow.py --dataset mmimdb --root RAW --target OUT
"""

import argparse
import importlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.machine import check_system, cores, print_anywhere
from common.messages import byte_size, printable
from common.text import terminal_table
from engine.ending import DONE, INTERRUPTED, TERMINATED, USER_ERROR, end_with_our_fault
from vilt.datasets.specs import EVERY_DATASET
from vilt.utils.arrow_writer import BAD_SAMPLES, BadSample, BadSamplesError, SplitSummary, convert
from vilt.utils.recordings import WAYS

N_SHOWN = 20
"""How many bad samples the terminal shows."""
DEFAULT_ROOT = Path("datasets")
"""Where arrow files go that no --target is given for, in a folder of their dataset's name."""
SIGNS = ("negative", "zero", "positive")
"""What labels that are numbers are counted by."""
CONVERTERS = {spec.make_arrow_name: spec for spec in EVERY_DATASET.values()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with status 2 if they contradict each other."""
    parser = argparse.ArgumentParser(
        description="Convert a raw dataset to arrow files. DATA.md describes the layouts of RAW and the files written."
    )
    parser.add_argument("--dataset", required=True, choices=list(CONVERTERS))
    parser.add_argument("--root", required=True, type=Path, metavar="RAW", help="folder of the raw dataset")
    parser.add_argument(
        "--target", type=Path, metavar="OUT", help="folder for the arrow files (default: datasets/NAME, in this folder)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, cores()),
        metavar="N",
        help="threads that read and check images (default: %(default)s)",
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
        "--spec", type=Path, metavar="FILE", help="custom, sensors: what the data holds (default: RAW/spec.yaml)"
    )
    described.add_argument(
        "--table", type=Path, metavar="FILE", help="custom only: a table with columns image, text, label and split"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        default=None,
        help="keep samples without image or text, whose cell is then empty (custom: also where the file is not there)",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        help="custom only: draws the splits where the table has none (default: 0)",
    )
    parser.add_argument(
        "--follow-links", action="store_true", default=None, help="custom only: images may be links that leave RAW"
    )
    parser.add_argument("--split", choices=WAYS, help="recordings: how they are divided (default: see DATA.md)")
    args = parser.parse_args(argv)
    for option in dict.fromkeys(option for spec in CONVERTERS.values() for option in spec.converter_options):
        takers = [name for name, spec in CONVERTERS.items() if option in spec.converter_options]
        if getattr(args, option) is not None and args.dataset not in takers:
            where = " or ".join(takers)
            parser.error(f"--{option.replace('_', '-')} belongs to --dataset {where}, not {args.dataset}")
    if args.workers < 0:
        parser.error(f"--workers: expected 0 or more, found {args.workers}")
    return args


def describe_bad(bad: Sequence[BadSample]) -> str:
    """The bad samples for the terminal: how many for each reason, and the first of them."""
    counts = Counter(sample.reason for sample in bad).most_common()
    more = f"\n... and {len(bad) - N_SHOWN:,} more" if len(bad) > N_SHOWN else ""
    return "\n\n".join(
        [
            terminal_table(("samples", "reason"), [(f"{n:,}", reason) for reason, n in counts], "><"),
            terminal_table(BadSample._fields, [sample.cells() for sample in bad[:N_SHOWN]], "<<><<<") + more,
        ]
    )


def describe(splits: Sequence[SplitSummary], class_names: Sequence[str]) -> str:
    """The files for the terminal: their sizes, label counts per split, what was left out."""

    def row(name: str, parts: Sequence[SplitSummary], remark: str) -> tuple[str, ...]:
        n_samples, n_texts = sum(part.n_samples for part in parts), sum(part.n_texts for part in parts)
        return (name, f"{n_samples:,}", f"{n_texts:,}", byte_size(sum(part.n_bytes for part in parts)), remark)

    files = [row(s.path.name, [s], "replaced" if s.replaced else "") for s in splits]
    counts = [[printable(name), *(f"{s.label_counts[n]:,}" for s in splits)] for n, name in enumerate(class_names)]
    lines = [
        terminal_table(("file", "samples", "texts", "size", ""), [*files, None, row("total", splits, "")], "<>>><"),
        "",
        terminal_table(["label", *(s.name for s in splits)], counts, "<" + ">" * len(splits)),
        "",
    ]
    remarks = {
        "left out, no text": [s.n_without_text for s in splits],
        "left out, bad": [len(s.bad) for s in splits],
        **{
            f"kept, {name} missing": [s.n_missing[name] for s in splits]
            for name in sorted({name for s in splits for name in s.n_missing})
        },
        "kept, but with none of the labels": [s.n_without_label for s in splits],
    }
    for remark in dict.fromkeys(remark for split in splits for remark in split.remarks):
        remarks[remark] = [split.remarks[remark] for split in splits]
    for remark, numbers in remarks.items():
        if any(numbers):
            per_split = ", ".join(f"{s.name} {n:,}" for s, n in zip(splits, numbers, strict=True))
            lines.append(f"{remark}: {per_split}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 2 for a user error, 1 for a fault of ours, 130 for Ctrl-C."""
    print_anywhere()
    args = parse_args(argv)
    target: Path | None = args.target
    start = time.monotonic()
    try:
        check_system()
        spec = CONVERTERS[args.dataset]
        options = {name: getattr(args, name) for name in spec.converter_options if getattr(args, name) is not None}
        dataset = importlib.import_module(spec.converter).open_raw(args.root, **spec.converter_arguments, **options)
        target = target or DEFAULT_ROOT / (dataset.spec.custom.name if dataset.spec.custom else spec.name)
        splits = convert(dataset, target, args.workers, args.skip_bad)
    except BadSamplesError as error:
        print(f"error: {error}; nothing was written to {target}.\n\n{describe_bad(error.bad)}\n", file=sys.stderr)
        print("Correct them, or leave them out with --skip-bad, which lists all of them in a file.", file=sys.stderr)
        return USER_ERROR
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return end_with_our_fault(error, None)
    assert target is not None
    if bad := [sample for split in splits for sample in split.bad]:
        report = target / f"{spec.name}{BAD_SAMPLES}"
        print(f"{len(bad):,} bad samples were left out, and are listed in {report}:\n", file=sys.stderr)
        print(f"{describe_bad(bad)}\n", file=sys.stderr)
    print(describe(splits, SIGNS if spec.label_range is not None else dataset.class_names))
    if dataset.note:
        print(dataset.note)
    print(f"written to {target} in {time.monotonic() - start:,.1f} s")
    return DONE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # an orderly end, which removes unfinished files
    sys.exit(main())
