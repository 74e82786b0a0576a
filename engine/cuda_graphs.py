"""Training steps as CUDA graphs: forward and backward pass of each shape of batch are recorded once and replayed, which
launches their two thousand kernels at once.

Batches come in few shapes (`ModelInput.rounded`); dropout masks follow from the seed of each batch as without graphs.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from clip.modules.vision_transformer_memory import ClipBackbone
from common.messages import first_line

if TYPE_CHECKING:
    from config import Options

log = logging.getLogger("rep")

T = TypeVar("T")
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
Step = Callable[[ModelInput, Tensor, int], Losses]
"""From a batch, its labels and how many of its samples count to the loss, logits (B, C), and the own losses in it."""
MOST = 64
"""Graphs. An epoch of MM-IMDb has some 30 shapes (benchmarks/RESULTS.md); steps of further ones are not recorded."""


def recorded(step: Step, classifier: MissingModalityClassifier, options: "Options") -> Step:
    """The step, recorded if `cuda_graphs` asks for it and nothing is against it, which a line of the log says."""
    reasons = {
        "there is no GPU": not options.num_gpus,
        "several processes train": options.processes > 1,
        f"precision={options.precision}": options.precision.startswith("16"),
        "activation_checkpointing=True": options.activation_checkpointing,
        f"text_windows={options.text_windows}": options.text_windows > 1,
        "neighbours or a teacher": options.neighbours > 0 or options.teacher is not None,
        "the backbone is not CLIP": not isinstance(classifier.model, ClipBackbone),
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if options.cuda_graphs and against:
        log.info("cuda_graphs: steps are not recorded: %s", ", ".join(against))
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return GraphedSteps(step, trained) if options.cuda_graphs and not against else step


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    """What a replay reads."""
    outputs: Losses
    """What it writes."""
    gradients: list[Tensor | None]
    """Likewise, by parameter; None where the loss does not depend on it."""
    replay: Callable[[], None]


class GraphedSteps:
    """A step that is replayed where a batch of the same shape has been recorded. What cannot be, runs as it is.

    Args:
        parameters: those that the loss has gradients of.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter]) -> None:
        self.step, self.parameters = step, parameters
        self.refused: str | None = None
        """Why nothing is recorded any more."""
        self._recorded: dict[Hashable, _Recorded] = {}
        self._gradients: list[Tensor] = []
        """By parameter, of the newest replay, whichever graph it was of."""
        self._pool: Any = None
        """Memory that the graphs share: what one leaves there has been read when the next is replayed."""

    def __call__(self, batch: ModelInput, labels: Tensor, counted: int) -> Losses:
        """See `Step`; the loss has a backward pass."""
        batch = batch.rounded()
        tensors = [*batch.inputs.values(), *batch.rows.values(), batch.present_BM, labels]
        shapes = tuple((each.shape, each.dtype) for each in tensors)
        shape = shapes, batch.types, tuple(batch.lengths.items()), batch.kept, counted
        if shape not in self._recorded:
            if self.refused is None and len(self._recorded) == MOST:
                self._refuse(f"there are {MOST} graphs already; steps of batches of other shapes are not recorded")
            if self.refused is None:
                try:
                    self._recorded[shape] = self._record(batch, tensors, counted)
                except RuntimeError as error:
                    self._refuse(f"the step cannot be recorded: {first_line(error)}")
            if self.refused is not None:
                return self.step(batch, labels, counted)
        recorded = self._recorded[shape]
        torch._foreach_copy_(recorded.inputs, tensors)
        recorded.replay()
        loss, logits, own_losses = recorded.outputs  # which the next replay overwrites
        loss = _Replayed.apply(loss, recorded.gradients, *self.parameters)
        return loss, logits.clone(), {name: value.clone() for name, value in own_losses.items()}

    def _refuse(self, why: str) -> None:
        self.refused = why
        log.info("cuda_graphs: %s", why)

    def _record(self, batch: ModelInput, tensors: list[Tensor], counted: int) -> _Recorded:
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        own = [each.clone() for each in tensors]
        *_, present_BM, labels = own
        of_inputs, of_rows = (dict(zip(batch.inputs, part, strict=False)) for part in (own, own[len(batch.inputs) :]))
        own_batch = batch._replace(inputs=of_inputs, rows=of_rows, present_BM=present_BM, index_B=None)
        device, gradients = labels.device.type, list[Tensor | None]()

        def run() -> Losses:
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            with torch.autocast(device, dtype, enabled, cache_enabled=False):  # each replay casts anew
                loss, logits, own_losses = self.step(own_batch, labels, counted)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            gradients[:] = [own if made is not None else None for own, made in zip(self._gradients, found, strict=True)]
            torch._foreach_copy_([each for each in gradients if each is not None], [g for g in found if g is not None])
            return loss.detach(), logits.detach(), {name: value.detach() for name, value in own_losses.items()}

        if self._pool is None and device == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        outputs, replay = capture(run, self._pool)
        return _Recorded(own, outputs, gradients, replay)


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        scaled = iter(torch._foreach_mul([each for each in ctx.gradients if each is not None], factor))
        return None, None, *(None if each is None else next(scaled) for each in ctx.gradients)


def capture(run: Callable[[], T], pool: Any) -> tuple[T, Callable[[], None]]:
    """What `run` gives, in memory that each call of the function returned fills anew. Draws nothing from the generator.

    Raises:
        RuntimeError: it makes the host wait for the GPU, which no graph can.
    """
    state, mode, stream = torch.cuda.get_rng_state(), torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # chooses kernels and fills caches
            torch.cuda.set_sync_debug_mode("error")
            run()
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread pins memory
            outputs = run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_rng_state(state)
    return outputs, graph.replay
