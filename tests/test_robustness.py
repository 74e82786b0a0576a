"""`run.py robustness`: all cells come from three passes and equal single evaluations; resuming, reuse and refusals."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.text import AT_OFFSET
from engine.checkpoint import read_checkpoint
from engine.stored_logits import LogitStore
from engine.tasks import TASKS
from engine.training import FinetuneModule
from run import command_line
from tests.conftest import LONG, Captured, Patch, Workspace, read_csv, read_json, refusal
from tests.custom_files import read_arrow
from tests.data_files import LOGIT_COLUMNS, TYPE_NAMES
from tests.report_files import edit_json
from tests.test_run import in_processes
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, load_missing_table

QUICK = ("robustness_ratios=[0,0.5]", "robustness_seeds=[0,1]", "bootstrap=20")


def draw_head(path: Path, seed: int) -> None:
    """Replaces the checkpoint at `path` by one with a random head."""
    checkpoint = torch.load(path, weights_only=True)
    weight = checkpoint["state_dict"]["mmimdb_classifier.weight"]
    generator = torch.Generator().manual_seed(seed)
    checkpoint["state_dict"]["mmimdb_classifier.weight"] = torch.randn(weight.shape, generator=generator)
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def trained(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run whose head is replaced by a random one, so that its predictions vary."""
    folder = Path(shutil.copytree(fitted, tmp_path_factory.mktemp("robust") / "version_0"))
    (folder / "test_results.json").unlink()  # otherwise a resumed run would count separately
    draw_head(folder / "best.ckpt", seed=0)
    return folder


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run for one test."""
    return Path(shutil.copytree(trained, tmp_path / "robust_seed0" / "version_0"))


def robustness(*options: str, status: int = 0) -> None:
    """Runs `run.py robustness` without task and data_root, which come from the run."""
    assert command_line(robustness_command(*options)) == status


def robustness_command(*options: str) -> list[str]:
    return ["run.py", "robustness", "with", "precision=32", "num_workers=0", "per_gpu_batchsize=4", *options]


def results_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "robustness" / "robustness.json")


def table_of(folder: Path, name: str) -> list[dict[str, str]]:
    return read_csv(folder / "robustness" / name)


def stored(folder: Path) -> pa.Table:
    return read_arrow(folder / "robustness" / "logits.arrow")


def forbid_the_model(monkeypatch: Patch) -> None:
    """Makes any use of the model fail from here on."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was touched")

    for name in ("evaluation.open_models", "robustness.make_trainer"):
        monkeypatch.setattr(f"runs.{name}", fail)


def test_every_cell_equals_an_evaluation_with_test_only(workspace: Workspace, fresh: Path, tmp_path: Path) -> None:
    """Within 1e-6, for saved tables, newly drawn ones and one in the published format."""
    tables = tmp_path / "tables"
    tables.mkdir()
    dataset = ArrowDataset(DATASETS["mmimdb"], workspace.arrow, "test", 32)
    published = torch.arange(dataset.n_rows) % 3
    torch.save(published, tables / "mmimdb_test_missing_image_05.pt")
    best = f"load_path={fresh / 'best.ckpt'}"
    common = (f"missing_table_root={tables}", "both_ratio=0.3", best)
    ratios, seeds = (0, 0.5, 0.7, 1), (0, 3)
    robustness(*common, f"robustness_ratios={list(ratios)}", f"robustness_seeds={list(seeds)}",
               "num_workers=1", "bootstrap=0")  # fmt: skip
    cells = {(cell["missing_type"], cell["ratio"]): cell["metrics"] for cell in results_of(fresh)["cells"]}
    assert list(cells) == [(kind, ratio) for kind in ("text", "image", "both") for ratio in ratios]
    compared = [("text", 0.7), ("image", 0.5), ("both", 0.5)]
    values = set()
    for kind, ratio in compared:
        for place, seed in enumerate(seeds):
            name = f"cell_{kind}_{ratio}_{seed}"
            options = (f"test_type={kind}", f"test_ratio={ratio}", f"seed={seed}", f"test_exp_name={name}")
            assert command_line(workspace.command("test_only=True", *common, *options)) == 0
            tested = read_json(workspace.results / name / "version_0" / "test_results.json")
            found = {metric: figures["values"][place] for metric, figures in cells[kind, ratio].items()}
            expected = {metric: value for metric, value in tested["metrics"].items() if metric != "loss"}
            assert found == pytest.approx(expected, abs=1e-6), name
            values.add(found["f1_macro"])
            offset = read_checkpoint(fresh / "best.ckpt").offset
            assert AT_OFFSET in found and tested["offset"] == results_of(fresh)["offset"] == offset
    assert len(values) > 3, "the cells should differ, or their equality says little"
    published_cell = cells["image", 0.5]["f1_macro"]
    assert published_cell["std"] == 0.0  # one table for all seeds


