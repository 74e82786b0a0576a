"""`pip install .`: the checkout as one package `rep`, with the command `rep`.

The folders at the top level (`clip`, `vilt`, …) become `rep.clip`, `rep.vilt`, …, and every import of one is rewritten
on the way: installed under their own names they would hide OpenAI's `clip`, and many a `config`.
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
"""Requirements that others than requirements.txt's versions meet, tried; of the rest, its versions and newer ones."""
PYTHON_INTERFACE = Path("runs", "python_interface.py")
"""What `import rep` gives."""


def under_rep(source: str) -> str:
    """A module with the imports of this repository's packages below `rep`, and names in strings such as
    "clip.modules.coop:CoOp" likewise."""
    source = re.sub(rf"^(\s*)(from|import) ({OWN})(?=[. ])", r"\1\2 rep.\3", source, flags=re.MULTILINE)
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token in reversed(tokens):
        named = re.fullmatch(rf"\"(({OWN})(\.\w+)+)(:\w+)?\"", token.string) if token.type == tokenize.STRING else None
        if named and Path(*named[1].split(".")).with_suffix(".py").is_file():  # "config.json" is no module
            (row, start), (_, end) = token.start, token.end
            lines[row - 1] = f'{lines[row - 1][:start]}"rep.{token.string[1:-1]}"{lines[row - 1][end:]}'
    return "".join(lines)


class BuildAsRep(build_py):
    """Copies the packages below `rep` instead of beside each other."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("error: expected `pip install .`; an editable install is the checkout itself, with run.py")
        for source, target in self.places().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".py":
                target.write_text(under_rep(source.read_text("utf-8")), "utf-8")
            else:
                shutil.copyfile(source, target)

    def places(self) -> dict[Path, Path]:
        """Files of the checkout, and where each belongs."""
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
