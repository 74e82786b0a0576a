"""Text, audio and vision through run.py: both stages, resuming, robustness, prediction, tables and report."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import make_arrow
from common.errors import DataError
from engine.checkpoint import read_checkpoint
from engine.items import Item, read_items
from engine.predict import load_model
from run import command_line
from runs.export import export
from tests.conftest import Captured, call, error_line, read_csv, read_json
from tests.report_files import page_text
from tests.vla_files import mmsa_pickle, vla_splits
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.utils.write_vla import NOT_FINITE
from vla.backbone import LETTERS

pytestmark = pytest.mark.slow
SIZES = {"train": 24, "valid": 8, "test": 14}
TYPE_NAMES = (
    *("complete", "vision missing", "audio missing", "audio, vision missing"),
    *("text missing", "text, vision missing", "text, audio missing"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrow files of two corpora with different widths."""
    root = tmp_path_factory.mktemp("vla")
    widths = {"mosei": (7, 5, 6), "mosi": (7, 3, 4)}
    for seed, (name, (text, audio, vision)) in enumerate(widths.items()):
        shapes = {"text": (5, text), "audio": (6, audio), "vision": (4, vision)}
        (root / f"{name}.pkl").write_bytes(pickle.dumps(mmsa_pickle(vla_splits(SIZES, shapes, seed))))
        converted = ["--dataset", name, "--root", str(root / f"{name}.pkl"), "--target", str(root / name)]
        assert make_arrow.main(converted) == 0
    return root


def command(root: Path, *options: str, name: str | None = None, corpus: str = "mosi") -> list[str]:
    places = (f"data_root={root / corpus}", f"log_dir={root / 'result'}", f"missing_table_root={root / 'tables'}")
    small = ("batch_size=8", "per_gpu_batchsize=8", "max_epoch=2", "num_workers=0")
    task = "task_pretrain_mosei" if corpus == "mosei" else "task_finetune_mosi"
    return ["run.py", *([name] if name else []), "with", task, *places, *small, *options]


def folder_of(root: Path, name: str) -> Path:
    return root / "result" / f"{name}_seed0" / "version_0"


@pytest.fixture(scope="module")
def pretrained(root: Path) -> Path:
    """The checkpoint of stage 1."""
    sizes = ("network.width=8", "network.heads=2", "network.layers=2")
    assert command_line(command(root, *sizes, corpus="mosei")) == 0
    return folder_of(root, "pretrain_mosei") / "best.ckpt"


def finetune(root: Path, pretrained: Path, method: str, *options: str) -> Path:
    own = [f"prompt_type={method}", f"exp_name={method}", "memory_length=6", "memory_depth=2"]
    own += ["prompt_length=3"] if method.startswith("mplmm") else []
    assert command_line(command(root, *own, f"load_path={pretrained}", *options)) == 0
    return folder_of(root, method)


@pytest.fixture(scope="module")
def trained(root: Path, pretrained: Path) -> Path:
    """The run folder of REP in stage 2."""
    return finetune(root, pretrained, "rep")


@pytest.fixture(scope="module")
def measured(trained: Path, root: Path) -> Path:
    options = ["robustness_ratios=[0,0.7,1]", "robustness_seeds=[0]", "bootstrap=20", "published_f1=True"]
    options.append("robustness_types=[some,text,audio+text]")
    assert command_line(command(root, f"load_path={trained / 'best.ckpt'}", *options, name="robustness")) == 0
    return trained / "robustness"


def test_both_stages_on_data_of_ones_own(root: Path, tmp_path: Path) -> None:
    """As docs/vla.md has them, without MOSEI."""
    converted = ["--dataset", "vla", "--root", str(root / "mosi.pkl"), "--target", str(root / "own")]
    assert make_arrow.main(converted) == 0
    text = (Path(__file__).parents[1] / "docs" / "vla.md").read_text("utf-8")
    commands = re.findall(r"python run.py with (task_finetune_vla .*)", text)
    assert len(commands) == 2
    sizes = ("network.width=8", "network.heads=2", "network.layers=2"), ("memory_length=6", "memory_depth=2")
    for words, own in zip(commands, sizes, strict=True):
        words = words.replace("datasets/own", str(root / "own")).replace("result/", f"{tmp_path}/")
        assert command_line(["run.py", "with", *words.split(), *command(root)[4:], *own, f"log_dir={tmp_path}"]) == 0
    taken = (tmp_path / "rep_seed0" / "version_0" / "taken_over.txt").read_text()
    assert "taken over\t" in taken


