"""`run.py compare`: which runs are compared, the reported values, and refusals."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.errors import DataError
from engine.metrics import multilabel_f1
from engine.significance import Difference, holm
from engine.stored_logits import SplitLogits, logit_columns_of
from engine.tasks import TASKS
from run import command_line
from runs.compare import Comparison, Settings, compare_runs
from runs.pattern import Pattern
from runs.run_reader import find_runs
from tests.conftest import Captured
from tests.report_files import TestSet, at, edit_json, sha256_of, write_arrow, write_measured, write_run
from vilt.datasets.specs import DATASETS
from vilt.missing_tables import MissingPattern, draw_missing_table

FILMS = TestSet(films=60)
QUICK = ("bootstrap=50", "permutations=2000", "robustness_seeds=[0,1]")


def write(folder: Path, strength: float, seed: int, test_set: TestSet = FILMS, **options: Any) -> Path:
    """Writes a run with stored logits, which are better for higher `strength`."""
    run = write_run(folder, test_set.task, seed=seed, **options)
    logits, labels = test_set.logits(seed), test_set.labels
    target = 2.0 * (labels if labels.ndim == 2 else np.eye(TASKS[test_set.task].n_classes)[labels]) - 1
    test_set.write(run, logits={k: v + strength * target for k, v in logits.items()})
    return run


def compare(*options: str) -> int:
    return command_line(["run.py", "compare", "with", *QUICK, *options])


@pytest.fixture(scope="module")
def runs_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        for method, strength in (("rep", 1.5), ("dcp", 0.0), ("mmp", 0.0)):
            write(folder / f"{method}_seed{seed}" / "version_0", strength, seed, prompt_type=method)
    return folder


@pytest.fixture
def runs(runs_once: Path, tmp_path: Path) -> Path:
    """Three methods with two seeds each: one is far better, the other two are equal."""
    return Path(shutil.copytree(runs_once, tmp_path / "runs"))


def test_the_command_reports_significant_differences(runs: Path, capsys: Captured) -> None:
    """Different methods differ significantly, equal ones do not; the JSON file has all values."""
    assert compare(f"runs={runs}") == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads((runs / "compare.json").read_text())
    (group,) = found["groups"]
    assert (group["dataset"], group["metric"], group["samples"]) == ("mmimdb", "f1_macro", 61)
    assert [(method["name"], list(method["runs"])) for method in group["methods"]] == [
        ("dcp", ["0", "1"]), ("mmp", ["0", "1"]), ("rep", ["0", "1"]),
    ]  # fmt: skip
    patterns = [("text", 0.0), *((kind, ratio) for kind in ("text", "image", "both") for ratio in (0.7, 1.0))]
    assert found["comparisons"] == len(group["differences"]) == 3 * len(patterns)
    for place, each in enumerate(group["differences"]):
        assert (each["missing_type"], each["ratio"]) == patterns[place // 3]
        equal = {each["one"], each["other"]} == {"dcp", "mmp"}
        assert each["significant"] is not equal
        assert each["low"] < each["value"] < each["high"]
        if equal:
            assert (each["value"], each["p"], each["of_seeds"]) == (0.0, 1.0, [0.0, 0.0])
        else:
            assert each["value"] == pytest.approx(each["values"][0] - each["values"][1]) and each["value"] < -0.05
            assert each["p"] == pytest.approx(1 / 2001) and each["high"] < 0
    assert [each["p_corrected"] for each in group["differences"]] == holm([e["p"] for e in group["differences"]])
    first = group["differences"][1]
    assert (first["one"], first["other"]) == ("dcp", "rep")
    row = next(line.split() for line in said if line.startswith("A-C"))
    assert row[:5] == ["A-C", "complete", *(f"{value:.4f}" for value in first["values"]), f"{first['value']:.4f}"]
    assert row[-2:] == ["0/2", f"{first['p_corrected']:.4f}*"]
    constant = group["baselines"]["constant"]
    assert any(f"{constant['answer']}: f1_macro {constant['metrics']['f1_macro']:.4f}" in line for line in said)
    assert max(map(len, said)) <= 120


def test_values_match_the_logits_at_the_missing_tables(runs: Path) -> None:
    """A pair's values are means over the seeds that both methods have; a third seed of one method is ignored."""
    write(runs / "rep_seed2" / "version_0", 9.0, 2, prompt_type="rep")
    settings = Settings((3, 4), 20, 100, ("both",), (0.5,), 0.3, missing_table_root=runs)
    (group,) = compare_runs(find_runs(runs)[0], settings)
    each = next(each for each in group.comparisons if (each.one, each.other) == (0, 2))
    expected = []
    for strength in (0.0, 1.5):
        seed_values = []
        for seed in (0, 1):
            logits = [value + strength * (2.0 * FILMS.labels - 1) for value in FILMS.logits(seed).values()]
            for table_seed in (3, 4):
                table = draw_missing_table("mmimdb", "test", MissingPattern("both", 0.5, 0.3, table_seed), 60)
                rows = [logits[table[row]][place] for place, row in enumerate(FILMS.rows)]
                predicted, true = np.stack(rows) > 0, FILMS.labels > 0
                hits, both = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
                seed_values.append((2 * hits[both > 0] / both[both > 0]).mean())
        expected.append(np.mean(seed_values))
    assert each.values == pytest.approx(expected, abs=1e-6) and len(each.of_seeds) == 2