def test_the_stored_logits_identify_their_samples(workspace: Workspace, fresh: Path) -> None:
    robustness(f"load_path={fresh / 'best.ckpt'}", *QUICK)
    table = stored(fresh).to_pydict()
    films = read_arrow(workspace.arrow / "mmimdb_test.arrow").to_pylist()
    expected = [(row, number, film) for row, film in enumerate(films) for number in range(len(film["plots"]))]
    assert max(number for _, number, _ in expected) > 0, "no film with several plots"
    assert table["sample"] == list(range(len(expected)))
    assert table["row"] == [row for row, _, _ in expected]
    assert table["text_number"] == [number for _, number, _ in expected]
    assert table["id"] == [film["image_id"] for _, _, film in expected]
    assert table["label"] == [film["label"] for _, _, film in expected]
    logits = [np.array(table[name]) for name in LOGIT_COLUMNS]
    assert all(values.shape == (len(expected), 23) and np.isfinite(values).all() for values in logits)
    assert all(np.abs(logits[0] - other).max() > 1e-3 for other in logits[1:])
    for row in {row for row, number, _ in expected if number}:  # plots of one film differ, its poster does not
        same = [place for place, found in enumerate(table["row"]) if found == row]
        assert np.allclose(logits[1][same[0]], logits[1][same[1]], atol=1e-5)
        assert not np.allclose(logits[2][same[0]], logits[2][same[1]], atol=1e-5)
    description = json.loads(stored(fresh).schema.metadata[b"rep"])
    assert description["format"] == 1 and description["task"] == "mmimdb" and description["precision"] == "32-true"
    assert description["arrow_file"] == "mmimdb_test.arrow" and len(description["arrow_sha256"]) == 64
    assert description["checkpoint_sha256"] == results_of(fresh)["checkpoint_sha256"]


