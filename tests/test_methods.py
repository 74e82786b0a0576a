"""Every method equals its slow version, in evaluation and training, outputs and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clip.checkpoint import ModelSpec, build_classifier, kept_names, read_checkpoint, restore_classifier
from clip.modules.classifier import MissingModalityClassifier, ModelInput
from clip.modules.heads import PrototypeHead
from clip.modules.method import MethodOptions
from clip.modules.registry import METHODS
from clip.modules.vision_transformer_memory import ClipArchitecture
from clip.trainable import freeze
from tests import golden, slow_methods
from tests.models import TINY, model_input, tiny_batch, tiny_classifier

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
DEEPER = ClipArchitecture(
    **{**vars(TINY), "vision_layers": 4, "text_layers": 3},
)


def make(variant: str, arch: ClipArchitecture = DEEPER, depth: int = 2, head: str = "linear", seed: int = 0):
    """A random classifier in float64, all values moved away from their trivial start."""
    torch.manual_seed(seed)
    options = MethodOptions(memory_length=6, memory_depth=depth, **VARIANTS[variant])
    classifier = MissingModalityClassifier(arch, options, "mmimdb_classifier", 23, head).double()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    freeze(classifier, "mmimdb")
    return classifier.eval()


def slow_features(classifier: MissingModalityClassifier, variant: str, images: Tensor, tokens: Tensor, mix: list[int]):
    """(B, 2E) of the slow version; gradients reach the parameters of the classifier."""
    state = {**dict(classifier.named_buffers()), **dict(classifier.named_parameters())}
    options = {"far": True, "fmb": True, "dynamic_init": False} | VARIANTS[variant]
    prompt_type = options.get("prompt_type", "rep")
    rows = [
        slow_methods.features(state, prompt_type, image, ids, missing_type, options)
        for image, ids, missing_type in zip(images, tokens, mix, strict=True)
    ]
    return torch.stack(rows)


def double_batch(size: int) -> tuple[Tensor, Tensor]:
    images, tokens = tiny_batch(size)
    return images.double(), tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_slow_version(variant: str) -> None:
    classifier = make(variant)
    images, tokens = double_batch(4)
    weight = torch.randn(23, dtype=torch.float64)
    for mix in MIXES:
        of_mix = images[: len(mix)], tokens[: len(mix)]
        slow = slow_features(classifier, variant, *of_mix, mix)
        expected = slow @ classifier.get_parameter("mmimdb_classifier.weight").T
        expected = expected + classifier.get_parameter("mmimdb_classifier.bias")
        with torch.inference_mode():
            kept = classifier(model_input(*of_mix, mix))
        fast = classifier(model_input(*of_mix, mix))
        assert golden.relative_error(kept, expected) < 1e-9, mix
        assert golden.relative_error(fast, expected) < 1e-9, mix
        trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((fast * weight).sum(), list(trained.values()), allow_unused=True)
        wanted = torch.autograd.grad((expected * weight).sum(), list(trained.values()), allow_unused=True)
        for name, mine, theirs in zip(trained, grads, wanted, strict=True):
            mine, theirs = (torch.zeros(()) if grad is None else grad for grad in (mine, theirs))
            assert float((mine - theirs).norm()) <= 1e-8 * (1 + float(theirs.norm())), (name, mix)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "replay" not in name and "described" not in name])
def test_memory_depths_from_one_block_to_all(variant: str, depth: int) -> None:
    classifier = make(variant, depth=depth)
    images, tokens = double_batch(3)
    slow = slow_features(classifier, variant, images, tokens, [0, 1, 2])
    with torch.inference_mode():
        assert golden.relative_error(classifier.model(model_input(images, tokens, [0, 1, 2])), slow) < 1e-9
    assert golden.relative_error(classifier.model(model_input(images, tokens, [0, 1, 2])), slow) < 1e-9


def test_replay_before_several_blocks() -> None:
    arch = ClipArchitecture(**{**vars(TINY), "vision_layers": 5, "text_layers": 4})
    VARIANTS["several"] = {"replay_depth": 2}
    try:
        classifier = make("several", arch)
        images, tokens = double_batch(3)
        slow = slow_features(classifier, "several", images, tokens, [0, 1, 2])
    finally:
        del VARIANTS["several"]
    with torch.inference_mode():
        assert golden.relative_error(classifier.model(model_input(images, tokens, [0, 1, 2])), slow) < 1e-9
    assert golden.relative_error(classifier.model(model_input(images, tokens, [0, 1, 2])), slow) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_that_share_an_image(variant: str) -> None:
    """In evaluation an image that several samples have is in the batch once."""
    classifier = make(variant)
    images, tokens = double_batch(5)
    mix = [2, 0, 0, 1, 1]
    images[2] = images[1]
    images[4] = images[3]
    apart = model_input(images, tokens, mix)
    together = apart._replace(
        image_b3RR=images[[1, 3]], image_rows=torch.tensor([1, 3]), image_of_B=torch.tensor([0, 1, 1, 3, 3])
    )
    with torch.inference_mode():
        assert torch.allclose(classifier(together), classifier(apart), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_evaluation_keeps_follows_every_change(variant: str) -> None:
    classifier = make(variant)
    images, tokens = double_batch(3)
    batch = model_input(images, tokens, [0, 1, 2])
    with torch.inference_mode():
        classifier(batch)
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.1, fused=True)
    classifier.train()
    classifier(batch).square().sum().backward()
    optimizer.step()
    classifier.eval()
    slow = slow_features(classifier, variant, images, tokens, [0, 1, 2])
    with torch.inference_mode():
        assert golden.relative_error(classifier.model(batch), slow) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_nothing(variant: str) -> None:
    classifier = make(variant)
    images, tokens = double_batch(3)
    results = []
    for checkpointing in (False, True):
        classifier.compute(torch.float64, checkpointing=checkpointing)
        classifier.zero_grad()
        logits = classifier(model_input(images, tokens, [0, 1, 2]))
        logits.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}
        results.append((logits, grads))
    (logits, grads), (again, grads_again) = results
    assert torch.equal(logits, again) and grads.keys() == grads_again.keys()
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_close(variant: str) -> None:
    classifier = make(variant).float()
    images, tokens = tiny_batch(3)
    batch = model_input(images, tokens, [0, 1, 2])
    with torch.inference_mode():
        whole = classifier(batch)
        classifier.compute(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            half = classifier(batch)
    assert golden.relative_error(half.float(), whole) < 5e-2


# What is trained, and its size


def learner_size(prompt_type: str, arch: ClipArchitecture, m: int, depth: int) -> int:
    """Parameters of the learner by hand, where that is one line."""
    widths = arch.vision_width + arch.text_width
    return {
        "none": 0,
        "coop": m * widths,
        "maple": depth * (m * arch.text_width + (arch.text_width + 1) * arch.vision_width),
        "map_input": 3 * depth * m * widths,
        "map_attention": 3 * depth * m * widths,
        "msp": 2 * depth * m * widths,
    }[prompt_type]


@pytest.mark.parametrize("task", ["mmimdb", "hatememes"])
@pytest.mark.parametrize("prompt_type", [name for name in METHODS if name not in ("rep", "dcp")])
def test_the_prompts_and_the_head_alone_are_trained(prompt_type: str, task: str) -> None:
    classifier = build_classifier(ModelSpec(task, MethodOptions(prompt_type, 6, 2), TINY))
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    assert all(name.startswith(("model.prompt_learner.", f"{task}_classifier.")) for name in trained)
    of_learner = [p.numel() for name, p in trained.items() if name.startswith("model.")]
    assert sum(of_learner) == learner_size(prompt_type, TINY, 2, 2)


@pytest.mark.parametrize("task", ["mmimdb", "food101", "hatememes"])
def test_dcp_trains_the_ends_of_the_towers_on_every_task(task: str) -> None:
    classifier = build_classifier(ModelSpec(task, MethodOptions("dcp", 6, 2), TINY))
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    of_towers = {name for name in trained if "_encoder." in name}
    ends = {"model.image_encoder.proj"}
    ends |= {f"model.{norm}.{part}" for norm in ("image_encoder.ln_post", "text_encoder.ln_final")
             for part in ("weight", "bias")}  # fmt: skip
    ends |= {
        f"model.{tower}_encoder.transformer.resblocks.0.attn_prompt.{name}"
        for tower in ("image", "text")
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert of_towers == ends


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, ["dynamic_common_token_net.fc1.weight"]),
        ({"dynamic_init": True}, []),
        ({"far": False}, ["residual_alpha"]),
        ({"fmb": False}, ["text_memory_missing", "visual_memory_missing", "common_memory_image",
                          "common_memory_projection_text.fc1.weight"]),
    ],
)  # fmt: skip
def test_what_an_option_leaves_unused_is_not_trained(options: dict[str, Any], frozen: list[str]) -> None:
    learner = build_classifier(ModelSpec("mmimdb", MethodOptions("rep", 6, 2, **options), TINY)).model.method
    assert all(not learner.get_parameter(name).requires_grad for name in frozen)
    used = set(dict(learner.named_parameters())) - {n for n in dict(learner.named_parameters()) if n in frozen}
    assert ("dynamic_common_token_net.fc2.weight" in used) and learner.get_parameter(
        "text_memory_complete"
    ).requires_grad


def test_published_sizes_in_millions() -> None:
    """REP's learner has 17.9 million values, DCP's 2.0 (METHOD.md section 9), at ViT-B/16 and the default sizes."""
    for prompt_type, millions in (("rep", 17.9), ("dcp", 2.0)):
        with torch.device("meta"):
            learner = METHODS[prompt_type](VIT_B_16, MethodOptions(prompt_type))
        assert sum(p.numel() for p in learner.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


# The losses


def training_batch(mix: list[int]) -> tuple[ModelInput, Tensor]:
    images, tokens = double_batch(len(mix))
    labels = torch.zeros(len(mix), 23, dtype=torch.uint8)
    labels[0, [1, 5]] = 1
    labels[-1, 22] = 1
    return model_input(images, tokens, mix), labels


def test_the_loss_of_msp() -> None:
    classifier = make("msp").train()
    _, penalty = classifier.training_outputs(*training_batch([0, 2]))
    assert penalty is not None
    expected = slow_methods.msp_penalty(dict(classifier.named_parameters()))
    assert float(penalty) == pytest.approx(float(expected), rel=1e-12)
    penalty.backward()
    assert float(classifier.get_parameter("model.prompt_learner.image_prompts").grad.norm()) > 0
    classifier.eval()
    assert classifier.training_outputs(*training_batch([0, 2]))[1] is None


def test_the_decoupling_loss() -> None:
    classifier = make("rep described").train()
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    mix = [0, 2, 1, 0]
    batch, labels = training_batch(mix)
    _, penalty = classifier.training_outputs(batch, labels)
    assert penalty is not None
    state = {**dict(classifier.named_buffers()), **dict(classifier.named_parameters())}
    images, tokens = double_batch(len(mix))
    image_tokens, text_tokens = (
        classifier.model.image_encoder.embed(images),
        classifier.model.text_encoder.embed(tokens),
    )
    options = {"far": True, "fmb": True, "dynamic_init": True}
    slots = [
        slow_methods.method_slots(
            state, "rep", mix[row], {"image": image_tokens[row], "text": text_tokens[row]}, options
        )
        for row in range(len(mix))
    ]
    assert float(penalty) == pytest.approx(0.5 * float(slow_methods.decoupling(slots)), rel=1e-9)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("msp", "rep described")])
def test_no_other_method_has_a_loss_of_its_own(variant: str) -> None:
    classifier = make(variant).train()
    assert classifier.training_outputs(*training_batch([0, 2]))[1] is None


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("variant", ["rep", "none"])
def test_the_prototype_head_equals_the_slow_version(variant: str, multilabel: bool) -> None:
    classifier = make(variant, head="prototype")
    mix = [0, 1, 2, 0]
    batch, labels = training_batch(mix)
    if not multilabel:
        labels = torch.tensor([3, 0, 22, 3])
    features = classifier.model(batch)
    prototypes = classifier.get_parameter("mmimdb_classifier.prototypes")
    logits = classifier(batch)
    widened, _ = classifier.training_outputs(batch, labels)
    for row, missing_type in enumerate(mix):
        expected = slow_methods.prototype_logits(prototypes, features[row], missing_type)
        assert torch.allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
        right = labels[row].nonzero().flatten().tolist() if multilabel else [int(labels[row])]
        expected = slow_methods.prototype_logits(prototypes, features[row], missing_type, right)
        assert torch.allclose(widened[row], expected, rtol=1e-6, atol=1e-6)
    widened.square().sum().backward()
    assert torch.isfinite(prototypes.grad).all()


def test_a_sample_on_its_prototype_has_a_finite_gradient() -> None:
    head = PrototypeHead(4, 3).double()
    features = (
        torch.cat([head.prototypes[0, 0, 1], torch.zeros(4, dtype=torch.float64)])[None].detach().requires_grad_()
    )
    logits = head(features, torch.tensor([0]), torch.tensor([1]))
    logits.sum().backward()
    assert torch.isfinite(features.grad).all() and torch.isfinite(head.prototypes.grad).all()  # type: ignore[arg-type]


# REP as described


def test_with_gates_at_their_start_the_described_model_gives_the_released_output() -> None:
    released = tiny_classifier().eval()
    described = MissingModalityClassifier(
        TINY, MethodOptions("rep", 6, 1, replay_depth=1, dynamic_init=True), "mmimdb_classifier", 23
    )
    shallow = tiny_classifier(memory_depth=1).eval()
    assert len(released.state_dict()) > len(shallow.state_dict())
    new = set(described.state_dict()) - set(shallow.state_dict())
    assert all(".replay_" in name for name in new)
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


# Backbones


VIT_B_16 = ClipArchitecture(224, 16, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "quick_gelu")
ARCHITECTURES = {
    "ViT-B/32": ClipArchitecture(224, 32, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "quick_gelu"),
    "ViT-B/16": VIT_B_16,
    "ViT-L/14": ClipArchitecture(224, 14, 1024, 24, 16, 768, 12, 12, 77, 49408, 768, "quick_gelu"),
    "ViT-B/16 of LAION": ClipArchitecture(224, 16, 768, 12, 12, 512, 12, 8, 77, 49408, 512, "gelu"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_method_on_every_backbone_by_shapes(arch: str, variant: str) -> None:
    """Forward and backward at the sizes of real backbones, without values."""
    of_backbone = ARCHITECTURES[arch]
    with FakeTensorMode():
        options = MethodOptions(memory_length=36, memory_depth=6, **VARIANTS[variant])
        classifier = MissingModalityClassifier(of_backbone, options, "food101_classifier", 101).train()
        freeze(classifier, "food101")
        rows = torch.arange(2)
        batch = ModelInput(
            torch.empty(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.long), torch.zeros(2, dtype=torch.long),
            rows, rows, (0,), None,
        )  # fmt: skip
        logits, penalty = classifier.training_outputs(batch, torch.zeros(2, dtype=torch.long))
        (logits.sum() + (0 if penalty is None else penalty)).backward()
    assert logits.shape == (2, 101)
    assert all(p.grad is not None for p in classifier.get_submodule("food101_classifier").parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gelu_backbones(variant: str) -> None:
    arch = ClipArchitecture(**{**vars(DEEPER), "activation": "gelu"})
    classifier = make(variant, arch)
    images, tokens = double_batch(3)
    state = {**dict(classifier.named_buffers()), **dict(classifier.named_parameters())}
    options = {"far": True, "fmb": True, "dynamic_init": False} | VARIANTS[variant]
    with torch.inference_mode():
        fast = classifier.model(model_input(images, tokens, [0, 1, 2]))
    for row in range(3):
        slow = slow_methods.features(
            state, options.get("prompt_type", "rep"), images[row], tokens[row], row, options, "gelu"
        )
        assert golden.relative_error(fast[row], slow) < 1e-9


# Sizes that do not fit


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt_type": "maple", "memory_depth": 3}, "memory_depth=3 is more than the backbone has blocks"),
        ({"prompt_type": "msp", "memory_depth": 3}, "memory_depth=3 is more than the backbone has blocks"),
        ({"prompt_type": "map_input", "memory_depth": 3}, "memory_depth=3 is more than the backbone has blocks"),
        ({"prompt_type": "dcp", "memory_depth": 3}, "memory_depth=3 is more than the backbone has blocks"),
        ({"prompt_type": "map_attention", "memory_length": 9}, "memory_length must be a multiple of 6, found 9"),
        ({"prompt_type": "coop", "memory_length": 8}, "memory_length must be a positive multiple of 3"),
        ({"memory_depth": 2, "replay_depth": 1}, "memory_depth=2 with replay_depth=1 is more than the backbone has"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_classifier(ModelSpec("mmimdb", MethodOptions(**{"memory_length": 6, "memory_depth": 2, **options}), TINY))


# Checkpoints


@pytest.mark.parametrize("head", ["linear", "prototype"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_checkpoint_keeps_restores_the_model(variant: str, head: str) -> None:
    classifier = make(variant, head=head)
    other = make(variant, head=head, seed=1)
    images, tokens = double_batch(3)
    batch = model_input(images, tokens, [0, 1, 2])
    kept = set(kept_names(classifier))
    unused = tuple(f"model.{classifier.model.method.attribute}.{name}" for name in classifier.model.method.frozen)
    state, target = classifier.state_dict(), other.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            frozen_clip = name.startswith(("model.image_encoder", "model.text_encoder", "model.logit_scale"))
            if name in kept or frozen_clip:
                target[name].copy_(value)
            else:
                assert name.startswith(unused), f"{name} is neither kept nor of the backbone"
    with torch.inference_mode():
        assert torch.equal(other(batch), classifier(batch))


def test_a_published_dcp_checkpoint_evaluates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the golden file's weights, laid out as the published code does: without the dynamic queries."""
    [path] = golden.dcp_files()
    expected = golden.load_golden(path)
    state = {name: value for name, value in expected.state.items() if "prompts_dynamic" not in name}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "dcp.ckpt")
    checkpoint = read_checkpoint(tmp_path / "dcp.ckpt")
    assert checkpoint.published
    assert checkpoint.spec.method == MethodOptions("dcp", expected.memory_length, expected.memory_depth)
    classifier = restore_classifier(checkpoint, None).eval()
    assert "its dynamic queries were never saved" in caplog.text
    with torch.no_grad():
        for name, buffer in classifier.named_buffers():
            buffer.copy_(expected.state[name])
    with torch.inference_mode():
        logits = classifier(model_input(expected.images, expected.tokens, expected.missing_types))
    assert golden.relative_error(logits, expected.expected["logits"]) < 1e-4
