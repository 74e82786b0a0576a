"""Commands on terminals limited to ASCII, on other systems, and on shared cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import make_arrow
from common import machine
from common.machine import settle_threads, threads_wait
from demo.__main__ import main as demo
from run import command_line
from tests.conftest import Captured, Patch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden" / "raw" / "mmimdb"
ASCII = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
"""An environment in which print raises UnicodeEncodeError and logging shows a traceback instead of the line."""


def ascii_output(*command: str) -> str:
    """The output of a command that can print only ASCII."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, check=False, env={**os.environ, **ASCII}
    )
    said = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode in (0, 2) and "Traceback" not in said and "UnicodeEncodeError" not in said, said
    return said


def test_commands_run_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    given = ("--dataset", "mmimdb", "--root", str(GOLDEN), "--target", f"{tmp_path}/é", "--workers", "0")
    said = ascii_output("make_arrow.py", *given)
    assert "written to" in said and f"{tmp_path}/?" in said
    assert "exp_name=..." in ascii_output("run.py", "--help")
    assert "no such file" in ascii_output("run.py", "with", "é.json")
    assert "expected a folder" in ascii_output("run.py", "runs", "with", "log_dir=é")


def test_unprintable_characters_are_replaced() -> None:
    code = "from common.machine import print_anywhere as p; p(); import logging; print('0.1 ± 0.2 – … × ─ é 𝟙')"
    said = ascii_output("-c", f"{code}; logging.error('é…')")
    assert said == "0.1 +/- 0.2 - ... x - ? ?\nERROR:root:?...\n"


def test_table_columns_are_aligned_after_replacement() -> None:
    code = "from common.machine import print_anywhere as p; p(); from common.text import terminal_table as t"
    said = ascii_output("-c", f"{code}; print(t(['a', 'b'], [['1 ± 2', '3'], ['–', '4']], '><'))")
    heads, line, *rows = said.rstrip("\n").split("\n")
    assert rows == ["1 +/- 2  3", "      -  4"] and heads == "      a  b" and set(line) <= {"-", " "}


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(system: str, monkeypatch: Patch, capsys: Captured, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.sys, "platform", system)
    statuses = [
        command_line(["run.py", "print_config"]),
        make_arrow.main(["--dataset", "mmimdb", "--root", str(tmp_path)]),
        demo(["--out", str(tmp_path / "demo")]),
    ]
    said = capsys.readouterr()
    assert statuses == [2] * 3 and not said.out
    assert [f"expected Linux, found {system}" in line for line in said.err.splitlines()] == [True] * 3


FAULTS = """
import resource, torch
from common.machine import keep_freed_memory
keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones((1 + i % 5) * 2**18) for i in range(40)]  # 1 to 5 MiB each
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints how many pages the system had to provide for tensors of sizes that had all been freed before."""


def test_freed_memory_is_reused() -> None:
    """It is not returned to the system, which would have to zero the pages of each new tensor."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # otherwise 100,000, with glibc's defaults


@pytest.mark.parametrize(
    ("busy", "given", "expected"),
    [
        (0.0, {}, {"GOMP_SPINCOUNT": "10000"}),
        (1.1, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (1.1, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (1.1, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (1.1, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_how_threads_wait(busy: float, given: dict[str, str], expected: dict[str, str], monkeypatch: Patch) -> None:
    """The user's environment variables win; without them the load of the machine decides."""
    environment = dict(given)
    monkeypatch.setattr(machine.os, "environ", environment)
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    settle_threads()
    assert environment == expected
    assert threads_wait() == "".join(f", {name}={value}" for name, value in expected.items() if "NUM" not in name)
