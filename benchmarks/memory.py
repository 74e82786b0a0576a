"""Peak memory of a training step, in a process of its own: `python -m benchmarks.memory ours|theirs [bf16]`."""

import resource
import sys

import torch

from benchmarks.sides import Data, Ours, Theirs, mixed


def main(side: str, dtype: torch.dtype) -> None:
    """Prints the MiB of the model at rest and the peak of two steps."""
    device = torch.device("cpu")
    model = Ours(device, dtype) if side == "ours" else Theirs(device, dtype)
    data = Data(mixed(16), [77] * 16, device)
    at_rest = _resident_mib()
    model.train(data)
    model.train(data)
    print(at_rest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main(sys.argv[1], torch.bfloat16 if "bf16" in sys.argv[2:] else torch.float32)
