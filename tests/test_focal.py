"""FOCAL's pretraining in 16-bit precision."""

import pytest
import torch
from torch import Tensor

from clip.modules.method import MethodOptions
from clip.modules.registry import PRETRAINING
from sensors.methods import Focal
from tests.models import batch_of
from tests.test_sensor_rep import SIZES, make, signals_of

SAMPLES = 3 * PRETRAINING["focal"]


def losses_and_gradients(dtype: torch.dtype, *, autocast: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of pretraining, with the blocks in `dtype`, within the autocast of mixed precision or outside it."""
    classifier = make(options=MethodOptions("focal"), kind=Focal)
    classifier.compute(dtype)
    batch = batch_of(signals_of(SIZES, SAMPLES), torch.ones(SAMPLES, len(SIZES.modalities), dtype=torch.bool))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = classifier.pretraining_losses(batch)
        loss = sum(losses.values(), torch.zeros(()))
    loss.backward()
    gradients = {name: x.grad for name, x in classifier.named_parameters() if x.grad is not None}
    return losses, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_precision_leaves_the_patch_embedding_and_the_losses_in_full(dtype: torch.dtype) -> None:
    """Patches are sums over raw counts, and similarities are divided by a small temperature."""
    expected, found = (losses_and_gradients(dtype, autocast=autocast) for autocast in (False, True))
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs and theirs.keys() == ours.keys()
        for name, x in theirs.items():
            assert x.dtype is torch.float32 and torch.equal(ours[name], x), name
