"""The slow model gives the published numbers.

Tolerances are on the relative error of a whole array, `golden.relative_error`: norm of the difference over norm of the
expected value (for the loss and a gradient norm, that of one number; for `grad_head`, see the test).
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import golden, slow_rep

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


class Run:
    """One golden file and what the slow model makes of it, forward and backward."""

    def __init__(self, path: Path) -> None:
        self.golden = golden.load_golden(path)
        task, depth = self.golden.task, self.golden.memory_depth
        self.trained = slow_rep.trained_names(self.golden.state, task)
        self.state = {
            name: value.clone().requires_grad_() if name in self.trained else value
            for name, value in self.golden.state.items()
        }

        memories = [slow_rep.learn_memory(self.state, t, depth) for t in self.golden.missing_types]
        samples = list(zip(self.golden.images, self.golden.tokens, self.golden.missing_types, strict=True))
        features = [slow_rep.features(self.state, *sample, depth) for sample in samples]
        logits = slow_rep.batch_logits(
            self.state, self.golden.images, self.golden.tokens, self.golden.missing_types, depth, task
        )
        self.outputs: dict[str, Tensor] = {
            "memory_image_0": torch.stack([image_memory[0] for image_memory, _ in memories]),
            "memory_text_0": torch.stack([text_memory[0] for _, text_memory in memories]),
            "memory_image_last": torch.stack([image_memory[-1] for image_memory, _ in memories]),
            "memory_text_last": torch.stack([text_memory[-1] for _, text_memory in memories]),
            "features_unmasked": torch.stack([both.unmasked for both in features]),
            "features": torch.stack([both.masked for both in features]),
            "logits": logits,
        }
        loss = slow_rep.loss(logits, self.golden.labels, task)
        loss.backward()
        self.loss = loss.item()
        self.gradients = {name: value.grad for name, value in self.state.items() if value.grad is not None}


@pytest.fixture(scope="module", params=golden.rep_files(), ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_golden_files_are_there() -> None:
    assert golden.rep_files(), f"no rep_*.npz in {golden.GOLDEN_DIR} (environment variable GOLDEN_DIR)"


def test_full_size_names_are_the_published_ones() -> None:
    """At the published sizes the table of names is the published checkpoint's, plus the dynamic queries."""
    shapes = golden.rep_shapes(
        golden.GOLDEN_DIR,
        task="mmimdb",
        classes=23,
        vision_layers=12,
        text_layers=12,
        resolution=224,
        memory_length=36,
        memory_depth=6,
    )
    published = json.loads((golden.GOLDEN_DIR / "rep_checkpoint_keys_vitb16.json").read_text())
    dynamic = {name: shape for name, shape in shapes.items() if "memories_dynamic" in name}
    assert len(dynamic) == 6
    assert {name: list(shape) for name, shape in shapes.items() if name not in dynamic} == published


@pytest.mark.parametrize("name", golden.EXPECTED)
def test_output(run: Run, name: str) -> None:
    assert golden.relative_error(run.outputs[name], run.golden.expected[name]) < FORWARD_TOLERANCE


def test_loss(run: Run) -> None:
    assert run.loss == pytest.approx(run.golden.loss, rel=FORWARD_TOLERANCE)


def test_trained_names(run: Run) -> None:
    assert run.trained == set(run.golden.grad_norm) | set(run.golden.trainable_without_grad)
    assert set(run.gradients) == set(run.golden.grad_norm)


def test_gradient_norms(run: Run) -> None:
    norms = {name: float(run.gradients[name].norm()) for name in run.golden.grad_norm}
    assert norms == pytest.approx(run.golden.grad_norm, rel=GRADIENT_TOLERANCE, abs=0)


def test_gradient_values(run: Run) -> None:
    for name, head in run.golden.grad_head.items():
        gradient = run.gradients[name]
        error = golden.relative_error(gradient.flatten()[:4], torch.tensor(head))
        assert error < GRADIENT_TOLERANCE, name


def test_dropout_is_called_once_per_rdn(run: Run) -> None:
    """The hook sees each RDN by its prefix, and its result is used."""
    seen: list[str] = []

    def drop_all(name: str, hidden: Tensor) -> Tensor:
        seen.append(name)
        return torch.zeros_like(hidden)

    depth = run.golden.memory_depth
    image_memory, _ = slow_rep.learn_memory(run.state, 0, depth, drop_all)
    lists = [f"compound_memory_projections_{tower}.{k}" for tower in ("image", "text") for k in range(depth)]
    expected = [*lists, "common_memory_projection_image", "common_memory_projection_text"]
    assert sorted(seen) == sorted(f"{slow_rep.LEARNER}.{name}" for name in expected)

    name = f"{slow_rep.LEARNER}.common_memory_projection_image"
    common = run.state[f"{slow_rep.LEARNER}.common_memory_complete"]
    only_skip = slow_rep.linear(run.state, f"{name}.skip", common) + run.state[f"{name}.fc2.bias"]
    m = common.shape[0]
    torch.testing.assert_close(image_memory[0][m:], only_skip)
