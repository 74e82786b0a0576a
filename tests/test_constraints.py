"""constraints.txt pins all that requirements-dev.txt brings in, and the pins agree with each other."""

import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
PINS = dict(line.split("==") for line in LINES)
REQUIRED = [
    line
    for name in ("requirements.txt", "requirements-dev.txt")
    for line in (ROOT / name).read_text("utf-8").splitlines()
    if line and line[0] not in "#-"
]
INSTALLED = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}


def needs(name: NormalizedName) -> list[Requirement]:
    """What the installed distribution `name` requires on this machine, without its extras."""
    found = map(Requirement, INSTALLED[name].requires or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def test_the_file_is_one_exact_pin_a_line() -> None:
    assert len(PINS) == len(LINES) > 50
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert sorted(PINS) == list(PINS) == [canonicalize_name(name) for name in PINS]
    assert set(REQUIRED) <= set(LINES)


def test_nothing_that_the_requirements_need_is_left_out() -> None:
    waiting = {canonicalize_name(Requirement(line).name) for line in REQUIRED}
    seen: set[NormalizedName] = set()
    while waiting:
        seen.add(name := waiting.pop())
        names = {canonicalize_name(one.name) for one in needs(name)}
        waiting |= {one for one in names if not re.match("nvidia-|cuda-|triton$", one)} - seen
    assert len(seen) > 50 and seen <= set(PINS)


def test_the_pins_satisfy_each_other() -> None:
    """What each pinned distribution requires of others, as far as it is the one installed here."""
    pinned = [name for name in INSTALLED if name in PINS and Version(INSTALLED[name].version).public == PINS[name]]
    wanted = [
        (name, one, PINS[other])
        for name in pinned
        for one in needs(name)
        if (other := canonicalize_name(one.name)) in PINS
    ]
    assert len(wanted) > 50
    assert [
        f"{name} requires {one}" for name, one, pin in wanted if not one.specifier.contains(pin, prereleases=True)
    ] == []


def test_make_constraints_turns_pip_freeze_into_pins() -> None:
    frozen = "Jinja2==3.1.6\ncuda-pathfinder==1.2\nmypy_extensions==1.0\nmypy==2.4.1\nnvidia-cublas==13.1\npip==25.1\n"
    frozen += "ruamel.yaml==0.18.6\ntorch==2.13.0+cpu\ntriton==3.5\n"
    command = ["make", "-s", "--eval", "pins: ; @$(PINS)", "pins"]
    pins = subprocess.run(command, cwd=ROOT, input=frozen, capture_output=True, text=True, check=True).stdout
    assert pins.split() == [
        "jinja2==3.1.6",
        "mypy==2.4.1",
        "mypy-extensions==1.0",
        "ruamel-yaml==0.18.6",
        "torch==2.13.0",
    ]
