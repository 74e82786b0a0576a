"""Models of text, audio and vision: REP equals its slow version; exact shortcuts; promises of every method."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clip.modules.method import MethodOptions
from clip.modules.registry import FAMILY_METHODS
from common.errors import CheckpointError
from engine.checkpoint import read_checkpoint, restore_classifier
from tests import slow_vla
from tests.conftest import Patch
from tests.golden import relative_error
from tests.vla_models import TINY, TYPE_OF_MODE, published_name, random_features, vla_batch, vla_classifier
from vla.backbone import LETTERS, VlaArchitecture, VlaBackbone, cross
from vla.encoder import Attention, Encoder, mask

MISSING = ("l", "a", "v", "la", "lv", "av", "")
REP = MethodOptions("rep", 6, 2)
METHODS = list(FAMILY_METHODS["vla"])


def moved(options: MethodOptions = REP, outputs: int = 1):
    """A classifier in evaluation mode, with all values moved away from their initial ones."""
    classifier = vla_classifier(TINY, options, outputs).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return classifier


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_readout": True},
        {"far": False},
        {"fmb": False},
        {"replay_depth": 1, "decoupling_weight": 0.3, "dynamic_init": True},
        {"memory_depth": 1, "replay_depth": 2},
    ],
    ids=str,
)
def test_rep_equals_the_slow_version(options: Any) -> None:
    classifier = moved(replace(REP, **options), outputs=2)
    features = random_features(TINY, 7)
    batch = vla_batch(features, TYPE_OF_MODE)
    found, slots = classifier.features(batch)
    logits = classifier(batch)
    state = {published_name(name): value for name, value in classifier.state_dict().items()}
    flags = {name: value for name, value in options.items() if name in ("far", "fmb", "mask_readout")}
    expected, cosines = zip(
        *(
            slow_vla.forward(
                state, {c: features[name][row] for name, c in LETTERS.items()}, missing, TINY.heads, **flags
            )
            for row, missing in enumerate(MISSING)
        ),
        strict=True,
    )
    assert relative_error(logits, torch.stack(expected)) < 1e-5
    losses = classifier.method.losses(slots, found, logits, torch.zeros(7))
    weight = options.get("decoupling_weight", 0)
    assert set(losses) == ({"decoupling"} if weight else set())
    if weight:
        assert losses["decoupling"].item() == pytest.approx(weight * float(torch.stack(cosines).mean()), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_logits_depend_only_on_the_present_inputs_of_a_sample(method: str) -> None:
    classifier = moved(replace(REP, prompt_type=method, prompt_length=3))
    features = random_features(TINY, 7)
    together = classifier(vla_batch(features, TYPE_OF_MODE))
    for row, code in enumerate(TYPE_OF_MODE):
        own = {name: x[row : row + 1].clone() for name, x in features.items()}
        alone = classifier(vla_batch(own, [code]))
        assert torch.allclose(alone[0], together[row], atol=1e-6)
        for (name, letter), x in zip(LETTERS.items(), own.values(), strict=True):
            changed = {**own, name: x + 1}
            same = bool((classifier(vla_batch(changed, [code])) == alone).all())
            assert same == (letter in MISSING[row]), (name, row)


@pytest.mark.parametrize("method", METHODS)
def test_without_dropout_slots_are_the_same_in_training(method: str) -> None:
    classifier = moved(replace(REP, prompt_type=method, prompt_length=3))
    batch = vla_batch(random_features(TINY, 8), [*TYPE_OF_MODE, 0])
    expected = classifier(batch)
    classifier.method.train()  # one set of slots for each sample, not for each type
    for module in classifier.method.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    assert relative_error(classifier(batch), expected) < 1e-5


@pytest.mark.parametrize(("steps", "source_steps"), [(5, 6), (6, 5), (9, 4), (35, 40), (70, 40)])
@pytest.mark.parametrize(("real", "source_real"), [(9, 9), (2, 3), (3, 1), (0, 2), (2, 0)])
def test_steps_of_zeros_may_be_computed_once(steps: int, source_steps: int, real: int, source_real: int) -> None:
    """Every step gets the same result as if no step were left out."""
    model, draw = moved().model, torch.Generator().manual_seed(0)
    encoder = model.get_submodule("trans_l_with_a")
    assert isinstance(encoder, Encoder)
    lengths, padded = [], []
    for T, most in ((steps, min(real, steps)), (source_steps, min(source_real, source_steps))):
        lengths.append([(row + most) % (most + 1) for row in range(6)])
        padded.append(torch.randn(6, T, TINY.width, generator=draw))
        for x, length in zip(padded[-1], lengths[-1], strict=True):
            x[: T - length] = 0
    target, source = padded
    whole = encoder.cross(target, source, steps, source_steps)
    assert relative_error(cross(encoder, target, source, *lengths), whole) < 1e-6


@pytest.mark.parametrize(("steps", "source_steps"), [(70, 70), (40, 90), (90, 40)])
def test_attention_in_blocks_of_queries_equals_attention_at_once(steps: int, source_steps: int) -> None:
    attention, causal = Attention(8, 2), mask(steps, source_steps, torch.device("cpu"))
    query, source = torch.randn(3, steps, 8), torch.randn(3, source_steps, 8)
    q, k, v = (
        F.linear(x, weight).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, weight in zip((query, source, source), attention.in_proj_weight.chunk(3), strict=True)
    )
    expected = attention.out_proj(F.scaled_dot_product_attention(q, k, v, causal).transpose(1, 2).flatten(2))
    assert relative_error(attention.eval()(query, source, causal), expected) < 1e-6


@pytest.mark.parametrize("steps", [4, 9])
def test_dropout_on_merged_steps_of_zeros_has_the_same_distribution(steps: int) -> None:
    """For a source of zeros only, and for zeros in front of two other steps."""
    torch.manual_seed(0)
    attention, n, count = Attention(8, 2).train(), 20_000, torch.arange(steps) + 1
    source, others = torch.randn(8), torch.randn(2, 8)
    causal = mask(steps, steps, torch.device("cpu"))
    query = torch.zeros(n, steps, 8)
    before = torch.cat([source.expand(steps, 8), others]).expand(n, -1, 8)
    first = torch.cat([source[None], others]).expand(n, -1, 8)
    wide = torch.cat([causal, torch.zeros(steps, 2)], dim=1)
    narrow = torch.cat([count.log()[:, None], torch.zeros(steps, 2)], dim=1)
    for drawn, expected in (
        (attention.of_constant(source, n, count), attention(query, source.expand(n, steps, 8), causal)),
        (attention(query, first, narrow, count), attention(query, before, wide)),
    ):
        assert (drawn.mean(0) - expected.mean(0)).abs().max() < 0.02
        assert torch.allclose(drawn.std(0), expected.std(0), rtol=0.05, atol=0.002)


@pytest.mark.parametrize(
    ("method", "trained"),
    [("rep", 245_504), ("mplmm", 88_141), ("mplmm_described", 88_141), ("none", 9_931), ("full", 1_071_211)],
)
def test_parameter_counts_at_the_sizes_of_mosi(method: str, trained: int) -> None:
    classifier = vla_classifier(VlaArchitecture(50, 50, 50, 300, 5, 20), MethodOptions(method, 12, 3))
    assert sum(p.numel() for p in classifier.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, set()),
        ({"far": False}, {"residual_alpha"}),
        ({"fmb": False}, {"common_memory", *(f"common_memory_projection_{letter}" for letter in LETTERS.values())}),
    ],
)
def test_parameters_unused_under_an_option_are_not_trained(options: Any, unused: set[str]) -> None:
    learner = vla_classifier(TINY, replace(REP, **options)).method
    assert {name.split(".")[0] for name, p in learner.named_parameters() if not p.requires_grad} == unused


@pytest.mark.parametrize("options", [{"replay_depth": 1}, {"dynamic_init": True}, {"decoupling_weight": 1.0}], ids=str)
def test_options_as_described_do_not_change_the_initial_output(options: Any) -> None:
    plain, described = (vla_classifier(TINY, each).eval() for each in (REP, replace(REP, **options)))
    described.load_state_dict(plain.state_dict(), strict=False)
    batch = vla_batch(random_features(TINY, 7), TYPE_OF_MODE)
    assert relative_error(described(batch), plain(batch)) < 1e-6


@pytest.mark.parametrize(("method", "learns"), [("mplmm", False), ("mplmm_described", True)])
def test_missing_type_prompts_learn_only_from_the_described_start(method: str, learns: bool) -> None:
    classifier = vla_classifier(TINY, MethodOptions(method, prompt_length=3))
    optimizer = torch.optim.Adam(p for p in classifier.parameters() if p.requires_grad)
    batch = vla_batch(random_features(TINY, 7), TYPE_OF_MODE)
    names = ("missing_type_prompt", "m_l", "m_a", "m_v")
    start = [classifier.get_parameter(f"model.prompt_learner.{name}").detach().flatten() for name in names]
    assert float(torch.cat(start).std()) == pytest.approx(0.02 * learns, rel=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        classifier(batch).sum().backward()
        optimizer.step()
    for name in names:
        gradient = classifier.get_parameter(f"model.prompt_learner.{name}").grad
        assert gradient is not None and bool(gradient.any()) == learns


def test_the_first_step_of_stage_one_does_not_explode() -> None:
    arch = replace(TINY, width=30, heads=5, layers=5, text_steps=20, audio_steps=20, vision_steps=20)
    classifier = vla_classifier(arch, MethodOptions("full")).eval()
    features = random_features(arch, 8)
    classifier(vla_batch(features, [0] * 8)).abs().mean().backward()
    norm = torch.stack([p.grad.norm() for p in classifier.parameters() if p.grad is not None]).norm()
    assert float(norm) < 1e3  # 1e10 if the norms after the cross-modal encoders had no bias


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 9}, "width: expected a multiple of heads=2"), ({"width": 2}, "width: expected .* 4 or more, found 2")],
)
def test_sizes_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VlaBackbone(replace(TINY, **change))


def test_memory_deeper_than_the_towers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory_depth=4 .*3 in the text tower"):
        vla_classifier(TINY, MethodOptions("rep", 6, 4))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_gives_exactly_the_trained_parameters_a_gradient(method: str) -> None:
    classifier = vla_classifier(TINY, replace(REP, prompt_type=method, prompt_length=3)).train()
    classifier(vla_batch(random_features(TINY, 7), TYPE_OF_MODE)).sum().backward()
    lacking = [name for name, p in classifier.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    frozen = [name for name, p in classifier.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        classifier = moved()
        classifier.train()
        classifier.compute(torch.float32, checkpointing=checkpointing)
        torch.manual_seed(3)
        classifier(vla_batch(random_features(TINY, 7), TYPE_OF_MODE)).sum().backward()
        gradients.append(classifier.model.get_parameter("proj_l.weight").grad)
    assert torch.equal(*gradients)


class PublishedModule(torch.nn.Module):
    """Stands for any module class of the published code."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads


