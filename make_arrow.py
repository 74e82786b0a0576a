"""Converts a raw dataset to the arrow files that training reads; DATA.md describes layouts and output.

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

import pyarrow.compute as pc
from rich import filesize

from common.arrow_file import open_table
from common.errors import UserError
from common.machine import check_system, cores, print_anywhere
from common.messages import printable
from common.text import counted, terminal_table
from engine.ending import DONE, INTERRUPTED, TERMINATED, USER_ERROR, end_with_our_fault
from vilt.datasets.specs import CLIP, EVERY_DATASET
from vilt.utils.arrow_writer import BAD_SAMPLES, BadSample, BadSamplesError, SplitSummary, convert
from vilt.utils.recordings import SPLIT_METHODS

N_SHOWN = 20
"""Number of bad samples shown on the terminal."""
DEFAULT_ROOT = Path("datasets")
"""Without --target, the arrow files go into a subfolder of this, named after the dataset."""
SIGNS = ("negative", "zero", "positive")
"""Names of the signs by which numeric labels are counted."""
LONG_TEXTS = "texts certainly longer than 77 tokens (text_windows reads them whole)"
CONVERTERS = {spec.make_arrow_name: spec for spec in EVERY_DATASET.values()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options. Exits with status 2 if they are wrong or contradict each other."""
    parser = argparse.ArgumentParser(
        description="Convert a raw dataset to arrow files. DATA.md describes the layouts of RAW and the files written."
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=list(CONVERTERS))
    add("--root", required=True, type=Path, metavar="RAW", help="folder of the raw dataset")
    add("--target", type=Path, metavar="OUT", help="folder of the arrow files (default: datasets/NAME, in this folder)")
    workers = min(8, cores())
    add("--workers", type=int, default=workers, metavar="N", help="threads that read images (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave bad samples out, listed in OUT/NAME_bad_samples.tsv")
    kept = "keep samples without image or text (see DATA.md)"
    add("--allow-missing", action="store_true", default=None, help=kept)
    splits = ("test", "test_seen", "test_unseen")
    add("--test-split", choices=splits, help="hateful_memes: the jsonl file to use for testing (default: test)")
    described = parser.add_mutually_exclusive_group()
    spec, table = "custom, sensors: describes the data (default: RAW/spec.yaml)", "custom, vla: table instead of a spec"
    described.add_argument("--spec", type=Path, metavar="FILE", help=spec)
    described.add_argument("--table", type=Path, metavar="FILE", help=table)
    add("--split-seed", type=int, metavar="N", help="custom: seed of the splits if the table has none (default: 0)")
    links = "custom: images may be links that lead out of RAW"
    add("--follow-links", action="store_true", default=None, help=links)
    add("--split", choices=SPLIT_METHODS, help="sensor datasets: how recordings are split (default: see DATA.md)")
    args = parser.parse_args(argv)
    for option, value in vars(args).items():
        takers = [name for name, spec in CONVERTERS.items() if option in spec.converter_options]
        if takers and value is not None and args.dataset not in takers:
            name = f"--{option.replace('_', '-')}"
            parser.error(f"{name} belongs to --dataset {' or '.join(takers)}, not {args.dataset}")
    if args.skip_bad and CONVERTERS[args.dataset].family != CLIP:
        parser.error(f"--skip-bad: only for datasets with images; {args.dataset} is converted completely or not at all")
    if args.workers < 0:
        parser.error(f"--workers: expected 0 or more, found {args.workers}")
    return args


def describe_bad(bad: Sequence[BadSample]) -> str:
    """Formats the bad samples for the terminal: counts by reason, and the first few."""
    counts = Counter(sample.reason for sample in bad).most_common()
    more = f"\n... and {len(bad) - N_SHOWN:,} more" if len(bad) > N_SHOWN else ""
    return "\n\n".join(
        [
            terminal_table(("samples", "reason"), [(f"{n:,}", reason) for reason, n in counts], "><"),
            terminal_table(BadSample._fields, [sample.cells() for sample in bad[:N_SHOWN]], "<<><<<") + more,
        ]
    )


def count_long_texts(split: SplitSummary, column: str) -> int:
    """How many texts of a split are certainly longer than CLIP reads: a lower bound, made without a vocabulary."""
    from clip.tokenizer import is_surely_cut  # takes a second to import

    texts = pc.list_flatten(open_table(split.path)[column])
    return sum(is_surely_cut(text) for chunk in texts.chunks for text in chunk.to_pylist())


def describe(splits: Sequence[SplitSummary], class_names: Sequence[str]) -> str:
    """Formats the files written for the terminal: their sizes, label counts per split, remarks."""
    with_texts = any(split.n_texts for split in splits)

    def row(name: str, parts: Sequence[SplitSummary], remark: str) -> tuple[str, ...]:
        texts = (f"{sum(part.n_texts for part in parts):,}",) if with_texts else ()
        n_samples, n_bytes = sum(part.n_samples for part in parts), sum(part.n_bytes for part in parts)
        return (name, f"{n_samples:,}", *texts, filesize.decimal(n_bytes), remark)

    files = [row(s.path.name, [s], "replaced" if s.replaced else "") for s in splits]
    counts = [[printable(name), *(f"{s.label_counts[n]:,}" for s in splits)] for n, name in enumerate(class_names)]
    heads = ("file", "samples", *(("texts",) if with_texts else ()), "size", "")
    lines = [
        terminal_table(heads, [*files, None, row("total", splits, "")], "<" + ">" * (len(heads) - 2) + "<"),
        "",
        terminal_table(["label", *(s.name for s in splits)], counts, "<" + ">" * len(splits)),
        "",
    ]
    for remark in dict.fromkeys(remark for s in splits for remark, count in s.remarks.items() if count):
        lines.append(f"{remark}: {', '.join(f'{s.name} {s.remarks[remark]:,}' for s in splits)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, 2 for a user error, 1 for a bug in the program, 130 for Ctrl-C."""
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
        if dataset.spec.family == CLIP and (texts := dataset.spec.column_of("text")):
            for split in splits:
                split.remarks[LONG_TEXTS] = count_long_texts(split, texts)
    except BadSamplesError as error:
        print(f"error: {error}; nothing was written to {target}.\n\n{describe_bad(error.bad)}\n", file=sys.stderr)
        print("Fix them, or leave them out with --skip-bad, which lists them all in a file.", file=sys.stderr)
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
        print(f"left out, and listed in {report}: {counted(len(bad), 'bad sample')}\n", file=sys.stderr)
        print(f"{describe_bad(bad)}\n", file=sys.stderr)
    print(describe(splits, SIGNS if spec.label_range is not None else dataset.class_names))
    if dataset.note:
        print(dataset.note)
    print(f"written to {target} in {time.monotonic() - start:,.1f} s")
    return DONE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # an orderly exit, which removes unfinished files
    sys.exit(main())