def test_the_card_of_a_regression_model_has_no_classes(trained: Path, tmp_path: Path) -> None:
    export(trained / "best.ckpt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "CMU-MOSI, predicted from text" in card and "Predicted: sentiment." in card and "Classes" not in card


def test_stage_one_trains_the_whole_backbone_on_complete_segments(pretrained: Path) -> None:
    results = read_json(pretrained.parent / "test_results.json")
    assert results["missing"]["complete"] == SIZES["test"] and results["missing_in_training"].startswith("fixed")
    checkpoint = read_checkpoint(pretrained)
    assert checkpoint.spec.method.prompt_type == "full" and not checkpoint.spec.architecture.project_all
    metrics = ["loss", "mae", "corr", "acc7", "acc5", "acc2_non0", "f1_non0", "acc2_has0", "f1_has0"]
    assert list(results["metrics"]) == metrics


@pytest.mark.parametrize("method", ["mplmm", "none", "rep"])
def test_stage_two_loads_and_freezes_all_but_projections(root, pretrained, trained, method):
    trained = trained if method == "rep" else finetune(root, pretrained, method)
    config = read_json(trained / "config.json")
    assert config["vit"] == str(pretrained) and config["learning_rate"] == 1e-3 and config["optim_type"] == "adam"
    results = read_json(trained / "test_results.json")
    assert results["missing_in_training"].startswith("redrawn in each epoch (70 % some")
    assert sum(results["missing"][name] for name in TYPE_NAMES[1:]) == int(0.7 * SIZES["test"])
    saved = read_checkpoint(trained / "best.ckpt").state
    learner = {"rep": "model.memory_learner.", "mplmm": "model.prompt_learner."}.get(method, "none")
    own = ("model.proj_l", "model.proj_a", "model.proj_v", "mosi_classifier.", learner)
    assert all(name.startswith(own) for name in saved)
    assert saved["model.proj_a.weight"].shape == (8, 3, 1)
    lines = [line.split("\t") for line in (trained / "taken_over.txt").read_text().splitlines()]
    new, over, left = ({name for kind, name in lines if kind == group} for group in ("new", "taken over", "left"))
    assert new == set(saved) and over | left == set(read_checkpoint(pretrained).state)
    assert {name.rpartition(".")[0] for name in left} == {*(f"model.proj_{x}" for x in "lav"), "mosei_classifier"}


def test_the_best_checkpoint_has_the_lowest_error(trained: Path) -> None:
    best = torch.load(trained / "best.ckpt", weights_only=True)
    errors = [float(row["val/mae"]) for row in read_csv(trained / "metrics.csv") if row["val/mae"]]
    assert best["score"] == pytest.approx(min(errors)) and best["monitor"] == "val/mae"


def test_predictions_equal_those_of_the_test(measured: Path, root: Path, tmp_path: Path, capsys: Captured) -> None:
    dataset = ArrowDataset(open_spec("mosi", root / "mosi", ["test"]), root / "mosi", "test")
    lines = ["id,text,audio,vision"]
    for row in range(6):
        cells = [str(row)]
        for name, array in dataset[0, row].inputs.items():
            np.save(tmp_path / f"{name}{row}.npy", array.numpy())
            cells.append("" if row == 3 and name != "audio" else f"{name}{row}.npy")
        lines.append(",".join(cells))
    (tmp_path / "in.csv").write_text("\n".join(lines))
    output, checkpoint = tmp_path / "out.jsonl", measured.parent / "best.ckpt"
    given = [f"load_path={checkpoint}", f"input={tmp_path / 'in.csv'}", f"output={output}", "num_workers=0"]
    assert call("predict", "precision=32", *given) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    table = pa.ipc.open_file(pa.memory_map(str(measured / "logits.arrow"))).read_all()
    for row, one in enumerate(found):
        code = TYPE_NAMES.index("text, vision missing") if row == 3 else 0
        assert one["missing"] == TYPE_NAMES[code]
        column = f"logits_{TYPE_NAMES[code].replace(', ', '_').replace(' ', '_')}"
        assert one["value"] == pytest.approx(table[column][row].as_py()[0], abs=1e-5)
    arrays = {name: np.stack([dataset[0, row].inputs[name].numpy() for row in range(6)]) for name in LETTERS}
    arrays["text"][3] = arrays["vision"][3] = np.nan
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(arrays))
    for file in ("in.npz", "in.pkl"):
        again = ["num_workers=0", *given[::2], f"input={tmp_path / file}"]
        assert call("predict", *again) == 0
        assert [json.loads(line) for line in output.read_text().splitlines()] == found
    model = load_model(checkpoint)
    present = [{name: x[row] for name, x in arrays.items() if not np.isnan(x[row]).any()} for row in range(6)]
    own = [Item("", inputs, "mine") for inputs in present]
    for items in (own, read_items(tmp_path / "in.npz", model.dataset)):
        values = [prediction.value for prediction in model.predict_items(items, batch_size=4)]
        assert values == pytest.approx([one["value"] for one in found], abs=1e-5)
    given[2] = f"output={tmp_path / 'out.npz'}"
    assert call("embed", "precision=32", *given) == 0
    head = model._classifier.head
    with np.load(tmp_path / "out.npz") as features:
        values = head(torch.from_numpy(features["fused"]), torch.zeros(6)).flatten().tolist()
        assert values == pytest.approx([one["value"] for one in found], abs=1e-5)
        assert [features[f"present/{name}"][3] for name in ("text", "audio", "vision")] == [False, True, False]
        assert features["features/audio"][3].any() and not features["features/text"][3].any()
    given[2] = f"output={output}"
    assert "not finite" not in capsys.readouterr().err
    arrays["audio"][4, 0, 0], arrays["audio"][5, -1, 1] = np.nan, -np.inf
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
    np.save(tmp_path / "audio4.npy", arrays["audio"][4])
    np.save(tmp_path / "audio5.npy", arrays["audio"][5])
    assert call("predict", "num_workers=0", *given[::2], f"input={tmp_path / 'in.npz'}") == 0
    assert f"audio: {NOT_FINITE}: 2\n" in capsys.readouterr().err
    of_arrays = output.read_text()
    assert call("predict", "precision=32", *given) == 0
    assert output.read_text() == of_arrays
    said = capsys.readouterr().err
    assert f"audio4.npy: {NOT_FINITE}: 1\n" in said and f"audio5.npy: {NOT_FINITE}: 1\n" in said
    wide = [Item("", {"audio": np.zeros((80, arrays["audio"].shape[2]))}, "mine")]
    with pytest.raises(DataError, match=r"mine: audio: cannot be read: expected at most \d+ steps of width \d+, found"):
        list(model.predict_items(wide, batch_size=4))


