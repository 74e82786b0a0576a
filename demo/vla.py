"""Both stages on synthetic text, audio and vision: `make demo-vla`. The figures say nothing about CMU-MOSI."""

import argparse
import json
import sys
from pathlib import Path

import make_arrow
from common.text import terminal_table
from demo import segments
from run import command_line

ROOT = Path("demo_run", "vla")
SMALL = ("num_workers=0", f"log_dir={ROOT / 'result'}", f"missing_table_root={ROOT / 'tables'}")
METHODS = ("none", "mplmm", "rep")
PRETRAINING_EPOCHS, EPOCHS = 6, 6


def main() -> int:
    """Runs everything and prints a table by missing modalities; returns the exit status."""
    argparse.ArgumentParser(prog="python -m demo.vla", description=__doc__).parse_args()
    for name, path in segments.write(ROOT / "raw").items():
        if make_arrow.main(["--dataset", name, "--root", str(path), "--target", str(ROOT / name)]):
            return 1
    sizes = ("network.layers=3", "batch_size=32", "per_gpu_batchsize=32", f"max_epoch={PRETRAINING_EPOCHS}")
    stage_one = ("task_pretrain_mosei", f"data_root={ROOT / 'mosei'}", *sizes)
    if status := run("main", *stage_one):
        return status
    backbone = newest("pretrain_mosei")
    for method in METHODS:
        own = (f"prompt_type={method}", f"exp_name={method}", f"max_epoch={EPOCHS}", "memory_depth=2")
        stage_two = ("task_finetune_mosi", f"data_root={ROOT / 'mosi'}", f"load_path={backbone}", *own)
        if status := run("main", *stage_two):
            return status
    paths = ",".join(str(newest(method)) for method in METHODS)
    if status := run("robustness", f"load_path=[{paths}]", "robustness_ratios=[0,0.7]", "bootstrap=100"):
        return status
    print(f"\n{table()}\n\nSynthetic segments: the errors say nothing about CMU-MOSI.\n")
    return command_line(["run.py", "report", "with", f"runs={ROOT / 'result'}", f"out={ROOT / 'report'}"])


def run(command: str, *options: str) -> int:
    """Runs a command of run.py with the demo's folders."""
    return command_line(["run.py", *([] if command == "main" else [command]), "with", *options, *SMALL])


def newest(name: str) -> Path:
    """Best checkpoint of an experiment's newest run."""
    folders = (ROOT / "result" / f"{name}_seed0").glob("version_*/best.ckpt")
    return max(folders, key=lambda path: path.stat().st_mtime)


def table() -> str:
    """Table of mean absolute error and correlation by method and missing modalities."""
    files = {method: newest(method).parent / "robustness" / "robustness.json" for method in METHODS}
    found = {method: json.loads(path.read_text())["by_type"] for method, path in files.items()}
    rows = [
        [kind, *(f"{found[m][kind]['mae']:.3f} / {found[m][kind]['corr']:.2f}" for m in METHODS)]
        for kind in found[METHODS[0]]
    ]
    return terminal_table(("MAE / Corr", *METHODS), rows, "<" + ">" * len(METHODS))


if __name__ == "__main__":
    sys.exit(main())
