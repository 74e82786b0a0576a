"""A split with one class leaves AUROC undefined: reported before training; later null, empty or `undefined`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run import command_line
from tests.conftest import Workspace, call, read_csv
from tests.report_files import write_arrow


def with_one_class(arrow: Path, split: str, label: int) -> Path:
    """Replaces every label in a Hateful Memes split; returns its file."""
    path = arrow / f"hatememes_{split}.arrow"
    table = pa.ipc.open_file(pa.OSFile(str(path))).read_all()
    place = table.schema.get_field_index("label")
    labels = pa.array([label] * len(table), table.schema.field("label").type)
    write_arrow(path, table.set_column(place, table.schema.field("label"), labels))
    return path


def train(workspace: Workspace, arrow: Path, *options: str) -> int:
    common = (f"vit={workspace.backbone}", "exp_name=undefined", "batch_size=2", "per_gpu_batchsize=2", "max_epoch=1")
    return command_line(workspace.command(*common, *options, task="hatememes", data_root=arrow))


def strict(path: Path) -> Any:
    """Content of a JSON file, read without support for NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path}: {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(("label", "absent"), [(0, "'hateful'"), (1, "'not hateful'")])
def test_an_undefined_validation_metric_is_refused_before_training(workspace, golden_arrow, capsys, label, absent):
    path = with_one_class(golden_arrow, "dev", label)
    assert train(workspace, golden_arrow) == 2
    said = capsys.readouterr().err
    assert f"{path}: no sample is of class {absent}, so val/auroc is undefined" in said
    assert not (workspace.results / "undefined_seed0").exists()


def test_an_undefined_test_metric_is_reported_throughout(workspace, golden_arrow, tmp_path, capsys):
    path = with_one_class(golden_arrow, "test", 1)
    assert train(workspace, golden_arrow, f"log_dir={tmp_path}") == 0
    said = capsys.readouterr()
    assert f"{path}: no sample is of class 'not hateful', so test/auroc is undefined" in said.err
    assert " ".join(["test/auroc", "undefined"]) in " ".join(said.out.split())
    folder = tmp_path / "undefined_seed0" / "version_0"
    results = strict(folder / "test_results.json")
    assert results["metrics"]["auroc"] is None and 0 <= results["metrics"]["accuracy"] <= 1
    assert [each["metrics"]["auroc"] for each in results["baselines"].values()] == [None, None]
    assert call("runs", f"log_dir={tmp_path}") == 0
    assert "undefined" in capsys.readouterr().out.splitlines()[3].split()
    options = (f"load_path={folder}", "robustness_ratios=[0,1]", "bootstrap=10", "precision=32", "num_workers=0")
    assert call("robustness", *options) == 0
    said = capsys.readouterr()
    assert f"{path}: no sample is of class 'not hateful'" in said.err and said.out.count("undefined") >= 9
    robustness = strict(folder / "robustness" / "robustness.json")
    for cell in robustness["cells"]:
        auroc = cell["metrics"]["auroc"]
        assert (auroc["mean"], auroc["n"], auroc["undefined"]) == (None, 0, len(robustness["table_seeds"]))
        assert (cell["interval"]["low"], cell["interval"]["high"]) == (None, None)
    assert robustness["by_type"]["complete"]["auroc"] is None
    assert robustness["confidence"]["complete"]["auroc"] == [None, None]
    assert robustness["confidence"]["undefined_resamples"]["complete"] == {"auroc": 10}
    rows = read_csv(folder / "robustness" / "matrix.csv")
    assert {row["auroc_mean"] for row in rows} == {""} and all(float(row["accuracy_mean"]) <= 1 for row in rows)
