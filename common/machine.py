"""The machine that a command runs on: its system, its cores and memory, and what its terminal can print."""

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
"""Iterations for which a libgomp thread spins while it waits for work: a fraction of a millisecond. At the default of
300,000, the threads of a training hold each other up on a core that another process uses."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Constants from malloc.h."""
LARGEST_KEPT = 2**25
"""Largest M_MMAP_THRESHOLD that glibc accepts, in bytes."""
LOOK_S = 0.2
"""Seconds over which `busy_cores` measures."""
IN_ASCII = "in ascii"
"""Name of the codec error handler that replaces characters the encoding lacks."""
ASCII = {"±": "+/-", "–": "-", "…": "...", "×": "x", "─": "-"}
"""The replacements it makes."""


def check_system() -> None:
    """Raises MachineError on anything but Linux."""
    if sys.platform != "linux":
        raise MachineError(f"expected Linux, found {sys.platform}; use a container or a virtual machine")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(IN_ASCII, _in_ascii)


def print_anywhere() -> None:
    """Makes both output streams replace characters that their encoding lacks, as in some containers and batch systems.

    They print the ASCII replacement, or `?` if there is none, instead of raising a UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_ASCII)


def as_printed(text: str) -> str:
    """`text` as standard output will show it; the column widths of tables depend on that."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, IN_ASCII).decode(encoding)


def print_safely(text: str) -> None:
    """Prints `text`, without an error if the reader has closed the pipe, as in `run.py --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def settle_threads() -> None:
    """Decides how libgomp's threads wait, unless the user has; must be called before torch is imported.

    On a core shared with another process, a spinning thread keeps the thread it waits for from running: a small model
    then trains at a tenth of its speed. If other processes use the cores, threads sleep instead, which would cost a
    third on an idle machine. The number of threads, and with it every result, stays the same.
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
    """Makes glibc keep the memory of freed tensors for new ones, instead of returning it to the system each time.

    Otherwise the system clears the pages again, which takes a tenth of a training on a CPU and a quarter of an
    evaluation.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def threads_wait() -> str:
    """How threads wait, for the log line about the device; empty if nothing is set."""
    set_to = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    return "".join(f", {name}={value}" for name, value in set_to.items())


def busy_cores() -> float:
    """How many of this process's cores other processes are using; 0 if the system does not say."""
    try:
        before = _idle_ticks()
        began = time.monotonic()
        time.sleep(LOOK_S)
        idle = _idle_ticks() - before
    except (OSError, ValueError, IndexError):
        return 0.0
    return cores() - idle / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)


def _idle_ticks() -> int:
    """Ticks that all cores of this process have spent idle, or waiting for a disk, since the machine booted."""
    own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
    return sum(int(words[4]) + int(words[5]) for words in lines if words[0] in own)
