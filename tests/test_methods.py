"""Every method equals its slow version in outputs and gradients, in evaluation and training; more about methods."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clip.modules.aoept import AOEPT
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.dpl import DecoupledPrototypes
from clip.modules.heads import LinearByType, LinearHead
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.mora import LoRA
from clip.modules.registry import HEADS, METHODS
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from engine.checkpoint import (
    DESCRIPTION,
    ModelSpec,
    build_classifier,
    describe,
    read_checkpoint,
    restore_classifier,
    saved_state,
)
from engine.tasks import TASKS
from engine.training import FinetuneModule
from engine.training import model_input as training_input
from tests import golden, slow_methods
from tests.conftest import Patch
from tests.models import ENDS, REAL, TINY, model_input, published_name, published_state, tiny_batch, tiny_classifier
from vilt.batches import Batch

MIXES = ([0, 1, 2, 0], [1, 1], [2, 0, 2], [2], [0])
REP_OPTIONS: dict[str, dict[str, Any]] = {
    "rep": {},
    "rep far=False": {"far": False},
    "rep fmb=False": {"fmb": False},
    "rep far=False fmb=False": {"far": False, "fmb": False},
    "rep replay": {"replay_depth": 1},
    "rep dynamic_init": {"dynamic_init": True},
    "rep described": {"replay_depth": 1, "dynamic_init": True, "decoupling_weight": 0.5},
    "rep fmb=False replay": {"fmb": False, "replay_depth": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **REP_OPTIONS,
    **{name: {"prompt_type": name} for name in METHODS if name != "rep"},
}
SLOW_VARIANTS = [name for name in VARIANTS if name not in ("mora", "lora", "aoept")]
"""Variants with a slow version; the others are compared with golden numbers (test_golden_rivals.py)."""
DEEPER = replace(TINY, vision_layers=4, text_layers=3)


def make(
    variant: str,
    arch: ClipArchitecture = DEEPER,
    depth: int = 2,
    head: str = "linear",
    seed: int = 0,
    task: str = "mmimdb",
    **more: Any,
) -> MissingModalityClassifier:
    """A random classifier in float64, with all values moved away from their trivial initial ones."""
    options = {**VARIANTS[variant], **more}
    return tiny_classifier(task, memory_depth=depth, seed=seed, head=head, arch=arch, **options).double().eval()


def joined_features(classifier: MissingModalityClassifier, batch: ModelInput) -> Tensor:
    return classifier.model.fuse(classifier.features(batch)[0], batch.present_BM)


def slow_features(
    classifier: MissingModalityClassifier,
    variant: str,
    images: Tensor,
    tokens: Tensor,
    mix: list[int],
    activation: str = "quick_gelu",
) -> Tensor:
    """Features (B, 2E) by the slow version; gradients reach the classifier's parameters."""
    state = published_state(classifier)
    options = slow_methods.RELEASED | VARIANTS[variant]
    prompt_type = options.get("prompt_type", "rep")
    rows = [
        slow_methods.features(state, prompt_type, image, ids, missing_type, options, activation).masked
        for image, ids, missing_type in zip(images, tokens, mix, strict=True)
    ]
    return torch.stack(rows)


def double_batch(size: int) -> tuple[Tensor, Tensor]:
    images, tokens = tiny_batch(size)
    return images.double(), tokens


@pytest.mark.parametrize("variant", SLOW_VARIANTS)
def test_outputs_and_gradients_equal_the_slow_version(variant: str) -> None:
    classifier = make(variant, task="hatememes")
    images, tokens = double_batch(4)
    weight = torch.randn(2, dtype=torch.float64)
    for mix in MIXES:
        inputs = images[: len(mix)], tokens[: len(mix)]
        slow = slow_features(classifier, variant, *inputs, mix)
        expected = slow @ classifier.get_parameter("hatememes_classifier.weight").T
        expected = expected + classifier.get_parameter("hatememes_classifier.bias")
        with torch.inference_mode():
            evaluated = classifier(model_input(*inputs, mix))
        fast = classifier(model_input(*inputs, mix))
        assert golden.relative_error(evaluated, expected) < 1e-9, mix
        assert golden.relative_error(fast, expected) < 1e-9, mix
        trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((fast * weight).sum(), list(trained.values()), allow_unused=True)
        slow_grads = torch.autograd.grad((expected * weight).sum(), list(trained.values()), allow_unused=True)
        for name, grad, slow_grad in zip(trained, grads, slow_grads, strict=True):
            grad, slow_grad = (torch.zeros(()) if g is None else g for g in (grad, slow_grad))
            assert float((grad - slow_grad).norm()) <= 1e-8 * (1 + float(slow_grad.norm())), (name, mix)


