"""The machine that a command runs on: its system, what its terminal can print, its cores."""

import codecs
import ctypes
import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.errors import MachineError

SPINS = "10000"
"""Rounds that a thread of libgomp waits busily for its next work, a fraction of a millisecond. Its default, 300,000,
makes the threads of a training wait for each other's turn on a core that another process uses."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
LARGEST_KEPT = 2**25
"""Bytes; glibc takes no more."""
LOOK_S = 0.2
"""How long `busy_cores` looks."""
IN_ASCII = "in ascii"
"""Name of the handler of what an encoding lacks, by this table."""
ASCII = {"±": "+/-", "–": "-", "…": "...", "×": "x", "─": "-"}


def check_system() -> None:
    """Raises MachineError on anything but Linux."""
    if sys.platform != "linux":
        raise MachineError(f"expected Linux, found {sys.platform}: runs there in a container or a virtual machine")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(IN_ASCII, _in_ascii)


def print_anywhere() -> None:
    """Lets both outputs put ASCII for what their encoding lacks (as in some containers and batch systems), `?` where
    there is no such, instead of ending the command with a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_ASCII)


def as_printed(text: str) -> str:
    """As standard output will have it, for tables, whose columns are as wide as that."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, IN_ASCII).decode(encoding)


def say(text: str) -> None:
    """Prints, without an error where nobody reads on, as in `run.py --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def settle_threads() -> None:
    """Decides how the threads of libgomp wait, unless the user has; has to be called before torch is imported.

    On a core that another process uses a waiting thread that spins keeps the one it waits for from running: a small
    model then trains at a tenth of its speed. Where cores are taken, threads sleep instead, which costs a third on a
    quiet machine. The number of threads, and with it every result, is the same.
    """
    if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} or os.environ.get("OMP_NUM_THREADS") == "1":
        return
    if cores() == 1 or "torch" in sys.modules:
        return
    if busy_cores() > 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free for the next ones, instead of giving it back to the system at each of them.

    Pages that the system has to clear again cost a tenth of a training on a CPU and a quarter of an evaluation.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def threads_wait() -> str:
    """How threads wait for each other, for the line about the device; nothing where that is as usual."""
    set_to = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    return "".join(f", {name}={value}" for name, value in set_to.items())


def busy_cores() -> float:
    """How many of the cores of this process others use now; 0 where the system does not say."""
    try:
        before = _idle_ticks()
        began = time.monotonic()
        time.sleep(LOOK_S)
        idle = _idle_ticks() - before
    except (OSError, ValueError, IndexError):
        return 0.0
    return cores() - idle / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)


def _idle_ticks() -> int:
    """Of all cores of this process since the start of the machine: idle, or waiting for a disk."""
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
    return sum(int(words[4]) + int(words[5]) for words in lines if words[0] in mine)
