"""A run of thousands of steps takes no more memory at its end than at its beginning."""

import os
import re
import time
from pathlib import Path

import pytest

from tests.conftest import Workspace
from tests.interrupted import Chain

STEPS = 2_000
GROWTH = 8 * 2**20
"""Bytes, in three quarters of the run, of the main process and of each loader process."""


def anonymous(pid: int) -> int:
    """Bytes of memory that belong to a process alone."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.mark.skipif(not os.environ.get("TEST_LONG"), reason="long: TEST_LONG=1")
def test_memory_does_not_grow(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    chain = Chain(workspace, "long", "num_workers=2", "max_epoch=10000", f"max_steps={STEPS}", "val_check_interval=1.0")
    process, seen = chain.started(), dict[int, list[int]]()
    assert process.pid is not None
    while process.exitcode is None:
        process.join(0.5)
        try:
            for pid in (process.pid, *children(process.pid)):
                seen.setdefault(pid, []).append(anonymous(pid))
        except OSError:  # it has just ended
            continue
        time.sleep(0.5)
    assert process.exitcode == 0, chain.log.read_text()[-3000:]
    longest = max(map(len, seen.values()))
    for pid, sizes in seen.items():
        if len(sizes) > longest / 2:  # not those of the test at the end
            early, late = max(sizes[len(sizes) // 8 : len(sizes) // 4]), max(sizes[-len(sizes) // 8 :])
            with capsys.disabled():
                who = "main process" if pid == process.pid else "loader process"
                print(f"\n{who}: {early / 2**20:.1f} MB, at the end of {STEPS} steps {late / 2**20:.1f} MB")
            assert late < early + GROWTH
