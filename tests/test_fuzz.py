"""Every reader of damaged and made-up input comes to a result or to one of our own errors; `make fuzz` tries more."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, outcome_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Of each target; the default ones are always the same."""
OURS = {"result", "DataError", "CheckpointError", "BackboneError", "ConfigError"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_readers_end_with_a_result_or_our_own_error(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    (tmp_path / "prepared").mkdir()
    prepared = target.prepare(tmp_path / "prepared")
    outcomes = Counter[str]()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 40,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def feed(data: st.DataObject) -> None:
        outcomes[outcome_of(target, prepared, tmp_path, data.draw(target.inputs))] += 1

    feed()
    print(f"{name}: {dict(outcomes)}")
    assert outcomes.keys() <= OURS
    assert len(outcomes) > (name not in ("texts", "JSON of any shape")), "the inputs are all right, or all wrong"
