"""The model and its slow version give the published implementation's numbers, the tokenizer CLIP's token ids.

Runs over every `rep_*.npz`, `dcp_*.npz` and `clip_tokens.json` in GOLDEN_DIR (default: tests/data/golden). Tolerances
are on the relative error of a whole array (of the loss and a gradient norm, of that one number).
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip.modules.vision_transformer_memory import ClipBackbone
from engine.tasks import TASKS
from tests import golden, slow_rep
from tests.models import classifier_of, model_input, published_name

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


@dataclass
class Run:
    """One golden file, and what a model gives for it, forward and backward, in evaluation mode."""

    golden: golden.Golden
    outputs: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    """By published name."""


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
    gradients = {published_name(name): p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    return Run(expected, outputs, loss.item(), gradients)


def run_in_few_shapes(expected: golden.Golden) -> Run:
    """As on a GPU, where numbers of inputs and lengths are rounded up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipBackbone, "prepare", lambda _, batch: batch.rounded(4))
        return run_of_the_model(expected)


def run_of_the_slow_version(expected: golden.Golden) -> Run:
    task, depth, types = expected.task, expected.memory_depth, expected.missing_types
    trained = slow_rep.trained_names(expected.state, task)
    assert trained == set(expected.grad_norm) | set(expected.trainable_without_grad)
    state = {
        name: value.clone().requires_grad_() if name in trained else value for name, value in expected.state.items()
    }
    image, text = zip(*(slow_rep.learn_memory(state, t, depth) for t in types), strict=True)
    samples = zip(expected.images, expected.tokens, types, strict=True)
    features = [slow_rep.features(state, *sample, depth) for sample in samples]
    outputs = {
        "features_unmasked": torch.stack([both.unmasked for both in features]),
        "features": torch.stack([both.masked for both in features]),
        "logits": slow_rep.batch_logits(state, expected.images, expected.tokens, types, depth, task),
    }
    for place, memories in (("image", image), ("text", text)):
        outputs[f"memory_{place}_0"] = torch.stack([memory[0] for memory in memories])
        outputs[f"memory_{place}_last"] = torch.stack([memory[-1] for memory in memories])
    loss = slow_rep.loss(outputs["logits"], expected.labels, task)
    loss.backward()
    return Run(expected, outputs, loss.item(), {name: p.grad for name, p in state.items() if p.grad is not None})


RUNS = [
    *((run_of_the_model, path) for path in (*golden.rep_files(), *golden.dcp_files())),
    *((run_in_few_shapes, path) for path in (*golden.rep_files()[-1:], *golden.dcp_files())),
    *((run_of_the_slow_version, path) for path in golden.rep_files()),
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
    """Exactly the published parameters get one."""
    assert set(run.gradients) == set(run.golden.grad_norm)
    for name, norm in run.golden.grad_norm.items():
        gradient = run.gradients[name]
        assert float(gradient.norm()) == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=0), name
        head = torch.tensor(run.golden.grad_head[name])
        assert golden.relative_error(gradient.flatten()[:4], head) < GRADIENT_TOLERANCE, name


# The slow version, which other tests rest on


@pytest.mark.parametrize("path", golden.rep_files(), ids=lambda path: path.stem)
def test_the_slow_version_calls_dropout_once_per_rdn(path: Path) -> None:
    """By the prefix of each RDN, and uses its result."""
    expected = golden.load_golden(path)
    state, depth = expected.state, expected.memory_depth
    seen: list[str] = []

    def drop_all(name: str, hidden: Tensor) -> Tensor:
        seen.append(name)
        return torch.zeros_like(hidden)

    image_memory, _ = slow_rep.learn_memory(state, 0, depth, drop_all)
    lists = [f"compound_memory_projections_{tower}.{k}" for tower in ("image", "text") for k in range(depth)]
    rdns = [*lists, "common_memory_projection_image", "common_memory_projection_text"]
    assert sorted(seen) == sorted(f"{slow_rep.LEARNER}.{name}" for name in rdns)

    name = f"{slow_rep.LEARNER}.common_memory_projection_image"
    common = state[f"{slow_rep.LEARNER}.common_memory_complete"]
    only_skip = slow_rep.linear(state, f"{name}.skip", common) + state[f"{name}.fc2.bias"]
    torch.testing.assert_close(image_memory[0][len(common) :], only_skip)
