"""docs/quickstart.ipynb runs from its first cell to its last."""

from pathlib import Path
from typing import Any

from tests.conftest import Captured, Patch, read_json

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for cell in read_json(ROOT / "docs" / "quickstart.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert len(names["results"]) == 2 and all(len(found["cells"]) == 9 for found in names["results"])
    assert len(list((names["work"] / "result").glob("*/version_0/robustness/robustness.json"))) == 2
    assert "rep both 0.5 0." in printed and "image missing" in printed
    assert read_json(names["work"] / "result" / "compare.json")
