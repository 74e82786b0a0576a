"""Training and evaluation steps as CUDA graphs, captured once for each batch shape and replayed.

A replay launches the step's thousands of kernels with one call. For a training step, the graph holds the forward and
the backward pass. Batches come in few shapes (`ModelInput.rounded`); dropout masks follow from each batch's seed, as
they do without graphs.
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.fused import BlockOps, compiled
from clip.modules.interfaces import ModelInput
from clip.modules.vision_transformer_memory import ClipBackbone, ResidualAttentionBlock
from common.messages import first_line

if TYPE_CHECKING:
    from config import Options

log = logging.getLogger("rep")

STEPS, EVALUATIONS = "training steps", "evaluations"
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
Step = Callable[[ModelInput, Tensor, int], Losses]
"""Computes the loss, the logits (B, C) and the method's own losses by name, from a batch, its labels and the number of
samples that count."""
Forward = Callable[[ModelInput], Tensor]
"""Maps a batch to its logits (B, C)."""
Run = Callable[[ModelInput, list[Tensor]], Any]
"""Maps a batch and further tensors to tensors."""
MIN_BATCHES = 1000
"""Fewest batches worth capturing for: compiling and capturing take up to half a minute on an H200."""
MAX_GRAPHS = 64
"""Most graphs of one kind. An epoch of MM-IMDb has about 30 shapes (benchmarks/RESULTS.md)."""


def captured(
    step: Step, forward: Forward, classifier: MissingModalityClassifier, options: "Options", batches: int
) -> tuple[Step, Forward]:
    """`step` and `forward`, as CUDA graphs for CLIP on a GPU, unless `cuda_graphs` is off.

    If an option rules graphs out, the log says so, and both are returned unchanged.

    Args:
        forward: computes the logits of `classifier` in evaluation mode.
        batches: number in the whole training; with fewer than MIN_BATCHES nothing is captured.
    """
    is_clip, pays = isinstance(classifier.model, ClipBackbone), batches >= MIN_BATCHES
    if not (options.cuda_graphs and options.num_gpus and is_clip and pays):
        return step, forward
    reasons = {
        "several processes train": options.processes > 1,
        f"precision={options.precision}": options.precision.startswith("16"),
        "activation_checkpointing=True": options.activation_checkpointing,
        f"text_windows={options.text_windows}": options.text_windows > 1,
        "neighbours or a teacher": options.neighbours > 0 or options.teacher is not None,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if against:
        log.info("cuda_graphs: steps are not captured: %s", ", ".join(against))
        return step, forward
    try:
        use_ops(classifier, compiled())
    except Exception as error:  # Triton may fail for any reason
        log.info("cuda_graphs: compilation failed, going on without: %s", first_line(error))
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    graphs = CapturedGraphs()
    evaluate = GraphedForward(forward, graphs, own_inputs=classifier.method.per_sample)
    return GraphedSteps(step, trained, graphs), evaluate


def use_ops(classifier: nn.Module, ops: BlockOps) -> None:
    """Sets how the blocks compute the operations between their matrix products."""
    for module in classifier.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.use_ops(ops)


class _CapturedGraph(NamedTuple):
    inputs: list[Tensor]
    """Tensors that a replay reads."""
    outputs: Any
    """Tensors that a replay writes; the next replay of any graph overwrites them."""
    replay: Callable[[], None]


class CapturedGraphs:
    """Captured graphs by kind and input shape, up to `MAX_GRAPHS` of a kind.

    If the run before a capture fails, that kind gets no more graphs. All graphs are dropped, and no kind gets more, if
    the capture itself fails, since the existing graphs no longer follow from the seeds, and if memory runs out, since
    steps without graphs need theirs.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        """Why nothing more is captured, keyed by kind."""
        self.by_shape: dict[str, dict[Hashable, _CapturedGraph]] = {}
        self._pool: Any = None
        """Memory that the graphs share: the outputs of one have been read before the next is replayed."""

    def replayed(self, kind: str, batch: ModelInput, more: list[Tensor], counted: int, run: Run) -> Any:
        """The outputs of `run` for a batch and `more` tensors, replayed; None if they cannot be captured.

        Args:
            kind: what `run` computes.
            counted: a number that the computation depends on, besides the shapes.
        """
        graphs = self.by_shape.setdefault(kind, {})
        tensors = [*_tensors(batch), *more]
        shapes = tuple((each.shape, each.dtype) for each in tensors)
        shape = shapes, tuple(batch.source_of_B), batch.types, tuple(batch.lengths.items()), batch.cached, counted
        if shape not in graphs and kind not in self.refused:
            if len(graphs) == MAX_GRAPHS:
                self._refuse(kind, f"{MAX_GRAPHS} graphs already; further shapes are not captured")
            else:
                self._capture(kind, shape, batch, tensors, run)
        if (graph := graphs.get(shape)) is None:
            return None
        torch._foreach_copy_(graph.inputs, tensors)
        graph.replay()
        return graph.outputs

    def _capture(self, kind: str, shape: Hashable, batch: ModelInput, tensors: list[Tensor], run: Run) -> None:
        own = [each.clone() for each in tensors]
        own_batch, more = _with_tensors(batch, own)

        def run_own() -> Any:
            torch.clear_autocast_cache()  # each replay has to cast again
            outputs = run(own_batch, more)
            torch.clear_autocast_cache()
            return outputs

        if self._pool is None and batch.present_BM.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        graphs = self.by_shape[kind]
        try:
            outputs, replay = capture(run_own, self._pool, first=not graphs)
            graphs[shape] = _CapturedGraph(own, outputs, replay)
        except (CaptureFailedError, torch.OutOfMemoryError) as error:
            for each, of_kind in self.by_shape.items():
                of_kind.clear()
                self._refuse(each, f"cannot be captured: {first_line(error)}")
        except RuntimeError as error:
            self._refuse(kind, f"cannot be captured: {first_line(error)}")

    def _refuse(self, kind: str, why: str) -> None:
        self.refused[kind] = why
        log.info("cuda_graphs: %s: %s", kind, why)