def test_the_result_files_agree_with_the_stored_logits(fresh: Path, tmp_path: Path) -> None:
    """Every number is computed again from logits.arrow and the missing tables, with the statistics module."""
    root = tmp_path / "tables"
    options = ("robustness_ratios=[0,0.3,1.0]", "robustness_seeds=[5,2,9]", "robustness_both_ratios=[0.5,0.2]")
    robustness(f"load_path={fresh / 'best.ckpt'}", f"missing_table_root={root}", *options, "bootstrap=30")
    results, table = results_of(fresh), stored(fresh).to_pydict()
    assert results["format"] == 1 and results["split"] == "test" and results["checkpoint"] == "best.ckpt"
    assert (results["method"], results["exp_name"], results["train_seed"]) == ("rep", "fitted", 0)
    assert results["train_pattern"] == {"missing_type": "both", "ratio": 0.7, "both_ratio": 0.5}
    assert results["table_seeds"] == [5, 2, 9] and results["metric"] == "f1_macro"
    assert results["class_names"] == list(DATASETS["mmimdb"].class_names or ())
    logits = [torch.tensor(table[name]) for name in LOGIT_COLUMNS]
    labels, rows = torch.tensor(table["label"]), table["row"]
    metrics = TASKS["mmimdb"].metrics
    kinds = [("text", 0.5), ("image", 0.5), ("both", 0.2), ("both", 0.5)]  # both_ratio given for `both` alone
    assert [(cell["missing_type"], cell["both_ratio"], cell["ratio"]) for cell in results["cells"]] == [
        (kind, both_ratio, ratio) for kind, both_ratio in kinds for ratio in (0.0, 0.3, 1.0)
    ]
    by_cell, matrix = table_of(fresh, "cells.csv"), table_of(fresh, "matrix.csv")
    for cell, line in zip(results["cells"], matrix, strict=True):
        pattern = (cell["missing_type"], cell["ratio"], cell["both_ratio"])
        tables = [load_missing_table(root, "mmimdb", "test", MissingPattern(*pattern, seed), 13) for seed in (5, 2, 9)]
        expected = [
            metrics(torch.stack([logits[found[row]][n] for n, row in enumerate(rows)]), labels) for found in tables
        ]
        for metric in expected[0]:
            figures, values = cell["metrics"][metric], [one[metric] for one in expected]
            assert figures["values"] == pytest.approx(values, abs=1e-12)
            assert figures["mean"] == pytest.approx(statistics.fmean(values)) == float(line[f"{metric}_mean"])
            assert figures["std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
            assert figures["std"] == float(line[f"{metric}_std"])
        assert cell["image_available"] == pytest.approx(np.mean([np.mean(found != 2) for found in tables]))
        assert cell["text_available"] == pytest.approx(np.mean([np.mean(found != 1) for found in tables]))
        assert float(line["image_available"]) == pytest.approx(100 * cell["image_available"], abs=1e-5)
        assert line["n_seeds"] == "3"
        for seed, value in zip((5, 2, 9), cell["metrics"]["f1_macro"]["values"], strict=True):
            row = by_cell.pop(0)
            assert (row["missing_type"], float(row["ratio"]), float(row["both_ratio"])) == pattern
            assert (int(row["table_seed"]), int(row["samples"]), float(row["f1_macro"])) == (seed, len(rows), value)
    assert not by_cell
    untouched = [cell["metrics"] for cell in results["cells"] if cell["ratio"] == 0]
    assert all(cell == untouched[0] and cell["f1_macro"]["std"] == 0.0 for cell in untouched)
    for name, of_type in zip(TYPE_NAMES, logits, strict=True):
        found, expected_of_type = results["by_type"][name], metrics(of_type, labels)
        assert {metric: found[metric] for metric in expected_of_type} == pytest.approx(expected_of_type, abs=1e-12)
    assert untouched[0]["f1_macro"]["mean"] == results["by_type"]["complete"]["f1_macro"]
    assert [(row["type_name"], row["class"], int(row["support"])) for row in table_of(fresh, "per_class.csv")] == [
        (row["type"], row["class"], row["support"]) for row in results["per_class"]
    ]
    assert len(results["per_class"]) == 3 * 23 and (results["confusions"], results["roc"]) == ([], {})
    assert not (fresh / "robustness" / "roc.csv").exists()


def test_adding_ratios_and_seeds_does_not_run_the_model(fresh: Path, monkeypatch: Patch, capsys: Captured) -> None:
    best = f"load_path={fresh / 'best.ckpt'}"
    robustness(best, *QUICK)
    assert "encoding 3 of 3: image missing" in capsys.readouterr().err
    before = results_of(fresh)["cells"]
    forbid_the_model(monkeypatch)
    robustness(best, "robustness_ratios=[0,0.25,0.5]", "robustness_seeds=[0,1,2]", "bootstrap=0")
    assert "uses the stored logits" in capsys.readouterr().err
    after = {(cell["missing_type"], cell["ratio"]): cell["metrics"]["f1_micro"] for cell in results_of(fresh)["cells"]}
    assert len(after) == 9 and all(len(figures["values"]) == 3 for figures in after.values())
    for cell in before:
        assert after[cell["missing_type"], cell["ratio"]]["values"][:2] == cell["metrics"]["f1_micro"]["values"]
    described = {"level": 0.95, "resamples": 0, "undefined_resamples": {}}
    assert results_of(fresh)["confidence"] == described | {name: {} for name in TYPE_NAMES}


@pytest.mark.parametrize("damage", ["not", "cut", "of another checkpoint"])
def test_an_interrupted_run_continues_after_the_finished_missing_types(fresh, encoded, monkeypatch, capsys, damage):
    """Unless the partial file is damaged or belongs to another checkpoint."""
    write = LogitStore.write

    def stop(self: LogitStore, logits: dict[str, torch.Tensor]) -> None:
        if len(logits) == 3:
            raise KeyboardInterrupt
        write(self, logits)

    command = robustness_command(f"load_path={fresh / 'best.ckpt'}", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(LogitStore, "write", stop)
        assert command_line(command) == 130
    (part,) = (fresh / "robustness").iterdir()
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-200])
    elif damage == "of another checkpoint":
        draw_head(fresh / "best.ckpt", seed=1)
    capsys.readouterr()
    assert command_line(command) == 0
    said = capsys.readouterr().err
    assert said.count("encoding ") == (1 if damage == "not" else 3) and (f"{part}: " in said) == (damage != "not")
    assert not part.exists()
    assert stored(fresh).equals(stored(encoded)) == (damage != "of another checkpoint")


