"""Damaged run folders and sweeps, as `runs`, `report`, `robustness`, `sweep` and resume_from=auto read them.

A result, or an error of ours that names the file. Damage that other tests have too is not here: damaged bytes, entries
of a record that are missing, results of something else.
"""

from pathlib import Path

import pyarrow as pa
import pytest

from common.errors import DataError
from runs.report.results import read_report_runs
from tests.report_files import TestSet, write_run
from tests.test_sweep import SetUp, Sweep, error_line, stand_in, sweep  # noqa: F401 - two fixtures

Captured = pytest.CaptureFixture[str]


LOGITS = "robustness/logits.arrow"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A made-up run with results and logits."""
    folder = write_run(tmp_path / "result" / "rep_seed0" / "version_0")
    TestSet().write(folder)
    return folder


def test_stored_logits_that_are_compressed_are_refused(run: Path) -> None:
    with pa.OSFile(str(run / LOGITS)) as file:
        table = pa.concat_tables([pa.ipc.open_file(file).read_all()] * 50)
    with pa.ipc.new_file(str(run / LOGITS), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"logits\.arrow: not readable as stored logits: it is compressed"):
        read_report_runs([run])
