"""Prints constraints.txt for the environment that runs it: `make constraints` does so in a fresh one.

Every distribution that requirements-dev.txt brings in, directly or through others, with its exact version.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REQUIREMENTS = Path(__file__).with_name("requirements-dev.txt")
OF_ONE_PLATFORM = re.compile(r"nvidia-|cuda-|triton$")
"""What only a PyTorch with CUDA brings in, which names the exact versions itself; one without CUDA does without."""
HEADER = """\
# Exact versions of all that requirements-dev.txt brings in, also indirectly: for Linux on x86_64, Python 3.11 to 3.13.
#   pip install -r requirements.txt -c constraints.txt
# `make constraints` writes this file anew, from a fresh environment. torch is without its local version (+cpu and the
# like), so that any build of it fits. nvidia-*, cuda-* and triton are left out: a torch with CUDA pins them itself.
"""


def read_requirements(path: Path) -> Iterator[Requirement]:
    """The requirements of a file and of those that it includes with `-r`."""
    for line in path.read_text("utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from read_requirements(path.parent / line.removeprefix("-r ").strip())
        elif line:
            yield Requirement(line)


def installed(path: list[str] | None = None) -> dict[str, Distribution]:
    """Distributions of this environment, or of the folders `path`, by normalised name; the first of a name counts."""
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=sys.path if path is None else path):
        found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    return found


def needed(requirements: Iterable[Requirement], available: dict[str, Distribution]) -> dict[str, Version]:
    """Name and version of what `requirements` bring in, also indirectly, where their markers say so; sorted by name.

    Versions are public ones: without `+cpu` and the like. Packages of OF_ONE_PLATFORM are left out.

    Raises:
        KeyError: something is not installed.
    """
    found: dict[str, Version] = {}
    seen: set[tuple[str, str]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if OF_ONE_PLATFORM.match(name):
            continue
        distribution = available[name]
        found[name] = Version(Version(distribution.version).public)
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            of_this = [Requirement(line) for line in distribution.requires or ()]
            waiting += [one for one in of_this if one.marker is None or one.marker.evaluate({"extra": extra})]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    pins = needed(read_requirements(REQUIREMENTS), installed())
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in pins.items()))
