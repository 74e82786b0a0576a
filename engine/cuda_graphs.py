"""Steps as CUDA graphs: what is computed of each shape of batch is recorded once and replayed, which launches its
thousands of kernels with one call. Of a training step these are the forward and the backward pass.

Batches come in few shapes (`ModelInput.rounded`); dropout masks follow from the seed of each batch as without graphs.
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.fused import Passes, compiled
from clip.modules.interfaces import ModelInput
from clip.modules.vision_transformer_memory import ClipBackbone, ResidualAttentionBlock
from common.messages import first_line

if TYPE_CHECKING:
    from config import Options

log = logging.getLogger("rep")

STEPS, EVALUATIONS = "training steps", "evaluations"
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
Step = Callable[[ModelInput, Tensor, int], Losses]
"""From a batch, its labels and how many of its samples count to the loss, logits (B, C), and the own losses in it."""
Forward = Callable[[ModelInput], Tensor]
"""From a batch to its logits (B, C)."""
Run = Callable[[ModelInput, list[Tensor]], Any]
"""From a batch and further tensors to tensors."""
LEAST_BATCHES = 1000
"""Compiling and recording take up to half a minute on an H200, which so many steps win back."""
MOST = 64
"""Graphs of a kind. An epoch of MM-IMDb has some 30 shapes (benchmarks/RESULTS.md); further ones are not recorded."""


def recorded(
    step: Step, forward: Forward, classifier: MissingModalityClassifier, options: "Options", batches: int
) -> tuple[Step, Forward]:
    """Both, for CLIP on a GPU recorded unless `cuda_graphs` is off or a reason is against it, which the log then says.

    Args:
        forward: of a classifier in evaluation mode.
        batches: of the whole training; of less than LEAST_BATCHES nothing is recorded.
    """
    of_clip, pays = isinstance(classifier.model, ClipBackbone), batches >= LEAST_BATCHES
    if not (options.cuda_graphs and options.num_gpus and of_clip and pays):
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
        log.info("cuda_graphs: steps are not recorded: %s", ", ".join(against))
        return step, forward
    try:
        compute_by(classifier, compiled())
    except Exception as error:  # whatever keeps Triton from it
        log.info("cuda_graphs: nothing is compiled: %s", first_line(error))
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    recordings = Recordings()
    return GraphedSteps(step, trained, recordings), GraphedForward(forward, recordings)


def compute_by(classifier: nn.Module, passes: Passes) -> None:
    """Sets how the blocks compute what is between their matrix products."""
    for module in classifier.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.compute_by(passes)


class _Recording(NamedTuple):
    inputs: list[Tensor]
    """What a replay reads."""
    outputs: Any
    """What it writes, overwritten by the next replay of any graph."""
    replay: Callable[[], None]


class Recordings:
    """Of each shape of inputs the recording, up to `MOST` of a kind; a kind of which one fails has no more.

    Where the recording itself fails, not what goes before it, the others do not follow from the seeds any more: all are
    dropped, and no kind has more.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        """By kind, why nothing is recorded any more."""
        self.by_shape: dict[str, dict[Hashable, _Recording]] = {}
        self._pool: Any = None
        """Memory that the graphs share: what one leaves there has been read when the next is replayed."""

    def replayed(self, kind: str, batch: ModelInput, more: list[Tensor], counted: int, run: Run) -> Any:
        """What `run` gives of a batch and of `more` tensors; None where it cannot be recorded.

        Args:
            kind: what `run` computes.
            counted: what else decides what is computed.
        """
        recordings = self.by_shape.setdefault(kind, {})
        tensors = [*_tensors(batch), *more]
        shapes = tuple((each.shape, each.dtype) for each in tensors)
        shape = shapes, tuple(batch.source_of_B), batch.types, tuple(batch.lengths.items()), batch.kept, counted
        if shape not in recordings and kind not in self.refused:
            if len(recordings) == MOST:
                self._refuse(kind, f"there are {MOST} graphs already; other shapes are not recorded")
            else:
                self._record(kind, shape, batch, tensors, run)
        if (recording := recordings.get(shape)) is None:
            return None
        torch._foreach_copy_(recording.inputs, tensors)
        recording.replay()
        return recording.outputs

    def _record(self, kind: str, shape: Hashable, batch: ModelInput, tensors: list[Tensor], run: Run) -> None:
        own = [each.clone() for each in tensors]
        own_batch, more = _with_tensors(batch, own)

        def run_own() -> Any:
            torch.clear_autocast_cache()  # each replay casts anew
            outputs = run(own_batch, more)
            torch.clear_autocast_cache()
            return outputs

        if self._pool is None and batch.present_BM.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        recordings = self.by_shape[kind]
        try:
            outputs, replay = capture(run_own, self._pool, first=not recordings)
            recordings[shape] = _Recording(own, outputs, replay)
        except CaptureFailedError as error:
            for each, of_kind in self.by_shape.items():
                of_kind.clear()
                self._refuse(each, f"cannot be recorded: {first_line(error)}")
        except RuntimeError as error:
            self._refuse(kind, f"cannot be recorded: {first_line(error)}")

    def _refuse(self, kind: str, why: str) -> None:
        self.refused[kind] = why
        log.info("cuda_graphs: %s: %s", kind, why)


