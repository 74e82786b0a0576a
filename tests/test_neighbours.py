"""Retrieval of training samples, compared with a slow, obvious search."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.neighbours import Neighbours
from engine.checkpoint import ModelSpec, build_classifier, load_saved_state, saved_state
from tests.models import TINY

NAMES = ("image", "text")
N, E, C, K = 30, 5, 3, 4


def samples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Features (count, M, E), zero where missing, and the mask of present ones; some samples have only one."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([[True, True], [True, False], [False, True]])[torch.arange(count) % 3]
    features = torch.randn(count, 2, E, generator=generator).half().float()
    return features * present[..., None], present


@pytest.fixture
def neighbours() -> Neighbours:
    module = Neighbours(dict.fromkeys(NAMES, E), C, K)
    features, present = samples(0, N)
    labels = (torch.rand(N, C, generator=torch.Generator().manual_seed(1)) < 0.4).to(torch.uint8)
    module.store(features.flatten(1), present, labels, torch.arange(N) // 2)  # a row has two samples
    with torch.no_grad():
        module.feature_gate_M.copy_(torch.tensor([0.5, 2.0]))
        module.vote_gate_C.copy_(torch.tensor([1.0, -1.0, 0.5]))
    return module


def batch_of(present: Tensor, split: str = "") -> ModelInput:
    return ModelInput({}, {}, present, (0, 1, 2), index_B=torch.arange(len(present)), split=split)


def slow_search(module: Neighbours, query: Tensor, present: Tensor, own_row: int | None) -> tuple[Tensor, Tensor]:
    """Filled features (M, E) and votes (C,) of one sample, one neighbour at a time."""
    bank, stored, labels, rows = (module.get_buffer(n) for n in ("features_NF", "present_NM", "labels_NC", "row_N"))
    bank = bank.unflatten(1, (2, E))
    means = [bank[stored[:, m], m].float().mean(0) for m in range(2)]
    near = {}
    for n in range(N):
        cosines = [
            torch.cosine_similarity(query[m] - means[m], bank[n, m].float() - means[m], dim=0)
            for m in range(2)
            if present[m] and stored[n, m]
        ]
        if cosines and rows[n] != own_row:
            near[n] = sum(cosines, torch.zeros(())) / len(cosines)
    ranked = sorted(near, key=lambda n: -near[n])
    filled = query.clone()
    for m in range(2):
        found = [n for n in ranked if stored[n, m]][:K]
        if not present[m]:
            filled[m] = module.feature_gate_M[m] * torch.stack([bank[n, m].float() for n in found]).mean(0)
    share = (labels.float().sum(0) + 0.5) / (N + 1)
    voted = (labels[ranked[:K]].float().sum(0) + share) / (K + 1)
    return filled, module.vote_gate_C * (voted.logit() - share.logit())


@pytest.mark.parametrize("split", ["", "val", "train"])
def test_features_and_votes_equal_the_slow_search(neighbours: Neighbours, split: str) -> None:
    """The second pass over a split uses cached neighbours; a training sample never finds its own row."""
    features, present = samples(0 if split == "train" else 2, N)
    given = {name: features[:, m] for m, name in enumerate(NAMES)}
    for _ in range(2):
        filled, votes = neighbours(given, batch_of(present, split))
        for row in range(N):
            expected = slow_search(neighbours, features[row], present[row], row // 2 if split == "train" else None)
            torch.testing.assert_close(torch.stack([filled[name][row] for name in NAMES]), expected[0])
            torch.testing.assert_close(votes[row], expected[1])
    assert len(neighbours._found) == (0 if split == "" else N)


def test_initial_gates_change_nothing_even_with_fewer_samples_than_neighbours(neighbours: Neighbours) -> None:
    fresh = Neighbours(dict.fromkeys(NAMES, E), C, K)
    bank = [neighbours.get_buffer(name)[:2] for name in ("features_NF", "present_NM", "labels_NC", "row_N")]
    features, present = samples(3, 9)
    given = {name: features[:, m] for m, name in enumerate(NAMES)}
    for split in ("train", "val"):  # no sample yet, then two
        filled, votes = fresh(given, batch_of(present, split))
        assert all(torch.equal(filled[name], given[name]) for name in NAMES) and not votes.any()
        fresh.store(*bank)


def test_a_checkpoint_stores_the_samples() -> None:
    spec = ModelSpec("mmimdb", MethodOptions("none", neighbours=2), TINY)
    one, other = build_classifier(spec), build_classifier(spec)
    assert one.neighbours is not None and other.neighbours is not None
    features = torch.randn(5, 2 * TINY.embed_dim)
    one.neighbours.store(features, torch.ones(5, 2, dtype=torch.bool), torch.ones(5, 23), torch.arange(5))
    load_saved_state(other, saved_state(one), "a file")
    torch.testing.assert_close(other.neighbours.get_buffer("features_NF"), features.half())


@pytest.mark.parametrize("options", [{"prompt_type": "coop"}, {"prompt_type": "none", "train_ends": True}])
def test_neighbours_with_trained_towers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="neighbours"):
        build_classifier(ModelSpec("mmimdb", MethodOptions(neighbours=2, memory_length=6, **options), TINY))
