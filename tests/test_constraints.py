"""constraints.txt pins everything that requirements-dev.txt installs."""

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

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
    """Requirements of the installed distribution `name` on this platform, without extras."""
    found = map(Requirement, INSTALLED[name].requires or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def test_every_line_is_one_exact_pin() -> None:
    assert len(PINS) == len(LINES) > 50
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert sorted(PINS) == list(PINS) == [canonicalize_name(name) for name in PINS]
    assert set(REQUIRED) <= set(LINES)


def test_everything_the_requirements_need_is_pinned() -> None:
    waiting = {canonicalize_name(Requirement(line).name) for line in REQUIRED}
    seen: set[NormalizedName] = set()
    while waiting:
        seen.add(name := waiting.pop())
        names = {canonicalize_name(one.name) for one in needs(name)}
        waiting |= {one for one in names if not re.match("nvidia-|cuda-|triton$", one)} - seen
    assert len(seen) > 50 and seen <= set(PINS)
