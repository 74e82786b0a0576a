"""The whole method on synthetic films, through the user's own commands: `python -m demo` (or `make demo`).

    python -m demo [--out demo_run] [--seed 0]

Steps whose result exists are not repeated; delete the folder to start again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.machine import check_system, print_anywhere
from demo.backbone import make_backbone
from demo.data import write_pretrain, write_task
from engine.baselines import baselines
from engine.tasks import TASKS
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES, SPLITS

FILMS, PRETRAIN_FILMS, PRETRAIN_STEPS = 1200, 3000, 400
TRAINING = {
    "per_gpu_batchsize": "32",
    "batch_size": "32",
    "max_epoch": "10",
    "val_check_interval": "1.0",
    "memory_length": "12",
    "memory_depth": "3",
    "precision": "32",
    "num_workers": "1",
}
"""The published schedule is for 15,552 films; this one is for 1,200. Everything else is at its default."""
EVALUATION = {"precision": "32", "num_workers": "1"}
PATTERNS = (
    ("complete", "100 %", "100 %", "both", "0"),
    ("image missing", "0 %", "100 %", "image", "1"),
    ("text missing", "100 %", "0 %", "text", "1"),
    ("70 % missing, both", "65 %", "65 %", "both", "0.7"),
)
"""Label, share of available images and texts, test_type, test_ratio."""
SWEEP, SWEEP_TYPES, SWEEP_RATIO, SWEEP_SEEDS = "sweep", ("both", "text", "image"), "0.7", 2
"""The small grid whose robustness the report shows; its first seed is the demo's."""
REAL_DATA = """\
The same on a real dataset (see DATA.md for how to get it):

  .venv/bin/python make_arrow.py --dataset mmimdb --root RAW --target datasets/mmimdb
  .venv/bin/python run.py with task_finetune_mmimdb data_root=datasets/mmimdb per_gpu_batchsize=32 exp_name=rep
"""


class StepError(Exception):
    """A command of the demo ended with an error that it has already printed."""


def run(title: str, *command: str) -> None:
    """Prints a command and runs it; raises StepError if it fails."""
    print(f"\n── {title}\n$ {shlex.join(['python', *command])}", flush=True)
    began = time.monotonic()
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        raise StepError(f"{command[0]} ended with status {status}")
    print(f"   ({time.monotonic() - began:.0f} s)", flush=True)


