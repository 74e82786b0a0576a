"""A checkpoint against what it is used with: classes, tokenizer, options from files, and what its run recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from common.errors import CheckpointError, DataError
from engine.checkpoint import read_checkpoint
from engine.predict import load_model
from run import command_line
from runs.run_table import list_runs
from tests.conftest import Workspace, error_of
from tests.data_files import write
from tests.test_robustness import QUICK, robustness
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS

Patch = pytest.MonkeyPatch

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
    golden = Path(__file__).parent / "data" / "golden" / "arrow"
    arrow = name_classes(Path(shutil.copytree(golden, root / "arrow")), DISHES)
    options = (f"vit={workspace.backbone}", f"log_dir={root}", "exp_name=food", "test_after_fit=False", *SMALL)
    assert command_line(workspace.command(*options, task="food101", data_root=arrow)) == 0
    return root / "food_seed0" / "version_0"


@pytest.fixture(scope="module")
def coop(workspace: Workspace) -> Path:
    """The folder of a run of another method than the default one."""
    options = (f"vit={workspace.backbone}", "exp_name=agree", "prompt_type=coop", "max_epoch=1", "test_after_fit=False")
    assert command_line(workspace.command(*options)) == 0
    return workspace.results / "agree_seed0" / "version_0"


@pytest.fixture
def other_tokenizer(workspace: Workspace, tmp_path: Path) -> Path:
    """The backbone's tokenizer without its last merge."""
    folder = Path(shutil.copytree(workspace.backbone, tmp_path / "tokenizer"))
    content = json.loads((folder / "tokenizer.json").read_text())
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


# Classes


@pytest.mark.parametrize("use", ["test_only", "resume", "finetune_first", "robustness"])
def test_data_with_another_order_of_classes(
    workspace: Workspace, food: Path, tmp_path: Path, golden_arrow: Path, capsys: Any, use: str
) -> None:
    arrow = name_classes(golden_arrow, [*DISHES[:2], DISHES[3], DISHES[2], *DISHES[4:]])
    common = (f"log_dir={tmp_path}", f"vit={workspace.backbone}", *SMALL)
    best = f"load_path={food / 'best.ckpt'}"
    if use == "robustness":
        robustness(workspace, best, f"data_root={arrow}", *QUICK, status=2)
    else:
        how = {
            "test_only": ("test_only=True", best),
            "resume": (f"resume_from={food / 'last.ckpt'}", "max_epoch=2"),
            "finetune_first": ("finetune_first=True", best),
        }[use]
        assert command_line(workspace.command(*common, *how, task="food101", data_root=arrow)) == 2
    split = "test" if use in ("test_only", "robustness") else "train"
    name = "last.ckpt" if use == "resume" else "best.ckpt"
    assert (
        f"{food / name}: trained on other classes than those of {arrow / f'food101_{split}.arrow'}: "
        f"expected 'dish 2' as class 2, found 'dish 3'"
    ) in error_of(capsys)


def test_classes_without_a_name_agree_with_any(
    workspace: Workspace, food: Path, tmp_path: Path, golden_arrow: Path
) -> None:
    """The published files have no names, and a checkpoint may be older than its class names."""
    unnamed = name_classes(golden_arrow, DISHES[:2])
    for number, checkpoint in enumerate(
        [food / "best.ckpt", changed(food / "best.ckpt", tmp_path / "old.ckpt", class_names=None)]
    ):
        options = (f"load_path={checkpoint}", f"log_dir={tmp_path / str(number)}", "test_only=True")
        assert command_line(workspace.command(*options, task="food101", data_root=unnamed)) == 0


def test_a_class_name_that_stands_twice(golden_arrow: Path) -> None:
    for names, found in ((["a", "b", "a"], "a"), (["3"], "3")):  # the fourth class has no name but its number
        arrow = name_classes(golden_arrow, names)
        with pytest.raises(DataError, match=rf"food101_test\.arrow: metadata class_names: .* found '{found}' twice"):
            ArrowDataset(DATASETS["food101"], arrow, "test", 32).class_names()


# Tokenizer