def test_a_store_of_another_checkpoint_is_refused_until_it_is_deleted(encoded: Path, capsys: Captured) -> None:
    best, store, old = encoded / "best.ckpt", encoded / "robustness" / "logits.arrow", results_of(encoded)
    draw_head(best, seed=1)
    new_sha256 = read_checkpoint(best).sha256
    said = refusal(robustness_command(f"load_path={best}", *QUICK), capsys)
    facts = (f"{store}: ", "checkpoint (sha256)", new_sha256[:12], old["checkpoint_sha256"][:12], "delete the file")
    assert all(fact in said for fact in facts), said
    assert results_of(encoded) == old
    store.unlink()
    robustness(f"load_path={best}", *QUICK)
    assert results_of(encoded)["checkpoint_sha256"] == new_sha256
    assert results_of(encoded)["by_type"] != old["by_type"]


def rewrite(path: Path, compression: str | None = None, times: int = 1, **changes: Any) -> None:
    """Changes columns of a logits.arrow (None removes one) or its `metadata`, and repeats its rows `times` times."""
    table = pa.concat_tables([read_arrow(path)] * times).combine_chunks()
    metadata = changes.pop("metadata", table.schema.metadata)
    columns = {name: table[name] for name in table.column_names} | changes
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    table = table.replace_schema_metadata(metadata)
    path.unlink()  # not overwritten, since it is memory-mapped
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)


def with_narrow_row(table: pa.Table) -> dict[str, Any]:
    rows = [row[: 5 if place == 4 else None] for place, row in enumerate(table["logits_complete"].to_pylist())]
    return {"logits_complete": pa.array(rows, pa.list_(pa.float32()))}


FOREIGN = "expected logits stored by `run.py robustness`"
DAMAGES: dict[str, tuple[Callable[[pa.Table], dict[str, Any]], str]] = {
    "foreign": (lambda table: {"metadata": {}}, FOREIGN),
    "format": (
        lambda table: {"metadata": {"rep": table.schema.metadata[b"rep"].replace(b'"format": 1', b'"format": 2')}},
        FOREIGN,
    ),
    "column": (lambda table: {"logits_complete": None}, "logits_complete"),
    "names": (lambda table: {"id": table["id"].cast(pa.binary())}, f"{FOREIGN}: id: expected string, found binary"),
    "width": (with_narrow_row, "logits_complete: expected 23 numbers, found others in row 4"),
    "compressed": (
        lambda table: {"compression": "zstd", "times": 50},
        "not readable as stored logits: it is compressed",
    ),
}


@pytest.mark.parametrize("how", [*DAMAGES, "truncated"])
def test_a_damaged_or_foreign_store_is_refused(encoded: Path, capsys: Captured, how: str) -> None:
    path, message = encoded / "robustness" / "logits.arrow", "not readable as stored logits: "
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        change, message = DAMAGES[how]
        rewrite(path, **change(read_arrow(path)))
    error = refusal(robustness_command(f"load_path={encoded / 'best.ckpt'}", *QUICK), capsys)
    assert error.startswith(f"error: {path}: ") and message in error and "; delete the file" in error