def _tensors(batch: ModelInput) -> list[Tensor]:
    return [*batch.inputs.values(), *batch.rows.values(), *batch.source_of_B.values(), batch.present_BM]


def _with_tensors(batch: ModelInput, tensors: list[Tensor]) -> tuple[ModelInput, list[Tensor]]:
    """The batch with its tensors replaced, in the order of `_tensors`, and the remaining tensors."""
    left = iter(tensors)
    names = (batch.inputs, batch.rows, batch.source_of_B)
    inputs, rows, sources = ({name: next(left) for name in group} for group in names)
    batch = batch._replace(inputs=inputs, rows=rows, source_of_B=sources, present_BM=next(left), index_B=None)
    return batch, list(left)


class GraphedForward:
    """A forward pass that replays the graph for the batch's shape; a batch that cannot be captured runs without one.

    Args:
        own_inputs: whether the model copies shared inputs to each sample. This makes the host wait for the GPU, so it
            is done before.
    """

    def __init__(self, forward: Forward, graphs: CapturedGraphs, *, own_inputs: bool = False) -> None:
        self.forward, self.graphs, self.own_inputs = forward, graphs, own_inputs

    def __call__(self, batch: ModelInput) -> Tensor:
        """See `Forward`."""
        batch = (batch.with_own_inputs() if self.own_inputs else batch).rounded()
        logits_BC = self.graphs.replayed(EVALUATIONS, batch, [], 0, lambda own, _: self.forward(own))
        return self.forward(batch) if logits_BC is None else logits_BC.clone()