@pytest.mark.parametrize("use", ["test_only", "predict", "robustness", "resume"])
def test_another_tokenizer_than_that_of_the_training(
    workspace: Workspace, coop: Path, other_tokenizer: Path, tmp_path: Path, capsys: Any, use: str
) -> None:
    option, best = f"tokenizer={other_tokenizer}", coop / "best.ckpt"
    if use == "test_only":
        assert command_line(evaluation(workspace, tmp_path, f"load_path={best}", option)) == 2
    elif use == "robustness":
        robustness(workspace, f"load_path={best}", option, *QUICK, status=2)
    elif use == "predict":
        (tmp_path / "one.jsonl").write_text('{"text": "a film"}\n')
        words = (f"input={tmp_path / 'one.jsonl'}", f"output={tmp_path / 'found.csv'}", option)
        assert command_line(["run.py", "predict", "with", f"load_path={best}", "num_workers=0", *words]) == 2
    else:
        best = coop / "last.ckpt"
        model = (f"vit={workspace.backbone}", "prompt_type=coop")
        assert command_line(workspace.command(*model, f"resume_from={best}", f"log_dir={tmp_path}", option)) == 2
    expected = f"{best}: trained with the tokenizer that comes with its backbone (fingerprint "
    assert expected in error_of(capsys)


def test_the_message_names_the_tokenizer_that_the_run_had(
    workspace: Workspace, coop: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    common = (f"vit={workspace.backbone}", "max_epoch=1", "test_after_fit=False", f"log_dir={tmp_path}", "exp_name=t")
    assert command_line(workspace.command(*common, f"tokenizer={other_tokenizer}")) == 0
    best = tmp_path / "t_seed0" / "version_0" / "best.ckpt"
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


# What is recorded, and taken from records


def test_an_evaluation_records_the_model_of_its_checkpoint(workspace: Workspace, coop: Path, tmp_path: Path) -> None:
    assert command_line(evaluation(workspace, tmp_path, f"load_path={coop / 'best.ckpt'}")) == 0
    config = json.loads((tmp_path / "e" / "version_0" / "config.json").read_text())
    expected = {"prompt_type": "coop", "memory_length": 6, "memory_depth": 2, "head": "linear"}
    expected |= {"vit": str(workspace.backbone)}
    assert {name: config[name] for name in expected} == expected
    assert [row.method for row in list_runs(tmp_path)] == ["coop"]


def test_tables_are_not_written_where_a_record_points(
    workspace: Workspace, coop: Path, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    """Only where that folder is there."""
    run = Path(shutil.copytree(coop, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    elsewhere = tmp_path / "else" / "where"
    (run / "config.json").write_text(json.dumps({**config, "missing_table_root": str(elsewhere)}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    robustness(workspace, f"load_path={run}", *QUICK)
    assert not elsewhere.parent.exists()
    assert list((tmp_path / "here" / "datasets" / "missing_tables").iterdir())
    said = f"missing_table_root: no folder at {elsewhere} here"
    assert said in capsys.readouterr().err
    elsewhere.mkdir(parents=True)
    robustness(workspace, f"load_path={run}", *QUICK)
    assert list(elsewhere.iterdir())


# Options from files


def options_file(folder: Path, **options: Any) -> str:
    path = folder / "options.json"
    path.write_text(json.dumps(options))
    return str(path)


def test_the_data_that_a_file_names_is_evaluated(workspace: Workspace, coop: Path, tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(coop, tmp_path / "run"))
    given = options_file(tmp_path, data_root=str(tmp_path / "nowhere"))
    robustness(workspace, f"load_path={run}", given, status=2)
    assert str(tmp_path / "nowhere") in error_of(capsys)


def test_the_config_of_a_run_starts_it_again(coop: Path, tmp_path: Path) -> None:
    """It has the options of sweeps too, which are refused where someone writes them."""
    assert command_line(["run.py", "with", str(coop / "config.json"), f"log_dir={tmp_path}"]) == 0
    assert (tmp_path / "agree_seed0" / "version_0" / "best.ckpt").is_file()
