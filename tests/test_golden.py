"""The model and its slow version give the published implementation's numbers, the tokenizer CLIP's token ids.

Runs over every `rep_*.npz`, `dcp_*.npz` and `clip_tokens.json` in GOLDEN_DIR (default: tests/data/golden). Tolerances
are on the relative error of a whole array (of the loss and a gradient norm, of that one number).
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from clip.modules.vision_transformer_memory import ClipBackbone
from engine.tasks import TASKS
from tests import golden, slow_methods
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
    classifier = classifier_of(
        expected.state, expected.task, expected.memory_length, expected.memory_depth, expected.prompt_type
    ).eval()
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


def run_in_few_shapes(expected: golden.Golden) -> Run:
    """As on a GPU, where numbers of inputs and lengths are rounded up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipBackbone, "prepare", lambda _, batch: batch.rounded(4))
        return run_of_the_model(expected)


def run_of_the_slow_version(expected: golden.Golden) -> Run:
    method, trained = expected.prompt_type, trained_in(expected)
    state = {name: value.clone().requires_grad_(name in trained) for name, value in expected.state.items()}
    samples = list(zip(expected.images, expected.tokens, expected.missing_types, strict=True))
    features = [slow_methods.features(state, method, *sample) for sample in samples]
    masked = torch.stack([both.masked for both in features])
    outputs = {
        "features_unmasked": torch.stack([both.unmasked for both in features]),
        "features": masked,
        "logits": slow_methods.linear(state, f"{expected.task}_classifier", masked),
    }
    slots = [slow_methods.method_slots(state, method, missing_type, {}) for *_, missing_type in samples]
    for place in ("image", "text"):
        of_place = [of_sample[place] for of_sample in slots]
        outputs[f"memory_{place}_0"] = torch.stack([torch.cat([of.replaced[0], of.inserted[0]]) for of in of_place])
        outputs[f"memory_{place}_last"] = torch.stack([of.replaced[-1] for of in of_place])
    loss = TASKS[expected.task].loss(outputs["logits"], expected.labels)
    loss.backward()
    gradients = {name: p.grad for name, p in state.items() if p.grad is not None}
    return Run(expected, outputs, loss.item(), gradients, trained)


FILES = (*golden.rep_files(), *golden.dcp_files())
RUNS = [
    *((run, path) for run in (run_of_the_model, run_of_the_slow_version) for path in FILES),
    *((run_in_few_shapes, path) for path in (*golden.rep_files()[-1:], *golden.dcp_files())),
]


@pytest.fixture(scope="module", params=RUNS, ids=lambda param: f"{param[0].__name__}-{param[1].stem}")
def run(request: pytest.FixtureRequest) -> Run:
    make, path = request.param
    return make(golden.load_golden(path))


def test_golden_files_are_there() -> None:
    for method, files in (("rep", golden.rep_files()), ("dcp", golden.dcp_files())):
        assert files, f"no {method}_*.npz in {golden.GOLDEN_DIR} (environment variable GOLDEN_DIR)"


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
