"""REP on the SW-Transformer equals golden numbers and a slow version, and has the properties of its definition."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.method import Method, MethodOptions
from clip.modules.no_prompts import NoPrompts
from clip.trainable import freeze
from config import DEFAULTS, NAMED_CONFIGS
from engine.checkpoint import ModelSpec, build_classifier
from runs.check_options import resolve
from runs.training import fit_depths
from sensors.backbone import SwtBackbone
from sensors.memory import SensorMemoryLearner, patterns
from sensors.sizes import SWT, ModalitySizes, SensorSizes
from sensors.swt import joint_softmax
from tests import golden_as, slow_sensors, vla_models
from tests.conftest import Patch
from tests.golden import assert_gradients, relative_error
from tests.models import batch_of
from tests.test_golden_as import FORWARD

NAMES = ("sound", "shake", "light")
SIZES = SensorSizes(
    SWT, "here", 3,
    {
        "sound": asdict(ModalitySizes(1, 7, patch=[1, 2], window=[2, 2])),
        "shake": asdict(ModalitySizes(2, 6, window=[2, 3])),
        "light": asdict(ModalitySizes(1, 4, window=[2, 2])),
    },
    8, 12, 6, blocks=[2, 2], heads=2,
)  # fmt: skip
OPTIONS = MethodOptions("rep", 6, 2)
ALL = torch.tensor([[bool(number >> bit & 1) for bit in range(3)] for number in range(1, 8)])
CLASSES = 4


def make(
    sizes: SensorSizes = SIZES, options: MethodOptions = OPTIONS, kind: type[Method] = SensorMemoryLearner,
    classes: int = CLASSES,
) -> MissingModalityClassifier:  # fmt: skip
    """A classifier in evaluation mode, with weights large enough for every part to matter."""
    torch.manual_seed(3)
    backbone = SwtBackbone(sizes)
    method = kind(backbone.places, backbone.embed_dim, options)
    head = LinearHead(backbone.fused_parts, backbone.embed_dim, classes)
    classifier = MissingModalityClassifier(backbone, method, "class_layer", head)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    freeze(classifier, "sensors")
    return classifier.eval()


def signals_of(sizes: SensorSizes, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: (count, sizes.of(name).channels, sizes.intervals, sizes.of(name).samples) for name in sizes.modalities
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("task", "blocks", "wanted", "given", "expected"),
    [
        ("rwhar", [2, 2], {}, (), (2, 0)),
        ("mod", [2, 2, 2], {}, (), (3, 0)),
        ("mod", [2, 2, 4], {}, (), (4, 0)),
        ("mod", [2, 2, 6], {}, (), (5, 0)),
        ("mod", [1], {}, (), (1, 0)),
        ("mod", [2, 2, 6], {"memory_depth": 4}, ("memory_depth",), (4, 0)),
        ("mod", [2, 2, 6], {"replay_depth": 6}, (), (5, 5)),
        ("mod", [2, 2, 6], {"replay_depth": 6}, ("replay_depth",), (4, 6)),
        ("mod", [2, 2, 6], {"prompt_type": "none"}, (), (4, 0)),
    ],
)
def test_half_of_the_blocks_have_private_slots_unless_a_depth_is_given(caplog, task, blocks, wanted, given, expected):
    options = resolve({**DEFAULTS, **NAMED_CONFIGS[f"task_finetune_{task}"], **wanted})
    with caplog.at_level("INFO"):
        fitted = fit_depths(options, given, replace(SIZES, blocks=blocks))
    assert (fitted.memory_depth, fitted.replay_depth) == expected
    changed = {name for name in ("memory_depth", "replay_depth") if getattr(fitted, name) != getattr(options, name)}
    assert {record.getMessage().partition("=")[0] for record in caplog.records} == changed
    assert all(f"{sum(blocks)} blocks" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("path", golden_as.files("rep"), ids=lambda path: path.stem)
def test_values_and_gradients_equal_the_golden_ones(path: Path) -> None:
    golden = golden_as.load(path)
    meta = golden.meta
    options = MethodOptions("rep", meta["memory_length"], meta["memory_depth"])
    classifier = make(golden.sizes, options, classes=meta["n_classes"])
    golden.fill(classifier.model)
    golden.fill(classifier.head, "class_layer.0.")
    learner = classifier.method
    assert sum(parameter.numel() for parameter in learner.parameters()) == meta["learner_parameters"]
    signals, present = golden.signals(), golden["present"].bool()
    batch = batch_of(signals, present)
    features, slots = classifier.features(batch)
    for key, expected in golden.arrays.items():
        what, _, sample = key.rpartition("_")
        if not sample.isdigit():
            continue
        row = int(sample)
        kind, _, name = what.rpartition("_")
        tower_slots = slots[name]
        assert tower_slots.dynamic_BmD is not None
        found = {
            "slots0": torch.cat(
                [tower_slots.replaced_BmD[0][row], tower_slots.inserted_BmD[0][row], tower_slots.dynamic_BmD[row]]
            ),
            "private_last": tower_slots.replaced_BmD[-1][row],
            "feature": features[name][row],
        }[kind]
        assert relative_error(found, torch.from_numpy(expected)) < FORWARD, key
    logits = classifier(batch)
    assert relative_error(logits, golden["logits"]) < FORWARD
    loss = F.cross_entropy(logits, golden["label"])
    assert loss.item() == pytest.approx(meta["loss"], rel=FORWARD)
    loss.backward()
    gradients = {
        name.removeprefix("model.").replace("class_layer.", "class_layer.0."): parameter.grad
        for name, parameter in classifier.named_parameters()
        if parameter.grad is not None
    }
    assert set(gradients) == set(meta["grad_norm"])
    assert_gradients(gradients, meta, floor=1e-7)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"far": False},
        {"fmb": False},
        {"memory_depth": 3, "replay_depth": 1, "dynamic_init": True},
        {"memory_depth": 1, "replay_depth": 3},
    ],
    ids=str,
)
def test_the_slow_version_gives_the_same_numbers_and_gradients(changed: dict[str, Any]) -> None:
    options = replace(OPTIONS, **changed)
    classifier = make(options=options).double()
    present = ALL[[6, 1, 4]] if not changed else ALL[[4]]
    signals = {name: x.double() for name, x in signals_of(SIZES, len(present)).items()}
    names = [name for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    logits = classifier(batch_of(signals, present))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    gradients = torch.autograd.grad(
        (logits * weights).sum(), list(map(classifier.get_parameter, names)), allow_unused=True
    )
    state = {name: x.detach().clone().requires_grad_(name in names) for name, x in classifier.state_dict().items()}
    model_state = {name.removeprefix("model."): x for name, x in state.items()}
    head = state["class_layer.weight"], state["class_layer.bias"]
    used = {name: getattr(options, name) for name in ("far", "fmb", "replay_depth", "dynamic_init")}
    torch.set_default_dtype(torch.double)
    try:
        slow = torch.stack(
            [
                slow_sensors.logits(
                    model_state, SIZES, head, {name: signals[name][row] for m, name in enumerate(NAMES) if here[m]},
                    depth=options.memory_depth, **used,
                )
                for row, here in enumerate(present.tolist())
            ]
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float)
    assert relative_error(logits, slow) < 1e-9
    expected = torch.autograd.grad((slow * weights).sum(), [state[name] for name in names], allow_unused=True)
    for name, found, known in zip(names, gradients, expected, strict=True):
        zero = torch.zeros_like(state[name])
        torch.testing.assert_close(zero if found is None else found, zero if known is None else known, msg=name)


def test_without_slots_the_tower_equals_the_plain_one() -> None:
    rep, none = make(), make(kind=NoPrompts)
    none.model.load_state_dict(rep.model.state_dict(), strict=False)
    x = signals_of(SIZES, 2)
    batch = batch_of(x, torch.ones(2, 3, dtype=torch.bool))
    features, _ = none.features(batch)
    for name in NAMES:
        assert torch.equal(features[name], rep.model.towers[name](x[name]))


def test_logits_depend_only_on_the_present_inputs_of_a_sample() -> None:
    classifier = make()
    signals = signals_of(SIZES, 7)
    logits = classifier(batch_of(signals, ALL))
    ran: list[str] = []
    for name, tower in classifier.model.towers.items():
        tower.get_submodule("patch_embed").register_forward_hook(lambda *_, name=name: ran.append(name))
    for row in range(7):
        other = {name: x[[row]] if ALL[row, m] else x[[row]] + torch.nan for m, (name, x) in enumerate(signals.items())}
        ran.clear()
        torch.testing.assert_close(classifier(batch_of(other, ALL[[row]]))[0], logits[row], rtol=1e-4, atol=1e-5)
        assert set(ran) == {name for m, name in enumerate(NAMES) if ALL[row, m]}
    order = torch.tensor([3, 0, 6, 1, 5, 4, 2])
    shuffled = batch_of({name: x[order] for name, x in signals.items()}, ALL[order])
    torch.testing.assert_close(classifier(shuffled), logits[order], rtol=1e-4, atol=1e-5)


def test_tokens_that_cannot_attend_to_slots_equal_those_without(monkeypatch: Patch) -> None:
    """Attention logits towards slots are set to minus infinity."""
    classifier = make(options=replace(OPTIONS, memory_length=9))
    signals, present = signals_of(SIZES, 2), torch.ones(2, 3, dtype=torch.bool)
    plain = {name: tower(signals[name]) for name, tower in classifier.model.towers.items()}
    assert relative_error(classifier.features(batch_of(signals, present))[0]["sound"], plain["sound"]) > 1e-3

    def unseen(to_slots: Tensor, to_tokens: Tensor) -> Sequence[Tensor]:
        return joint_softmax(to_slots - torch.inf, to_tokens)

    monkeypatch.setattr("sensors.swt.joint_softmax", unseen)
    features, _ = classifier.features(batch_of(signals, present))
    for name in NAMES:
        assert relative_error(features[name], plain[name]) < 1e-5


def test_alpha_blends_starting_slots_and_those_of_the_blocks() -> None:
    options = replace(OPTIONS, memory_depth=4)
    classifier = make(options=options)
    signals = signals_of(SIZES, 7)

    def private(classifier: MissingModalityClassifier) -> dict[str, Sequence[Tensor]]:
        _, slots = classifier.features(batch_of(signals, ALL))
        return {name: tower_slots.replaced_BmD for name, tower_slots in slots.items()}

    alpha = classifier.method.get_parameter("residual_alpha")
    with torch.no_grad():
        alpha.fill_(0)
        for layers in private(classifier).values():
            assert all(torch.equal(layer, layers[0]) for layer in layers)
        alpha.fill_(1)
        with_alpha_1 = private(classifier)
        without = make(options=replace(options, far=False))
        without.load_state_dict(classifier.state_dict())
        for name, layers in private(without).items():
            torch.testing.assert_close(torch.stack([*layers]), torch.stack([*with_alpha_1[name]]))


def test_the_whole_learner_is_trained_and_no_tower() -> None:
    described = replace(OPTIONS, replay_depth=2, decoupling_weight=0.5, dynamic_init=True)
    unused = tuple(
        f"model.memory_learner.{part}" for part in ("private_memory_missing", "common_memory", "residual_alpha")
    )
    for options in (OPTIONS, described, replace(OPTIONS, far=False, fmb=False)):
        classifier = make(options=options).train()
        assert not classifier.model.towers["sound"].get_submodule("stages").training
        before = {name: x.clone() for name, x in (*classifier.named_parameters(), *classifier.named_buffers())}
        labels = torch.arange(7) % CLASSES
        optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):  # in the first step, gates of 0 keep the replay scores from getting a gradient
            logits, own = classifier.training_outputs(batch_of(signals_of(SIZES, 7), ALL), labels)
            assert set(own) == ({"decoupling"} if options.decoupling_weight else set())
            (F.cross_entropy(logits, labels) + sum(own.values())).backward()
            optimizer.step()
        for name, parameter in classifier.named_parameters():
            trained = name.startswith(("model.memory_learner.", "model.mod_fusion_layers.", "class_layer."))
            trained &= options.fmb or not name.startswith(unused)
            assert parameter.requires_grad == trained and (parameter.grad is not None) == trained, name
            assert trained == (not torch.equal(before[name], parameter)), name
        for name, buffer in classifier.named_buffers():
            assert torch.equal(before[name], buffer), name


def test_the_order_of_modalities_does_not_change_the_logits() -> None:
    classifier = make().double()
    reordered = ("light", "sound", "shake")
    other = make(replace(SIZES, modalities={name: SIZES.modalities[name] for name in reordered})).double()
    columns = torch.cat([torch.arange(8) + 8 * NAMES.index(name) for name in reordered])
    key_of = {frozenset(pattern.split("+")): pattern for pattern in patterns(NAMES)}
    state = {}
    for name in other.state_dict():
        beginning, _, last = name.rpartition(".")
        source = f"{beginning}.{key_of[frozenset(last.split('+'))]}" if "+" in last else name
        value = classifier.state_dict()[source]
        if ".layernorm." in name and "projection" not in name:
            value = value[columns]
        elif "compound" in name and name.endswith(("fc1.weight", "skip.weight")):
            value = value[:, columns]
        state[name] = value
    other.load_state_dict(state)
    signals = {name: x.double() for name, x in signals_of(SIZES, 7).items()}
    expected = classifier(batch_of(signals, ALL))
    present = ALL[:, [NAMES.index(name) for name in reordered]]
    torch.testing.assert_close(other(batch_of({name: signals[name] for name in reordered}, present)), expected)


@pytest.mark.parametrize(("task", "sizes"), [("mod", SIZES), ("mosi", vla_models.TINY)])
def test_heads_are_initialised_by_torch_as_published(task: str, sizes: Any) -> None:
    torch.manual_seed(0)
    head = build_classifier(ModelSpec(task, replace(OPTIONS, prompt_type="none"), sizes)).head
    assert isinstance(head, LinearHead)
    weight, bias = head.weight.detach().abs().max(), head.bias.detach().abs().max()
    most = head.weight.shape[1] ** -0.5
    assert 0.9 * most < weight <= most and 0 < bias <= most


def test_parameter_counts_for_mod_equal_the_definition() -> None:
    sizes = golden_as.load(golden_as.HERE / "rep_mod.npz").sizes
    classifier = make(sizes, MethodOptions("rep", 12, 4), classes=7)
    counts = [
        sum(p.numel() for p in classifier.parameters() if p.requires_grad == trained) for trained in (True, False)
    ]
    assert counts == [486_920, 11_243_840]
    depth_8 = make(sizes, MethodOptions("rep", 12, 8), classes=7).method
    assert sum(p.numel() for p in depth_8.parameters()) == 389_889
    more_slots = make(sizes, MethodOptions("rep", 36, 4), classes=7).method
    assert sum(p.numel() for p in more_slots.parameters()) == 227_073


def test_decoupling_counts_present_modalities_only() -> None:
    classifier = make(options=replace(OPTIONS, decoupling_weight=2.0))
    batch = batch_of(signals_of(SIZES, 7), ALL)
    features, slots = classifier.features(batch)
    found = classifier.method.losses(slots, features, torch.zeros(7, CLASSES), torch.zeros(7))["decoupling"]
    cosines = [
        F.cosine_similarity(private, shared, dim=0).square()
        for m, name in enumerate(NAMES)
        for row in range(7)
        if ALL[row, m]
        for layer in slots[name].replaced_BmD
        for private in layer[row]
        for shared in slots[name].inserted_BmD[0][row]
    ]
    assert found.item() == pytest.approx(2 * float(torch.stack(cosines).detach().mean()), rel=1e-5)
