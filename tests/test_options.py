"""Every invalid option ends in one clear line and status 2, before anything expensive starts."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from config import DEFAULTS, OPTIONS, Options
from run import command_line
from runs import start, training
from runs.check_options import check, read_options
from tests.conftest import Captured, Workspace, error_line
from vilt.datasets.specs import DATASETS, SPLITS

WRONG = {
    "seed=08": "seed: expected an integer of at least 0, found '08'",
    "seed=-1": "seed: expected an integer of at least 0, found -1",
    "seed=True": "seed: expected an integer of at least 0, found True",
    "learning_rate=0": "learning_rate: expected a number above 0, found 0",
    "learning_rate=fast": "learning_rate: expected a number above 0, found 'fast'",
    "learning_rate=nan": "learning_rate: expected a number above 0, found 'nan'",
    "missing_ratio=1.5": "missing_ratio: expected a number from 0 to 1, found 1.5",
    "missing_ratio.train=-0.1": "missing_ratio.train: expected a number from 0 to 1, found -0.1",
    "test_ratio=70": "test_ratio: expected a number from 0 to 1, found 70",
    "both_ratio=2": "both_ratio: expected a number from 0 to 1, found 2",
    "missing_type=picture": "missing_type: expected text or image or both, found 'picture'",
    "missing_type=any": "missing_type: expected text or image or both, found 'any'; did you mean both?",
    "missing_type.test=none": "missing_type.test: expected text or image or both, found 'none'",
    "test_type=audio": "test_type: expected text or image or both, found 'audio'",
    "prompt_type=input": "prompt_type: expected rep or dcp or map_input or map_attention or maple or coop or msp or",
    "head=cosine": "head: expected linear or linear_by_type or dpl, found 'cosine'",
    "dpl_margins=[0.1,0.2]": "dpl_margins: expected one value, or a list of 3, found [0.1, 0.2]",
    "dpl_margins=2": "dpl_margins: expected",
    "prompt_type=none head=dpl text_windows=3": "head: expected linear with text_windows=3, found dpl",
    "dpl_contrast_weight=1": "dpl_contrast_weight: is an option of head=dpl, found head=linear",
    "prompt_type=none prompt_length=9": "prompt_length: is an option of prompt_type=mplmm or mplmm_described",
    "far=no": "far: expected True or False, found 'no'",
    "prompt_type=dcp far=False": "far: is an option of prompt_type=rep, found prompt_type=dcp",
    "prompt_type=none rep_described": "replay_depth: is an option of prompt_type=rep, found prompt_type=none",
    "replay_depth=-1": "replay_depth: expected an integer of at least 0, found -1",
    "replay_depth=1 far=False": "replay_depth: expected 0 with far=False, found 1",
    "decoupling_weight=0.1 fmb=False": "decoupling_weight: expected 0 with fmb=False, found 0.1",
    "dynamic_init=True fmb=False": "dynamic_init: expected False with fmb=False, found True",
    "prompt_type=map_attention memory_length=9": "memory_length: expected a multiple of 6 (each third has keys and",
    "memory_length=35": "memory_length: expected a positive multiple of 3",
    "memory_length=0": "memory_length: expected an integer of at least 3, found 0",
    "memory_depth=0": "memory_depth: expected an integer of at least 1, found 0",
    "batch_size=0": "batch_size: expected an integer of at least 1, found 0",
    "optim_type=lion": "optim_type: expected adamw or adam or sgd, found 'lion'",
    "missing_tables=random": "missing_tables: expected nested or published, found 'random'",
    "num_gpus=[1]": "num_gpus: expected a number, or the first GPUs as in [0] or [0,1], found [1]",
    "per_gpu_batchsize=0": "per_gpu_batchsize: expected an integer of at least 1, found 0",
    "max_epoch=1.5": "max_epoch: expected an integer of at least 1, found 1.5",
    "warmup_steps=1.5": "warmup_steps: expected a share below 1 or a number of steps, found 1.5",
    "val_check_interval=0": "val_check_interval: expected a share of an epoch above 0 and up to 1, or an integer",
    "val_check_interval=2.5": "val_check_interval: expected a share of an epoch above 0 and up to 1, or an integer",
    "decay_power=linear": "decay_power: expected a number above 0, found 'linear'",
    "decay_power=steps": "decay_power: expected a number above 0, found 'steps'",
    "decay_power=plateau": "warmup_steps: expected 0 with decay_power=plateau, which has none, found 0.1",
    "decay_power=plateau warmup_steps=0 end_lr=1e-5": "end_lr: expected 0 with decay_power=plateau",
    "network.width=64": "network: is not an option of task=mmimdb, found {'width': 64}",
    "rdn_hidden=8": "rdn_hidden: is not an option of task=mmimdb, found 8",
    "prompt_type=mora mask_readout=True": "mask_readout: is not an option of task=mmimdb, found True",
    "prompt_type=none train_pooler=True": "train_pooler: is an option of prompt_type=rep, found prompt_type=none",
    "end_lr=1": "end_lr: expected less than learning_rate=0.01, found 1",
    "precision=8": "precision: expected 32, 16, bf16 or published, found '8'",
    "num_nodes=0": "num_nodes: expected an integer of at least 1, found 0",
    "num_gpus=99": "num_gpus: expected at most ",
    "fast_dev_run=yes": "fast_dev_run: expected True or False, found 'yes'",
    "exp_name=a/b": "exp_name: expected the name of a folder, without slashes, found 'a/b'",
    "data_root=nowhere": "mmimdb_train.arrow, mmimdb_dev.arrow, mmimdb_test.arrow in nowhere, found no such folder; "
    "make it with `python make_arrow.py --dataset mmimdb --root RAW --target nowhere`",
    "data_root=": "data_root: expected the folder of the arrow files",
    "vit=ViT-Z": "vit=ViT-Z: expected one of ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px",
    "vit=nowhere": "vit: expected one of ViT-B/32",
    "vit=RN50": "vit=RN50: expected one of ViT-B/32",
    "image_size=48": "image_size: expected 32, the size that the backbone's position embeddings are for, found 48",
    "memory_depth=3": "memory_depth=3 needs more blocks than the backbone has (2 in the image tower, 2 in the text",
    "load_path=no.ckpt": "load_path: expected a checkpoint file, found nothing at no.ckpt",
    "resume_from=no.ckpt": "resume_from: expected a checkpoint file, found nothing at no.ckpt",
    "test_only=True": "test_only: expected a checkpoint to evaluate",
    "finetune_first=True": "finetune_first: expected a checkpoint to start from in load_path",
    "task=imagenet": "task: expected mmimdb or food101 or hatememes or mosi",
    "tokenizer=nowhere": "tokenizer=nowhere: not readable as a CLIP tokenizer",
    "tokenizer=/no/where": "tokenizer=/no/where: expected a CLIP tokenizer (a Hugging Face folder",
    "": "error: no task: expected one of task_finetune_mmimdb, task_finetune_food101",
    **({} if torch.cuda.is_available() else {"precision=16": "precision: expected 32 or bf16, found 16"}),
}


@pytest.mark.parametrize("option", WRONG)
def test_invalid_options_are_refused(workspace: Workspace, tmp_path: Path, capsys: Captured, option: str) -> None:
    command = workspace.command(f"vit={workspace.backbone}", f"log_dir={tmp_path / 'result'}", *option.split())
    assert command_line([word for word in command if option or not word.startswith("task_")]) == 2
    assert WRONG[option] in error_line(capsys)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("option", ["memory_depth=3", "prompt_type=none head=dpl text_windows=3"])
def test_a_model_that_cannot_be_built_is_refused_before_the_data_are_read(workspace, option, monkeypatch, capsys):
    """Reading them includes hashing, token ids and the image cache, which take long."""
    monkeypatch.setattr(training, "open_data", None)
    assert command_line(workspace.command(f"vit={workspace.backbone}", *option.split())) == 2
    assert WRONG[option] in error_line(capsys)


def test_print_config_explains_every_option(capsys: Captured) -> None:
    assert command_line(["run.py", "print_config", "with", "published", "seed=3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line[2:].partition(" = ")[0] for line in shown] == list(DEFAULTS)
    assert all(re.search(r"  # \S", line) for line in shown)
    changed = {line[2:].partition(" = ")[0] for line in shown if line.startswith("* ")}
    assert changed == {"missing_tables", "order_seed", "precision", "seed"}


def test_options_accept_the_choices_that_the_code_implements() -> None:
    from clip.modules.vision_transformer_memory import ACTIVATIONS
    from engine.optimization import OPTIMIZERS

    for option, known in (("optim_type", OPTIMIZERS), ("vit_activation", ACTIVATIONS)):
        for name in known:
            assert OPTIONS[option].read(option, name) == name
        with pytest.raises(ConfigError, match=f"expected {' or '.join(known)}, found"):
            OPTIONS[option].read(option, "none of them")


def test_options_are_read_without_torch(workspace: Workspace, tmp_path: Path) -> None:
    """Invalid options, and commands that need no model, answer at once."""
    train_command = workspace.command(f"vit={workspace.backbone}")[1:]
    commands = [
        (["print_config"], 0),
        (["runs", "with", f"log_dir={tmp_path}"], 0),
        (["report", "with", "runs=[]"], 2),
        (["predict", "with", "load_path=x.ckpt"], 2),
        (["robustness"], 2),
        ([*train_command, "learning_rat=1"], 2),
        ([*train_command, "learning_rate=0"], 2),
        ([*train_command, "far=False", "replay_depth=1"], 2),
        ([*train_command, "data_root=nowhere"], 2),
        (["sweep", *train_command, "seed=1", "data_root=nowhere"], 2),
    ]
    code = (
        "import sys, run\n"
        f"found = [run.command_line(['run.py', *command]) for command, _ in {commands}]\n"
        f"assert found == {[status for _, status in commands]}, found\n"
        "assert not {'torch', 'pytorch_lightning', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def config_with(workspace: Workspace, **changes: object) -> Options:
    config = DEFAULTS
    return check({**config, "task": "mmimdb", "data_root": str(workspace.arrow), **changes})


def test_published_defaults(workspace: Workspace) -> None:
    options = config_with(workspace)
    assert (options.batch_size, options.learning_rate, options.weight_decay) == (256, 1e-2, 2e-2)
    assert (options.max_epoch, options.warmup_steps, options.val_check_interval) == (20, 0.1, 0.2)
    assert (options.memory_length, options.memory_depth, options.prompt_type) == (36, 6, "rep")
    assert options.missing_ratio == {"train": 0.7, "val": 0.7, "test": 0.7}
    assert options.accumulation == 8


def test_one_value_serves_all_splits_and_the_test_options_override_two(workspace: Workspace) -> None:
    options = config_with(workspace, missing_ratio=0.5, missing_type="text", test_ratio=0.9, test_type="image")
    assert options.missing_ratio == {"train": 0.5, "val": 0.9, "test": 0.9}
    assert options.missing_type == {"train": "text", "val": "image", "test": "image"}


@pytest.mark.parametrize("given", ["any", "Acc+Mag"])
def test_a_split_may_have_a_missing_type_of_its_own_where_both_does_not_exist(given: str) -> None:
    """The other splits have the default of such a task."""
    config = {**DEFAULTS, "task": "pamap2", "missing_type": {**DEFAULTS["missing_type"], "train": given}}
    assert read_options(config, ["missing_type"])["missing_type"] == {"train": given, "val": "any", "test": "any"}
    with pytest.raises(ConfigError, match=r"missing_type\.train: expected .*, found 'both'; did you mean any\?"):
        of_mosi = {"task": "mosi", "missing_type": dict.fromkeys(SPLITS, "some") | {"train": "both"}}
        read_options({**config, **of_mosi}, ["missing_type"])


def test_accumulation_counts_all_processes(workspace: Workspace) -> None:
    options = config_with(workspace, num_gpus=0, cpu_processes=2, num_nodes=2, per_gpu_batchsize=8, batch_size=64)
    assert (options.processes, options.accumulation) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [  # 24 samples in batches of 4, two of them a step: 3 steps an epoch, 6 in all
        ({"warmup_steps": 1000}, ["warmup_steps=1000", "6 steps", "0.5 % of 0.01"]),
        ({"warmup_steps": 6}, ["warmup_steps=6", "6 steps", "83.33 %"]),
        ({"warmup_steps": 5}, None),
        ({"warmup_steps": 0.99}, None),
        ({"warmup_steps": 3, "max_steps": 3}, ["warmup_steps=3", "3 steps"]),
        ({"max_steps": 6}, None),
        ({"max_steps": 5}, ["only 5 optimiser steps"]),
        ({"max_steps": 7}, ["max_steps=7", "max_epoch=2", "after 6"]),
        ({"batch_size": 10}, ["batch_size=10", "8 samples", "2 × 4"]),
        ({"batch_size": 2}, ["batch_size=2", "4 samples", "1 × 4"]),
        ({"val_check_interval": 7}, ["val_check_interval=7", "6 batches"]),
        ({"val_check_interval": 6}, None),
    ],
)
def test_a_run_remarks_on_options_that_mislead(workspace, monkeypatch, changes, facts):
    """Remarks name a schedule, batch size or validation interval that is not what the options suggest."""
    common = {"num_gpus": 0, "per_gpu_batchsize": 4, "batch_size": 8, "max_epoch": 2}
    monkeypatch.setattr(start, "FEW_STEPS", 6)
    options = config_with(workspace, **{**common, **changes})
    found = start.remarks(options, DATASETS["mmimdb"], samples=24)
    assert len(found) == (facts is not None) and all(fact in found[0] for fact in facts or [])
    untrained = [replace(options, vit="random:3", prompt_type=method) for method in ("rep", "full")]
    more = [len(start.remarks(each, DATASETS["mmimdb"], samples=24)) - len(found) for each in untrained]
    assert more == [1, 0], "a remark that a frozen backbone is untrained"