def test_tables_and_report_tell_percentages_from_errors(measured, root, tmp_path, capsys):
    assert call("runs", f"log_dir={root / 'result'}") == 0
    assert "mae" in (said := capsys.readouterr().out) and "70 % some" in said
    assert call("report", f"runs={root / 'result'}", f"out={tmp_path / 'report'}") == 0
    page = page_text(tmp_path / "report")
    assert "CMU-MOSI" in page and "without text + vision" in page and "unavailable" not in page, "no pictures"
    table = read_csv(tmp_path / "report" / "tables" / "rivals_mosi.csv")
    rows = {(row["method"], row["metric"], row["source"]): row for row in table}
    ours = {metric: row["value"] for (_, metric, source), row in rows.items() if source == "ours"}
    assert set(ours) == {"acc2 non0", "F1-non0 published"}, "published_f1=True was given"
    published = rows["MPLMM", "acc2 non0", "MPLMM's Table 1"]
    assert (published["value"], published["read"]) == ("72.1400", "second-hand")
    found = read_json(measured / "robustness.json")
    best = measured.parent / "best.ckpt"
    options = (
        f"load_path={best}",
        "robustness_seeds=[0]",
        "bootstrap=20",
        "published_f1=True",
        "robustness_ratios=[0.7]",
    )
    assert command_line(command(root, *options, name="robustness")) == 0
    assert "; mae (lower is better), mean ± std over" in capsys.readouterr().out
    by_type, cells = found["by_type"], {(cell["missing_type"], cell["ratio"]): cell for cell in found["cells"]}
    assert cells["text+audio", 1.0]["metrics"]["mae"]["mean"] == by_type["text, audio missing"]["mae"]
    assert cells["text+audio", 1.0]["vision_available"] == 1 and cells["text+audio", 1.0]["text_available"] == 0
    mean = np.mean([by_type[name]["acc2_non0"] for name in TYPE_NAMES[1:]])
    assert float(ours["acc2 non0"]) == pytest.approx(100 * mean, abs=1e-3)


