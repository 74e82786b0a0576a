"""A small, fixed part of `make fuzz`: every reader comes to a result or to one of our own errors."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, outcome_of

EXAMPLES = 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_readers_end_with_a_result_or_our_own_error(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    (tmp_path / "prepared").mkdir()
    prepared = target.prepare(tmp_path / "prepared")
    outcomes = set()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def feed(data: st.DataObject) -> None:
        outcomes.add(outcome_of(target, prepared, tmp_path, data.draw(target.inputs)))

    feed()
    assert outcomes <= {"result", "DataError", "CheckpointError", "BackboneError", "ConfigError"}
    assert len(outcomes) > (name not in ("texts", "JSON of any shape")), "the inputs are all right, or all wrong"
