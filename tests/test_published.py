"""Behaviour of the published code reproduced here: queries, tables, steps, validation intervals and command lines.

Whole trainings are in test_golden_training.py.
"""

import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip.backbone import load_backbone
from clip.published_queries import published_queries
from common.errors import ConfigError
from config import DEFAULTS, NAMED_CONFIGS, Options
from engine.checkpoint import read_checkpoint, restore_classifier
from engine.optimization import AdamW, OptimizerSettings, make_optimizer
from engine.trainer import validation_interval
from run import command_line
from runs.check_options import check, resolve
from tests.conftest import Captured, Patch, Workspace, read_csv, read_json, refusal
from tests.models import published_name, published_state
from tests.test_run import evaluate, other_backbone, results_of
from vilt.datasets.open_spec import rows_of_splits
from vilt.datasets.specs import DATASETS, SPLITS, Split
from vilt.missing_tables import MissingPattern, draw_missing_table, load_missing_table, published_patterns

ROWS: dict[Split, int] = dict(zip(SPLITS, (155, 26, 78), strict=True))
ONE_TABLE = ("robustness_seeds=0", "bootstrap=0")


def defaults(**changes: Any) -> dict[str, Any]:
    return {**DEFAULTS, "task": "mmimdb", **changes}


def test_a_published_checkpoint_gives_the_metrics_of_its_run(workspace, fitted, tmp_path, capsys):
    """Published checkpoints lack the dynamic queries; they are drawn again from the seed of the run."""
    backbone = load_backbone(str(workspace.backbone))
    trained = read_checkpoint(fitted / "best.ckpt")
    classifier = restore_classifier(trained, backbone)
    files = {}
    for seed in (0, 3):
        drawn = published_queries(backbone.architecture, trained.spec.method.slots, seed)
        queries = {published_name(f"model.memory_learner.dynamic.{name}"): query for name, query in drawn.items()}
        state = {**published_state(classifier), **queries}
        assert state.keys() == published_state(classifier).keys()
        for kind, names in (("with", state.keys()), ("without", state.keys() - queries.keys())):
            files[kind, seed] = tmp_path / f"{kind}_{seed}.ckpt"
            torch.save({"state_dict": {name: state[name] for name in names}}, files[kind, seed])

    def metrics(kind: str, seed: int, *options: str) -> dict[str, float]:
        options = (f"load_path={files[kind, seed]}", f"tokenizer={workspace.backbone}", "test_ratio=0.7", *options)
        found: dict[str, float] = evaluate(workspace, f"{kind}_{seed}", *options)["metrics"]
        return found

    for seed in (0, 3):
        before = restore_classifier(read_checkpoint(files["with", seed]), None).state_dict()
        after = restore_classifier(read_checkpoint(files["without", seed]), None, published_seed=seed).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    first = metrics("without", 0)
    assert "dynamic queries drawn as in its run, with seed 0" in capsys.readouterr().err
    assert first == metrics("with", 0)
    assert metrics("without", 3, "published_seed=3") == metrics("with", 3)
    assert metrics("with", 3)["loss"] != metrics("with", 0)["loss"]

    other = other_backbone(workspace, tmp_path)
    error = refusal(workspace.command(f"vit={other}", f"load_path={files['without', 0]}"), capsys)
    assert f"its backbone differs from vit={other} in " in error and "image_encoder.proj" in error
    alone = tmp_path / "alone" / "published.ckpt"  # stored logits depend on the seed too
    alone.parent.mkdir()
    shutil.copy(files["without", 3], alone)
    cells = (f"tokenizer={workspace.backbone}", "robustness_types=text", "robustness_ratios=0.7", *ONE_TABLE)
    robustness = workspace.command(f"load_path={alone}", *cells, name="robustness")
    assert command_line([*robustness, "published_seed=3"]) == 0
    assert command_line(robustness) == 2
    assert "published_seed: expected 0, found 3" in capsys.readouterr().err


def tables_of_one_generator(patterns: list[MissingPattern], rows: list[int]) -> list[list[int]]:
    """Tables as the published code draws them: one global generator for the splits in turn."""
    random.seed(patterns[0].seed)
    tables = []
    for pattern, samples in zip(patterns, rows, strict=True):
        table = [0] * samples
        chosen = random.sample(range(samples), int(samples * pattern.ratio))
        for row in chosen:
            table[row] = 2 if pattern.missing_type == "image" else 1
        if pattern.missing_type == "both":
            for row in random.sample(chosen, int(len(chosen) * pattern.both_ratio)):
                table[row] = 2
        tables.append(table)
    return tables


