"""A checkpoint against what it is used with: classes, tokenizer, options from files, and what its run recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from common.errors import CheckpointError
from engine.checkpoint import read_checkpoint
from engine.predict import load_model
from run import command_line
from tests.conftest import GOLDEN_ARROW, Captured, Workspace, call, error_of, json_of
from tests.data_files import write
from tests.report_files import edited
from tests.test_robustness import QUICK, robustness

DISHES = [f"dish {number}" for number in range(101)]
SMALL = ("batch_size=2", "per_gpu_batchsize=2", "max_epoch=1")


def name_classes(folder: Path, names: list[str]) -> Path:
    """Gives the Food-101 files in `folder` the class names `names`."""
    for path in folder.glob("food101_*.arrow"):
        table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        write(path, table.replace_schema_metadata({"class_names": json.dumps(names)}))
    return folder


@pytest.fixture(scope="module")
def food(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Food-101 run, whose arrow files lie beside it."""
    root = tmp_path_factory.mktemp("food")
    arrow = name_classes(Path(shutil.copytree(GOLDEN_ARROW, root / "arrow")), DISHES)
    return workspace.train("food", "test_after_fit=False", *SMALL, log_dir=root, task="food101", data_root=arrow)


@pytest.fixture(scope="module")
def coop(workspace: Workspace) -> Path:
    """The folder of a run of another method than the default one."""
    return workspace.train("agree", "prompt_type=coop", "max_epoch=1", "test_after_fit=False")


@pytest.fixture
def other_tokenizer(workspace: Workspace, tmp_path: Path) -> Path:
    """The backbone's tokenizer without its last merge."""
    folder = Path(shutil.copytree(workspace.backbone, tmp_path / "tokenizer"))
    content = json_of(folder / "tokenizer.json")
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def changed(path: Path, target: Path, **described: Any) -> Path:
    """A copy of a checkpoint with other entries in its description; None leaves an entry out."""
    content = torch.load(path, weights_only=True)
    merged = {**content["rep"], **described}
    content["rep"] = {name: value for name, value in merged.items() if value is not None}
    torch.save(content, target)
    return target


def evaluation(workspace: Workspace, log_dir: Path, *options: str) -> list[str]:
    command = workspace.command("test_only=True", "test_exp_name=e", f"log_dir={log_dir}", *options)
    return [option for option in command if not option.startswith("memory_")]


@pytest.mark.parametrize("use", ["test_only", "resume", "finetune_first", "robustness"])
def test_data_with_another_order_of_classes(workspace, food, tmp_path, golden_arrow, capsys, use):
    arrow = name_classes(golden_arrow, [*DISHES[:2], DISHES[3], DISHES[2], *DISHES[4:]])
    common = (f"log_dir={tmp_path}", f"vit={workspace.backbone}", *SMALL)
    best = f"load_path={food / 'best.ckpt'}"
    how = {
        "test_only": ("test_only=True", best),
        "resume": (f"resume_from={food / 'last.ckpt'}", "max_epoch=2"),
        "finetune_first": ("finetune_first=True", best),
    }
    if use == "robustness":
        robustness(best, f"data_root={arrow}", *QUICK, status=2)
    else:
        assert command_line(workspace.command(*common, *how[use], task="food101", data_root=arrow)) == 2
    split = "test" if use in ("test_only", "robustness") else "train"
    checkpoint = food / ("last.ckpt" if use == "resume" else "best.ckpt")
    said = error_of(capsys)
    assert f"{checkpoint}: trained on other classes than those of {arrow / f'food101_{split}.arrow'}: " in said
    assert "expected 'dish 2' as class 2, found 'dish 3'" in said


def test_classes_without_a_name_agree_with_any(workspace, food, tmp_path, golden_arrow):
    """The published files have no names, and a checkpoint may be older than its class names."""
    unnamed = name_classes(golden_arrow, DISHES[:2])
    old = changed(food / "best.ckpt", tmp_path / "old.ckpt", class_names=None)
    for number, checkpoint in enumerate([food / "best.ckpt", old]):
        options = (f"load_path={checkpoint}", f"log_dir={tmp_path / str(number)}", "test_only=True")
        assert command_line(workspace.command(*options, task="food101", data_root=unnamed)) == 0