@pytest.fixture(scope="module")
def encoded_once(workspace: Workspace, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("encoded") / "version_0"))
    robustness(f"load_path={folder / 'best.ckpt'}", *QUICK)
    return folder


@pytest.fixture
def encoded(encoded_once: Path, tmp_path: Path) -> Path:
    """A copy of a run with robustness results, for one test."""
    return Path(shutil.copytree(encoded_once, tmp_path / "encoded" / "version_0"))


def test_a_later_call_adds_its_cells_and_computes_all_with_its_seeds(encoded: Path, capsys: Captured) -> None:
    """The same as in one call, in the order of the dataset's missing types; each in its place on the terminal."""
    best, few = f"load_path={encoded / 'best.ckpt'}", ("robustness_seeds=[3]", "bootstrap=0")
    robustness(best, "robustness_types=[both,text]", "robustness_ratios=[0.7]", "both_ratio=0.3", *few)
    found, said = results_of(encoded), capsys.readouterr().out.splitlines()
    names = [(cell["missing_type"], cell["ratio"], cell["both_ratio"]) for cell in found["cells"]]
    text = [("text", ratio, both) for ratio, both in ((0, 0.5), (0.5, 0.5), (0.7, 0.3))]
    both = [("both", 0.7, 0.3), ("both", 0, 0.5), ("both", 0.5, 0.5)]
    assert names == [*text, ("image", 0, 0.5), ("image", 0.5, 0.5), *both]
    rows = [re.split(r"\s{2,}", line.strip()) for line in said]
    assert ["missing", "text", "image", "both 0.3", "both 0.5"] in rows
    [row, *_] = [row for row in rows if row[0] == "70 %"]
    assert row[2] == row[4] == "–" and len(row) == 5
    assert {len(cell["metrics"]["f1_macro"]["values"]) for cell in found["cells"]} == {1}, "with the new seed alone"
    assert not any("interval" in cell for cell in found["cells"])
    (encoded / "robustness" / "robustness.json").unlink()
    robustness(best, "robustness_ratios=[0,0.5]", *few)
    at_once = {str(cell): cell for cell in results_of(encoded)["cells"]}
    assert len(at_once) == 6 and all(cell in found["cells"] for cell in at_once.values())


def test_new_results_replace_all_old_files_and_no_others(encoded: Path) -> None:
    folder = encoded / "robustness"
    (folder / "roc.csv").write_text("of another dataset")
    (folder / "mine").mkdir()
    logits = (folder / "logits.arrow").stat()
    (folder / "robustness.json").write_text("{}")  # unreadable
    robustness(f"load_path={encoded / 'best.ckpt'}", "robustness_ratios=[0.5]", "bootstrap=0")
    names = {"logits.arrow", "robustness.json", "cells.csv", "matrix.csv", "per_class.csv", "mine"}
    assert {path.name for path in folder.iterdir()} == names
    assert len(results_of(encoded)["cells"]) == len(table_of(encoded, "matrix.csv")) == 3
    assert (folder / "logits.arrow").stat().st_mtime_ns == logits.st_mtime_ns


def test_another_test_set_precision_or_tokenizer_is_refused(workspace, encoded, tmp_path, capsys):
    best = f"load_path={encoded / 'best.ckpt'}"
    assert "stored logits of another precision: expected bf16-mixed, found 32-true; " in refusal(
        robustness_command(best, "precision=bf16"), capsys
    )
    assert f"stored logits of another tokenizer: expected {workspace.backbone}, found None; " in refusal(
        robustness_command(best, f"tokenizer={workspace.backbone}"), capsys
    )
    other = Path(shutil.copytree(workspace.arrow, tmp_path / "arrow"))
    with (other / "mmimdb_test.arrow").open("r+b") as file:  # one bit of one poster
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    assert "stored logits of another test set (sha256 of the arrow file): expected " in refusal(
        robustness_command(best, f"data_root={other}"), capsys
    )
    moved = Path(shutil.copytree(workspace.arrow, tmp_path / "moved"))
    robustness(best, f"data_root={moved}", *QUICK)  # the same file in another place