def test_a_method_without_a_slow_version_is_told_where_it_belongs() -> None:
    images, tokens = double_batch(1)
    with pytest.raises(NotImplementedError, match=r"^mine: expected its slow version here, in method_slots of "):
        slow_methods.features(published_state(make("coop")), "mine", images[0], tokens[0], 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_padded_to_few_shapes_give_the_same_results(variant: str, monkeypatch: Patch) -> None:
    """On a GPU inputs are added to a batch and dropped again: outputs, losses and gradients are the same."""
    classifier, unpadded = make(variant, task="hatememes"), ClipBackbone.prepare
    seen: list[ModelInput] = []

    def rounded(self: ClipBackbone, batch: ModelInput) -> ModelInput:
        seen.append(batch.rounded(4))
        return seen[-1]

    images, tokens = double_batch(7)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    own_losses = {"msp": {"orthogonality"}, "rep described": {"decoupling"}, "aoept": {"auxiliary"}}
    for mix in ([0, 1, 2, 0, 1, 0, 1], [1, 1], [2, 0, 2], [2], [0]):
        batch, labels = model_input(images[: len(mix)], tokens[: len(mix)], mix), torch.arange(len(mix)) % 2
        found = []
        for prepare in (unpadded, rounded):
            monkeypatch.setattr(ClipBackbone, "prepare", prepare)
            logits, losses = classifier.training_outputs(batch, labels)
            assert losses.keys() == own_losses.get(variant, set())
            loss = TASKS["hatememes"].loss(logits, labels) + sum(losses.values())
            found.append([logits, loss, *torch.autograd.grad(loss, trained, allow_unused=True)])
        for plain, padded in zip(*found, strict=True):
            assert (plain is None) == (padded is None), mix
            assert plain is None or torch.allclose(padded, plain, rtol=1e-9, atol=1e-12), mix
    assert [len(batch.inputs["image"]) for batch in seen[:1]] == [7] and len(seen) == 5


OTHER_SIZES: list[tuple[str, ClipArchitecture, int, dict[str, Any]]] = [
    *((variant, DEEPER, depth, {}) for variant in ("rep", "dcp", "map_attention", "syp") for depth in (1, 3)),
    ("rep", replace(DEEPER, activation="gelu"), 2, {}),
    ("rep replay", replace(TINY, vision_layers=5, text_layers=4), 2, {"replay_depth": 2}),
]


@pytest.mark.parametrize(
    ("variant", "arch", "depth", "more"),
    OTHER_SIZES,
    ids=[f"{variant}-depth {depth}-{arch.activation}" for variant, arch, depth, _ in OTHER_SIZES],
)
def test_other_depths_and_activations(variant: str, arch: ClipArchitecture, depth: int, more: dict[str, Any]) -> None:
    classifier = make(variant, arch, depth, **more)
    images, tokens = double_batch(3)
    slow = slow_features(classifier, variant, images, tokens, [0, 1, 2], arch.activation)
    assert golden.relative_error(joined_features(classifier, model_input(images, tokens, [0, 1, 2])), slow) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_may_share_an_image(variant: str) -> None:
    """In evaluation, an image shared by several samples is in the batch only once."""
    classifier = make(variant)
    images, tokens = double_batch(5)
    images[2], images[4] = images[1], images[3]
    apart = model_input(images, tokens, [2, 0, 0, 1, 1])
    together = apart._replace(
        inputs={**apart.inputs, "image": images[[1, 3]]},
        rows={**apart.rows, "image": torch.tensor([1, 3])},
        source_of_B={"image": torch.tensor([0, 1, 1, 3, 3])},
    )
    with torch.inference_mode():
        assert torch.allclose(classifier(together), classifier(apart), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_no_bit(variant: str) -> None:
    classifier = make(variant, task="hatememes").train()
    images, tokens = double_batch(3)
    results = []
    for checkpointing in (False, True):
        classifier.compute(torch.float64, checkpointing=checkpointing)
        classifier.zero_grad()
        torch.manual_seed(1)  # dropout
        classifier(model_input(images, tokens, [0, 1, 2])).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_close_to_float32(variant: str) -> None:
    classifier = make(variant).float()
    batch = model_input(*tiny_batch(3), [0, 1, 2])
    with torch.inference_mode():
        exact = classifier(batch)
        classifier.compute(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            half = classifier(batch)
    assert golden.relative_error(half, exact) < 5e-2
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize(
    ("prompt_type", "head", "entry", "std"),
    [
        ("rep", "linear", "model.memory_learner.common_memory_image", (1 / TINY.embed_dim + 0.04) ** 0.5),
        ("rep", "linear", "model.memory_learner.dynamic.text.queries_image", 0.02),
        ("dcp", "linear", "model.prompt_learner.common_prompt_text", 0.02),
        ("map_input", "linear", "model.prompt_learner.image_prompts", 0.02),
        ("mora", "linear", "model.prompt_learner.shared.1.image", 0.5),
        ("mora", "linear", "model.prompt_learner.own.text.1_q.P", 0.5),
        ("mora", "linear", "model.prompt_learner.own.text.1_q.Q", 0.0),
        ("none", "linear", "food101_classifier.weight", 0.02),
        ("none", "linear", "food101_classifier.bias", 0.0),
        ("none", "linear_by_type", "food101_classifier.weight", 0.02),
        ("none", "linear_by_type", "food101_classifier.bias", 0.0),
        ("none", "dpl", "food101_classifier.w_mt_im", (2 / (TINY.embed_dim + 101)) ** 0.5),
    ],
)
def test_initial_values_are_drawn_as_documented(prompt_type: str, head: str, entry: str, std: float) -> None:
    torch.manual_seed(0)
    spec = ModelSpec("food101", MethodOptions(prompt_type, 192, 2), TINY, head)
    values = build_classifier(spec).state_dict()[entry]
    assert float(values.square().mean().sqrt()) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    ("prompt_type", "head"), [*((name, "linear") for name in METHODS), ("none", "dpl"), ("none", "linear_by_type")]
)
def test_every_method_overfits_sixteen_samples(prompt_type: str, head: str) -> None:
    """Every trained parameter changes in the process."""
    torch.manual_seed(0)
    options = MethodOptions(prompt_type, 6, 2, dynamic_init=True, replay_depth=0)
    classifier = build_classifier(ModelSpec("hatememes", options, TINY, head)).train()
    batch, labels = model_input(*tiny_batch(16), [0, 1, 2, 0] * 4), torch.arange(16) // 2 % 2
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    for _ in range(30):
        logits, losses = classifier.training_outputs(batch, labels)
        (TASKS["hatememes"].loss(logits, labels) + sum(losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        assert classifier.eval()(batch).argmax(dim=1).tolist() == labels.tolist()
    assert [name for name, parameter in trained.items() if torch.equal(parameter, start[name])] == []


README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


@pytest.mark.parametrize("prompt_type", METHODS)
def test_trained_parameters_are_as_many_as_the_readme_says(prompt_type: str) -> None:
    """The learner and the head are trained; with DCP and AOEPT, so are the ends of the towers."""
    found = re.search(
        rf"^\| `{prompt_type}` \|.*\| ([\d,]+) ?(?:\(`memory_depth=(\d+)`\))?[^|]*\|[^|]*\|$", README, re.M
    )
    assert found is not None
    with torch.device("meta"):
        options = MethodOptions(prompt_type, memory_depth=int(found[2] or 6))
        classifier = build_classifier(ModelSpec("mmimdb", options, REAL["ViT-B/16"]))
    trained = {name: p.numel() for name, p in classifier.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == int(found[1].replace(",", "")) + 1024 * 23 + 23
    others = {name for name in trained if not name.startswith((f"model.{classifier.method.attribute}.", "mmimdb_"))}
    projection = {"model.text_encoder.text_projection"}
    assert others == {"dcp": ENDS, "aoept": ENDS | projection}.get(prompt_type, set())


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, {"dynamic_common_token_net"}),
        ({"dynamic_init": True}, set()),
        ({"far": False}, {"dynamic_common_token_net", "residual_alpha"}),
        ({"fmb": False}, {"dynamic_common_token_net", "text_memory_missing", "visual_memory_missing",
                          "common_memory_complete", "common_memory_image", "common_memory_text",
                          "common_memory_projection_image", "common_memory_projection_text"}),
    ],
)  # fmt: skip
def test_parameters_unused_under_an_option_are_not_trained(options: dict[str, Any], unused: set[str]) -> None:
    learner = build_classifier(ModelSpec("hatememes", MethodOptions("rep", 6, 2, **options), TINY)).method
    assert {name.split(".")[0] for name, p in learner.named_parameters() if not p.requires_grad} == unused
    assert {name.split(".")[0] for name, p in learner.named_parameters() if p.requires_grad}.isdisjoint(unused)


def training_batch(mix: list[int]) -> tuple[ModelInput, Tensor]:
    images, tokens = double_batch(len(mix))
    labels = torch.zeros(len(mix), 23, dtype=torch.uint8)
    labels[0, [1, 5]] = 1
    labels[-1, 22] = 1
    return model_input(images, tokens, mix), labels


BATCH = Batch(
    inputs={
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        "text": tiny_batch(2)[1],
    },
    rows={"image": torch.tensor([0, 2]), "text": torch.tensor([0, 1])},
    present_BM=torch.tensor([[True, True], [False, True], [True, False]]),
    types=(0, 1, 2),
    lengths={},
    length_b={},
    source_of_B={},
    label=torch.eye(23, dtype=torch.uint8)[:3],
    index_B=torch.arange(3),
)


def training_step(classifier: MissingModalityClassifier) -> tuple[Tensor, dict[str, float], ModelInput]:
    """A step on BATCH in float32: the loss returned to the trainer, the logged values and the model's input."""
    module = FinetuneModule(classifier.float(), ModelSpec("mmimdb", MethodOptions(), DEEPER))
    module._trainer = SimpleNamespace(world_size=1, global_step=0)  # type: ignore[assignment]
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    return module.training_step(BATCH, 0), logged, training_input(BATCH)


def test_the_msp_loss_is_the_orthogonality_penalty() -> None:
    classifier = make("msp").train()
    losses = classifier.training_outputs(*training_batch([0, 2]))[1]
    assert losses.keys() == {"orthogonality"}
    expected = slow_methods.msp_penalty(dict(classifier.named_parameters()))
    assert losses["orthogonality"].item() == pytest.approx(expected.item(), rel=1e-12)
    losses["orthogonality"].backward()
    gradient = classifier.get_parameter("model.prompt_learner.image_prompts").grad
    assert gradient is not None and gradient.any()


def test_the_decoupling_loss_equals_the_slow_version() -> None:
    classifier = make("rep described").train()
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    mix = [0, 2, 1, 0]
    losses = classifier.training_outputs(*training_batch(mix))[1]
    assert losses.keys() == {"decoupling"}
    images, tokens = double_batch(len(mix))
    everything = model_input(images, tokens, [0] * len(mix))
    inputs = classifier.model.embed(everything).values()
    options = {"far": True, "fmb": True, "dynamic_init": True}
    state = published_state(classifier)
    slots = [
        slow_methods.method_slots(state, "rep", missing_type, {"image": image, "text": text}, options)
        for missing_type, image, text in zip(mix, *inputs, strict=True)
    ]
    assert losses["decoupling"].item() == pytest.approx(0.5 * slow_methods.decoupling(slots).item(), rel=1e-9)


@pytest.mark.parametrize(("variant", "name"), [("msp", "orthogonality"), ("rep described", "decoupling")])
def test_a_training_step_adds_and_logs_the_losses_of_the_method(variant: str, name: str) -> None:
    classifier = make(variant)  # in evaluation, without dropout
    loss, logged, batch = training_step(classifier)
    logits, losses = classifier.training_outputs(batch, BATCH.label)
    task_loss = TASKS["mmimdb"].loss(logits.float(), BATCH.label).item()
    assert losses[name].item() > 1e-3
    assert loss.item() == pytest.approx(task_loss + losses[name].item(), rel=1e-6)
    assert logged == {"train/loss": loss.item(), f"train/{name}": losses[name].item()}


def test_a_training_step_gives_the_head_the_labels() -> None:
    """With labels, DPL widens the angles to the true classes, so the loss exceeds that of the plain logits."""
    classifier = make("none", head="dpl", dpl_contrast_weight=0.5)
    loss, logged, batch = training_step(classifier)
    with torch.no_grad():
        logits, losses = classifier.training_outputs(batch, BATCH.label)
        without_labels = TASKS["mmimdb"].loss(classifier(batch), BATCH.label)
        task_loss = TASKS["mmimdb"].loss(logits, BATCH.label)
    assert loss.item() == pytest.approx((task_loss + losses["contrast"]).item(), rel=1e-6)
    assert logged["train/contrast"] == losses["contrast"].item() > 0.1
    assert task_loss > without_labels + 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cosine", [0.9, 0.998, 0.9999, 1.0, -1.0])
def test_the_gradient_is_finite_near_a_prototype(cosine: float, dtype: torch.dtype) -> None:
    """Under autocast too, although a 16-bit cosine would round to 1 from 0.998 on."""
    torch.manual_seed(0)
    head = DecoupledPrototypes(2, 64, 3, MethodOptions(dpl_contrast_weight=0.5))
    head = head.to(torch.float64 if dtype is torch.float64 else torch.float32)
    prototype = nn.functional.normalize(head.get_parameter("w_mi_tm")[:, 1].detach(), dim=0)
    other = torch.randn_like(prototype)
    other = nn.functional.normalize(other - (other @ prototype) * prototype, dim=0)
    feature = cosine * prototype + (1 - cosine**2) ** 0.5 * other
    features = torch.cat([feature, torch.zeros_like(feature)])[None].to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits = head(features, torch.tensor([1]), torch.tensor([1]))
        contrast = head.losses()["contrast"]
    assert logits.dtype == contrast.dtype == head.get_parameter("w_mi_c").dtype
    beyond = cosine - 0.1 * np.sin(np.pi - 0.1)
    expected = np.cos(np.arccos(cosine) + 0.1) if cosine > np.cos(np.pi - 0.1) else beyond
    assert logits[0, 1].item() == pytest.approx(32 * expected, abs=0.3)
    (logits.sum() + contrast).backward()
    for leaf in (features, *head.parameters()):
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_linear_by_type_is_a_linear_head_per_missing_type() -> None:
    head = LinearByType(2, 4, 3)
    nn.init.normal_(head.bias)
    features, types = torch.randn(4, 8), torch.tensor([2, 0, 1, 2])
    for row, missing_type in enumerate(types):
        expected = head.weight[missing_type] @ features[row] + head.bias[missing_type]
        assert torch.allclose(head(features, types)[row], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt_type", "task", "head", "train_ends", "trained"),
    [
        ("none", "mmimdb", "linear", None, False),
        ("none", "mmimdb", "linear", True, True),
        ("none", "mmimdb", "dpl", None, True),
        ("coop", "mmimdb", "dpl", False, False),
        ("dcp", "mmimdb", "linear", None, True),
        ("dcp", "mmimdb", "linear_by_type", False, False),
        ("rep", "hatememes", "linear", False, False),
    ],
)
def test_the_ends_of_the_towers_are_trained_by_method_head_or_option(prompt_type, task, head, train_ends, trained):
    classifier = build_classifier(ModelSpec(task, MethodOptions(prompt_type, 6, 2, train_ends=train_ends), TINY, head))
    found = {name for name, p in classifier.named_parameters() if p.requires_grad and "_encoder." in name}
    assert found == (ENDS if trained else set())


@pytest.mark.parametrize("variant", ["mora", "lora"])
def test_missing_inputs_are_encoded_as_white_images_and_empty_texts(variant: str) -> None:
    """They are encoded once in evaluation, and in training for each sample with its own dropout mask."""
    classifier = make(variant).float()
    images, tokens = tiny_batch(4)
    images = (images * 60 + 128).clamp(0, 255).to(torch.uint8)
    images[1:3], tokens[0], tokens[3] = 255, 0, 0
    tokens[0, :2] = tokens[3, :2] = torch.tensor([298, 299])
    everything = model_input(images, tokens, [0, 0, 0, 0])
    for mix in ([1, 2, 2, 1], [0, 2, 0, 1], [0, 2, 2, 0]):
        batch = model_input(images, tokens, mix)
        with torch.inference_mode():
            assert torch.allclose(classifier(batch), classifier(everything), atol=1e-5), mix
    features = joined_features(classifier.train(), model_input(images, tokens, [1, 2, 2, 1]))
    image, text = features.chunk(2, dim=1)
    assert not torch.equal(image[1], image[2]) and not torch.equal(text[0], text[3])


def test_lora_starts_at_the_frozen_weights_and_adds_its_update() -> None:
    method = build_classifier(
        ModelSpec("mmimdb", MethodOptions("lora", lora_alpha=0.5, lora_matrices="kv"), TINY)
    ).method
    assert isinstance(method, LoRA)
    weight = torch.randn(128, 128)
    assert torch.equal(method.adapted("image", 1, "v", weight), weight)
    own = method.own.get_submodule("image.1_v")
    nn.init.normal_(own.get_parameter("Q"))
    expected = weight + 0.5 * (own.get_parameter("P") @ own.get_parameter("Q")).T
    assert torch.allclose(method.adapted("image", 1, "v", weight), expected)


def test_aoept_clusters_start_at_mean_tokens_of_the_training_split() -> None:
    """Means are over present inputs, and texts up to `<end>`; with as many samples as clusters, each is a cluster."""
    classifier = build_classifier(ModelSpec("mmimdb", MethodOptions("aoept", 6, 2, aoept_prototypes=2), TINY))
    images, tokens = tiny_batch(3)
    classifier.method.see(classifier.model, [model_input(images, tokens, [0, 1, 2])])
    assert isinstance(classifier.model, ClipBackbone)
    text_tower, image_tower = classifier.model.text_encoder, classifier.model.image_encoder
    seen_images, seen_text = (classifier.method.get_buffer(f"{name}_init_tokens") for name in ("vision", "text"))
    for row, expected in enumerate(image_tower.embed(images[:2]).mean(dim=1)):
        assert torch.allclose(seen_images[0, row], expected, atol=1e-5)
    for row, sample in enumerate((0, 2)):
        ids = tokens[sample : sample + 1]
        x = text_tower.embed(ids)[:, : int(ids.argmax()) + 1]
        assert torch.allclose(seen_text[0, row], x[0].mean(dim=0), atol=1e-5)
        x = text_tower.transformer.run(0, x, mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())
        assert torch.allclose(seen_text[1, row], x[0].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("mix", "counted"), [([0, 2, 2], [True, False]), ([0, 1, 2], [True, True]), ([1], [False] * 2)]
)
def test_the_auxiliary_loss_of_aoept_counts_modalities_with_two_samples_or_more(mix, counted):
    classifier = make("aoept", depth=1, aoept_weight=0.5)
    loss = classifier.training_outputs(*training_batch(mix))[1]["auxiliary"]
    assert isinstance(classifier.method, AOEPT)
    terms = [term for term, of_two in classifier.method._auxiliary if of_two]
    assert [bool(of_two) for _, of_two in classifier.method._auxiliary] == counted  # text, image
    assert loss.item() == pytest.approx(0.5 * float(np.mean([term.item() for term in terms] or [0.0])))


def test_rep_as_described_starts_at_the_output_of_the_released_model() -> None:
    described = build_classifier(
        ModelSpec("mmimdb", MethodOptions("rep", 6, 1, replay_depth=1, dynamic_init=True), TINY)
    )
    shallow = tiny_classifier(memory_depth=1).eval()
    new = set(described.state_dict()) - set(shallow.state_dict())
    assert new and all(".replay_" in name for name in new)
    state = shallow.state_dict()
    for name in list(state):
        if "dynamic_common_token_net.fc2" in name or "dynamic_common_token_net.skip" in name:
            del state[name]
    described.load_state_dict(state, strict=False)
    images, tokens = tiny_batch(4)
    for mix in ([0, 1, 2, 0], [2], [1]):
        batch = model_input(images[: len(mix)], tokens[: len(mix)], mix)
        with torch.inference_mode():
            assert torch.allclose(described.eval()(batch), shallow(batch), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        described.get_parameter("model.memory_learner.replay_image.gates").fill_(5.0)
    batch = model_input(images, tokens, [0, 0, 0, 0])
    with torch.inference_mode():
        assert not torch.allclose(described(batch), shallow(batch), rtol=1e-4)


@pytest.mark.parametrize(
    ("arch", "variant"),
    [*(("ViT-B/32", variant) for variant in ("rep described", "aoept", "mora")), *((arch, "rep") for arch in REAL)],
)
def test_shapes_are_right_at_the_sizes_of_real_backbones(arch: str, variant: str) -> None:
    """A forward and backward pass on fake tensors, which have no values."""
    with FakeTensorMode():
        options = MethodOptions(memory_length=36, memory_depth=6, **VARIANTS[variant])
        classifier = build_classifier(ModelSpec("food101", options, REAL[arch])).train()
        rows, side = torch.arange(2), REAL[arch].image_size
        batch = ModelInput(
            inputs={"image": torch.empty(2, 3, side, side), "text": torch.zeros(2, 77, dtype=torch.long)},
            rows={"image": rows, "text": rows},
            present_BM=torch.ones(2, 2, dtype=torch.bool),
            types=(0,),
        )
        logits, losses = classifier.training_outputs(batch, torch.zeros(2, dtype=torch.long))
        (logits.sum() + sum(losses.values())).backward()
    assert logits.shape == (2, 101)
    assert all(p.grad is not None for p in classifier.get_submodule("food101_classifier").parameters())


WITHOUT_DEPTH = ("coop", "mora", "lora", "none")
"""Methods that do not use `memory_depth`."""


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        *(
            ({"prompt_type": name, "memory_depth": 3}, "memory_depth=3 needs more blocks than the backbone has")
            for name in METHODS
            if name not in WITHOUT_DEPTH
        ),
        ({"prompt_type": "map_attention", "memory_length": 9}, "memory_length must be a multiple of 6, found 9"),
        ({"prompt_type": "coop", "memory_length": 8}, "memory_length must be a positive multiple of 3.* 8"),
        ({"memory_length": 0}, "memory_length must be a positive multiple of 3.* 0"),
        ({"memory_depth": 2, "replay_depth": 1}, "memory_depth=2 with replay_depth=1 needs more blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_classifier(ModelSpec("mmimdb", MethodOptions(**{"memory_length": 6, "memory_depth": 2, **options}), TINY))


class Scaled(LinearHead):
    """A head with a buffer and names that the registered heads lack."""

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(n_classes))

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(features, missing_type_B) * self.scale


@pytest.mark.parametrize(
    ("variant", "head"),
    [
        *((variant, "linear") for variant in VARIANTS),
        *(("rep", "dpl"), ("none", "dpl"), ("none", "linear_by_type"), ("rep", "scaled")),
    ],
)
def test_a_checkpoint_restores_the_model_on_its_backbone(variant, head, backbone, tmp_path, monkeypatch):
    """A head's buffers are restored too; test_three_modalities.py has a method with a buffer."""
    monkeypatch.setitem(HEADS, "scaled", f"{__name__}:Scaled")
    options = {"memory_length": 6, "memory_depth": 1, **VARIANTS[variant]}
    spec = ModelSpec("hatememes", MethodOptions(**options), backbone.architecture, head)
    torch.manual_seed(0)
    classifier = build_classifier(spec).eval()
    backbone.load_into(classifier.model)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    content = {"state_dict": saved_state(classifier), DESCRIPTION: describe(spec, backbone.name, backbone.sha256)}
    torch.save(content, tmp_path / "best.ckpt")
    assert not any(".resblocks." in name for name in content["state_dict"])
    checkpoint = read_checkpoint(tmp_path / "best.ckpt")
    assert checkpoint.spec == spec and not checkpoint.published
    assert (checkpoint.backbone_name, checkpoint.backbone_sha256) == (backbone.name, backbone.sha256)
    restored = restore_classifier(checkpoint, backbone).eval()
    batch = model_input(*tiny_batch(3), [0, 1, 2])
    with torch.inference_mode():
        assert torch.equal(restored(batch), classifier(batch))
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (classifier, restored)]
    assert trained[0] == trained[1]


def test_a_published_dcp_checkpoint_can_be_evaluated(tmp_path: Path) -> None:
    """The golden file's weights, laid out as in a published checkpoint: without the dynamic queries."""
    [path] = golden.dcp_files()
    expected = golden.load_golden(path)
    state = {name: value for name, value in expected.state.items() if "prompts_dynamic" not in name}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "dcp.ckpt")
    checkpoint = read_checkpoint(tmp_path / "dcp.ckpt")
    assert checkpoint.published
    assert checkpoint.spec.method == expected.options
    classifier = restore_classifier(checkpoint, None).eval()
    with torch.no_grad():
        for name, buffer in classifier.named_buffers():
            buffer.copy_(expected.state[published_name(name)])
    with torch.inference_mode():
        logits = classifier(model_input(expected.images, expected.tokens, expected.missing_types))
    assert golden.relative_error(logits, expected.expected["logits"]) < 1e-4
