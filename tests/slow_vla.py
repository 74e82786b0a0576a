"""The backbone for text, audio and vision with REP's memory, slowly: one sample at a time, following docs/vla.md.

The reference for the fast model, so the two share no code: functions over `state`, tensors keyed by published name.
Letters l, a, v in this order. Shapes: T steps, S of a source, D width, w width of a tower, m slots of a group.
"""

import math
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

LETTERS = "lav"
State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, target: Tensor, source: Tensor, heads: int, causal: bool) -> Tensor:
    (wq, wk, wv), (bq, bk, bv) = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = target @ wq.T + bq, source @ wk.T + bk, source @ wv.T + bv
    width, steps = q.shape[1] // heads, []
    for i in range(len(q)):
        seen = min(len(k), i + abs(len(k) - len(q)) + 1) if causal else len(k)
        parts = []
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            weights = (k[:seen, columns] @ q[i, columns] / math.sqrt(width)).softmax(0)
            parts.append(weights @ v[:seen, columns])
        steps.append(torch.cat(parts))
    return linear(state, f"{name}.out_proj", torch.stack(steps))


def embed(x: Tensor) -> Tensor:
    rows, (T, D) = [], x.shape
    half = D // 2
    for t in range(1, T + 1):
        angles = torch.tensor([t * math.exp(-i * math.log(10000) / (half - 1)) for i in range(half)])
        position = torch.cat([angles.sin(), angles.cos(), torch.zeros(D % 2)])
        rows.append(math.sqrt(D) * x[t - 1] + (position if x[t - 1, 0] != 0 else 0))
    return torch.stack(rows)


def layer(state: State, name: str, x: Tensor, source: Tensor | None, heads: int) -> Tensor:
    query = norm(state, f"{name}.layer_norms.0", x)
    keys = query if source is None else norm(state, f"{name}.layer_norms.0", source)
    x = x + attention(state, f"{name}.self_attn", query, keys, heads, causal=True)
    hidden = linear(state, f"{name}.fc1", norm(state, f"{name}.layer_norms.1", x)).relu()
    return x + linear(state, f"{name}.fc2", hidden)


def depth_of(state: State, encoder: str) -> int:
    return next(k for k in count() if f"{encoder}.layers.{k}.fc1.weight" not in state)


def cross(state: State, encoder: str, target: Tensor, source: Tensor, heads: int) -> Tensor:
    x, read = embed(target), embed(source)
    for k in range(depth_of(state, encoder)):
        x = layer(state, f"{encoder}.layers.{k}", x, read, heads)
    return norm(state, f"{encoder}.layer_norm", x)


def rdn(state: State, name: str, x: Tensor) -> Tensor:
    hidden = F.gelu(norm(state, f"{name}.layernorm", linear(state, f"{name}.fc1", x)))
    skip = linear(state, f"{name}.skip", x) if f"{name}.skip.weight" in state else x
    return linear(state, f"{name}.fc2", hidden) + skip


def forward(
    state: State,
    features: dict[str, Tensor],
    missing: str,
    heads: int,
    *,
    far: bool = True,
    fmb: bool = True,
    mask_readout: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sample's output (C,) and decoupling penalty; features (T, D) keyed by letter, those in `missing` unread."""
    mode = ["l", "a", "v", "la", "lv", "av", ""].index(missing)
    u = {
        c: (torch.zeros_like(x) if c in missing else x) @ state[f"proj_{c}.weight"][..., 0].T
        for c, x in features.items()
    }
    E = {}
    for c in LETTERS:
        streams = [cross(state, f"trans_{c}_with_{s}", u[c], u[s], heads) for s in LETTERS if s != c]
        E[c] = embed(torch.cat(streams, dim=1))

    M = "memory_learner"
    D = next(k for k in count() if f"{M}.layernorm_l.{k}.weight" not in state)
    before = {c: state[f"{M}.memory_start_{c}"][int(fmb and c in missing)] for c in LETTERS}
    private: dict[str, list[Tensor]] = {c: [] for c in LETTERS}
    alpha = state[f"{M}.residual_alpha"]
    for k in range(D):
        joined = torch.cat([before[c] for c in LETTERS], dim=1)
        for c in LETTERS:
            new = rdn(state, f"{M}.compound_memory_projections_{c}.{k}", norm(state, f"{M}.layernorm_{c}.{k}", joined))
            private[c].append(alpha * new + (1 - alpha) * before[c] if k and far else new)
        before = {c: private[c][k] for c in LETTERS}
    common = state[f"{M}.common_memory"][mode]
    if f"{M}.dynamic_common_token_net.fc1.weight" in state:
        means = torch.cat([E[c].mean(0) * (c not in missing) for c in LETTERS])
        common = common + rdn(state, f"{M}.dynamic_common_token_net", means)

    readouts, cosines = [], []
    for c in LETTERS:
        shared = [rdn(state, f"{M}.common_memory_projection_{c}", common)] if fmb else []
        dynamic = attention(state, f"{M}.attn_memory_{c}", state[f"{M}.dynamic_queries_{c}"][mode], E[c], 1, False)
        m, P = len(dynamic), len(private[c][0]) + sum(map(len, shared))
        x = torch.cat([private[c][0], *shared, dynamic, E[c]])
        kept: list[Tensor] = []
        for k in range(depth_of(state, f"trans_{c}_mem")):
            if 0 < k < D:
                x = torch.cat([private[c][k], x[m:]])
            gates = state.get(f"{M}.replay_{c}.gates", torch.zeros(0))
            if D <= k < D + len(gates):
                weights = state[f"{M}.replay_{c}.layer_scores"].softmax(0)
                summed = torch.stack([weight * slots for weight, slots in zip(weights, kept, strict=True)]).sum(0)
                x = torch.cat([x[:P] + gates[k - D] * norm(state, f"{M}.replay_{c}.norm", summed), x[P:]])
            x = layer(state, f"trans_{c}_mem.layers.{k}", x, None, heads)
            if k < D:
                kept.append(x[:P])
        readout = norm(state, f"trans_{c}_mem.layer_norm", x[-1])
        readouts.append(torch.zeros_like(readout) if mask_readout and c in missing else readout)
        for slots in private[c] if shared else []:
            cosines += [F.cosine_similarity(one, other, dim=0).square() for one in slots for other in shared[0]]
    z = torch.cat(readouts)
    fused = linear(state, "proj2", linear(state, "proj1", z).relu()) + z
    return linear(state, "out_layer", fused), torch.stack(cosines).mean() if cosines else torch.tensor(0.0)
