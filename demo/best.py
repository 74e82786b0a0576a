"""The recipe `mmimdb_best` step by step, compared with every method at its own best setting: `python -m demo.best`.

    python -m demo.best --data demo_run/arrow --vit demo_run/backbone --out demo_run/best [--methods dcp rep …]

For each method and each step, the learning rate and then the number of epochs are searched on the validation split of
the first table seed; training on the other seeds uses both. The best epoch of a run is chosen on validation too. The
recipe is the step with the best validation metric (the mean of several models has none). The test split is read once
for each run. Existing runs are not trained again; delete the folder to start afresh.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from common.machine import print_anywhere
from common.text import AT_OFFSET, estimate, terminal_table
from run import command_line

METHODS: dict[str, Mapping[str, object]] = {
    "dpl": {"prompt_type": "none", "head": "dpl"},
    **{name: {} for name in ("rep", "dcp", "map_input", "map_attention", "maple", "coop", "msp", "syp")},
    "mora": {"lora_alpha": 0.1},
    "aoept": {"aoept_prototypes": 64},
}
"""Options of each method; `prompt_type` defaults to its name. The linear head alone is the first step of the recipe."""
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Learning rates; the first and the last are tried only if their neighbour is the best of the others."""
STEPS: dict[str, Mapping[str, object]] = {
    "head": {"prompt_type": "none"},
    "+ whole texts": {"text_windows": 8},
    "+ neighbours": {"neighbours": 16},
    "+ teacher": {"teacher": "+ neighbours"},
}
"""Steps of the recipe; each adds its options to those before it, and names a checkpoint by its step."""
SLOTS = {"prompt_type": "dcp", "text_windows": 8, "finetune_first": True}
"""Options of a run with slots that starts from the weights of the step `+ whole texts`."""
MEMBERS = ("+ whole texts", "+ neighbours", "+ teacher", "slots on the head")
"""Steps that form the ensemble."""


class Result(NamedTuple):
    """Macro F1 of one run."""

    folder: Path
    validation: float
    """Macro F1 at 1/2 on validation, in the best epoch."""
    test: float
    at_offset: float


