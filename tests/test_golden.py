"""The model gives the published implementation's numbers; test_methods.py compares it with its slow version.

Runs over every `rep_*.npz` and `dcp_*.npz` in GOLDEN_DIR (default: tests/data/golden). Tolerances are on the relative
error of a whole array (of the loss and a gradient norm, of that one number).
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
    """One golden file, and what a model gives for it, forward and backward, in evaluation mode."""

    golden: golden.Golden
    outputs: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    """By published name."""
    trained: set[str]


def trained_in(expected: golden.Golden) -> set[str]:
    """What is trained, but for the net that the released code never uses."""
    names = {*expected.grad_norm, *expected.trainable_without_grad}
    return {name for name in names if ".dynamic_common_token_net." not in name}


def run_of_the_model(expected: golden.Golden) -> Run:
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
    for place, of_place in slots.items():
        outputs[f"memory_{place}_0"] = torch.cat([of_place.replaced_BmD[0], of_place.inserted_BmD[0]], dim=1)
        outputs[f"memory_{place}_last"] = of_place.replaced_BmD[-1]
    loss = TASKS[expected.task].loss(outputs["logits"], expected.labels)
    loss.backward()
    trained = {published_name(name): p.grad for name, p in classifier.named_parameters() if p.requires_grad}
    gradients = {name: grad for name, grad in trained.items() if grad is not None}
    return Run(expected, outputs, loss.item(), gradients, set(trained))


FILES = (*golden.rep_files(), *golden.dcp_files())
assert {path.name[:4] for path in FILES} == {"rep_", "dcp_"}, f"golden files of both in {golden.GOLDEN_DIR}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Run:
    return run_of_the_model(golden.load_golden(request.param))


@pytest.mark.parametrize("name", golden.EXPECTED)
def test_output(run: Run, name: str) -> None:
    assert golden.relative_error(run.outputs[name], run.golden.expected[name]) < FORWARD_TOLERANCE


def test_loss(run: Run) -> None:
    assert run.loss == pytest.approx(run.golden.loss, rel=FORWARD_TOLERANCE)


def test_gradients(run: Run) -> None:
    """Exactly the published parameters are trained, and get one."""
    assert run.trained == trained_in(run.golden)
    assert set(run.gradients) == set(run.golden.grad_norm)
    golden.assert_gradients(run.gradients, vars(run.golden))
