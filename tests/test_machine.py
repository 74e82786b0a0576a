"""Commands where only ASCII can be printed, on other systems, and on cores that others use."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import make_arrow
from common import machine
from common.machine import keep_freed_memory, settle_threads, threads_wait
from demo.__main__ import main as demo
from run import command_line
from tests.conftest import Captured, Patch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden" / "raw" / "mmimdb"
ASCII = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
"""Where print would raise UnicodeEncodeError, and logging show a traceback instead of the line."""


def ascii_output(*command: str) -> str:
    """What a command prints where only ASCII can be printed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, check=False, env={**os.environ, **ASCII}
    )
    said = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode in (0, 2) and "Traceback" not in said and "UnicodeEncodeError" not in said, said
    return said


def test_tables_and_names_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    given = ("--dataset", "mmimdb", "--root", str(GOLDEN), "--target", f"{tmp_path}/é", "--workers", "0")
    said = ascii_output("make_arrow.py", *given)
    assert "written to" in said and f"{tmp_path}/?" in said
    assert "exp_name=..." in ascii_output("run.py", "--help")
    assert "no such file" in ascii_output("run.py", "with", "é.json")
    assert "expected a folder" in ascii_output("run.py", "runs", "with", "log_dir=é")


def test_what_stands_for_what_cannot_be_printed() -> None:
    code = "from common.machine import print_anywhere as p; p(); import logging; print('0.1 ± 0.2 – … × ─ é 𝟙')"
    said = ascii_output("-c", f"{code}; logging.error('é…')")
    assert said == "0.1 +/- 0.2 - ... x - ? ?\nERROR:root:?...\n"


def test_a_table_is_as_wide_as_what_is_printed() -> None:
    code = "from common.machine import print_anywhere as p; p(); from common.text import terminal_table as t"
    said = ascii_output("-c", f"{code}; print(t(['a', 'b'], [['1 ± 2', '3'], ['–', '4']], '><'))")
    heads, line, *rows = said.rstrip("\n").split("\n")
    assert rows == ["1 +/- 2  3", "      -  4"] and heads == "      a  b" and set(line) <= {"-", " "}


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_another_system_is_one_line(system: str, monkeypatch: Patch, capsys: Captured, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.sys, "platform", system)
    statuses = [
        command_line(["run.py", "print_config"]),
        make_arrow.main(["--dataset", "mmimdb", "--root", str(tmp_path)]),
        demo(["--out", str(tmp_path / "demo")]),
    ]
    said = capsys.readouterr()
    assert statuses == [2] * 3 and not said.out
    assert [f"expected Linux, found {system}" in line for line in said.err.splitlines()] == [True] * 3


def test_freed_memory_is_used_again() -> None:
    """Not given back, and cleared by the system page by page, at each tensor."""
    keep_freed_memory()
    faults = []
    for _ in range(8):
        sum(torch.ones(5 * 2**20) for _ in range(3))  # 20 MiB each
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[4] < 256


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
    """As the user says, else by the load."""
    environment = dict(given)
    monkeypatch.setattr(machine.os, "environ", environment)
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    settle_threads()
    assert environment == expected
    assert threads_wait() == "".join(f", {name}={value}" for name, value in expected.items() if "NUM" not in name)
