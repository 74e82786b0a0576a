"""Damaged run folders and sweeps, as `runs`, `report`, `robustness`, `sweep` and resume_from=auto read them.

A result, or an error of ours that names the file. Damage that other tests have too is not here: damaged bytes, entries
of a record that are missing, results of something else.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from common.errors import DataError, UserError
from engine import resume
from engine.logit_store import LogitStore, Origin
from engine.resume import Progress, Training
from run import command_line
from runs.comparable import NOT_THE_TRAINING
from runs.report.results import read_report_runs
from runs.run_table import list_runs
from tests.report_files import TestSet, write_run
from tests.test_sweep import SetUp, Sweep, error_line, stand_in, sweep  # noqa: F401 - two fixtures
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.specs import DATASETS

Captured = pytest.CaptureFixture[str]


def find_progress(parent: Path, config: dict[str, Any]) -> Progress:
    return resume.find_progress(Training(parent, config, NOT_THE_TRAINING, 4, {}))


GOLDEN_ARROW = Path(__file__).parent / "data" / "golden" / "arrow"
ROBUSTNESS = "robustness/robustness.json"
LOGITS = "robustness/logits.arrow"
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 10**400, 0.5, float("nan"), "", "\0", "0.5", "x" * 100_000, [], [[]], {}, {"": None}, [None] * 3,
)  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value of JSON: keys and indices from the outside; of a list the first two."""
    for key in value if isinstance(value, dict) else range(min(len(value), 2)):
        yield (*above, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*above, key))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    within = changed
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = new
    return changed


def damaged(path: Path, odd_values: int = len(ODD_VALUES)) -> Iterator[str]:
    """Puts an odd value into one place after the other of a JSON file; gives what it put where."""
    whole = path.read_bytes()
    value = json.loads(whole)
    draw = random.Random(0)
    for place in list(places(value)):
        for odd in draw.sample(ODD_VALUES, odd_values):
            path.write_text(json.dumps(replaced(value, place, odd)))
            yield f"{place}: {odd!r}"[:100]
    path.write_bytes(whole)


def outcome(read: Callable[[], object], named: Path) -> str:
    """`read`, or `refused`; raises what is no error of ours, or does not name the path on one line of some length."""
    try:
        read()
    except UserError as error:
        assert str(named) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 2000, error
        return "refused"
    return "read"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A made-up run with results and logits."""
    folder = write_run(tmp_path / "result" / "rep_seed0" / "version_0")
    TestSet().write(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "odd_values"), [("config.json", 6), ("environment.json", 15), ("test_results.json", 15), (ROBUSTNESS, 2)]
)
def test_odd_values_in_the_files_of_a_run(run: Path, name: str, odd_values: int) -> None:
    outcomes = set()
    for told in damaged(run / name, odd_values):
        try:
            outcomes.add(outcome(lambda: read_report_runs([run]), run))
            assert all(len(row.note) < 1000 for row in list_runs(run.parents[1]))
            find_progress(run.parent, {"test_after_fit": True, "seed": 0})
        except Exception as error:
            raise AssertionError(f"{name}: {told}") from error
    assert outcomes == {"read", "refused"}
    assert len(read_report_runs([run])) == 1


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    with pa.OSFile(str(path)) as file:
        table = change(pa.ipc.open_file(file).read_all())
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


def test_flipped_bits_of_stored_logits(run: Path) -> None:
    """A bit of a number cannot be noticed, as long as it is one."""
    whole = (run / LOGITS).read_bytes()
    draw = random.Random(0)
    outcomes = []
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (run / LOGITS).write_bytes(content)
        outcomes.append(outcome(lambda: read_report_runs([run]), run / LOGITS))
    assert 20 < outcomes.count("refused") < 180


def test_stored_logits_that_are_compressed_are_refused(run: Path) -> None:
    rewrite(run / LOGITS, lambda table: pa.concat_tables([table] * 50), compression="zstd")
    with pytest.raises(DataError, match=r"logits\.arrow: not readable as stored logits: it is compressed"):
        read_report_runs([run])
    dataset = ArrowDataset(DATASETS["mmimdb"], GOLDEN_ARROW, "test", 8)
    origin = Origin("mmimdb", "0" * 64, "mmimdb_test.arrow", "0" * 64, "32-true", None)
    store = LogitStore((run / LOGITS).parent, origin, dataset, {})
    with pytest.raises(DataError, match=r"logits\.arrow: not readable as stored logits: it is compressed"):
        store.lacking()


def test_odd_values_in_the_record_and_the_results_of_a_sweep(
    sweep: Sweep,  # noqa: F811
    stand_in: SetUp,  # noqa: F811
    capsys: Captured,
) -> None:
    """Options that another run of the sweep had are those of another sweep; else the record is damaged."""

    def run_grid() -> int:
        return sweep.grid(types="[text]", ratios="[0.5]", seeds="[0]")

    assert run_grid() == 0
    [results] = sweep.folder.rglob("test_results.json")
    for path, odd_values in ((sweep.folder / "sweep.json", 1), (results, len(ODD_VALUES))):
        outcomes = set()
        for told in damaged(path, odd_values):
            status = run_grid()
            said = capsys.readouterr().err
            assert status in (0, 2), f"{told}: {said[-1000:]}"
            assert status == 0 or len(error_line(said)) < 3000, told
            outcomes.add(status)
            if path.name == "sweep.json" and status == 0:
                path.unlink()  # it was written anew
        assert outcomes == {0, 2}
    assert sweep.versions() == {"s_text_0.5_seed0": 1}, "a run was made again"


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (5, "not as written by run.py"),
        ([], "sweep.json is of a sweep over a search, not over sweep_types"),
        ({"sweep_types": 5}, "grid: expected lists of values by name, found {{'sweep_types': 5}}"),
        ({"sweep_types": [[]], "sweep_ratios": [], "sweep_seeds": []}, "sweep_types: expected at least"),
    ],
)
def test_a_grid_that_is_none(
    sweep: Sweep,  # noqa: F811
    stand_in: SetUp,  # noqa: F811
    capsys: Captured,
    grid: Any,
    problem: str,
) -> None:
    assert sweep.grid() == 0
    path = sweep.folder / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "grid": grid}))
    assert sweep.grid() == 2
    assert problem.format(folder=sweep.folder) in error_line(capsys.readouterr().err)


def test_a_run_whose_options_are_no_numbers_is_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: Captured
) -> None:
    """Multiplied, this text would fill any memory."""
    config = json.loads((run / "config.json").read_text())
    odd = {"per_gpu_batchsize": "x" * 1000, "num_nodes": 10**15, "num_gpus": 1}
    (run / "config.json").write_text(json.dumps({**config, **odd}))
    with caplog.at_level("WARNING", "rep"):
        assert find_progress(run.parent, config) == Progress()
    assert f"{run}: passed over: samples per batch: expected whole numbers" in caplog.text
    assert command_line(["run.py", "runs", "with", f"log_dir={run.parents[1]}"]) == 0