def whole_model(state: dict[str, torch.Tensor], heads: int) -> torch.nn.Module:
    """A tree of modules with the given parameters, with classes of MPLMM's code."""
    root = PublishedModule(heads)
    for name, value in state.items():
        *path, last = name.split(".")
        module: torch.nn.Module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, PublishedModule(heads))
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(value))
    root.add_module("relu", torch.nn.ReLU())
    return root


@pytest.mark.parametrize("method", ["mplmm", "full"])
def test_a_published_checkpoint_can_be_read_without_its_code(method: str, tmp_path: Path, monkeypatch: Patch) -> None:
    arch = replace(TINY, project_all=method == "mplmm")
    classifier = vla_classifier(arch, MethodOptions(method, prompt_length=3)).eval()
    state = {published_name(name): value for name, value in classifier.state_dict().items()}
    state["trans_l_mem.version"] = torch.tensor([2.0])
    code = ModuleType("src")
    code.models = ModuleType("src.models")  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "src", code)
        patch.setitem(sys.modules, "src.models", code.models)
        code.models.PublishedModule = PublishedModule
        patch.setattr(PublishedModule, "__module__", "src.models")
        torch.save(whole_model(state, arch.heads), tmp_path / "published.pt")
    checkpoint = read_checkpoint(tmp_path / "published.pt")
    assert checkpoint.published and checkpoint.spec.method.prompt_type == method
    found = checkpoint.spec.architecture
    assert (found.width, found.heads, found.layers) == (8, 2, 2) and found.text_dim == 7
    restored = restore_classifier(checkpoint, None).eval()
    batch = vla_batch(random_features(TINY, 7), TYPE_OF_MODE)
    if method == "full":  # no entry states the steps
        restored.model.arch = arch  # type: ignore[assignment]
    assert torch.equal(restored(batch), classifier(batch))


def test_a_pickled_model_that_mentions_other_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1), "run": print}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"print, which might run code; not opened"):
        read_checkpoint(tmp_path / "m.pt")
