"""Sensors on synthetic signals, through the user's own commands: `python -m demo.sensors` (or `make demo-as`).

python -m demo.sensors [--out demo_run/sensors]
"""

import argparse
from pathlib import Path

import numpy as np

from make_arrow import main as make_arrow
from run import command_line

RATE, SECONDS, RECORDINGS = 20, 20, 48
CLASSES = ("walking slowly", "walking fast", "cycling slowly", "cycling fast")
"""The activity shows in the acceleration, its speed in the rotation, and both weakly in the light."""
SPEC = "name: made_up_motions\nsample: 2\ninterval: 0.4\ninterval_overlap: 0.5\n"
NETWORK = ("network.width=16", "network.blocks=[1,1]", "network.feature_width=32", "network.projection_width=32")


def write_signals(folder: Path) -> None:
    """Writes a sensor dataset in the layout of DATA.md: 12 people, each doing every activity once."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = np.random.default_rng(0), RATE * SECONDS
    signals, recordings = [], []
    for number in range(RECORDINGS):
        label, time = number % 4, np.arange(rows) / RATE + draw.uniform(0, 9)
        cycling, fast = divmod(label, 2)
        acc, gyr = np.sin(2 * np.pi * time * (1.5 + 2.5 * cycling)), np.sin(2 * np.pi * time * (0.8 + 1.6 * fast))
        columns = [acc, acc**2, gyr, -gyr, 0.4 * acc + 0.4 * gyr]
        signals.append(np.stack(columns, axis=1) + draw.normal(0, (0.4, 0.4, 0.4, 0.4, 0.8), (rows, 5)))
        person = number // 4
        split = "test" if person >= 9 else "val" if person == 8 else "train"
        recordings.append(f"r{number},p{person},{split},{rows * number},{rows}")
    np.save(folder / "signals.npy", (1000 * np.concatenate(signals)).round().astype(np.int16))
    np.save(folder / "labels.npy", np.repeat(np.arange(RECORDINGS) % 4, rows).astype(np.int8))
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    names = ("acc", "acc", "gyr", "gyr", "light")
    channels = [f"{column},{name},{column},1,{RATE},0.001" for column, name in enumerate(names)]
    (folder / "channels.csv").write_text("\n".join(["column,modality,axis,unit,rate_hz,scale", *channels]))
    (folder / "recordings.csv").write_text("\n".join(["recording,subject,split,start,length", *recordings]))
    (folder / "spec.yaml").write_text(SPEC)


def main() -> int:
    """Writes and converts data, pretrains with FOCAL, trains `none` and `rep` with sensors missing, and reports."""
    parser = argparse.ArgumentParser(prog="python -m demo.sensors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_run/sensors"))
    out = parser.parse_args().out
    write_signals(out / "raw")
    result, data = out / "result", out / "data"
    places = (f"data_root={data}", f"log_dir={result}", f"missing_table_root={out / 'missing_tables'}")
    here = ("precision=32", "num_workers=0")
    common = ["with", *places, *here, "batch_size=64", "per_gpu_batchsize=64", "resume_from=auto"]
    focal, *tuned = (result / f"{name}_seed0" / "version_0" / "best.ckpt" for name in ("focal", "none", "rep"))
    backbone = f"load_path={focal}"
    fine_tuning = ("task_finetune_sensors", backbone, "max_epoch=20", "missing_type=some", "missing_ratio=0.7")
    slots = ("memory_depth=1", "memory_length=12")
    matrix = ("robustness_ratios=[0,0.3,0.5,0.7,0.9]", "robustness_seeds=[0,1]", "bootstrap=200")
    status = make_arrow(["--dataset", "sensors", "--root", str(out / "raw"), "--target", str(data)])
    for words in (
        [*common, "task_pretrain_sensors", "exp_name=focal", "max_epoch=15", *NETWORK],
        [*common, *fine_tuning, "exp_name=none", "prompt_type=none", *slots],
        [*common, *fine_tuning, "exp_name=rep", "prompt_type=rep", *slots],
        ["robustness", "with", f"load_path=[{tuned[0]},{tuned[1]}]", *matrix, *places, *here],
        ["report", "with", f"runs={result}", f"out={out / 'report'}"],
    ):
        if status == 0:
            print(f"\n$ python run.py {' '.join(words)}\n", flush=True)
            status = command_line(["run.py", *words])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