@pytest.mark.parametrize("missing_type", ["text", "image", "both"])
@pytest.mark.parametrize(("ratios", "seed"), [((0.7, 0.7, 0.7), 0), ((0.9, 0.0, 0.5), 3), ((0.0, 1.0, 0.3), 1)])
def test_published_tables_of_the_splits_are_drawn_in_turn(tmp_path, missing_type, ratios, seed):
    ratio_of = dict(zip(SPLITS, ratios, strict=True))
    given = {split: MissingPattern(missing_type, ratio_of[split], 0.5, seed, "published") for split in SPLITS}
    patterns = published_patterns(given, ROWS)
    expected = tables_of_one_generator(list(given.values()), list(ROWS.values()))
    for split, table in zip(SPLITS, expected, strict=True):
        for _ in range(2):  # drawn, then read
            assert load_missing_table(tmp_path, "mmimdb", split, patterns[split], ROWS[split]).tolist() == table
    tables = [
        draw_missing_table("mmimdb", "train", MissingPattern(missing_type, 0.7, 0.5, seed, drawing), 155)
        for drawing in ("nested", "published")
    ]
    assert not np.array_equal(tables[0], tables[1])


def test_published_test_tables_depend_on_the_training_pattern(tmp_path: Path) -> None:
    tables = []
    for ratio in (0.7, 0.5):
        given = {split: MissingPattern("both", 0.7, 0.5, 0, "published") for split in SPLITS}
        given["train"] = replace(given["train"], ratio=ratio)
        tables.append(load_missing_table(tmp_path, "mmimdb", "test", published_patterns(given, ROWS)["test"], 78))
    assert len(list(tmp_path.iterdir())) == 2 and not np.array_equal(tables[0], tables[1])


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_run_and_its_robustness_use_the_published_tables(workspace: Workspace, tmp_path: Path, share: float) -> None:
    """The table of another test pattern is the one that the published code draws after training's and validation's."""
    tables, log_dir = f"missing_table_root={tmp_path / 'tables'}", tmp_path / "result"
    published = ("published", f"both_ratio={share}", tables)
    folder = workspace.train("as_published", *published, log_dir=log_dir)
    assert results_of(folder)["missing_pattern"]["drawing"] == "published"
    rows = rows_of_splits(DATASETS["mmimdb"], workspace.arrow)
    options = ("test_ratio=0.4", "test_type=text", f"load_path={folder / 'best.ckpt'}")
    tested = evaluate(workspace, "table", *options, tables)
    patterns = [MissingPattern(kind, ratio, share, 0) for kind, ratio in (("both", 0.7), ("text", 0.4), ("text", 0.4))]
    expected = tables_of_one_generator(patterns, list(rows.values()))[2]
    name = next(path for path in (tmp_path / "tables").iterdir() if "_test_missing_text_0.4_" in path.name)
    assert "".join(line for line in name.read_text().splitlines() if line[0] != "#") == "".join(map(str, expected))
    other = workspace.train("too", *published, "far=False", "fmb=False", log_dir=log_dir)
    cells = (tables, "robustness_types=[text,both]", "robustness_ratios=[0.4,0.7]", *ONE_TABLE)
    for each in (folder, other):
        assert command_line(workspace.command(f"load_path={each / 'best.ckpt'}", *cells, name="robustness")) == 0
    first, *_, last = read_csv(folder / "robustness" / "cells.csv")
    own = [results_of(each)["metrics"]["f1_macro"] for each in (folder, other)]
    assert float(first["f1_macro"]) == pytest.approx(tested["metrics"]["f1_macro"], abs=1e-9)
    assert float(last["f1_macro"]) == pytest.approx(own[0], abs=1e-9)
    compared = ("robustness_types=both", "robustness_seeds=0", "permutations=10", "bootstrap=10")
    assert command_line(["run.py", "compare", "with", f"runs=[{folder},{other}]", *compared]) == 0
    [_, at_own, _] = read_json(folder / "compare.json")["groups"][0]["differences"]
    assert sorted(at_own["values"]) == pytest.approx(sorted(own), abs=1e-9)


def test_checkpoints_trained_with_different_drawings_need_a_choice(workspace, fitted, tmp_path, capsys):
    """Results are not averaged or tabulated together unless one drawing is chosen for all."""
    published = workspace.train("drawn", "published", log_dir=tmp_path) / "best.ckpt"
    both = f"load_path=[{fitted / 'best.ckpt'},{published}]"
    small = (both, f"log_dir={tmp_path}", "robustness_ratios=0.7", *ONE_TABLE)
    for command in (workspace.command(both, "test_only=True"), workspace.command(*small, name="robustness")):
        assert "missing_tables: expected nested or published to be chosen, since" in refusal(command, capsys)
    assert command_line(workspace.command(both, "test_only=True", "missing_tables=nested", f"log_dir={tmp_path}")) == 0