def test_multi_label_runs_are_also_compared_at_their_own_offsets(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only runs with an offset take part, each at its own."""
    settings = Settings((0,), 20, 100, ("text",), (1.0,))
    assert compare_runs(find_runs(runs)[0], settings, at_offset=True) == []
    for path in runs.rglob("logits.arrow"):
        offset = {"rep": -0.75, "dcp": 0.5}.get(path.parts[-4].partition("_")[0])
        edit_json(path.parents[1], "robustness/robustness.json", offset=offset)
    with caplog.at_level(logging.INFO, "rep"):
        (group,) = compare_runs(find_runs(runs)[0], settings, at_offset=True)
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["f1_macro_at_offset"]
    assert (group.metric, group.labels) == ("f1_macro_at_offset", ["dcp", "rep"]), "mmp, without an offset, is left out"
    (each,) = group.comparisons
    expected = []
    for strength, offset in ((0.0, 0.5), (1.5, -0.75)):
        values = []
        for seed in (0, 1):
            logits = FILMS.logits(seed)["text missing"] + strength * (2.0 * FILMS.labels - 1)
            shifted = torch.from_numpy(logits.astype(np.float32)).double() + offset
            values.append(multilabel_f1(shifted, torch.from_numpy(FILMS.labels))["f1_macro"])
        expected.append(np.mean(values))
    assert each.values == pytest.approx(expected, abs=1e-6)
    edit_json(path.parents[1], "robustness/robustness.json", offset="0.5")
    with pytest.raises(DataError, match=r"robustness\.json: .*offset: expected a number, found '0\.5'"):
        compare_runs(find_runs(runs)[0], settings, at_offset=True)


def test_naturally_missing_inputs_are_missing_at_every_pattern(runs: Path) -> None:
    """If every sample lacks its text, further missing texts change nothing, and images are kept as the only input.

    Runs whose natural missingness differs have different test samples, even with the same ids and labels.
    """
    first, *_ = paths = sorted(runs.rglob("logits.arrow"))
    for path in reversed(paths):
        if path == first:
            with pytest.raises(DataError, match=r"logits of other test samples than"):
                compare_runs(find_runs(runs)[0], Settings((0,), 20, 100))
        table = pa.ipc.open_file(path).read_all()
        described = json.loads(table.schema.metadata[b"rep"]) | {"natural": "1" * 60}
        write_arrow(path, table.replace_schema_metadata({"rep": json.dumps(described)}))
    (group,) = compare_runs(find_runs(runs)[0], Settings((0,), 20, 100))
    values = {each.pattern[:2]: each.values for each in group.comparisons if (each.one, each.other) == (0, 2)}
    assert len(values) == 7 and len(set(values.values())) == 1


def test_only_like_for_like_is_compared(tmp_path: Path, capsys: Captured) -> None:
    """Training pattern, dataset and kind of run must match; an interrupted run and its continuation are one seed."""
    places: dict[str, dict[str, Any]] = {"rep_seed0": {}, "dcp": {"prompt_type": "dcp"}, "text": at("text", 0.7)}
    for name, options in places.items():
        write(tmp_path / name / "version_0", 0.5, 0, **options)
    write(tmp_path / "rep_seed0" / "version_1", 0.5, 0, resume_from="x/rep_seed0/version_0/last.ckpt", tested=0.4)
    (tmp_path / "rep_seed0" / "version_0" / "test_results.json").unlink()
    write(tmp_path / "memes" / "version_0", 0.5, 0, TestSet("hatememes"))
    write_run(tmp_path / "lacking" / "version_0", learning_rate=0.5)
    assert compare(f"runs={tmp_path}") == 0
    said = capsys.readouterr()
    assert f"left out for lack of stored logits: {tmp_path / 'lacking' / 'version_0'}" in said.err
    assert "with one training seed each, a difference may be due to the seeds" in said.err
    (group,) = json.loads((tmp_path / "compare.json").read_text())["groups"]
    assert [method["runs"] for method in group["methods"]] == [
        {"0": str(tmp_path / "dcp" / "version_0")},
        {"0": str(tmp_path / "rep_seed0" / "version_1")},
    ]


def test_errors_are_said_to_be_better_if_lower(tmp_path: Path, capsys: Captured) -> None:
    spec, labels = DATASETS["mosi"], torch.linspace(-3, 3, 30)
    for method, error in (("rep", 0.25), ("none", 1.5)):
        run = write_run(tmp_path / method, "mosi", prompt_type=method, **at("some", 0.7))
        split = SplitLogits(np.arange(30), 30, labels, (labels[:, None] + error).expand(len(spec.type_names), -1, -1))
        write_measured(run, split, ("sentiment",), spec.missing_types, (0.0, 0.7), tuple(spec.modalities))
        described = {"format": 1, "task": "mosi", "checkpoint_sha256": sha256_of(run / "best.ckpt")}
        columns = {"row": range(30), "id": list(map(str, range(30))), "label": pa.array(labels.tolist(), pa.float32())}
        logits = zip(logit_columns_of(spec), split.logits_TNC, strict=True)
        columns |= {name: pa.array(values.tolist(), pa.list_(pa.float32())) for name, values in logits}
        table = pa.table(columns).replace_schema_metadata({"rep": json.dumps(described)})
        write_arrow(run / "robustness" / "logits.arrow", table)
    assert compare(f"runs={tmp_path}", "robustness_types=[some]", "robustness_ratios=[0]") == 0
    assert "mosi test, 30 samples, mae (lower is better); trained at" in capsys.readouterr().out


def test_an_undefined_metric_is_null_and_not_significant(tmp_path: Path, capsys: Captured) -> None:
    class Kind(TestSet):
        @property
        def labels(self) -> np.ndarray:
            return np.zeros(len(self.rows), np.int64)

    for method in ("rep", "dcp"):
        write(tmp_path / method / "version_0", 0.5, 0, Kind("hatememes"), prompt_type=method)
    assert compare(f"runs={tmp_path}", "robustness_ratios=[0]") == 0
    (each,) = json.loads((tmp_path / "compare.json").read_text())["groups"][0]["differences"]
    assert [each[name] for name in ("value", "low", "high", "p", "p_corrected")] == [None] * 5
    assert each["significant"] is False
    said = capsys.readouterr().out
    assert said.count("undefined") >= 6 and "undefined to" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["runs={top}/rep_seed0"],
            "runs: expected at least two configurations in {top}/rep_seed0 that were trained on",
        ),
        (["runs={top}/rep_seed0"], "stored logits, found rep on mmimdb at 70 % both\n"),
        (["runs={top}/bare"], "none with logits; `python run.py robustness with load_path={top}/bare` stores them"),
        (["runs=[{top},{top}/nowhere]"], "runs={top}/nowhere: expected a run folder or a folder with runs below it"),
        (["runs={top}", "robustness_types=[sound]"], "robustness_types: expected text or image or both, found sound"),
        (["runs={top}", "bootstrap=0"], "bootstrap: expected an integer of at least 1, found 0"),
        (["runs={top}", "permutations=0"], "permutations: expected an integer of at least 1, found 0"),
    ],
)
def test_unusable_runs_and_options_are_refused(runs: Path, capsys: Captured, options: list[str], message: str) -> None:
    write_run(runs / "bare" / "version_0")
    assert compare(*(option.format(top=runs) for option in options)) == 2
    assert message.format(top=runs) in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["checkpoint", "test set", "damaged"])
def test_mismatched_or_damaged_logits_are_refused(runs: Path, capsys: Captured, fault: str) -> None:
    run = runs / "rep_seed1" / "version_0"
    logits = run / "robustness" / "logits.arrow"
    if fault == "checkpoint":
        shutil.copy(logits, run / "best.ckpt")
        message = f"{logits.with_name('robustness.json')}: not as written by run.py: results of another checkpoint"
    elif fault == "test set":
        shutil.rmtree(run)
        write(run, 1.0, 1, TestSet(films=61), prompt_type="rep")
        message = f"{logits}: logits of other test samples than "
    else:
        logits.write_bytes(logits.read_bytes()[:-50])
        message = f"{logits}: not readable as stored logits"
    assert compare(f"runs={runs}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "p", "metric", "significant"),
    [(0.1, 0.05, "accuracy", True), (0.1, 0.05, "mae", True), (-0.1, 0.01, "mae", False), (0.1, 0.06, "mae", False)],
)
def test_significance_needs_a_low_p_and_an_interval_without_zero(
    low: float, p: float, metric: str, significant: bool
) -> None:
    """The corrected p is at most 0.05 and the interval excludes 0; for error metrics, the lower value is ahead."""
    pattern, difference = Pattern("text", 0.5, 0.5), Difference(0.2, low, 0.3, 0.001)
    found = Comparison(0, 1, pattern, (0.9, 0.7), difference, (0.2, 0.3, -0.1), metric, p)
    assert found.significant is significant and found.ahead == (1 if metric == "mae" else 2)


def test_results_with_differently_drawn_missing_tables_are_refused(runs: Path) -> None:
    edit_json(runs / "dcp_seed1" / "version_0", "robustness/robustness.json", rows_before=[100, 20])
    with pytest.raises(
        DataError, match=r"dcp_seed1.*drawn after splits of other sizes.*run `python run.py robustness` again"
    ):
        compare_runs(find_runs(runs)[0], Settings((0,), 2, 2))


def test_the_both_ratio_defaults_to_that_of_training(tmp_path: Path) -> None:
    for method in ("dcp", "rep"):
        options = {"both_ratio": 0.25, **at("both", 0.7)}
        write(tmp_path / method, 0.5, 0, prompt_type=method, **options)
    for given, expected in ((None, 0.25), (0.5, 0.5)):
        [group] = compare_runs(find_runs(tmp_path)[0], Settings((0,), 2, 2, ("both",), (0.7,), given))
        assert [each.pattern.both_ratio for each in group.comparisons] == [expected]


def test_runs_of_the_same_seed_are_paired(tmp_path: Path) -> None:
    """Methods without common seeds are paired in order of their seeds."""
    for method, seeds in (("dcp", (1, 2)), ("mmp", (3, 5)), ("rep", (0, 1))):
        for seed in seeds:
            write(tmp_path / f"{method}_seed{seed}" / "version_0", seed / 10, seed, prompt_type=method)
    settings = Settings((0,), 2, 2, ("text",), (1.0,))
    alone = {}
    for one, other in (("dcp_seed1", "rep_seed1"), ("mmp_seed3", "rep_seed0"), ("mmp_seed5", "rep_seed1")):
        runs = [run for name in (one, other) for run in find_runs(tmp_path / name)[0]]
        alone[one, other] = compare_runs(runs, settings)[0].comparisons[0].difference.value
    (group,) = compare_runs(find_runs(tmp_path)[0], settings)
    found = {(each.one, each.other): each.of_seeds for each in group.comparisons}
    assert group.labels == ["dcp", "mmp", "rep"]
    assert found[0, 2] == (alone["dcp_seed1", "rep_seed1"],)
    assert found[1, 2] == (alone["mmp_seed3", "rep_seed0"], alone["mmp_seed5", "rep_seed1"])