def results_in(folder: Path) -> dict[str, Any] | None:
    """The latest test result of the runs in `folder`, or None."""
    found = sorted(folder.glob("version_*/test_results.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text("utf-8")) if found else None


def options(values: Mapping[str, object]) -> list[str]:
    """The options as words of a command line."""
    return [f"{name}={value}" for name, value in values.items()]


def demo(out: Path, seed: int) -> None:
    """Runs all steps and prints a table at the end."""
    began = time.monotonic()
    raw, arrow, backbone = out / "raw", out / "arrow", out / "backbone"
    if not (raw.is_dir() and (out / "pretrain").is_dir()):
        print(f"\n── synthetic films in the MM-IMDb layout: {raw}", flush=True)
        write_task(raw, FILMS, seed)
        write_pretrain(out / "pretrain", PRETRAIN_FILMS, seed)
    if not all((arrow / DATASETS["mmimdb"].file_name(split)).is_file() for split in SPLITS):
        run("conversion", "make_arrow.py", "--dataset", "mmimdb", "--root", str(raw), "--target", str(arrow))
    if not backbone.is_dir():
        print(f"\n── a tiny CLIP, pretrained on other films: {backbone}", flush=True)
        make_backbone(out / "pretrain", backbone, PRETRAIN_STEPS, seed)
    common = {"data_root": arrow, "log_dir": out / "result", "missing_table_root": out / "missing_tables"}
    checkpoint, rows = train_and_evaluate(common, backbone, seed)
    page = sweep_and_report(out, common, backbone, seed)
    labels = torch.from_numpy(ArrowDataset(DATASETS["mmimdb"], arrow, "test", 64).label_of_sample)
    constant = baselines(TASKS["mmimdb"], labels, MMIMDB_GENRES)["constant"]
    print(f"\nREP on synthetic films, trained at 70 % missing (both), checkpoint {checkpoint}\n")
    print(f"  {'test pattern':<22}{'image':>7}{'text':>7}{'F1-macro':>11}{'F1-micro':>11}")
    for label, image, text, macro, micro in rows:
        print(f"  {label:<22}{image:>7}{text:>7}{macro:>11.3f}{micro:>11.3f}")
    print(f"  {constant['answer']:<36}{constant['metrics']['f1_macro']:>11.3f}{constant['metrics']['f1_micro']:>11.3f}")
    print(
        "\n  image, text: share of the films that have one. Some genres show only in the poster, some only in the plot."
    )
    print(f"  Everything is in {out}/ ({time.monotonic() - began:.0f} s this time; existing results are reused).")
    print("\nA report on REP trained at three patterns, tested at every missing type and ratio (open it in a browser):")
    print(f"\n  {page}\n\n{REAL_DATA}")


def train_and_evaluate(
    common: Mapping[str, object], backbone: Path, seed: int
) -> tuple[str, list[tuple[str, str, str, float, float]]]:
    """Trains one run and tests it at PATTERNS; returns its checkpoint, and label, image, text and two F1 of each."""
    result = Path(str(common["log_dir"]))
    command = ["run.py", "with", "task_finetune_mmimdb", *options(common), f"seed={seed}"]
    trained = result / f"rep_seed{seed}"
    if results_in(trained) is None:
        pattern = ("missing_ratio=0.7", "missing_type=both")
        run("training", *command, f"vit={backbone}", "exp_name=rep", *options(TRAINING), *pattern)
    fit = results_in(trained)
    assert fit is not None, "training succeeded without a test result"
    rows = []
    for label, image, text, test_type, test_ratio in PATTERNS:
        name = f"rep_test_{test_type}_{test_ratio}"
        if (tested := results_in(result / name)) is None or tested["checkpoint_sha256"] != fit["checkpoint_sha256"]:
            test = (f"test_ratio={test_ratio}", f"test_type={test_type}", f"test_exp_name={name}")
            checkpoint = (f"load_path={fit['checkpoint']}", "test_only=True")
            run(f"evaluation: {label}", *command, *checkpoint, *options(EVALUATION), *test)
            tested = results_in(result / name)
        assert tested is not None
        rows.append((label, image, text, tested["metrics"]["f1_macro"], tested["metrics"]["f1_micro"]))
    return fit["checkpoint"], rows


def sweep_and_report(out: Path, common: Mapping[str, object], backbone: Path, seed: int) -> Path:
    """Trains a small grid, evaluates its runs at every missing pattern, and writes a report; returns the page."""
    grid, page = out / "result" / SWEEP, out / "report" / "index.html"
    seeds = range(seed, seed + SWEEP_SEEDS)
    names = [f"{SWEEP}_{kind}_{SWEEP_RATIO}_seed{one}" for kind in SWEEP_TYPES for one in seeds]
    if not all(results_in(grid / name) for name in names):
        types, listed = f"sweep_types=[{','.join(SWEEP_TYPES)}]", f"sweep_seeds=[{','.join(map(str, seeds))}]"
        axes = (f"sweep_name={SWEEP}", types, f"sweep_ratios=[{SWEEP_RATIO}]", listed)
        command = ("run.py", "sweep", "with", "task_finetune_mmimdb", *options(common), f"vit={backbone}")
        run("a sweep: three missing types, two seeds", *command, *options(TRAINING), *axes)
    found = [test.parent / "robustness" / "robustness.json" for test in grid.glob("*/version_*/test_results.json")]
    if not all(path.is_file() for path in found):
        run("all missing types and ratios", "run.py", "robustness", "with", f"load_path={grid}", *options(EVALUATION))
    if not page.is_file() or page.stat().st_mtime < max(path.stat().st_mtime for path in found):
        run("a report", "run.py", "report", "with", f"runs={grid}", f"out={page.parent}")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="REP on synthetic films, from start to finish.")
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="folder to work in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    print_anywhere()
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32 - SWEEP_SEEDS:
        parser.error(f"--seed: expected 0 to {2**32 - SWEEP_SEEDS - 1}, found {args.seed}")
    try:
        check_system()
        demo(args.out, args.seed)
    except (StepError, UserError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1 if isinstance(failure, StepError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