class GraphedSteps:
    """A training step that replays the graph for the batch's shape; a batch that cannot be captured runs without one.

    Args:
        parameters: the trained parameters, which get the gradients.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], graphs: CapturedGraphs) -> None:
        self.step, self.parameters, self.graphs = step, parameters, graphs
        self._gradients: list[Tensor] = []
        """Gradient of each parameter in the newest replay, shared by all graphs."""
        self._anchor = torch.zeros(()).requires_grad_()
        """Input of a replay's loss, to give it a backward pass."""

    def __call__(self, batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        """See `Step`; the loss has a backward pass."""
        batch = batch.rounded()

        def run(own: ModelInput, more: list[Tensor]) -> tuple[Losses, list[Tensor | None]]:
            [own_labels] = more
            return self._run(own, own_labels, counted)

        if (found := self.graphs.replayed(STEPS, batch, [labels], counted, run)) is None:
            return self.step(batch, labels, counted)
        (loss, logits, own_losses), gradients = found
        loss = _Replayed.apply(self._anchor, loss, self.parameters, gradients)
        return loss, logits.clone(), {name: value.clone() for name, value in own_losses.items()}

    def _run(self, batch: ModelInput, labels: Tensor, counted: int) -> tuple[Losses, list[Tensor | None]]:
        """The losses, and each parameter's gradient buffer, or None if the loss does not depend on the parameter."""
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        loss, logits, own_losses = self.step(batch, labels, counted)
        with torch.autocast(loss.device.type, enabled=False):  # a backward pass runs outside autocast
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self._gradients, found, strict=True)
        gradients: list[Tensor | None] = [None if new is None else own for own, new in pairs]
        torch._foreach_copy_([each for each in gradients if each is not None], [g for g in found if g is not None])
        detached = {name: value.detach() for name, value in own_losses.items()}
        return (loss.detach(), logits.detach(), detached), gradients


class _Replayed(torch.autograd.Function):
    """A loss whose gradients have been computed already.

    It adds them to the parameters itself: autograd's own accumulation nodes belong to the stream of the step that
    created them, and no graph can be captured while one of them is alive.
    """

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, loss: Tensor, parameters: Sequence[nn.Parameter], gradients: list[Tensor | None]
    ) -> Tensor:
        ctx.pairs = [(p, own) for p, own in zip(parameters, gradients, strict=True) if own is not None]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        parameters, gradients = zip(*ctx.pairs, strict=True)
        for parameter, gradient in zip(parameters, torch._foreach_mul(gradients, factor), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return None, None, None, None


class CaptureFailedError(RuntimeError):
    """An operation is not permitted while a graph is being captured."""


@cache
def _warm_up_stream() -> torch.cuda.Stream:
    """The stream of the runs before all captures. For each stream that it has run on, cuBLAS keeps tens of MiB."""
    return torch.cuda.Stream()


def capture(run: Callable[[], Any], pool: Any, *, first: bool) -> tuple[Any, Callable[[], None]]:
    """The outputs of `run`, and a function that replays it into the same memory. The generator's state is restored.

    Args:
        first: whether nothing like `run` has been captured; it is then checked for making the host wait for the GPU,
            which a graph cannot do.

    Raises:
        RuntimeError: `run` makes the host wait, or fails by itself.
        CaptureFailedError: the capture failed.
    """
    state, mode = torch.cuda.get_rng_state(), torch.cuda.get_sync_debug_mode()
    before, stream = torch.cuda.current_stream(), _warm_up_stream()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run()  # selects kernels and fills caches
            if first:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                    torch.cuda.set_sync_debug_mode("error")
                run()
        torch.cuda.set_sync_debug_mode(mode)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread pins memory
                outputs = run()
        except RuntimeError as error:  # torch stays on the side stream, and its generator in capture mode
            torch.cuda.set_stream(before)
            fresh = torch.Generator("cuda").graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            raise CaptureFailedError(*error.args) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_rng_state(state)
    return outputs, graph.replay
