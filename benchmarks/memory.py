"""Peak memory of a training step, in a process of its own: `python -m benchmarks.memory ours|theirs [bf16]`."""

import sys
from pathlib import Path

import torch

from benchmarks.sides import Data, Ours, Theirs, mixed


def main(side: str, dtype: torch.dtype) -> None:
    """Prints the MiB of the model at rest and the peak of two steps."""
    device = torch.device("cpu")
    model = Ours(device, dtype) if side == "ours" else Theirs(device, dtype)
    data = Data(mixed(16), [77] * 16, device)
    at_rest = _mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model.train(data)
    model.train(data)
    print(at_rest, _mib("VmHWM"))


def _mib(entry: str) -> float:
    """Of /proc; `getrusage` would start with the peak of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{entry}:")).split()[1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], torch.bfloat16 if "bf16" in sys.argv[2:] else torch.float32)
