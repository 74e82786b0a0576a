"""The documentation: options match config.py, links have targets, and the README links to every page."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import config
from clip.modules import method
from clip.modules.coop import CoOp
from clip.modules.interfaces import Place
from clip.modules.method import MethodOptions
from common.errors import ConfigError
from runs.check_options import is_range, resolve
from runs.help import PAGE, page
from tests.conftest import Patch
from tests.models import model_input, tiny_batch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))


def test_the_options_page_matches_config() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_has_a_target(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles], link


def examples() -> list[str]:
    """The code in docs/extending.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text("utf-8"), re.DOTALL)


def test_the_example_option_works(monkeypatch: Patch) -> None:
    """Its row and its field are matched by name; its value reaches the method."""
    field_line, row_line = examples()[1].splitlines()
    scope: dict[str, Any] = vars(config) | {"MethodOptions": MethodOptions}
    for name, base, line in (("Field", "MethodOptions", field_line), ("Row", "Options", row_line)):
        exec(f"@dataclass(frozen=True)\nclass {name}({base}):\n{line}\n", scope)
    monkeypatch.setattr(method, "MethodOptions", scope["Field"])
    values = vars(resolve({**config.DEFAULTS, "task": "mmimdb"}))
    assert scope["Row"](**values, prompt_std=0.5).method().prompt_std == 0.5
    row = next(each.metadata["option"] for each in fields(scope["Row"]) if each.name == "prompt_std")
    assert row.read("prompt_std", 1) == 1 and row.kind == config.MODEL
    with pytest.raises(ConfigError, match="prompt_std: expected a number of at least 0"):
        row.read("prompt_std", -1)


def test_the_ranges_of_a_search_are_listed() -> None:
    """In docs/sweeps.md: the options whose two values in a search are the ends of a range."""
    text = (ROOT / "docs" / "sweeps.md").read_text("utf-8")
    [listed] = re.findall(r"ends of a range, .*? for (.*?)\. Anything else", text, re.DOTALL)
    varied = [name for name, each in config.OPTIONS.items() if each.kind in (config.MODEL, config.TRAINING)]
    assert set(re.findall(r"`(\w+)`", listed)) == {name for name in varied if is_range(name, (1, 2))}


def test_the_example_method_works() -> None:
    """It is self-contained and gives the same slots as the real method of that name."""
    example = examples()[0]
    scope: dict[str, Any] = {}
    exec(example, scope)
    torch.manual_seed(0)
    theirs = scope["CoOp"](places := {"text": Place(8, 2)}, 4, MethodOptions("coop", 6, 2))
    torch.manual_seed(0)
    ours = CoOp(places, 4, MethodOptions("coop", 6, 2))
    batch = model_input(*tiny_batch(2), [0, 0])
    found, expected = (one(batch, {})["text"].inserted_BmD[0] for one in (theirs, ours))
    assert torch.equal(found, expected)


def test_the_readme_links_to_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in links(ROOT / "README.md") if not link.startswith("https://")}
    assert {path.resolve() for path in PAGES if path.name != "README.md"} <= linked