def test_runs_that_differ_only_in_seed_share_a_column(encoded: Path, tmp_path: Path, capsys: Captured) -> None:
    """Other runs have their own columns, even with the same name; a resumed run counts once."""
    folders = {}
    robust, first = {"exp_name": "robust"}, "x/robust_seed0/version_0/last.ckpt"
    described: dict[str, dict[str, Any]] = {
        "robust_seed0/version_0": {**robust, "seed": 0},
        "robust_seed0/version_1": {**robust, "seed": 0, "resume_from": first},
        "robust_seed1/version_0": {**robust, "seed": 1, "num_workers": 1},
        "robust_seed3/version_0": {**robust, "seed": 3, "weight_decay": 0.5},
        "other_seed4/version_0": {"exp_name": "other", "seed": 4, "prompt_type": "mmp"},
    }
    for name, options in described.items():
        folder = Path(shutil.copytree(encoded, tmp_path / "runs" / name))
        shutil.rmtree(folder / "robustness")
        edit_json(folder, "config.json", **options)
        draw_head(folder / "best.ckpt", options["seed"])
        folders[options["seed"]] = folder
    unfinished = tmp_path / "runs" / "robust_seed2" / "version_0"
    unfinished.mkdir(parents=True)
    shutil.copy(folders[3] / "config.json", unfinished)
    capsys.readouterr()
    robustness(f"load_path={tmp_path / 'runs'}", *QUICK)
    said = capsys.readouterr()
    assert f"left out for lack of a checkpoint: {unfinished}\n" in said.err
    assert said.err.count("encoding 1 of 3") == 4 and said.err.count(", precision 32-true") == 1, "the same for all"
    assert not (folders[0].parent / "version_0" / "robustness").exists(), "its training went on in version_1"
    results = {seed: results_of(folder) for seed, folder in folders.items()}
    assert {seed: found["train_seed"] for seed, found in results.items()} == {seed: seed for seed in folders}
    lines = [re.split(r"\s{2,}", line.strip()) for line in said.out.splitlines()]
    place = next(number for number, cells in enumerate(lines) if cells[0] == "method")
    assert lines[place] == ["method", "mmp", "rep weight_decay=0.02", "rep weight_decay=0.5"]
    assert lines[place + 2 : place + 6] == [
        ["name", "other", "robust", "robust"],
        ["trained at", *["70 % both"] * 3],
        ["seeds", "4", "0, 1", "3"],
        ["± over", "2 missing tables", "2 training seeds", "2 missing tables"],
    ]
    expected, chance = [], f"{results[0]['baselines']['chance']['metrics']['f1_macro']:.4f}"
    for number, cell in enumerate(results[0]["cells"]):
        by_seed = {seed: found["cells"][number]["metrics"]["f1_macro"]["values"] for seed, found in results.items()}
        both = [statistics.fmean(by_seed[0]), statistics.fmean(by_seed[1])]
        shown = [f"{statistics.fmean(v):.4f} ± {statistics.stdev(v):.4f}" for v in (by_seed[4], both, by_seed[3])]
        expected.append([f"{100 * cell['ratio']:g} %", *shown])
    shown_cells = [cells[-4:] for cells in lines[place + 6 :] if len(cells) >= 4]
    assert shown_cells[: len(expected)] == expected  # then those at the offset
    assert any(line == ["each class with probability 1/2: f1_macro " + chance] for line in lines)