@pytest.mark.parametrize("use", ["test_only", "predict", "robustness", "resume"])
def test_another_tokenizer_than_that_of_the_training(workspace, coop, other_tokenizer, tmp_path, capsys, use):
    option, best = f"tokenizer={other_tokenizer}", coop / "best.ckpt"
    if use == "test_only":
        assert command_line(evaluation(workspace, tmp_path, f"load_path={best}", option)) == 2
    elif use == "robustness":
        robustness(f"load_path={best}", option, *QUICK, status=2)
    elif use == "predict":
        (tmp_path / "one.jsonl").write_text('{"text": "a film"}\n')
        words = (f"input={tmp_path / 'one.jsonl'}", f"output={tmp_path / 'found.csv'}", option)
        assert call("predict", f"load_path={best}", "num_workers=0", *words) == 2
    else:
        best = coop / "last.ckpt"
        model = (f"vit={workspace.backbone}", "prompt_type=coop")
        assert command_line(workspace.command(*model, f"resume_from={best}", f"log_dir={tmp_path}", option)) == 2
    assert f"{best}: trained with the tokenizer that comes with its backbone (fingerprint " in error_of(capsys)


def test_the_message_names_the_tokenizer_that_the_run_had(workspace, other_tokenizer, tmp_path):
    short = ("max_epoch=1", "test_after_fit=False", f"tokenizer={other_tokenizer}")
    best = workspace.train("t", *short, log_dir=tmp_path) / "best.ckpt"
    with pytest.raises(CheckpointError, match=f"trained with tokenizer={other_tokenizer} "):
        load_model(best)
    load_model(best, tokenizer=str(other_tokenizer))
    copied = Path(shutil.copytree(other_tokenizer, tmp_path / "copied"))
    load_model(best, tokenizer=str(copied))  # the same one elsewhere


def test_a_checkpoint_without_its_tokenizer_is_read(coop: Path, other_tokenizer: Path, tmp_path: Path) -> None:
    old = changed(coop / "best.ckpt", tmp_path / "old.ckpt", tokenizer=None)
    load_model(old, tokenizer=str(other_tokenizer))
    assert read_checkpoint(old).tokenizer is None
    for wrong in ("x", {"option": 1, "fingerprint": "ab"}, {"option": None}, {"option": None, "fingerprint": 3}):
        with pytest.raises(CheckpointError, match=r"wrong\.ckpt: .*(TokenizerUsed|option|fingerprint)"):
            read_checkpoint(changed(coop / "best.ckpt", tmp_path / "wrong.ckpt", tokenizer=wrong))


def test_tables_are_not_written_where_a_record_points(coop, tmp_path, monkeypatch, capsys):
    """Only where that folder is there."""
    run, elsewhere = Path(shutil.copytree(coop, tmp_path / "run")), tmp_path / "else" / "where"
    edited(run, "config.json", missing_table_root=str(elsewhere))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    robustness(f"load_path={run}", *QUICK)
    assert not elsewhere.parent.exists()
    assert list((tmp_path / "here" / "datasets" / "missing_tables").iterdir())
    assert f"missing_table_root: no folder at {elsewhere} here" in capsys.readouterr().err
    elsewhere.mkdir(parents=True)
    robustness(f"load_path={run}", *QUICK)
    assert list(elsewhere.iterdir())


def test_the_data_that_a_file_names_is_evaluated(coop: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"data_root": str(tmp_path / "nowhere")}))
    robustness(f"load_path={coop}", str(tmp_path / "options.json"), status=2)
    assert str(tmp_path / "nowhere") in error_of(capsys)


def test_the_config_of_a_run_starts_it_again(coop: Path, tmp_path: Path) -> None:
    """It has the options of sweeps too, which are refused where someone writes them."""
    assert command_line(["run.py", "with", str(coop / "config.json"), f"log_dir={tmp_path}"]) == 0
    assert (tmp_path / "agree_seed0" / "version_0" / "best.ckpt").is_file()
