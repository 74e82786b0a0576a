"""Missing types and modality dropout drawn for each sample, and a learning rate that follows the validation loss."""

from collections import Counter

import numpy as np
import pytest
import torch

from engine.optimization import PATIENCE, OptimizerSettings, Plateau, make_schedule, plateau_of
from vilt.missing_tables import MissingPattern, draw_missing_type, drop_modalities

NAMES = ("text", "audio", "vision")
DRAWS = 6000


@pytest.mark.parametrize(
    ("kind", "types"), [("some", {1, 2, 3, 4, 5, 6}), ("any", {1, 2, 4}), ("text", {4}), ("vision", {1})]
)
def test_allowed_missing_types_are_equally_likely_at_the_ratio(kind: str, types: set[int]) -> None:
    generator = np.random.default_rng(0)
    pattern = MissingPattern(kind, 0.7, 0.5, 0)
    found = Counter(draw_missing_type(pattern, NAMES, generator) for _ in range(DRAWS))
    assert found[0] / DRAWS == pytest.approx(0.3, abs=0.03)
    assert set(found) == types | {0}
    for code in types:
        assert found[code] / DRAWS == pytest.approx(0.7 / len(types), abs=0.03)


def test_both_ratio_is_the_share_of_missing_images() -> None:
    generator = np.random.default_rng(0)
    pattern = MissingPattern("both", 1.0, 0.2, 0)
    found = Counter(draw_missing_type(pattern, ("image", "text"), generator) for _ in range(DRAWS))
    assert set(found) == {1, 2} and found[2] / DRAWS == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("code", "reached"), [(0, {1, 2, 3, 4, 5, 6}), (1, {3, 5}), (4, {5, 6}), (3, set()), (6, set())]
)
def test_modality_dropout_never_removes_all_modalities(code: int, reached: set[int]) -> None:
    generator = np.random.default_rng(0)
    found = Counter(drop_modalities(code, 0.5, NAMES, generator) for _ in range(DRAWS))
    assert set(found) == reached | {code}
    if reached:
        assert found[code] / DRAWS == pytest.approx(0.5, abs=0.03)
    assert {drop_modalities(code, 0.0, NAMES, generator) for _ in range(50)} == {code}


def test_plateau_divides_the_rate_by_ten_and_its_state_is_restored() -> None:
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 2e-3)]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    settings = OptimizerSettings("adam", 1e-3, 1.0, 0.0, 0, 0.0, "plateau")
    scheduler = make_schedule(optimizer, settings, 100)
    plateau = plateau_of(scheduler)
    assert isinstance(plateau, Plateau)
    for loss in (1.0, 0.9, *[0.95] * PATIENCE):
        plateau.see(loss, scheduler)
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-3]
    plateau.see(0.9, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 2e-4])
    again = make_schedule(optimizer, settings, 100)
    again.load_state_dict(scheduler.state_dict())
    restored = plateau_of(again)
    assert restored is not None and vars(restored) == vars(plateau)
