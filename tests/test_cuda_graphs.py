"""Captured steps give the same results as plain ones: real CUDA graphs on a GPU, elsewhere a stand-in for them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.fused import PLAIN, quick_gelu_in_one
from clip.modules.interfaces import ModelInput
from clip.modules.registry import METHODS
from clip.modules.vision_transformer_memory import ClipBackbone
from engine import cuda_graphs
from engine.cuda_graphs import (
    EVALUATIONS,
    STEPS,
    CapturedGraphs,
    CaptureFailedError,
    GraphedForward,
    GraphedSteps,
    Losses,
    captured,
)
from engine.tasks import TASKS
from tests.conftest import Patch, Workspace, read_json
from tests.models import model_input, tiny_batch, tiny_classifier

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES: dict[str, dict[str, Any]] = {
    **{method: {"prompt_type": method} for method in METHODS},
    "described": {"memory_depth": 1, "replay_depth": 1, "dynamic_init": True, "decoupling_weight": 0.1},
    "dpl": {"prompt_type": "none", "head": "dpl", "dpl_contrast_weight": 0.9},
    "linear by type": {"prompt_type": "coop", "head": "linear_by_type"},
}
MIXES = ([0, 1, 2, 0] * 3, [0, 1, 2, 1] * 3, [0, 1, 2, 0] * 3, [1] * 12, [0, 1, 2, 0] * 3)


aten = torch.ops.aten
WAITS = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.lift_fresh),
    *(aten._unique2, aten.unique_dim, aten.repeat_interleave),
)
"""Operations that make the host wait for the GPU, or copy Python numbers to it (`lift_fresh`)."""


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: records every operation with the tensors it reads and writes, and replays them.

    As with a real graph, a replay runs no Python code, so decisions and numbers from Python stay those of the capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [each for each in tree_leaves(args[1:2]) if isinstance(each, Tensor) and each.dtype == torch.bool]
        by_mask = operation.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and masks
        if operation.overloadpacket in WAITS or by_mask:
            raise RuntimeError("called a synchronizing CUDA operation")
        found = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, tree_leaves(found)))
        return found

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation, args, kwargs, written in self.calls:
                for old, new in zip(written, tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


def tape(run: Callable[[], Any], pool: Any, *, first: bool) -> tuple[Any, Callable[[], None]]:
    """Stands in for `capture`."""
    with torch.random.fork_rng(), Tape() as graph:
        outputs = run()
    return outputs, graph.replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: Patch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "capture", tape)
    return torch.device(request.param)


def to_device(device: torch.device, batch: ModelInput) -> ModelInput:
    groups = (batch.inputs, batch.rows, batch.source_of_B)
    inputs, rows, sources = ({name: x.to(device) for name, x in each.items()} for each in groups)
    return batch._replace(inputs=inputs, rows=rows, source_of_B=sources, present_BM=batch.present_BM.to(device))


def step_of(classifier: MissingModalityClassifier) -> cuda_graphs.Step:
    def step(batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        logits, own_losses = classifier.training_outputs(batch, labels)
        loss = TASKS["hatememes"].loss(logits[:counted].float(), labels[:counted])
        return loss + sum(own_losses.values()), logits, own_losses

    return step


@pytest.mark.parametrize("wait", ["x[x > 0]", "x[0].item()", "x.unique()", "torch.equal(x, x)", "x.new_tensor([1.0])"])
def test_the_stand_in_refuses_operations_that_a_graph_cannot_capture(wait: str) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        tape(lambda: eval(wait, {"torch": torch, "x": torch.arange(3.0)}), None, first=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((each, torch.float32) for each in CASES), ("rep", torch.bfloat16)],
)
def test_captured_training_steps_match_plain_ones(device: torch.device, case: str, dtype: torch.dtype) -> None:
    """Losses, logits and gradients match, accumulated over two batches, with dropout masks fixed by the seed alone.

    In 16-bit precision, only the forward pass is under autocast, as in training.
    """
    found: list[list[Tensor | None]] = []
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    for with_graphs in (False, True):
        classifier = tiny_classifier("hatememes", **CASES[case]).to(device).train()
        classifier.compute(dtype)
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        step = step_of(classifier)
        step = GraphedSteps(step, parameters, CapturedGraphs()) if with_graphs else step
        values: list[Tensor | None] = []
        for number, mix in enumerate(MIXES):
            images, tokens = tiny_batch(len(mix), seed=number)
            labels = torch.arange(len(mix), device=device) % 2
            batch = to_device(device, model_input(images, tokens, mix))
            torch.manual_seed(number)
            batch = batch if with_graphs else batch.rounded()
            with autocast:
                loss, logits, own_losses = step(batch, labels, len(mix) - number // 4)
            (loss * 0.5).backward()
            values += [loss.detach(), logits.detach(), *(value.detach() for value in own_losses.values())]
            values += [None if each.grad is None else each.grad.clone() for each in parameters]
            if number % 2:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
        found.append(values)
        if isinstance(step, GraphedSteps):
            assert not step.graphs.refused and len(step.graphs.by_shape[STEPS]) == 4, "one shape is used twice"
    for plain, replayed in zip(*found, strict=True):
        assert (plain is None) == (replayed is None)
        if plain is not None and replayed is not None:
            assert torch.allclose(plain.float(), replayed.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["rep", "described", "aoept", "mora", "dpl"])
def test_captured_evaluations_match_plain_ones(device: torch.device, case: str) -> None:
    """Logits match although the weights change between replays and samples share an image."""
    classifier = tiny_classifier("hatememes", **CASES[case]).to(device).eval()
    evaluate = GraphedForward(classifier, CapturedGraphs(), own_inputs=classifier.method.per_sample)
    for number, mix in enumerate(MIXES):
        images, tokens = tiny_batch(len(mix), seed=number)
        batch = model_input(images, tokens, mix)
        [first, *_] = batch.rows["image"].tolist()
        shared = {"image": batch.inputs["image"][:1]}, {"image": batch.rows["image"][:1]}
        inputs, rows = ({**old, **new} for old, new in zip((batch.inputs, batch.rows), shared, strict=True))
        sources = {"image": torch.full((len(mix),), first)}
        batch = to_device(device, batch._replace(inputs=inputs, rows=rows, source_of_B=sources))
        for parameter in classifier.head.parameters():
            nn.init.normal_(parameter)
        with torch.inference_mode():
            found, expected = evaluate(batch), classifier(batch)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not evaluate.graphs.refused and len(evaluate.graphs.by_shape[EVALUATIONS]) == 3


def test_shared_inputs_are_part_of_a_graphs_shape(monkeypatch: Patch) -> None:
    monkeypatch.setattr(cuda_graphs, "capture", tape)
    evaluate = GraphedForward(lambda batch: next(iter(batch.source_of_B.values())), CapturedGraphs())
    batch = model_input(*tiny_batch(3), [0, 1, 2])
    for name in ("image", "text"):
        evaluate(batch._replace(source_of_B={name: torch.arange(3)}))
    assert len(evaluate.graphs.by_shape[EVALUATIONS]) == 2


def test_the_gpu_activation_matches_the_plain_one() -> None:
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu_in_one(x), PLAIN.quick_gelu(x))


@on_gpu
def test_captures_use_the_same_streams() -> None:
    """For each stream, cuBLAS keeps memory that it never gives back."""
    streams: list[int] = []

    def run() -> Tensor:
        streams.append(torch.cuda.current_stream().cuda_stream)
        return torch.ones(2, device="cuda")

    for _ in range(3):
        cuda_graphs.capture(run, None, first=False)
    assert len(streams) == 6 and len(set(streams)) == 2, "one for the run before, one for the capture"


@pytest.mark.parametrize("error", [CaptureFailedError, torch.OutOfMemoryError])
def test_a_failed_capture_disables_all_graphs(
    device: torch.device, error: type[RuntimeError], monkeypatch: Patch
) -> None:
    """With the other graphs still in use, dropout would no longer follow from the seeds, and plain steps might lack
    the memory that the graphs hold."""

    def step(batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        dropped = torch.nn.functional.dropout(weight)
        return dropped.sum(), dropped, {}

    def forward(batch: ModelInput) -> Tensor:
        torch.cuda.synchronize()  # which torch objects to only during capture
        return torch.zeros(3, device=device)

    def fail(*_: Any, **__: Any) -> Any:
        raise error("not permitted")

    weight, graphs = nn.Parameter(torch.ones(64, device=device)), CapturedGraphs()
    graphed, evaluate = GraphedSteps(step, [weight], graphs), GraphedForward(forward, graphs)
    batch = to_device(device, model_input(*tiny_batch(3), [0, 1, 2]))

    def masks(step: cuda_graphs.Step) -> Tensor:
        torch.manual_seed(1)
        loss, dropped, _ = step(batch, torch.zeros(3, device=device), 3)
        loss.backward()
        return dropped

    found = [masks(graphed)]
    assert graphs.by_shape[STEPS]
    if device.type == "cpu" or error is torch.OutOfMemoryError:
        monkeypatch.setattr(cuda_graphs, "capture", fail)
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    evaluate(batch)
    assert graphs.refused.keys() == {STEPS, EVALUATIONS} and not any(graphs.by_shape.values())
    found.append(masks(graphed))
    assert torch.equal(found[0], masks(step)) and torch.equal(found[1], found[0])


def test_a_step_that_cannot_be_captured_runs_without_graphs(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    classifier = tiny_classifier("hatememes").train()
    step = GraphedSteps(step_of(classifier), [*classifier.parameters()], CapturedGraphs())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            loss, *_ = step(model_input(*tiny_batch(3), [0, 1, 2]), torch.arange(3) % 2, 3)
    assert loss.requires_grad
    assert [record.message for record in caplog.records] == [
        "cuda_graphs: training steps: cannot be captured: called a synchronizing CUDA operation"
    ]


def test_the_number_of_captured_shapes_is_limited(monkeypatch: Patch) -> None:
    monkeypatch.setattr(cuda_graphs, "capture", tape)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    classifier = tiny_classifier("hatememes", prompt_type="none").train()
    trained = [each for each in classifier.parameters() if each.requires_grad]
    step = GraphedSteps(step_of(classifier), trained, CapturedGraphs())
    for mix in ([0], [0, 1], [0, 0, 1], [0], [0, 0, 2]):
        step(model_input(*tiny_batch(len(mix)), mix), torch.zeros(len(mix), dtype=torch.long), len(mix))
    assert len(step.graphs.by_shape[STEPS]) == 2 and "2 graphs" in step.graphs.refused[STEPS]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_gpus": 0}, None),
        ({"processes": 2}, "several processes"),
        ({"precision": "16-mixed"}, "precision=16-mixed"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"text_windows": 2}, "text_windows=2"),
        ({"neighbours": 4}, "neighbours"),
        ({"cuda_graphs": False}, None),
        ({"batches": 999}, None),
        ({}, None),
    ],
)
def test_options_that_rule_out_graphs_are_logged(changed, reason, caplog, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "compiled", lambda: PLAIN)
    given = {"cuda_graphs": True, "num_gpus": 1, "processes": 1, "precision": "bf16", "activation_checkpointing": False}
    given |= {"text_windows": 1, "neighbours": 0, "teacher": None, "batches": 1000}
    options: Any = SimpleNamespace(**{**given, **changed})
    classifier = tiny_classifier(dynamic_init=True)  # shared images are encoded separately for each sample
    step = step_of(classifier)
    with caplog.at_level(logging.INFO):
        found, evaluate = captured(step, classifier, classifier, options, options.batches)
    assert isinstance(found, GraphedSteps) == isinstance(evaluate, GraphedForward) == (not changed)
    assert not isinstance(evaluate, GraphedForward) or evaluate.own_inputs
    assert (found is step) == (evaluate is classifier) == bool(changed)
    assert [reason in record.message for record in caplog.records if reason] == [True] * bool(reason)


@pytest.mark.slow
def test_a_run_with_captured_steps_trains_the_same_model(workspace: Workspace, monkeypatch: Patch) -> None:
    """Over two epochs with accumulation, validations and the test, which runs without graphs."""
    from runs import training

    captures: list[bool] = []
    capture = cuda_graphs.capture if torch.cuda.is_available() else tape

    def counted(run: Callable[[], Any], pool: Any, *, first: bool) -> Any:
        captures.append(first)
        return capture(run, pool, first=first)

    def as_on_gpu(step: Any, forward: Any, classifier: Any, options: Any, batches: int) -> Any:
        return captured(step, forward, classifier, replace(options, num_gpus=1), batches)

    monkeypatch.setattr(ClipBackbone, "prepare", lambda _, batch: batch.rounded())  # as on a GPU, so sums agree
    plain = workspace.train("plain_steps")
    monkeypatch.setattr(cuda_graphs, "capture", counted)
    monkeypatch.setattr(cuda_graphs, "compiled", lambda: PLAIN)
    monkeypatch.setattr(cuda_graphs, "MIN_BATCHES", 0)
    monkeypatch.setattr(training, "captured", as_on_gpu)
    graphed = workspace.train("captured_steps")
    assert captures.count(True) == 2 < len(captures), "training and evaluation are captured, each in several shapes"
    states = [torch.load(each / "last.ckpt", weights_only=True)["state_dict"] for each in (plain, graphed)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)
    results = [read_json(each / "test_results.json")["metrics"] for each in (plain, graphed)]
    assert results[0] == pytest.approx(results[1], abs=1e-4)
