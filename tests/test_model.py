"""REP against the slow, obvious version in tests/slow_methods.py; dtypes, gradients and initial values."""

import pytest
import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.clip_dynamic_memory import RDN, MemoryLearner
from clip.modules.method import MethodOptions
from clip.trainable import parts_of
from engine.tasks import TASKS
from tests import golden, slow_methods
from tests.models import TINY, model_input, published_name, published_state, tiny_batch, tiny_classifier


def labels_of(task: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if task == "mmimdb":
        return (torch.rand(size, 23, generator=generator) < 0.2).double()
    return torch.randint(TASKS[task].n_classes, (size,), generator=generator)


def slow_state(classifier: MissingModalityClassifier) -> dict[str, Tensor]:
    """The classifier's values as separate leaf tensors, for the slow version."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in published_state(classifier).items()
    }


def assert_same_gradients(classifier: nn.Module, state: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Asserts equal gradients where the slow version has any, and zero or absent ones elsewhere.

    The slow version never runs a tower that no sample needs, so it leaves those gradients absent.
    """
    for name, parameter in classifier.named_parameters():
        slow = state[published_name(name)].grad
        if slow is None or not slow.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert golden.relative_error(parameter.grad, slow) < tolerance, name


def test_only_frozen_weights_are_held_in_16_bits() -> None:
    classifier = tiny_classifier().eval()
    classifier.compute(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        classifier(model_input(*tiny_batch(4), [0, 1, 2, 0])).float().sum().backward()
    for name, parameter in classifier.named_parameters():
        blocks = any(part in name for part in (".attn.", ".mlp.", "conv1"))
        assert parameter.dtype == (torch.bfloat16 if blocks else torch.float32), name
        assert not (blocks and parameter.requires_grad), name


@pytest.mark.parametrize("mix", [[0, 1, 2, 0], [1, 1, 0, 1], [2, 2, 2]], ids=str)
def test_each_sample_has_its_own_dropout_mask(mix: list[int]) -> None:
    """In training, the slow version gives the same numbers with the masks that the real learner draws per sample."""
    classifier = tiny_classifier().double().train()
    images, tokens = tiny_batch(len(mix))
    images = images.double()
    labels = labels_of("mmimdb", len(mix))
    state = slow_state(classifier)
    masks: dict[str, Tensor] = {}
    for name, module in classifier.named_modules():
        if isinstance(module, RDN):

            def record_mask(_: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
                masks[name] = (output / inputs[0]).detach()

            module.dropout.register_forward_hook(record_mask)

    logits = classifier(model_input(images, tokens, mix))
    TASKS["mmimdb"].loss(logits, labels).backward()

    def slow(row: int) -> Tensor:
        def drop(name: str, x: Tensor) -> Tensor:
            return x * masks[name][row]

        return slow_methods.features(state, "rep", images[row], tokens[row], mix[row], dropout=drop).masked

    features = torch.stack([slow(row) for row in range(len(mix))])
    slow_logits = slow_methods.linear(state, "mmimdb_classifier", features)
    TASKS["mmimdb"].loss(slow_logits, labels).backward()
    some_mask = masks["model.memory_learner.common_memory_projection_text"]
    assert not torch.equal(some_mask[0], some_mask[1])
    assert golden.relative_error(logits, slow_logits) < 1e-9
    assert_same_gradients(classifier, state)


def test_absent_types_leave_gradients_none_and_skipped_towers_zero() -> None:
    """As published: starting slots of an absent type keep `grad=None` (no weight decay); a tower that no sample
    needs still gives its inputs zero gradients."""
    classifier = tiny_classifier("hatememes").train()
    images, tokens = tiny_batch(3)
    classifier(model_input(images, tokens, [2, 2, 2])).sum().backward()
    gradients = {name: p.grad for name, p in classifier.named_parameters()}
    assert gradients["model.memory_learner.common_memory_image"] is None
    assert gradients["model.memory_learner.visual_memory_complete"] is None
    for name in (
        "model.memory_learner.compound_memory_projections_image.1.fc2.weight",
        "model.memory_learner.dynamic.image.attention.in_proj_weight",
        "model.image_encoder.proj",
    ):
        gradient = gradients[name]
        assert gradient is not None and not gradient.any()


def test_every_parameter_is_in_exactly_one_part() -> None:
    classifier = tiny_classifier()
    assert {"method", "method, unused", "head", "dynamic attention", "CLIP"} < parts_of(classifier).keys()
    classifier.stray = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="a parameter is in no part"):
        parts_of(classifier)


def test_starting_slots_lie_around_the_backbone_embeddings() -> None:
    torch.manual_seed(0)
    learner = MemoryLearner(TINY.places, TINY.embed_dim, MethodOptions("rep", 9, 2))
    class_embedding, end_embedding = torch.randn(128), torch.randn(64)
    learner.start_from({"image": class_embedding, "text": end_embedding})
    for name, centre in (("visual_memory_missing", class_embedding), ("text_memory_complete", end_embedding)):
        distance = (learner.get_parameter(name) - centre).norm(dim=-1)
        torch.testing.assert_close(distance, torch.full((3,), 0.2))
    assert learner.residual_alpha.item() == 0.5