def _tensors(batch: ModelInput) -> list[Tensor]:
    return [*batch.inputs.values(), *batch.rows.values(), *batch.source_of_B.values(), batch.present_BM]


def _with_tensors(batch: ModelInput, tensors: list[Tensor]) -> tuple[ModelInput, list[Tensor]]:
    """The batch with these tensors, in the order of `_tensors`, and those that are left over."""
    left = iter(tensors)
    names = (batch.inputs, batch.rows, batch.source_of_B)
    inputs, rows, sources = ({name: next(left) for name in group} for group in names)
    batch = batch._replace(inputs=inputs, rows=rows, source_of_B=sources, present_BM=next(left), index_B=None)
    return batch, list(left)


class GraphedForward:
    """Logits that are replayed where a batch of the same shape has been recorded. What cannot be, runs as it is."""

    def __init__(self, forward: Forward, recordings: Recordings) -> None:
        self.forward, self.recordings = forward, recordings

    def __call__(self, batch: ModelInput) -> Tensor:
        """See `Forward`."""
        batch = batch.rounded()
        logits_BC = self.recordings.replayed(EVALUATIONS, batch, [], 0, lambda own, _: self.forward(own))
        return self.forward(batch) if logits_BC is None else logits_BC.clone()


class GraphedSteps:
    """A step that is replayed where a batch of the same shape has been recorded. What cannot be, runs as it is.

    Args:
        parameters: those that the loss has gradients of.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], recordings: Recordings) -> None:
        self.step, self.parameters, self.recordings = step, parameters, recordings
        self._gradients: list[Tensor] = []
        """By parameter, of the newest replay, whichever graph it was of."""
        self._anchor = torch.zeros(()).requires_grad_()
        """What the loss of a replay depends on, so that it has a backward pass."""

    def __call__(self, batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        """See `Step`; the loss has a backward pass."""
        batch = batch.rounded()

        def run(own: ModelInput, more: list[Tensor]) -> tuple[Losses, list[Tensor | None]]:
            [own_labels] = more
            return self._run(own, own_labels, counted)

        if (found := self.recordings.replayed(STEPS, batch, [labels], counted, run)) is None:
            return self.step(batch, labels, counted)
        (loss, logits, own_losses), gradients = found
        loss = _Replayed.apply(self._anchor, loss, self.parameters, gradients)
        return loss, logits.clone(), {name: value.clone() for name, value in own_losses.items()}

    def _run(self, batch: ModelInput, labels: Tensor, counted: int) -> tuple[Losses, list[Tensor | None]]:
        """Losses and, by parameter, where their gradients are; None where the loss does not depend on it."""
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        loss, logits, own_losses = self.step(batch, labels, counted)
        with torch.autocast(loss.device.type, enabled=False):  # as a backward pass is outside of it
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self._gradients, found, strict=True)
        gradients: list[Tensor | None] = [None if made is None else own for own, made in pairs]
        torch._foreach_copy_([each for each in gradients if each is not None], [g for g in found if g is not None])
        detached = {name: value.detach() for name, value in own_losses.items()}
        return (loss.detach(), logits.detach(), detached), gradients


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are there already.

    It adds them to the parameters itself: nodes of autograd that do belong to the stream of the step that made them,
    and while one is alive no graph can be recorded.
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
    """Something is not possible while a graph is recorded."""


def capture(run: Callable[[], Any], pool: Any, *, first: bool) -> tuple[Any, Callable[[], None]]:
    """What `run` gives, in memory that each call of the function returned fills anew. Draws nothing from the generator.

    Args:
        first: whether nothing like it has been recorded, so that it may make the host wait for the GPU, which no graph
            can.

    Raises:
        RuntimeError: it does, or fails by itself.
    """
    state, mode = torch.cuda.get_rng_state(), torch.cuda.get_sync_debug_mode()
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run()  # chooses kernels and fills caches
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
        except RuntimeError as error:  # which leaves torch in the stream, with a generator that waits for the end
            torch.cuda.set_stream(before)
            fresh = torch.Generator("cuda").graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            raise CaptureFailedError(*error.args) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_rng_state(state)
    return outputs, graph.replay
