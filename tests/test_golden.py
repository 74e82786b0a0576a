"""The model gives the published implementation's numbers, outputs and gradients, and CLIP's token ids.

Runs over every `rep_*.npz`, `dcp_*.npz` and `clip_tokens.json` in GOLDEN_DIR (default: tests/data/golden).
"""

import json
import os
from pathlib import Path

import pytest
import torch

from clip.tasks import TASKS
from clip.tokenizer import load_tokenizer
from tests import golden
from tests.models import classifier_of, model_input, published_name

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


class Run:
    """One golden file, and what the real model makes of it, forward and backward, in evaluation mode."""

    def __init__(self, path: Path) -> None:
        expected = self.golden = golden.load_golden(path)
        classifier = classifier_of(
            expected.state, expected.task, expected.memory_length, expected.memory_depth, expected.prompt_type
        )
        classifier.eval()
        batch = model_input(expected.images, expected.tokens, expected.missing_types)
        features, slots = classifier.features(batch)
        image, text = slots["image"], slots["text"]
        logits = classifier(batch)
        every_row = torch.arange(len(expected.images))
        unmasked = batch._replace(
            inputs={"image": expected.images, "text": expected.tokens}, rows={"image": every_row, "text": every_row}
        )
        self.outputs = {
            "memory_image_0": torch.cat([image.replaced_BmD[0], image.inserted_BmD[0]], dim=1),
            "memory_text_0": torch.cat([text.replaced_BmD[0], text.inserted_BmD[0]], dim=1),
            "memory_image_last": image.replaced_BmD[-1],
            "memory_text_last": text.replaced_BmD[-1],
            "features_unmasked": classifier.model.fuse(classifier.features(unmasked)[0]),
            "features": classifier.model.fuse(features),
            "logits": logits,
        }
        loss = TASKS[expected.task].loss(logits, expected.labels)
        loss.backward()
        self.loss = loss.item()
        self.gradients = {
            published_name(name): p.grad for name, p in classifier.named_parameters() if p.grad is not None
        }


@pytest.fixture(scope="module", params=[*golden.rep_files(), *golden.dcp_files()], ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_golden_files_are_there() -> None:
    for method, files in (("rep", golden.rep_files()), ("dcp", golden.dcp_files())):
        assert files, f"no {method}_*.npz in {golden.GOLDEN_DIR} (environment variable GOLDEN_DIR)"


@pytest.mark.parametrize("name", golden.EXPECTED)
def test_output(run: Run, name: str) -> None:
    assert golden.relative_error(run.outputs[name], run.golden.expected[name]) < FORWARD_TOLERANCE


def test_loss(run: Run) -> None:
    assert run.loss == pytest.approx(run.golden.loss, rel=FORWARD_TOLERANCE)


def test_exactly_the_published_parameters_get_a_gradient(run: Run) -> None:
    assert set(run.gradients) == set(run.golden.grad_norm)


def test_gradients(run: Run) -> None:
    for name, norm in run.golden.grad_norm.items():
        gradient = run.gradients[name]
        assert float(gradient.norm()) == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=0), name
        head = torch.tensor(run.golden.grad_head[name])
        assert golden.relative_error(gradient.flatten()[:4], head) < GRADIENT_TOLERANCE, name


@pytest.mark.skipif("CLIP_VOCAB" not in os.environ, reason="CLIP_VOCAB does not name CLIP's vocabulary file")
def test_token_ids() -> None:
    texts = json.loads((golden.GOLDEN_DIR / "clip_tokens.json").read_text("utf-8"))
    ids = load_tokenizer(os.environ["CLIP_VOCAB"])([entry["text"] for entry in texts])
    for row, entry in enumerate(texts):
        expected = entry["ids"] + [0] * (77 - len(entry["ids"]))
        assert ids[row].tolist() == expected, entry["text"]
