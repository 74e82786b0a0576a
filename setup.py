"""`pip install .` installs the checkout as a single package `rep`, with the command `rep`.

The top-level folders (`clip`, `vilt`, …) become `rep.clip`, `rep.vilt`, …, and every import of them is rewritten during
the build: installed under their own names, they would shadow OpenAI's `clip` and any other `config` module.
"""

import io
import re
import shutil
import tokenize
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = ("clip", "common", "engine", "runs", "sensors", "vilt", "vla")
MODULES = ("config", "make_arrow", "run")
OWN = "|".join((*PACKAGES, *MODULES))
LOWEST = {"torch": "torch>=2.11", "setuptools": "setuptools<81"}
"""Ranges that replace the pins of requirements.txt; for all other packages, the pinned version is the minimum."""
PYTHON_INTERFACE = Path("runs", "python_interface.py")
"""Becomes `rep/__init__.py`."""


def under_rep(source: str) -> str:
    """Prefixes `rep.` to this repository's packages in a module's imports and in strings such as
    "clip.modules.coop:CoOp". Help and messages name the command `rep` instead of scripts of the checkout."""
    source = re.sub(r"\b(python )?make_arrow\.py\b", "rep convert", source).replace('"python", "run.py"', '"rep"')
    source = re.sub(r"\b(python )?run\.py\b(?!\")", "rep", source)  # except the name of the file itself
    source = re.sub(rf"^(\s*)(from|import) ({OWN})(?=[. ])", r"\1\2 rep.\3", source, flags=re.MULTILINE)
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token in reversed(tokens):
        named = re.fullmatch(rf"\"(({OWN})(\.\w+)+)(:\w+)?\"", token.string) if token.type == tokenize.STRING else None
        if named and Path(*named[1].split(".")).with_suffix(".py").is_file():  # skips "config.json"
            (row, start), (_, end) = token.start, token.end
            lines[row - 1] = f'{lines[row - 1][:start]}"rep.{token.string[1:-1]}"{lines[row - 1][end:]}'
    return "".join(lines)


class BuildAsRep(build_py):
    """Copies the packages into `rep` instead of to the top level."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("error: expected `pip install .`; for an editable install, use the checkout's run.py")
        for source, target in self.places().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".py":
                target.write_text(under_rep(source.read_text("utf-8")), "utf-8")
            else:
                shutil.copyfile(source, target)

    def places(self) -> dict[Path, Path]:
        """Maps each file of the checkout to its place in the build."""
        root = Path(self.build_lib, "rep")
        files = [Path("requirements.txt"), *(Path(f"{name}.py") for name in MODULES)]
        for package in PACKAGES:
            files += [path for path in Path(package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {**{file: root / file for file in files}, PYTHON_INTERFACE: root / "__init__.py"}


def requirements() -> list[str]:
    lines = Path("requirements.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return [LOWEST.get(pin.partition("==")[0], pin.replace("==", ">=")) for pin in pins]


setup(install_requires=requirements(), packages=["rep"], package_dir={"rep": "runs"}, cmdclass={"build_py": BuildAsRep})