def test_published_tables_need_all_splits(workspace: Workspace, tmp_path: Path, capsys: Captured) -> None:
    for split in ("train", "test"):
        shutil.copy(workspace.arrow / f"mmimdb_{split}.arrow", tmp_path)
    options = (f"vit={workspace.backbone}", "missing_tables=published")
    assert command_line(workspace.command(*options, name="doctor", data_root=tmp_path)) == 2
    assert "missing_tables=published" in capsys.readouterr().out


def test_optim_type_chooses_the_published_optimisers() -> None:
    def made(optim_type: str) -> torch.optim.Optimizer:
        model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "body": torch.nn.Linear(2, 2)})
        return make_optimizer(model, "head", OptimizerSettings(optim_type, 0.1, 2.0, 0.01, 0, 0, 1))

    assert [type(made(name)) for name in ("adamw", "adam", "sgd")] == [AdamW, torch.optim.Adam, torch.optim.SGD]
    assert made("sgd").param_groups[0]["momentum"] == 0.9 and made("adam").param_groups[0]["betas"] == (0.9, 0.999)
    for name in ("adamw", "adam", "sgd"):
        found = [(group["lr"], group["weight_decay"]) for group in made(name).param_groups]
        assert found == [(0.1, 0.01), (0.1, 0), (0.2, 0.01), (0.2, 0)]


@pytest.mark.parametrize(
    ("wanted", "batches", "accumulation", "interval", "validations"),
    [
        (0.2, 1911, 8, 376, 5),  # Food-101 at 32: published every 382 batches
        (0.2, 486, 8, 96, 5),
        (1.0, 21, 4, 21, 1),
        (0.5, 21, 4, 8, 2),
        (0.1, 20, 4, 4, 5),  # at least one step
        (0.1, 3, 8, 8, 0),
        (7, 21, 4, 4, 5),
        (50, 21, 4, 21, 1),
    ],
)
def test_validation_falls_on_steps_and_never_later_than_asked(wanted, batches, accumulation, interval, validations):
    found = validation_interval(wanted, batches, accumulation)
    assert found == min(interval, batches) and batches // found == max(1, validations)
    asked = int(wanted * batches) if isinstance(wanted, float) else wanted
    assert found <= max(asked, accumulation)


def test_validation_intervals_depend_on_task_and_method() -> None:
    def interval(**options: Any) -> float:
        return resolve(defaults(**options)).val_check_interval

    assert interval() == interval(prompt_type="dcp") == interval(task="food101") == 0.2
    assert interval(task="hatememes") == 0.1 and interval(task="hatememes", prompt_type="dcp") == 0.11
    assert interval(task="hatememes", val_check_interval=0.5) == 0.5


def options_of(workspace: Workspace, **changes: Any) -> Options:
    return check(defaults(data_root=str(workspace.arrow), **changes))


def test_any_per_gpu_batch_size_is_accumulated_up_to_batch_size(workspace: Workspace) -> None:
    sizes = {7: 36, 12: 21, 32: 8, 300: 1}
    assert {size: options_of(workspace, per_gpu_batchsize=size).accumulation for size in sizes} == sizes


def test_num_gpus_is_checked_against_the_machine(workspace: Workspace, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for number in (1, [0]):
        with pytest.raises(ConfigError, match=r"num_gpus: .* 0, the number of GPUs here, found 1; leave num_gpus out"):
            options_of(workspace, num_gpus=number)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert options_of(workspace, num_gpus=[0]).num_gpus == 1
    assert options_of(workspace, num_gpus=[0, 1]).num_gpus == 2
    with pytest.raises(ConfigError, match=r"num_gpus: .*found \[1\]; CUDA_VISIBLE_DEVICES"):
        options_of(workspace, num_gpus=[1])
    assert options_of(workspace, num_gpus=1, precision="published").precision == "16-mixed"
    assert options_of(workspace, num_gpus=0, precision="published").precision == "32-true"


def test_the_published_configuration_changes_drawing_order_and_precision() -> None:
    published = NAMED_CONFIGS["published"]
    assert published == {"missing_tables": "published", "order_seed": 0, "precision": "published"}
    settings = {
        seed: resolve(defaults(seed=seed, data_root="somewhere", **published)).data_settings() for seed in (0, 5)
    }
    assert [one.order_seed for one in settings.values()] == [0, 0]
    assert {pattern.drawing for pattern in settings[5].patterns.values()} == {"published"}
    assert {pattern.seed for pattern in settings[5].patterns.values()} == {5}
    plain = resolve(defaults(seed=5, data_root="somewhere")).data_settings()
    assert plain.order_seed == 5 and {asdict(pattern)["drawing"] for pattern in plain.patterns.values()} == {"nested"}
