"""The model reproduces the published implementation's numbers; test_methods.py compares it with its slow version.

Runs over every `rep_*.npz` and `dcp_*.npz` in GOLDEN_DIR (default: tests/data/golden). Tolerances apply to the relative
error of a whole array, or of a single number for the loss and gradient norms.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.tasks import TASKS
from tests import golden
from tests.models import classifier_of, model_input, published_name

FORWARD_TOLERANCE = 1e-4


@dataclass
class Run:
    """One golden file and the model's results for it, forward and backward, in evaluation mode."""

    golden: golden.Golden
    outputs: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    """Keyed by published name."""
    trained: set[str]


def trained_in(expected: golden.Golden) -> set[str]:
    """Names of the trained parameters, except the net that the released code never uses."""
    names = {*expected.grad_norm, *expected.trainable_without_grad}
    return {name for name in names if ".dynamic_common_token_net." not in name}


def run_model(expected: golden.Golden) -> Run:
    classifier = classifier_of(expected.state, expected.task, expected.options).eval()
    batch = model_input(expected.images, expected.tokens, expected.missing_types)
    features, slots = classifier.features(batch)
    every_row = torch.arange(len(expected.images))
    unmasked = batch._replace(
        inputs={"image": expected.images, "text": expected.tokens}, rows={"image": every_row, "text": every_row}
    )
    outputs = {
        "features_unmasked": classifier.model.fuse(classifier.features(unmasked)[0], batch.present_BM),
        "features": classifier.model.fuse(features, batch.present_BM),
        "logits": classifier(batch),
    }
    for place, place_slots in slots.items():
        outputs[f"memory_{place}_0"] = torch.cat([place_slots.replaced_BmD[0], place_slots.inserted_BmD[0]], dim=1)
        outputs[f"memory_{place}_last"] = place_slots.replaced_BmD[-1]
    loss = TASKS[expected.task].loss(outputs["logits"], expected.labels)
    loss.backward()
    trained = {published_name(name): p.grad for name, p in classifier.named_parameters() if p.requires_grad}
    gradients = {name: grad for name, grad in trained.items() if grad is not None}
    return Run(expected, outputs, loss.item(), gradients, set(trained))


FILES = (*golden.rep_files(), *golden.dcp_files())
assert {path.name[:4] for path in FILES} == {"rep_", "dcp_"}, f"golden files of both in {golden.GOLDEN_DIR}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Run:
    return run_model(golden.load_golden(request.param))


@pytest.mark.parametrize("name", golden.EXPECTED)
def test_outputs_match_the_published_ones(run: Run, name: str) -> None:
    assert golden.relative_error(run.outputs[name], run.golden.expected[name]) < FORWARD_TOLERANCE


def test_the_loss_matches_the_published_one(run: Run) -> None:
    assert run.loss == pytest.approx(run.golden.loss, rel=FORWARD_TOLERANCE)


def test_the_published_parameters_are_trained_with_matching_gradients(run: Run) -> None:
    """Exactly the published parameters are trained, and exactly the published ones get a gradient."""
    assert run.trained == trained_in(run.golden)
    assert set(run.gradients) == set(run.golden.grad_norm)
    golden.assert_gradients(run.gradients, vars(run.golden))