def test_the_published_f1_is_for_sentiment_only(capsys: Captured) -> None:
    assert command_line(["run.py", "with", "task_finetune_hatememes", "published_f1=True"]) == 2
    assert "published_f1: expected a task of text, audio and vision, found hatememes" in capsys.readouterr().err


def test_doctor_checks_a_sentiment_task(root: Path, pretrained: Path, capsys: Captured) -> None:
    own = ("memory_length=6", "memory_depth=2", f"load_path={pretrained}")
    assert command_line(command(root, *own, name="doctor")) == 0
    said = capsys.readouterr().out
    facts = (
        f"ok   backbone: {pretrained}",
        "ok   tokenizer: not needed",
        "training step: loss",
        "missing, redrawn",
    )
    assert all(fact in said for fact in facts) and "FAIL" not in said


def test_full_fine_tuning_starts_from_stage_one(root: Path, pretrained: Path, capsys: Any) -> None:
    """Data with other widths gets new projections; the size of the network is that of the checkpoint."""
    full = finetune(root, pretrained, "full", "learning_rate=1e-9", "max_epoch=1") / "best.ckpt"
    before, after = (read_checkpoint(path).state for path in (pretrained, full))
    assert after["model.proj_a.weight"].shape == (8, 3, 1)
    assert torch.allclose(before["model.proj1.weight"], after["model.proj1.weight"], atol=1e-6)
    options = (f"load_path={full}", "prompt_type=full", "network.width=16")
    assert command_line(command(root, *options)) == 2
    assert "network.width: expected 8, as in the checkpoint, found 16" in error_line(capsys)
    assert command_line(command(root, *options[:2], "network.depth=2")) == 2
    assert "network: expected width, heads, layers, found depth" in error_line(capsys)
    shapes = {"text": (5, 9), "audio": (6, 4), "vision": (4, 2)}
    (root / "other.pkl").write_bytes(pickle.dumps(mmsa_pickle(vla_splits(SIZES, shapes))))
    converted = ["--dataset", "mosi", "--root", str(root / "other.pkl"), "--target", str(root / "other")]
    assert make_arrow.main(converted) == 0
    finetune(root, full, "full", f"data_root={root / 'other'}", "max_epoch=1", "exp_name=other")
    state = read_checkpoint(folder_of(root, "other") / "best.ckpt").state
    assert state["model.proj_a.weight"].shape == (8, 4, 1), "features of the same corpus by another extraction"


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("prompt_type=rep", "load_path=None"), "load_path: expected a checkpoint of stage 1, whose"),
    (("prompt_type=dcp",), "prompt_type: expected rep or mplmm or mplmm_described or none or full"),
    (("missing_type=image",), "any or some, or several as text+audio, found 'image'"),
    (("network.width=16",), "network.width: expected 8"),
    (("network.layers=5",), "network.layers: expected 2"),
    (("finetune_first=True",), "finetune_first: expected a model whose head fits, found the backbone"),
    (("teacher=best.ckpt",), "teacher: expected a task with classes, whose probabilities it gives, found mosi"),
    (("image_cache=True",), "image_cache: is not an option of task=mosi, found True"),
    (("network.depth=1",), "network: expected width, heads, layers, found depth"),
    (("memory_depth=9",), "memory_depth=9 needs more blocks than the backbone has"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[options[0] for options, _ in WRONG])
def test_invalid_options_are_refused_in_one_line(root, pretrained, options, message, capsys):
    assert command_line(command(root, "memory_length=6", "memory_depth=2", f"load_path={pretrained}", *options)) == 2
    assert message in error_line(capsys).replace(".train", "")


def test_data_of_other_sizes_is_refused(root: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    shapes = {"text": (5, 7), "audio": (6, 3), "vision": (4, 9)}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(mmsa_pickle(vla_splits(SIZES, shapes))))
    assert make_arrow.main(["--dataset", "mosi", "--root", str(tmp_path / "f.pkl"), "--target", str(tmp_path)]) == 0
    evaluated = (f"load_path={trained / 'best.ckpt'}", "test_only=True", f"data_root={tmp_path}")
    assert command_line(command(root, *evaluated)) == 2
    assert "vision (4, 4)" in (said := capsys.readouterr().err) and "(4, 9)" in said
