"""constraints.txt pins all that requirements-dev.txt brings in, and the pins agree with each other."""

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from constraints import HEADER, installed, needed, read_requirements

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "constraints.txt").read_text("utf-8")
LINES = [line for line in TEXT.splitlines() if not line.startswith("#")]
PINS = dict(line.split("==") for line in LINES)


def test_the_file_is_one_exact_pin_a_line() -> None:
    assert TEXT.startswith(HEADER) and len(PINS) == len(LINES) > 50
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert sorted(PINS) == list(PINS) == [canonicalize_name(name) for name in PINS]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_alike(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line and line[0] not in "#-"]
    assert lines and set(lines) <= set(LINES)


def test_nothing_that_the_requirements_need_here_is_left_out() -> None:
    """As pip sees it in this environment, through every dependency whose marker holds."""
    assert needed(read_requirements(ROOT / "requirements-dev.txt"), installed()).keys() <= PINS.keys()


def test_the_pins_satisfy_each_other() -> None:
    """What each pinned distribution asks of others, as far as it is the one installed here."""
    looked_at = 0
    for distribution in distributions():
        pin = PINS.get(canonicalize_name(distribution.metadata["Name"]))
        if pin is None or Version(Version(distribution.version).public) != Version(pin):
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            wanted = PINS.get(canonicalize_name(requirement.name))
            if wanted is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                looked_at += 1
                assert requirement.specifier.contains(wanted, prereleases=True), (distribution.name, requirement)
    assert looked_at > 50


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    metadata = "".join(f"Requires-Dist: {line}\n" for line in requires)
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")


def test_markers_extras_and_circles(tmp_path: Path) -> None:
    distribution(tmp_path, "Top_Level", "1.0", "side[fast]>=1", "never; python_version < '3'", "nvidia-blas==1")
    distribution(tmp_path, "side", "2.1+cpu", "top.level", "quick; extra == 'fast'", "slow; extra == 'careful'")
    distribution(tmp_path, "quick", "0.3", "side")
    distribution(tmp_path, "slow", "9")
    found = needed([Requirement("top-level")], installed([str(tmp_path)]))
    assert {name: str(version) for name, version in found.items()} == {
        "quick": "0.3",
        "side": "2.1",
        "top-level": "1.0",
    }
    with pytest.raises(KeyError, match="absent"):
        needed([Requirement("absent")], installed([str(tmp_path)]))


def test_included_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text("# what runs\nalpha==1.0\n")
    (tmp_path / "dev.txt").write_text("-r base.txt\nbeta==2.0  # tests\n\n")
    assert [str(one) for one in read_requirements(tmp_path / "dev.txt")] == ["alpha==1.0", "beta==2.0"]
