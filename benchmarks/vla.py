"""Text, audio and vision: a step and an evaluation against the published algorithm written plainly.

    python -m benchmarks.vla [--unaligned] [--batch N] [--repeats N]

Plainly: a loop over the samples for what their missing modes ask, every encoder in full on features of zeros where a
modality is missing, attention weights as matrices, towers to the end for all steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.interfaces import ModelInput
from clip.modules.method import MethodOptions
from clip.modules.registry import method_class
from clip.trainable import freeze
from vla.backbone import DROPOUT, LETTERS, Attention, Encoder, Layer, VlaArchitecture, VlaBackbone, mask

ALIGNED = VlaArchitecture(50, 50, 50, 300, 5, 20)
UNALIGNED = VlaArchitecture(50, 375, 500, 300, 5, 20)


def classifier_of(method: str, arch: VlaArchitecture) -> MissingModalityClassifier:
    """A random model."""
    torch.manual_seed(0)
    backbone = VlaBackbone(arch)
    learner = method_class(method, "vla")(backbone.places, backbone.embed_dim, MethodOptions(method, 12, 3))
    classifier = MissingModalityClassifier(backbone, learner, "mosi_classifier", LinearHead(3, backbone.embed_dim, 1))
    freeze(classifier, "mosi")
    return classifier


def batch_of(arch: VlaArchitecture, types: list[int]) -> ModelInput:
    """A batch with these missing types, three quarters of each sequence padding, as in MOSI."""
    draw = torch.Generator().manual_seed(0)
    present = torch.tensor([[not code & bit for bit in (4, 2, 1)] for code in types])
    inputs, rows = {}, {}
    for number, (name, (steps, width)) in enumerate(arch.shapes.items()):
        rows[name] = present[:, number].nonzero().flatten()
        x = torch.randn(len(types), steps, width, generator=draw)
        x[:, : steps * 3 // 4] = 0
        inputs[name] = x[rows[name]]
    return ModelInput(inputs, rows, present, tuple(sorted(set(types))))


def training_types(batch: int) -> list[int]:
    """Those of a batch at a missing rate of 0.7."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(1, 7, (batch,), generator=draw)
    return torch.where(torch.rand(batch, generator=draw) < 0.7, codes, 0).tolist()


def sample_of(batch: ModelInput, row: int) -> ModelInput:
    """A batch of one of the samples."""
    inputs, rows = {}, {}
    for name, rows_b in batch.rows.items():
        own = rows_b == row
        inputs[name], rows[name] = batch.inputs[name][own], torch.zeros(int(own.sum()), dtype=torch.long)
    present = batch.present_BM[row : row + 1]
    code = int(((~present) * torch.tensor([4, 2, 1])).sum())
    return ModelInput(inputs, rows, present, (code,))


def plainly(classifier: MissingModalityClassifier, batch: ModelInput) -> Tensor:
    """Logits (B, 1), the same as the classifier's without dropout."""
    model, method = classifier.model, classifier.method
    assert isinstance(model, VlaBackbone)
    entered: dict[str, list[Tensor]] = {name: [] for name in LETTERS}
    for row in range(len(batch.present_BM)):
        one = model.prepare(sample_of(batch, row))
        adapted = method.adapt(one, model.embed(one))
        for name, (steps, _) in model.arch.shapes.items():
            missing = torch.zeros(1, steps, model.arch.width)
            entered[name].append(adapted.get(name, missing))
    whole, towers = {name: torch.cat(rows) for name, rows in entered.items()}, {}
    for target, letter in LETTERS.items():
        streams = []
        for source, other in LETTERS.items():
            if source != target:
                encoder = model.get_submodule(f"trans_{letter}_with_{other}")
                assert isinstance(encoder, Encoder)
                streams.append(_run(encoder, encoder.embed(whole[target]), encoder.embed(whole[source])))
        towers[target] = model.towers[target].embed(torch.cat(streams, dim=-1))
    slots, features = method(batch, towers), {}
    for name, tower in model.towers.items():
        assert isinstance(tower, Encoder)
        of_tower, x = slots[name], towers[name]
        if of_tower.appended_BmD is not None:
            x = torch.cat([x, tower.embed(of_tower.appended_BmD, offset=x.shape[1])], dim=1)
        front = [*of_tower.replaced_BmD[:1], *of_tower.inserted_BmD]
        x = torch.cat([*front, *([] if of_tower.dynamic_BmD is None else [of_tower.dynamic_BmD]), x], dim=1)
        features[name] = _run(tower, x, None, of_tower.replaced_BmD)[:, -1]
    return classifier.head(model.fuse(features, batch.present_BM), batch.missing_type_B)


def _run(encoder: Encoder, x: Tensor, source: Tensor | None, replaced: object = ()) -> Tensor:
    of_layers = list(replaced)  # type: ignore[call-overload]
    for k, layer in enumerate(encoder.layers):
        assert isinstance(layer, Layer)
        if 0 < k < len(of_layers):
            x = torch.cat([of_layers[k], x[:, of_layers[k].shape[1] :]], dim=1)
        query = layer.layer_norms[0](x)
        keys = query if source is None else layer.layer_norms[0](source)
        read = _attend(layer.self_attn, query, keys, layer.training)
        x = layer._feed_forward(x + F.dropout(read, DROPOUT, layer.training))
    return encoder.layer_norm(x)


def _attend(attention: Attention, query: Tensor, keys: Tensor, training: bool) -> Tensor:
    D = query.shape[-1]
    q = F.linear(query, attention.in_proj_weight[:D], attention.in_proj_bias[:D]) * (D // attention.heads) ** -0.5
    k, v = F.linear(keys, attention.in_proj_weight[D:], attention.in_proj_bias[D:]).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~mask(q.shape[2], k.shape[2], q.device), -torch.inf)
    weights = F.dropout((q @ k.transpose(2, 3) + bias).softmax(dim=-1), DROPOUT, training)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time, which others on the machine change little."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Prints seconds of both on one thread, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unaligned", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    arch = UNALIGNED if args.unaligned else ALIGNED
    for method in ("rep", "mplmm"):
        classifier = classifier_of(method, arch)
        batch = batch_of(arch, training_types(args.batch))
        kinds = [batch_of(arch, [code] * args.batch) for code in range(7)]

        classifier.eval()
        with torch.no_grad():
            assert torch.allclose(classifier(batch), plainly(classifier, batch), atol=1e-4)
        runs: dict[str, Callable[[ModelInput], Tensor]] = {
            "ours": classifier,
            "plain": partial(plainly, classifier),
        }
        for what in ("training step", "evaluation of 7 modes"):
            training = what == "training step"
            classifier.train(training)
            found = {}
            for name, run in runs.items():
                work = partial(step, run, classifier, batch) if training else partial(evaluate, run, kinds)
                found[name] = seconds(work, args.repeats)
            ours, plain = found["ours"], found["plain"]
            print(f"{method:<6} {what:<22} {ours:7.3f} s, plainly {plain:7.3f} s: {plain / ours:.1f} x", flush=True)


def step(run: Callable[[ModelInput], Tensor], classifier: MissingModalityClassifier, batch: ModelInput) -> None:
    """Forward and backward."""
    classifier.zero_grad()
    run(batch).square().mean().backward()


@torch.no_grad()
def evaluate(run: Callable[[ModelInput], Tensor], batches: list[ModelInput]) -> None:
    """All batches."""
    for batch in batches:
        run(batch)


if __name__ == "__main__":
    main()