def test_the_matrix_of_one_checkpoint_is_printed(encoded: Path, capsys: Captured, monkeypatch: Patch) -> None:
    forbid_the_model(monkeypatch)
    robustness(f"load_path={encoded / 'best.ckpt'}", *QUICK, "robustness_both_ratios=[0.2,0.5]")
    results = results_of(encoded)
    said = capsys.readouterr().out
    assert f"robustness of {encoded / 'best.ckpt'} (sha256 {results['checkpoint_sha256'][:12]})" in said
    assert f"{results['samples']} samples; f1_macro, mean ± std over missing tables (seeds 0, 1)" in said
    lines = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    kinds = ["text", "image", "both 0.2", "both 0.5"]
    places = [place for place, line in enumerate(lines) if line == ["missing", *kinds]]
    assert [lines[place - 2][0] for place in places[1:]] == ["95 % interval over test samples:", f"{AT_OFFSET}:"]

    def estimate(cell: dict[str, Any], metric: str) -> str:
        return f"{cell['metrics'][metric]['mean']:.4f} ± {cell['metrics'][metric]['std']:.4f}"

    for place, cell_text in zip(
        places,
        (
            lambda cell: estimate(cell, "f1_macro"),
            lambda cell: f"{cell['interval']['low']:.4f} to {cell['interval']['high']:.4f}",
            lambda cell: estimate(cell, AT_OFFSET),
        ),
        strict=True,
    ):
        for line, ratio in zip(lines[place + 2 :], ("0 %", "50 %"), strict=False):
            of_ratio = [cell for cell in results["cells"] if f"{100 * cell['ratio']:g} %" == ratio]
            assert line == [ratio, *map(cell_text, of_ratio)]


