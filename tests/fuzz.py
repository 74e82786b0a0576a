"""The long form of test_fuzz.py: `make fuzz`, or `python -m tests.fuzz [--minutes 10] [--only NAME ...]`.

Each target runs in a process of its own with a bound on its memory, so that a crash is counted and not fatal. Ends with
a table of what was tried and what came of it; status 1 if anything but a result or one of our own errors came.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from common.text import terminal_table
from tests.fuzz_targets import TARGETS, outcome_of

MEMORY_BYTES = 6 * 2**30
PER_ROUND = 200
SLOW_S = 30.0
"""An input that takes longer counts as a hang."""


def feed_target(name: str, seconds: float) -> None:
    """Feeds inputs until the time is up; prints a line of JSON with the counts after each round."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    target, counts = TARGETS[name], Counter[str]()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        (folder / "prepared").mkdir()
        prepared = target.prepare(folder / "prepared")
        round_number = 0
        while time.monotonic() < until:

            @seed(round_number)
            @settings(
                max_examples=PER_ROUND,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(st.data())
            def feed(data: st.DataObject) -> None:
                given_input = data.draw(target.inputs)  # also when the time is up: drawing has to stay the same
                if (began := time.monotonic()) > until:
                    return
                try:
                    outcome = outcome_of(target, prepared, folder, given_input)
                except BaseException:
                    outcome = "finding"
                    print(f"{name}: {given_input!r}\n{traceback.format_exc()}", file=sys.stderr)
                counts[outcome if time.monotonic() - began < SLOW_S else "hang"] += 1

            feed()
            round_number += 1
            print(json.dumps(counts), flush=True)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Feeds damaged input to every reader.")
    parser.add_argument("--minutes", type=float, default=10, help="in all (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets")
    parser.add_argument("--feed", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds = 60 * args.minutes / len(args.only)
    if args.feed:
        feed_target(args.feed, 60 * args.minutes)
        return 0
    rows, bad = [], 0
    for name in args.only:
        command = [sys.executable, "-m", "tests.fuzz", "--feed", name, "--minutes", str(seconds / 60)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
        counts = Counter(json.loads(lines[-1])) if lines else Counter[str]()
        if child.returncode:
            counts["crash"] += 1
        if counts["finding"] or child.returncode:
            print(child.stderr[-3000:], file=sys.stderr)
        results = counts.pop("result", 0)
        found = sum(counts.pop(kind, 0) for kind in ("finding", "crash", "hang"))
        errors = sum(counts.values())
        bad += found
        rows.append([name, f"{results + errors + found:,}", f"{results:,}", f"{errors:,}", f"{found:,}"])
        print(f"{name}: {rows[-1][1:]}", file=sys.stderr, flush=True)
    print(terminal_table(("target", "inputs", "results", "our errors", "others"), rows, "<>>>>"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
