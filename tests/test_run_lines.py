"""Which runs share a line, and what its spread is over."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runs.comparable import checkpoint_label
from runs.lines import RunLine, lines_of, spread_of
from runs.run_reader import Run, find_runs
from tests.conftest import read_json
from tests.report_files import at, edit_json
from tests.test_run_table import write_run


def lines_in(folder: Path) -> list[RunLine[Run]]:
    runs, damaged = find_runs(folder)
    assert not damaged
    return lines_of(runs, lambda run: run)


def seeds_of(lines: list[RunLine[Run]]) -> list[list[int]]:
    return [[run.config["seed"] for run in line.items] for line in lines]


def test_runs_that_differ_only_in_their_seed_share_a_line(tmp_path: Path) -> None:
    """Names, places, speed, and options of evaluation and reports do not matter."""
    same: list[dict[str, Any]] = [{}, {"num_workers": 0, "exp_name": "other"}, {"test_ratio": 0.3, "log_dir": "x"}]
    same[1] |= {"image_cache": True, "compile": True, "activation_checkpointing": True, "bootstrap": 0, "runs": "x"}
    same[2] |= {"runs_sort": "-test", "out": "y", "robustness_anew": True, "robustness_types": ["text"]}
    same[2] |= {"robustness_ratios": [0.5], "robustness_both_ratios": [0.3]}
    for seed, options in enumerate(same):
        write_run(tmp_path / f"run{2 - seed}" / "version_0", seed=2 - seed, **options)
    (line,) = lines_in(tmp_path)
    assert seeds_of([line]) == [[0, 1, 2]] and not line.repeats and line.differing([line]) == []


def test_input_files_are_identified_by_content(tmp_path: Path) -> None:
    """Their paths do not matter if the runs recorded the contents."""
    for seed, vit in enumerate(("here/clip", "there/clip", "other/clip")):
        run = write_run(tmp_path / f"run{seed}" / "version_0", seed=seed, vit=vit, teacher=f"t{seed}/best.ckpt")
        contents = {"backbone": "b" if "other" in vit else "a", "teacher": "c"}
        (run / "contents.json").write_text(json.dumps(contents))
    assert seeds_of(lines_in(tmp_path)) == [[0, 1], [2]]
    (tmp_path / "run1" / "version_0" / "contents.json").unlink()
    assert seeds_of(lines_in(tmp_path)) == [[0], [1], [2]]


@pytest.mark.parametrize(("option", "value"), [("order_seed", 0), ("train_ends", False)])
def test_a_set_option_is_named_if_its_default_is_none(tmp_path: Path, option: str, value: Any) -> None:
    """0 and False differ from None."""
    for number, chosen in enumerate((None, value)):
        write_run(tmp_path / f"run{number}" / "version_0", **{option: chosen})
    lines = lines_in(tmp_path)
    assert [line.differing(lines) for line in lines] == [[], [f"{option}={value}"]]


def test_an_entry_that_other_lines_lack_is_named(tmp_path: Path) -> None:
    for number, network in enumerate(({}, {"width": 64}, {"width": 64, "heads": 2})):
        write_run(tmp_path / f"run{number}" / "version_0", tested=None, task="mod", vit="random", network=network)
    lines = lines_in(tmp_path)
    words = [["network.width=64"], ["network.width=64", "network.heads=2"]]
    assert [line.differing(lines) for line in lines] == [[], *words]


@pytest.mark.parametrize(("vit", "lines"), [("random", [[0, 1]]), ("here/backbone.ckpt", [[0], [1]])])
def test_random_backbones_of_different_seeds_share_a_line(tmp_path: Path, vit: str, lines: list[list[int]]) -> None:
    """Different backbones from a file do not."""
    for seed in (0, 1):
        run = write_run(tmp_path / f"run{seed}" / "version_0", tested=None, task="mod", seed=seed, vit=vit)
        (run / "contents.json").write_text(json.dumps({"backbone": str(seed), "data of train": "a"}))
    assert seeds_of(lines_in(tmp_path)) == lines


def test_an_older_run_has_the_default_of_a_newer_option(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"run{seed}" / "version_0", seed=seed)
    config = read_json(run / "config.json")
    del config["replay_depth"]
    (run / "config.json").write_text(json.dumps(config))
    assert seeds_of(lines_in(tmp_path)) == [[0, 1]]
    edit_json(run, "config.json", replay_depth=2)
    assert seeds_of(lines_in(tmp_path)) == [[0], [1]]


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.5}, {"precision": "bf16-mixed"}, {"prompt_type": "mmp"}, at("text", 0.7), {"far": False}],
)
def test_other_configurations_and_patterns_have_their_own_lines(tmp_path: Path, options: dict[str, Any]) -> None:
    """Even with the same seed, since configurations are not repetitions."""
    for number, differing in enumerate(({}, options)):
        write_run(tmp_path / f"run{number}" / "version_0", seed=0, **differing)
    assert seeds_of(lines_in(tmp_path)) == [[0], [0]]


def test_an_interrupted_run_and_its_continuation_count_as_one_seed(tmp_path: Path) -> None:
    """Of two runs with the same seed, the more complete one counts, or else the last."""
    parent = tmp_path / "rep_seed0"
    cut = write_run(parent / "version_0", tested=None)
    write_run(parent / "version_1", resume_from=str(cut / "last.ckpt"))
    (line,) = lines_in(tmp_path)
    assert [run.folder.name for run in line.items] == ["version_1"] and not line.repeats
    write_run(parent / "version_2", tested=None)
    (line,) = lines_in(tmp_path)
    assert [run.folder.name for run in (*line.items, *line.repeats)] == ["version_1", "version_2"]
    write_run(parent / "version_3")
    (line,) = lines_in(tmp_path)
    assert [run.folder.name for run in (*line.items, *line.repeats)] == ["version_3", "version_2", "version_1"]


def test_head_neighbours_and_teacher_are_always_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": "dpl", "neighbours": 4, "teacher": "result/large_seed1/version_2/best.ckpt"}
    write_run(tmp_path / "taught" / "version_0", prompt_type="none", **options)
    (line,) = lines_in(tmp_path)
    named = ["head=dpl", "neighbours=4", "teacher=large_seed1-version_2"]
    assert line.differing([line]) == named
    write_run(tmp_path / "plain" / "version_0", prompt_type="none", memory_length=9)
    plain, taught = lines_in(tmp_path)
    assert plain.differing([plain, taught]) == ["memory_length=9"]
    assert taught.differing([plain, taught]) == [*named, "memory_length=36"]


def test_lines_are_named_by_options_that_differ_not_by_unrecorded_contents(tmp_path: Path) -> None:
    for number, rate in enumerate((0.0123456789, 0.1)):
        run = write_run(tmp_path / f"run{number}" / "version_0", learning_rate=rate, far=not number)
        (run / "contents.json").write_text(json.dumps({"data of test": "a"} if number else {}))
    lines = lines_in(tmp_path)
    assert [line.differing(lines) for line in lines] == [
        ["learning_rate=0.0123457"],
        ["far=False", "learning_rate=0.1"],
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("result/large_seed1/version_2/best.ckpt", "large_seed1-version_2"),
        ("result/large_seed1/version_2/export", "large_seed1-version_2"),
        ("shared/rep_mmimdb", "shared-rep_mmimdb"),
        ("teachers/large.ckpt", "teachers-large.ckpt"),
        ("best.ckpt", "best.ckpt"),
    ],
)
def test_a_checkpoint_is_labelled_by_its_run(path: str, name: str) -> None:
    assert checkpoint_label(path) == name


def test_both_ratio_counts_only_if_it_has_an_effect(tmp_path: Path) -> None:
    for number, options in enumerate(({"both_ratio": 0.3}, {"both_ratio": 0.5})):
        write_run(tmp_path / "text" / f"version_{number}", seed=number, **options, **at("text", 0.7))
        write_run(tmp_path / "both" / f"version_{number}", seed=number, **options)
    assert seeds_of(lines_in(tmp_path)) == [[0], [1], [0, 1]]


def test_a_checkpoint_without_a_run_has_its_own_line() -> None:
    lines = lines_of(["a.ckpt", "b.ckpt"], lambda _: None)
    assert [line.items for line in lines] == [["a.ckpt"], ["b.ckpt"]]


def test_the_spread_is_over_training_seeds_or_else_missing_tables() -> None:
    three = spread_of([[0.1, 0.3], [0.4, 0.4], [0.6, 0.6]])
    assert three is not None and three.over == "3 training seeds"
    assert (three.estimate.mean, three.estimate.std) == pytest.approx((0.4, 0.2))
    one = spread_of([[0.1, 0.3]])
    assert one is not None and one.over == "2 missing tables"
    assert (one.estimate.mean, one.estimate.std) == pytest.approx((0.2, math.sqrt(0.02)))
    single = spread_of([[0.5]])
    assert single is not None and (single.estimate.text(), single.over) == ("0.5000", "")
    assert spread_of([]) is None


def test_undefined_values_are_left_out_and_counted() -> None:
    found = spread_of([[math.nan, math.nan], [0.4, math.nan], [0.6]])
    assert found is not None and found.estimate[:1] == (0.5,) and (found.estimate.n, found.estimate.undefined) == (2, 1)
    assert found.estimate.text() == "0.5000 ± 0.1414 (2 of 3)"
    nothing = spread_of([[math.nan], [math.nan]])
    assert nothing is not None and nothing.estimate.text() == "undefined"
