"""The script for a GPU goes through on a CPU, with tiny sizes; its trainings are those of test_benchmarks.py."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, loop, sides


def test_the_script_for_a_gpu_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("VIT_B16", "SPEC"):  # which it changes
        monkeypatch.setattr(sides, name, getattr(sides, name))
    asked: list[dict[str, Any]] = []

    def rates(folder: Path, device: Any, epochs: int, **more: Any) -> list[tuple[float, float]]:
        assert (folder / "arrow" / "mmimdb_train.arrow").exists() and (folder / "backbone" / "config.json").exists()
        asked.append(more)
        return [(200.0, 190.0)]

    monkeypatch.setattr(loop, "rates", rates)
    monkeypatch.setattr("sys.argv", ["gpu", "--small"])
    gpu.main()
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert rows["run.py, 4"] == "190 samples/s, bare step 200: 95% (≥ 90 %)"
    assert {"training, 8, few shapes, for the first time", "training, 4, as they are", "evaluation, 8"} <= rows.keys()
    assert [more["per_gpu_batchsize"] for more in asked][:2] == [4, 8]
