"""REP on the SW-Transformer, slowly: one sample at a time, with an explicit list of the positions each token sees.

The reference for the fast model, so the two share no code: pure functions over `state`, a flat dict of tensors keyed by
checkpoint name, and the sizes. Evaluation mode.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensors.sizes import SensorSizes

State = Mapping[str, Tensor]
LEARNER = "memory_learner"


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def rdn(state: State, name: str, x: Tensor) -> Tensor:
    hidden = F.gelu(norm(state, f"{name}.layernorm", linear(state, f"{name}.fc1", x)))
    skip = linear(state, f"{name}.skip", x) if f"{name}.skip.weight" in state else x
    return linear(state, f"{name}.fc2", hidden) + skip


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], added: Sequence[float | Tensor]) -> Tensor:
    """Attention of one query (d,) in one head; `added` is added to the scores."""
    scores = [query @ key / math.sqrt(len(query)) + one for key, one in zip(keys, added, strict=True)]
    weights = torch.stack(scores).softmax(dim=0)
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(query))


def multi_head(state: State, name: str, query: Tensor, source: Tensor, heads: int) -> Tensor:
    """Multi-head attention of queries (q, C) over (s, C), with the parameter names of torch's module."""
    width = query.shape[-1] // heads
    weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, source, source), weights, biases, strict=True))
    rows = []
    for one in q:
        parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
        rows.append(torch.cat([attend(one[p], k[:, p].unbind(), v[:, p].unbind(), [0.0] * len(k)) for p in parts]))
    return linear(state, f"{name}.out_proj", torch.stack(rows))


