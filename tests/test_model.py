"""The model against the slow, obvious version of tests/slow_rep.py, and against CLIP itself."""

import itertools
import shutil

import pytest
import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.clip_dynamic_memory import RDN, MemoryLearner
from clip.modules.method import MethodOptions
from clip.modules.vision_transformer_memory import TextTransformerMemory, VisionTransformerMemory
from clip.tasks import TASKS
from clip.trainable import freeze, part_of_parameters
from tests import golden, slow_rep
from tests.models import TINY, model_input, tiny_batch, tiny_classifier

MIXES = [
    *([t] * 4 for t in range(3)),
    *([a, b, a, b] for a, b in itertools.permutations(range(3), 2)),
    [0, 1, 2, 0],
    [2, 1, 0, 1],
    [1],
]


def labels_of(task: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if task == "mmimdb":
        return (torch.rand(size, 23, generator=generator) < 0.2).double()
    return torch.randint(TASKS[task].n_classes, (size,), generator=generator)


def slow_state(classifier: MissingModalityClassifier) -> dict[str, Tensor]:
    """The classifier's values as independent leaves, for the slow version."""
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    return {
        name: value.detach().clone().requires_grad_(name in trained) for name, value in classifier.state_dict().items()
    }


def assert_same_gradients(classifier: nn.Module, state: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal where the slow version has a gradient; zero or absent where it has none.

    The slow version never encodes for nothing, so a tower nobody needs leaves gradients absent there.
    """
    for name, parameter in classifier.named_parameters():
        slow = state[name].grad
        if slow is None or not slow.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert golden.relative_error(parameter.grad, slow) < tolerance, name


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_equals_the_slow_version(task: str, mix: list[int]) -> None:
    classifier = tiny_classifier(task).double().eval()  # in float64, where a mistake cannot pass for rounding
    images, tokens = tiny_batch(len(mix))
    images = images.double()
    labels = labels_of(task, len(mix))
    state = slow_state(classifier)

    logits = classifier(model_input(images, tokens, mix))
    TASKS[task].loss(logits, labels).backward()
    slow_logits = slow_rep.batch_logits(state, images, tokens, mix, 2, task)
    slow_rep.loss(slow_logits, labels, task).backward()

    assert golden.relative_error(logits, slow_logits) < 1e-9
    assert_same_gradients(classifier, state)


@pytest.mark.parametrize("depth", [1, 2])
def test_evaluation_without_gradients_equals_the_slow_version(depth: int) -> None:
    """What is kept between batches serves every mix of types, and follows every change of the weights."""
    classifier = tiny_classifier(memory_depth=depth).double().eval()
    images, tokens = tiny_batch(4)
    images = images.double()

    def assert_equal_to_slow() -> None:
        state = slow_state(classifier)
        for mix in ([0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 2, 2], [0, 0, 1, 1]):
            with torch.inference_mode():
                logits = classifier(model_input(images, tokens, mix))
            slow_logits = slow_rep.batch_logits(state, images, tokens, mix, depth, "mmimdb")
            assert golden.relative_error(logits, slow_logits) < 1e-9, mix

    assert_equal_to_slow()
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.1, fused=True)
    classifier(model_input(images, tokens, [0, 1, 2, 0])).sum().backward()
    optimizer.step()
    assert_equal_to_slow()
    with torch.no_grad():
        classifier.get_parameter("model.text_encoder.transformer.resblocks.1.ln_1.weight").mul_(2)
    assert_equal_to_slow()
    classifier.load_state_dict(tiny_classifier(memory_depth=depth, seed=5).state_dict())
    assert_equal_to_slow()


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_memory_of_one_block_equals_the_slow_version(task: str) -> None:
    classifier = tiny_classifier(task, memory_depth=1).double().eval()
    images, tokens = tiny_batch(4)
    images, mix, labels = images.double(), [0, 1, 2, 0], labels_of(task, 4)
    state = slow_state(classifier)
    logits = classifier(model_input(images, tokens, mix))
    TASKS[task].loss(logits, labels).backward()
    slow_logits = slow_rep.batch_logits(state, images, tokens, mix, 1, task)
    slow_rep.loss(slow_logits, labels, task).backward()
    assert golden.relative_error(logits, slow_logits) < 1e-9
    assert_same_gradients(classifier, state)


def test_text_after_the_last_end_changes_nothing() -> None:
    classifier = tiny_classifier().double().eval()
    images, tokens = tiny_batch(3)
    tokens[0, 40:] = 0
    tokens[0, 39] = 299
    batch = model_input(images.double(), tokens, [0, 2, 0])
    assert batch.text_length is not None and batch.text_length < 77
    whole = classifier(batch._replace(text_length=None))
    assert golden.relative_error(classifier(batch), whole) < 1e-12


def test_samples_that_share_an_image() -> None:
    """Three texts of one image and one without: the image is encoded once, and each gets its features."""
    classifier = tiny_classifier().double().eval()
    images, tokens = tiny_batch(4)
    images = images[[0, 0, 2, 0]].double()
    whole = model_input(images, tokens, [0, 0, 2, 0])
    once = whole._replace(image_b3RR=images[:1], image_rows=torch.tensor([0]), image_of_B=torch.tensor([0, 0, 2, 0]))
    with torch.no_grad():
        assert golden.relative_error(classifier(once), classifier(whole)) < 1e-12


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
def test_checkpointing_gives_the_same_numbers_to_the_bit(task: str) -> None:
    images, tokens = tiny_batch(4)
    labels = labels_of(task, 4)
    results = []
    for checkpointing in (False, True):
        classifier = tiny_classifier(task).train()
        classifier.compute(torch.float32, checkpointing=checkpointing)
        torch.manual_seed(1)
        TASKS[task].loss(classifier(model_input(images, tokens, [0, 1, 2, 0])), labels).backward()
        results.append({name: p.grad for name, p in classifier.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_sixteen_bits_hold_the_frozen_weights_once_and_stay_close() -> None:
    classifier, images, tokens = tiny_classifier().eval(), *tiny_batch(4)
    batch = model_input(images, tokens, [0, 1, 2, 0])
    expected = classifier(batch).detach()
    halved = tiny_classifier().eval()
    halved.compute(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = halved(batch).float()
    assert golden.relative_error(logits, expected) < 2e-2
    logits.sum().backward()
    for name, parameter in halved.named_parameters():
        blocks = any(part in name for part in (".attn.", ".mlp.", "conv1"))
        assert parameter.dtype == (torch.bfloat16 if blocks else torch.float32), name
        assert not (blocks and parameter.requires_grad), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gives_the_same_numbers() -> None:
    images, tokens = tiny_batch(4)
    labels = labels_of("mmimdb", 4)
    results = []
    for compiled in (False, True):
        classifier = tiny_classifier().train()
        classifier.compute(torch.float32, compiled=compiled)
        names = list(classifier.state_dict())
        for mix in ([0, 1, 2, 0], [0, 0, 1, 0], [2, 2, 0, 2]):  # other sizes, no error
            torch.manual_seed(1)
            classifier.zero_grad()
            TASKS["mmimdb"].loss(classifier(model_input(images, tokens, mix)), labels).backward()
        results.append((names, {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}))
    (names, plain), (compiled_names, compiled_grads) = results
    assert names == compiled_names
    assert plain.keys() == compiled_grads.keys()
    for name in plain:
        assert golden.relative_error(compiled_grads[name], plain[name]) < 1e-4, name


@pytest.mark.parametrize("mix", [[0, 1, 2, 0], [1, 1, 0, 1], [2, 2, 2]], ids=str)
def test_each_sample_has_its_own_dropout_mask(mix: list[int]) -> None:
    """In training: the masks that the real learner draws, one per sample, give the slow version the same numbers."""
    classifier = tiny_classifier().double().train()
    images, tokens = tiny_batch(len(mix))
    images = images.double()
    labels = labels_of("mmimdb", len(mix))
    state = slow_state(classifier)
    masks: dict[str, Tensor] = {}
    for name, module in classifier.named_modules():
        if isinstance(module, RDN):

            def keep_mask(_: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
                masks[name] = (output / inputs[0]).detach()

            module.dropout.register_forward_hook(keep_mask)

    logits = classifier(model_input(images, tokens, mix))
    TASKS["mmimdb"].loss(logits, labels).backward()

    def sample_dropout(row: int) -> slow_rep.Dropout:
        return lambda name, x: x * masks[name][row].to(x.dtype)

    dropouts = [sample_dropout(row) for row in range(len(mix))]
    slow_logits = slow_rep.batch_logits(state, images, tokens, mix, 2, "mmimdb", dropouts=dropouts)
    slow_rep.loss(slow_logits, labels, "mmimdb").backward()
    some_mask = masks["model.memory_learner.common_memory_projection_text"]
    assert not torch.equal(some_mask[0], some_mask[1])
    assert golden.relative_error(logits, slow_logits) < 1e-9
    assert_same_gradients(classifier, state)


def test_parameters_of_absent_types_get_no_gradient_and_skipped_towers_get_zeros() -> None:
    """As published: start slots of a type that does not occur keep `grad=None` (no weight decay); a tower that
    nobody needs still gives zero gradients to what feeds it."""
    classifier = tiny_classifier("hatememes").train()
    images, tokens = tiny_batch(3)
    classifier(model_input(images, tokens, [2, 2, 2])).sum().backward()
    gradients = {name: p.grad for name, p in classifier.named_parameters()}
    assert gradients["model.memory_learner.common_memory_image"] is None
    assert gradients["model.memory_learner.visual_memory_complete"] is None
    for name in ("model.memory_learner.compound_memory_projections_image.1.fc2.weight", "model.image_encoder.proj"):
        gradient = gradients[name]
        assert gradient is not None and not gradient.any()


def test_trained_parameters_are_the_published_ones() -> None:
    published = slow_rep.trained_names
    for task in ("mmimdb", "food101", "hatememes"):
        classifier = tiny_classifier(task)
        trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
        expected = published(classifier.state_dict(), task)
        unused = {name for name in expected if ".dynamic_common_token_net." in name}
        assert trained == {name for name in expected - unused if "memories_dynamic" not in name}
        assert part_of_parameters(classifier).keys() == dict(classifier.named_parameters()).keys()


def test_freeze_reports_counts() -> None:
    text = freeze(tiny_classifier(), "mmimdb")
    assert "  method  " in text and "trained in all" in text and "frozen" in text


def test_starting_slots_lie_around_the_backbone_embeddings() -> None:
    torch.manual_seed(0)
    learner = MemoryLearner(TINY, MethodOptions("rep", 9, 2))
    class_embedding, end_embedding = torch.randn(128), torch.randn(64)
    learner.start_from(class_embedding, end_embedding)
    for name, centre in (("visual_memory_missing", class_embedding), ("text_memory_complete", end_embedding)):
        distance = (learner.get_parameter(name) - centre).norm(dim=-1)
        torch.testing.assert_close(distance, torch.full((3,), 0.2))
    assert learner.residual_alpha.item() == 0.5


@pytest.mark.parametrize("length", [0, -3, 4, 35])
def test_memory_length_must_be_a_positive_multiple_of_three(length: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 3.*{length}"):
        MemoryLearner(TINY, MethodOptions("rep", length, 2))


def test_memory_depth_must_fit_the_towers() -> None:
    with pytest.raises(ValueError, match="memory_depth=3 is more than the backbone has blocks"):
        MissingModalityClassifier(TINY, MethodOptions("rep", 6, 3), "mmimdb_classifier", 23)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_bare_towers_equal_transformers_clip(tmp_path, activation: str) -> None:
    """Without memory the towers are CLIP: features of the same random weights, in transformers' implementation."""
    from clip.backbone import load_backbone
    from tests.backbones import random_hf_clip

    hf = random_hf_clip(tmp_path, activation=activation)
    backbone = load_backbone(str(tmp_path))
    arch = backbone.architecture
    image_tower, text_tower = VisionTransformerMemory(arch), TextTransformerMemory(arch)
    for prefix, tower in (("image_encoder.", image_tower), ("text_encoder.", text_tower)):
        own = {k.removeprefix(prefix): v for k, v in backbone.state.items() if k.startswith(prefix)}
        tower.load_state_dict(own, strict=True)
    images, tokens = tiny_batch(3)
    with torch.no_grad():
        image_features = hf.visual_projection(hf.vision_model(pixel_values=images).pooler_output)
        text_features = hf.text_projection(hf.text_model(input_ids=tokens).pooler_output)
        assert golden.relative_error(image_tower(images), image_features) < 1e-5
        assert golden.relative_error(text_tower(tokens), text_features) < 1e-5
