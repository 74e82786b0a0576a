"""Checkpoints match the classes, tokenizer and options they are used with, and the records of their run."""

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
from tests.conftest import GOLDEN_ARROW, Captured, Workspace, call, error_line, read_json
from tests.data_files import write
from tests.report_files import edit_json
from tests.test_robustness import QUICK, robustness

DISHES = [f"dish {number}" for number in range(101)]
SMALL = ("batch_size=2", "per_gpu_batchsize=2", "max_epoch=1")


def name_classes(folder: Path, names: list[str]) -> Path:
    """Sets the class names of the Food-101 files in `folder`."""
    for path in folder.glob("food101_*.arrow"):
        table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        write(path, table.replace_schema_metadata({"class_names": json.dumps(names)}))
    return folder


@pytest.fixture(scope="module")
def food(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Food-101 run on arrow files with class names."""
    root = tmp_path_factory.mktemp("food")
    arrow = name_classes(Path(shutil.copytree(GOLDEN_ARROW, root / "arrow")), DISHES)
    return workspace.train("food", "test_after_fit=False", *SMALL, log_dir=root, task="food101", data_root=arrow)


@pytest.fixture(scope="module")
def coop(workspace: Workspace) -> Path:
    """Folder of a run with a non-default method."""
    return workspace.train("agree", "prompt_type=coop", "max_epoch=1", "test_after_fit=False")


@pytest.fixture
def other_tokenizer(workspace: Workspace, tmp_path: Path) -> Path:
    """The backbone's tokenizer without its last merge."""
    folder = Path(shutil.copytree(workspace.backbone, tmp_path / "tokenizer"))
    content = read_json(folder / "tokenizer.json")
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def changed(path: Path, target: Path, **described: Any) -> Path:
    """Copies a checkpoint with entries of its description changed; None removes an entry."""
    content = torch.load(path, weights_only=True)
    merged = {**content["rep"], **described}
    content["rep"] = {name: value for name, value in merged.items() if value is not None}
    torch.save(content, target)
    return target


def evaluation(workspace: Workspace, log_dir: Path, *options: str) -> list[str]:
    command = workspace.command("test_only=True", "test_exp_name=e", f"log_dir={log_dir}", *options)
    return [option for option in command if not option.startswith("memory_")]


@pytest.mark.parametrize("use", ["test_only", "resume", "finetune_first", "robustness"])
def test_data_with_reordered_classes_is_refused(workspace, food, tmp_path, golden_arrow, capsys, use):
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
    said = error_line(capsys)
    assert f"{checkpoint}: trained on other classes than those of {arrow / f'food101_{split}.arrow'}: " in said
    assert "expected 'dish 2' as class 2, found 'dish 3'" in said


def test_unnamed_classes_match_any_names(workspace, food, tmp_path, golden_arrow):
    """The published files have no class names, nor do older checkpoints."""
    unnamed = name_classes(golden_arrow, DISHES[:2])
    old = changed(food / "best.ckpt", tmp_path / "old.ckpt", class_names=None)
    for number, checkpoint in enumerate([food / "best.ckpt", old]):
        options = (f"load_path={checkpoint}", f"log_dir={tmp_path / str(number)}", "test_only=True")
        assert command_line(workspace.command(*options, task="food101", data_root=unnamed)) == 0


@pytest.mark.parametrize("use", ["test_only", "predict", "robustness", "resume"])
def test_a_tokenizer_other_than_the_training_one_is_refused(workspace, coop, other_tokenizer, tmp_path, capsys, use):
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
    assert f"{best}: trained with the tokenizer that comes with its backbone (fingerprint " in error_line(capsys)


def test_the_error_names_the_training_tokenizer(workspace, other_tokenizer, tmp_path):
    short = ("max_epoch=1", "test_after_fit=False", f"tokenizer={other_tokenizer}")
    best = workspace.train("t", *short, log_dir=tmp_path) / "best.ckpt"
    with pytest.raises(CheckpointError, match=f"trained with tokenizer={other_tokenizer} "):
        load_model(best)
    load_model(best, tokenizer=str(other_tokenizer))
    copied = Path(shutil.copytree(other_tokenizer, tmp_path / "copied"))
    load_model(best, tokenizer=str(copied))  # the same tokenizer in another folder


def test_a_checkpoint_without_a_recorded_tokenizer_accepts_any(
    coop: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    old = changed(coop / "best.ckpt", tmp_path / "old.ckpt", tokenizer=None)
    load_model(old, tokenizer=str(other_tokenizer))
    assert read_checkpoint(old).tokenizer is None
    for wrong in ("x", {"option": 1, "fingerprint": "ab"}, {"option": None}, {"option": None, "fingerprint": 3}):
        with pytest.raises(CheckpointError, match=r"wrong\.ckpt: .*(TokenizerUsed|option|fingerprint)"):
            read_checkpoint(changed(coop / "best.ckpt", tmp_path / "wrong.ckpt", tokenizer=wrong))


def test_missing_tables_are_not_written_to_a_recorded_folder_that_is_absent(coop, tmp_path, monkeypatch, capsys):
    """They are written there only if that folder exists; otherwise in the default folder."""
    run, elsewhere = Path(shutil.copytree(coop, tmp_path / "run")), tmp_path / "else" / "where"
    edit_json(run, "config.json", missing_table_root=str(elsewhere))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    robustness(f"load_path={run}", *QUICK)
    assert not elsewhere.parent.exists()
    assert list((tmp_path / "here" / "datasets" / "missing_tables").iterdir())
    assert f"missing_table_root: no folder at {elsewhere} here" in capsys.readouterr().err
    elsewhere.mkdir(parents=True)
    robustness(f"load_path={run}", *QUICK)
    assert list(elsewhere.iterdir())


def test_a_data_root_from_an_options_file_overrides_the_recorded_one(
    coop: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"data_root": str(tmp_path / "nowhere")}))
    robustness(f"load_path={coop}", str(tmp_path / "options.json"), status=2)
    assert str(tmp_path / "nowhere") in error_line(capsys)


def test_a_runs_config_starts_the_same_run_again(coop: Path, tmp_path: Path) -> None:
    """It includes sweep options, which are accepted from a recorded config though refused if typed."""
    assert command_line(["run.py", "with", str(coop / "config.json"), f"log_dir={tmp_path}"]) == 0
    assert (tmp_path / "agree_seed0" / "version_0" / "best.ckpt").is_file()