class Bench:
    """Trains runs that do not exist yet.

    Args:
        common: options of all runs.
        out: folder of the runs.
        epochs: numbers of epochs to choose from; learning rates are searched with the first.
    """

    def __init__(self, common: Mapping[str, object], out: Path, epochs: Sequence[int]) -> None:
        self.common, self.out, self.epochs = common, out, epochs
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, seed: int, options: Mapping[str, object]) -> Result:
        """Trains and tests a model, or tests several checkpoints."""
        folder = self.out / f"{name}_seed{seed}"
        if not (found := sorted(folder.glob("version_*/test_results.json"))):
            tested = {"test_exp_name": folder.name} if "test_only" in options else {}
            words = {**self.common, "log_dir": self.out, "exp_name": name, "seed": seed, **options, **tested}
            command = ["run.py", "with", "task_finetune_mmimdb", *(f"{key}={value}" for key, value in words.items())]
            with (self.out / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
                status = command_line(command)
            if status:
                raise SystemExit(f"error: {' '.join(command)} ended with status {status}; see {self.out / 'log.txt'}")
            found = sorted(folder.glob("version_*/test_results.json"))
        metrics, validation = json.loads(found[-1].read_text())["metrics"], float("nan")
        if (logged := found[-1].with_name("metrics.csv")).is_file():
            values = [float(row["val/f1_macro"]) for row in csv.DictReader(logged.open()) if row.get("val/f1_macro")]
            validation = max(values, default=validation)
        return Result(found[-1].parent, validation, metrics["f1_macro"], metrics[AT_OFFSET])

    def at_best_setting(
        self, name: str, seeds: Sequence[int], of_seed: Mapping[int, Mapping[str, object]]
    ) -> list[Result]:
        """A result for each seed, with the setting that is best on the validation split of the first one."""

        def run(rate: float, epochs: int, seed: int) -> Result:
            setting = {"learning_rate": rate, "max_epoch": epochs}
            return self.run(f"{name}_{rate:g}_{epochs}", seed, {**setting, **of_seed[seed]})

        def of_rate(rate: float) -> float:
            return run(rate, self.epochs[0], seeds[0]).validation

        tried = RATES[1:-1]
        rate = max(tried, key=of_rate)
        if rate in (tried[0], tried[-1]):
            rate = max(rate, RATES[0] if rate == tried[0] else RATES[-1], key=of_rate)
        epochs = max(self.epochs, key=lambda number: run(rate, number, seeds[0]).validation)
        print(f"{name}: learning rate {rate:g}, {epochs} epochs", flush=True)
        return [run(rate, epochs, seed) for seed in seeds]


def recipe(bench: Bench, seeds: Sequence[int], slots: bool) -> dict[str, list[Result]]:
    """Runs the steps of the recipe; returns a result per seed, keyed by step."""
    found: dict[str, list[Result]] = {}

    def checkpoint(step: object, place: int) -> Path:
        return found[str(step)][place].folder / "best.ckpt"

    so_far: dict[str, object] = {}
    for step, options in STEPS.items():
        so_far |= options
        of_seed = {}
        for place, seed in enumerate(seeds):
            teacher = {"teacher": checkpoint(so_far["teacher"], place)} if "teacher" in so_far else {}
            of_seed[seed] = {**so_far, **teacher}
        found[step] = bench.at_best_setting(step.strip("+ ").replace(" ", "_"), seeds, of_seed)
    if slots:
        of_seed = {seed: {**SLOTS, "load_path": checkpoint("+ whole texts", n)} for n, seed in enumerate(seeds)}
        found["slots on the head"] = bench.at_best_setting("slots", seeds, of_seed)
    members = [step for step in MEMBERS if step in found]
    together = []
    for place, seed in enumerate(seeds):
        paths = ",".join(str(checkpoint(step, place)) for step in members)
        together.append(bench.run(f"mean_of_{len(members)}", seed, {"load_path": f"[{paths}]", "test_only": True}))
    return {**found, f"mean of {len(members)}": together}


def figures(results: Sequence[Result]) -> list[str]:
    """Mean and standard deviation of each figure, in per cent."""
    cells = []
    for values in zip(*((one.validation, one.test, one.at_offset) for one in results), strict=True):
        found = estimate(values)
        cells.append(found.text(1, 100) if found is not None and found.n else "")
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.best", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="demo_run/arrow", help="folder of MM-IMDb's arrow files")
    parser.add_argument("--vit", default="demo_run/backbone", help="like the option of run.py")
    parser.add_argument("--out", type=Path, default=Path("demo_run/best"), help="folder for the runs")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--epochs", nargs="*", type=int, default=[20, 10], help="choices; rates use the first")
    parser.add_argument("--seeds", type=int, default=5, help="table seeds")
    parser.add_argument("--no-slots", action="store_true", help="leave out the step that trains prompts")
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of run.py for all runs")
    print_anywhere()
    args = parser.parse_intermixed_args(argv)
    common = {"data_root": args.data, "vit": args.vit, "missing_table_root": args.out / "missing_tables"}
    common |= dict(word.split("=", 1) for word in args.options)
    bench, seeds = Bench(common, args.out, args.epochs), range(args.seeds)
    rows: list[list[str]] = []
    for name in args.methods:
        options = {"prompt_type": name, **METHODS[name]}
        results = bench.at_best_setting(name, seeds, dict.fromkeys(seeds, options))
        rows.append([name, *figures(results)])
    steps = recipe(bench, seeds, not args.no_slots)
    rows += [[f"recipe: {step}", *figures(results)] for step, results in steps.items()]
    print(f"\nMacro F1 in per cent, mean ± standard deviation over {args.seeds} table seeds\n")
    print(terminal_table(("", "validation", "test at 1/2", "test at the offset"), rows, "<>>>"))
    trained = {step: sum(one.validation for one in results) for step, results in steps.items() if "mean of" not in step}
    print(f"\nRecipe chosen on validation: {max(trained, key=lambda step: trained[step])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