def test_checkpoints_of_different_datasets_or_test_sets(workspace, encoded, golden_arrow, tmp_path, capsys):
    food = Path(shutil.copytree(encoded, tmp_path / "food" / "version_0"))
    shutil.rmtree(food / "robustness")
    content = torch.load(food / "best.ckpt", weights_only=True)
    head = {name: content["state_dict"].pop(f"mmimdb_classifier.{name}") for name in ("weight", "bias")}
    content["state_dict"] |= {
        f"food101_classifier.{name}": value.repeat_interleave(5, 0)[:101] for name, value in head.items()
    }
    content["rep"] |= {"task": "food101", "class_names": [f"dish {number}" for number in range(101)]}
    torch.save(content, food / "best.ckpt")
    edit_json(food, "config.json", task="food101", data_root=str(golden_arrow))
    both = f"load_path=['{encoded / 'best.ckpt'}', '{food / 'best.ckpt'}']"
    files = (
        f"{workspace.arrow / 'mmimdb_test.arrow'} for {encoded}",
        f"{golden_arrow / 'food101_test.arrow'} for {food}",
    )
    said = refusal(robustness_command(both), capsys)
    assert all(fact in said for fact in ("load_path: expected checkpoints with the same dataset", *files)), said
    other = ("task_finetune_mmimdb", f"load_path={food / 'best.ckpt'}", f"data_root={workspace.arrow}")
    assert f"task: mmimdb contradicts the checkpoint {food / 'best.ckpt'}" in refusal(
        robustness_command(*other), capsys
    )
    folders, few = f"load_path=['{encoded}','{food}']", ("robustness_ratios=0.7", "robustness_seeds=0", "bootstrap=0")
    robustness(folders, *few)
    tables = capsys.readouterr().out.split("robustness of ")[1:]
    assert ["mmimdb test" in tables[0], "food101 test" in tables[1], len(tables)] == [True, True, 2]
    elsewhere = Path(shutil.copytree(encoded, tmp_path / "other" / "version_0"))
    shutil.rmtree(elsewhere / "robustness")
    edit_json(elsewhere, "config.json", data_root=str(golden_arrow))
    assert "error: load_path: expected checkpoints with the same test set, found " in refusal(
        robustness_command(f"load_path=['{encoded}','{elsewhere}']"), capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "load_path: expected a checkpoint, a list of them, or a folder of runs"),
        (["load_path={top}/nowhere.ckpt"], "load_path: expected a checkpoint file or a folder of runs, found nothing"),
        (["load_path={top}/empty"], "load_path: expected runs with a best.ckpt in {top}/empty, found no run"),
        (["load_path={top}/half"], "found runs without one: {top}/half/rep_seed0/version_0"),
        (["load_path=[{run}/best.ckpt,{run}]"], "load_path: expected one checkpoint per folder"),
        (["load_path=['{run}/best.ckpt','{run}']"], "load_path: expected one checkpoint per folder"),
        (["load_path=['{run}','{run}']"], "load_path: expected each value once, found {run} twice"),
        (["load_path=['{run}/best.ckpt','{run}/again.ckpt']"], "load_path: expected one checkpoint per folder"),
        (["load_path={run}", "data_root={top}/nowhere"], "data_root: expected mmimdb_test.arrow in {top}/nowhere"),
        (["load_path={run}", "memory_length=9"], "memory_length: 9 contradicts the checkpoint {run}/best.ckpt"),
        (["load_path={run}", "fast_dev_run=True"], "fast_dev_run: expected False, since robustness needs"),
        (["load_path={run}/config.json"], "{run}/config.json: not readable as a checkpoint: "),
        (["load_path={run}", "robustnes_types=text"], "unknown option robustnes_types; did you mean robustness_types?"),
        (["load_path={run}", "robustness_types=[text,sound]"], "expected text or image or both, found 'sound'"),
        (["load_path={run}", "robustness_ratios=[0,1.1]"], "expected a number from 0 to 1, found 1.1"),
        (["load_path={run}", "robustness_ratios=[0,0.0]"], "robustness_ratios: expected each value once, found"),
        (["load_path={run}", "robustness_seeds=[1.5]"], "expected an integer of at least 0, found 1.5"),
        (["load_path={run}", "bootstrap=-1"], "bootstrap: expected an integer of at least 0, found -1"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused(encoded: Path, tmp_path: Path, capsys, options: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "rep_seed0" / "version_0").mkdir(parents=True)
    shutil.copy(encoded / "config.json", tmp_path / "half" / "rep_seed0" / "version_0")
    shutil.copy(encoded / "best.ckpt", encoded / "again.ckpt")
    places = {"top": tmp_path, "run": encoded}
    command = robustness_command(*(option.format(**places) for option in options))
    assert message.format(**places) in refusal(command, capsys)


def test_an_unwritable_folder_is_refused(fresh: Path, capsys) -> None:
    (fresh / "robustness").write_text("a file in the way")
    assert f"error: {fresh / 'robustness'}: cannot store results there: File exists" in refusal(
        robustness_command(f"load_path={fresh / 'best.ckpt'}", *QUICK), capsys
    )


def test_a_checkpoint_may_be_given_without_its_run(workspace: Workspace, trained: Path, tmp_path: Path, capsys) -> None:
    """As with published checkpoints, the task comes from the checkpoint and the data from the command line."""
    path = Path(shutil.copy(trained / "best.ckpt", tmp_path / "downloaded.ckpt"))
    assert "data_root: expected the folder of the arrow files" in refusal(
        robustness_command(f"load_path={path}"), capsys
    )
    tables = f"missing_table_root={tmp_path / 'tables'}"
    robustness(f"load_path={path}", f"data_root={workspace.arrow}", tables, *QUICK)
    results = results_of(tmp_path)
    assert (results["exp_name"], results["train_seed"]) == ("downloaded", 0)
    assert results["train_pattern"] == {"missing_type": "both", "ratio": 0.7, "both_ratio": 0.5}
    assert results["checkpoint"] == "downloaded.ckpt"


@LONG
def test_two_processes_give_the_same_results(fresh: Path, encoded: Path) -> None:
    in_processes(robustness_command(f"load_path={fresh / 'best.ckpt'}", "cpu_processes=2", *QUICK))
    for name in LOGIT_COLUMNS:
        two, one = (np.array(stored(folder)[name].to_pylist()) for folder in (fresh, encoded))
        assert np.allclose(two, one, atol=1e-5)
    assert {path.name for path in (fresh / "robustness").iterdir()} == {
        path.name for path in (encoded / "robustness").iterdir()
    }


def test_a_checkpoint_replaced_while_it_is_opened_is_refused(fresh: Path, monkeypatch, capsys) -> None:
    """A training run in progress may do this."""
    check_writable = LogitStore.check_writable

    def and_replace(self: LogitStore) -> None:
        check_writable(self)
        draw_head(fresh / "best.ckpt", seed=5)

    monkeypatch.setattr(LogitStore, "check_writable", and_replace)
    monkeypatch.setattr(FinetuneModule, "test_step", None)
    assert "best.ckpt: has just been replaced by another checkpoint; start again" in refusal(
        robustness_command(f"load_path={fresh}", *QUICK), capsys
    )