def patches(state: State, sizes: SensorSizes, name: str, signal: Tensor) -> dict[tuple[int, int], Tensor]:
    """Tokens keyed by grid position."""
    spec, at = sizes.of(name), f"patch_embed.{sizes.location}.{name}"
    spectrum = torch.fft.fft(signal)
    planes = torch.stack([part for channel in spectrum for part in (channel.real, channel.imag)])
    multiples = [w * p * 2 ** (len(sizes.blocks) - 1) for w, p in zip(spec.window, spec.patch, strict=True)]
    rows, columns = (-(-size // each) * each for size, each in zip(planes.shape[1:], multiples, strict=True))
    padded = torch.zeros(len(planes), rows, columns)
    padded[:, : planes.shape[1], : planes.shape[2]] = planes
    grid = {}
    for i in range(rows // spec.patch[0]):
        for j in range(columns // spec.patch[1]):
            patch = padded[
                :,
                i * spec.patch[0] : (i + 1) * spec.patch[0],
                j * spec.patch[1] : (j + 1) * spec.patch[1],
            ]
            token = (state[f"{at}.proj.weight"] * patch).sum(dim=(1, 2, 3)) + state[f"{at}.proj.bias"]
            grid[i, j] = norm(state, f"{at}.norm", token)
    return grid


def block(
    state: State, at: str, heads: int, window: Sequence[int], odd: bool, grid: dict[tuple[int, int], Tensor],
    slots: list[Tensor],
) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:  # fmt: skip
    H, W = (max(place[axis] for place in grid) + 1 for axis in (0, 1))
    h, w = min(window[0], H), min(window[1], W)
    shift = (h // 2, w // 2) if odd and h < H and w < W and h // 2 and w // 2 else (0, 0)
    table = state[f"{at}.attn.relative_position_bias_table"]

    def projected(x: Tensor) -> list[list[Tensor]]:
        parts = linear(state, f"{at}.attn.qkv", norm(state, f"{at}.norm1", x)).chunk(3)
        return [list(part.chunk(heads)) for part in parts]

    token_qkv = {place: projected(x) for place, x in grid.items()}
    slot_qkv = [projected(x) for x in slots]

    def shifted(place: tuple[int, int]) -> tuple[int, int]:
        return (place[0] - shift[0]) % H, (place[1] - shift[1]) % W

    def region(place: tuple[int, int]) -> tuple[int, ...]:
        return tuple(
            0 if x < size - length else 1 if x < size - by else 2
            for x, size, length, by in zip(shifted(place), (H, W), (h, w), shift, strict=True)
        )

    def output(query: list[list[Tensor]], seen: list[tuple[list[list[Tensor]], Any]]) -> Tensor:
        found = []
        for head in range(heads):
            keys, values = ([one[part_index][head] for one, _ in seen] for part_index in (1, 2))
            found.append(attend(query[0][head], keys, values, [added(head) for _, added in seen]))
        return linear(state, f"{at}.attn.proj", torch.cat(found))

    def finish(x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        hidden = F.gelu(linear(state, f"{at}.mlp.fc1", norm(state, f"{at}.norm2", x)))
        return x + linear(state, f"{at}.mlp.fc2", hidden)

    nothing = lambda _: 0.0  # noqa: E731
    new = {}
    for place, x in grid.items():
        seen: list[tuple[list[list[Tensor]], Any]] = [(one, nothing) for one in slot_qkv]
        target = shifted(place)
        for other in grid:
            source_place = shifted(other)
            if (target[0] // h, target[1] // w) != (source_place[0] // h, source_place[1] // w):
                continue
            down, right = target[0] - source_place[0], target[1] - source_place[1]
            bias = table[(down + h - 1) * (2 * w - 1) + right + w - 1]
            apart = -100.0 if 0 not in shift and region(place) != region(other) else 0.0
            seen.append((token_qkv[other], lambda head, bias=bias, apart=apart: bias[head] + apart))
        new[place] = finish(x, output(token_qkv[place], seen))
    everything = [(one, nothing) for one in (*slot_qkv, *token_qkv.values())]
    return new, [finish(x, output(one, everything)) for x, one in zip(slots, slot_qkv, strict=True)]


def merged(state: State, at: str, four: Sequence[Tensor]) -> Tensor:
    return linear(state, f"{at}.reduction", norm(state, f"{at}.norm", torch.cat([*four])))


def feature(
    state: State, sizes: SensorSizes, name: str, grid: dict[tuple[int, int], Tensor], first: list[Tensor],
    private: list[list[Tensor]], replay_steps: int = 0,
) -> Tensor:  # fmt: skip
    """One modality's feature (E,); `first` are block 0's slots, `private` replaces the leading slots of each block."""
    slots, k, depth = first, 0, len(private)
    outputs: list[list[Tensor]] = []
    replayed = 2 * len(private[0]) if private else 0
    for s, blocks in enumerate(sizes.blocks):
        at = f"freq_interval_layers.{sizes.location}.{name}.{s}"
        for b in range(blocks):
            if 0 < k < depth:
                slots = [*private[k], *slots[len(private[k]) :]]
            if depth <= k < depth + replay_steps:
                replay = f"{LEARNER}.replay.{name}"
                weights = state[f"{replay}.layer_scores"].softmax(dim=0)
                for place in range(replayed):
                    total = sum(w * y[place] for w, y in zip(weights, outputs, strict=True))
                    added = norm(state, f"{replay}.norms.{s}", torch.as_tensor(total))
                    slots[place] = slots[place] + state[f"{replay}.gates"][k - depth] * added
            window = sizes.of(name).window
            grid, slots = block(state, f"{at}.blocks.{b}", sizes.heads, window, b % 2 == 1, grid, slots)
            if k < depth:
                outputs.append(slots[:replayed])
            k += 1
        if s < len(sizes.blocks) - 1:
            down = f"{at}.downsample"
            places = {(i // 2, j // 2) for i, j in grid}
            four = ((0, 0), (1, 0), (0, 1), (1, 1))
            grid = {
                (i, j): merged(state, down, [grid[2 * i + a, 2 * j + b] for a, b in four]) for i, j in sorted(places)
            }
            carry = lambda group, down=down: [merged(state, down, [z] * 4) for z in group]  # noqa: E731
            slots, private, outputs = carry(slots), [*map(carry, private)], [*map(carry, outputs)]
    flat = torch.cat([grid[place] for place in sorted(grid)])
    return linear(state, f"mod_in_layers.{sizes.location}.{name}", flat)


def chain(state: State, names: Sequence[str], present: Sequence[str], depth: int, far: bool, fmb: bool) -> Any:
    """Private slots v_k (m, C) keyed by modality, for each k."""
    start = {
        name: state[f"{LEARNER}.private_memory_{'complete' if name in present or not fmb else 'missing'}.{name}"]
        for name in names
    }
    found = []
    for k in range(depth):
        joint = torch.cat([start[name] for name in names], dim=-1)
        new = {}
        for name in names:
            normed = norm(state, f"{LEARNER}.layernorm.{name}.{k}", joint)
            new[name] = rdn(state, f"{LEARNER}.compound_memory_projections.{name}.{k}", normed)
            if k > 0 and far:
                alpha = state[f"{LEARNER}.residual_alpha"]
                new[name] = alpha * new[name] + (1 - alpha) * start[name]
        found.append(new)
        start = new
    return found


def logits(
    state: State, sizes: SensorSizes, head: tuple[Tensor, Tensor], signals: Mapping[str, Tensor], *,
    depth: int, far: bool = True, fmb: bool = True, replay_depth: int = 0, dynamic_init: bool = False,
) -> Tensor:  # fmt: skip
    """Logits (K,) of one sample, whose missing modalities are absent from `signals`."""
    names = list(sizes.modalities)
    present = [name for name in names if name in signals]
    pattern = "+".join(present)
    grids = {name: patches(state, sizes, name, signals[name]) for name in present}
    v = chain(state, names, present, depth, far, fmb)
    features = []
    common = state.get(f"{LEARNER}.common_memory.{pattern}", torch.zeros(1, sizes.width))
    if dynamic_init:
        means = [
            torch.stack([*grids[name].values()]).mean(dim=0) if name in present else torch.zeros(sizes.width)
            for name in names
        ]
        common = common + rdn(state, f"{LEARNER}.dynamic_common_token_net", torch.cat(means))
    for name in present:
        shared: Any = rdn(state, f"{LEARNER}.common_memory_projection.{name}", common) if fmb else []
        queries = state[f"{LEARNER}.memories_dynamic.{name}.{pattern}"]
        source = torch.stack([*grids[name].values()])
        dynamic = multi_head(state, f"{LEARNER}.attn_memory.{name}", queries, source, 1)
        first = [*v[0][name], *shared, *dynamic]
        private = [[*layer_slots[name]] for layer_slots in v]
        features.append(feature(state, sizes, name, grids[name], first, private, replay_depth))
    x = torch.stack([norm(state, "mod_fusion_layers.norm1", one) for one in features])
    fused = multi_head(state, "mod_fusion_layers.mha", x.mean(dim=0, keepdim=True), x, sizes.heads)[0]
    return F.linear(fused, *head)
