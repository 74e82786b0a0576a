"""REP, slowly: one sample at a time, every step spelled out, as docs/method.md sections 2-5 say it.

This is the yardstick for the fast model, so it shares no code with it: pure functions over `state`, a flat dict of
tensors under their checkpoint names (`model.image_encoder.proj`, ...). Sizes come from the tensors; autograd flows
wherever an entry requires grad.

Shape suffixes: B batch, L sequence, D width of a tower (d_v image, d_t text), V the pair's width d_v+d_t, E joint
embedding, C classes, R image side, m slots in each of the three groups private, shared, dynamic.
A missing type is 0 complete, 1 text missing, 2 image missing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Dropout = Callable[[str, Tensor], Tensor]
"""(checkpoint prefix of the RDN, its hidden activations (m, 256)) -> the same, with a mask applied."""

LEARNER = "model.memory_learner"
IMAGE = "model.image_encoder"
TEXT = "model.text_encoder"
HEAD_WIDTH = 64

TEXT_MISSING, IMAGE_MISSING = 1, 2
AVAILABLE = ("complete", "image", "text")
"""By missing type: what the common memory and the dynamic queries are named after, which is what is *there*."""


class Features(NamedTuple):
    unmasked: Tensor  # (2E,) image half, then text half
    masked: Tensor  # (2E,) the half of the missing modality is zero


# --- building blocks -------------------------------------------------------------------------------------------------


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "gelu":
        return F.gelu(x)
    raise ValueError(f"activation must be 'quick_gelu' or 'gelu', got {activation!r}")


def attention(
    state: State, name: str, target_LD: Tensor, source_SD: Tensor, heads: int, allowed_LS: Tensor | None = None
) -> Tensor:
    """Multi-head attention of `target_LD` (queries) over `source_SD` (keys and values), (L, D).

    `allowed_LS` is True where a query may look; None is everywhere.
    """
    weight_q, weight_k, weight_v = state[f"{name}.in_proj_weight"].chunk(3)
    bias_q, bias_k, bias_v = state[f"{name}.in_proj_bias"].chunk(3)
    query_LD = F.linear(target_LD, weight_q, bias_q)
    key_SD = F.linear(source_SD, weight_k, bias_k)
    value_SD = F.linear(source_SD, weight_v, bias_v)

    width = target_LD.shape[-1] // heads
    outputs = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        score_LS = query_LD[:, columns] @ key_SD[:, columns].T / width**0.5
        if allowed_LS is not None:
            score_LS = score_LS.masked_fill(~allowed_LS, float("-inf"))
        outputs.append(score_LS.softmax(dim=-1) @ value_SD[:, columns])
    return linear(state, f"{name}.out_proj", torch.cat(outputs, dim=-1))


def residual_block(state: State, name: str, x_LD: Tensor, allowed_LL: Tensor | None, activation: str) -> Tensor:
    """One pre-norm block of CLIP, (L, D) -> (L, D)."""
    normed_LD = layer_norm(state, f"{name}.ln_1", x_LD)
    heads = x_LD.shape[-1] // HEAD_WIDTH
    x_LD = x_LD + attention(state, f"{name}.attn", normed_LD, normed_LD, heads, allowed_LL)
    hidden = linear(state, f"{name}.mlp.c_fc", layer_norm(state, f"{name}.ln_2", x_LD))
    return x_LD + linear(state, f"{name}.mlp.c_proj", activate(hidden, activation))


# --- memory learner (section 2) --------------------------------------------------------------------------------------


def rdn(state: State, name: str, x: Tensor, dropout: Dropout | None) -> Tensor:
    """RDN(i -> o), (m, i) -> (m, o): `skip` is the identity where the state has no such layer, which is where i = o."""
    hidden = F.gelu(layer_norm(state, f"{name}.layernorm", linear(state, f"{name}.fc1", x)))
    if dropout is not None:
        hidden = dropout(name, hidden)
    skipped = linear(state, f"{name}.skip", x) if f"{name}.skip.weight" in state else x
    return linear(state, f"{name}.fc2", hidden) + skipped


def learn_memory(
    state: State, missing_type: int, depth: int, dropout: Dropout | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Memory of one sample for the first `depth` blocks of each tower (D of docs/method.md; at least 1).

    Returns `(image_memory, text_memory)`, each a list of `depth` tensors: element 0 is (2m, D), private then shared
    slots; the others are (m, D), private slots only. D is d_v for the image, d_t for the text.
    """
    image_status = "missing" if missing_type == IMAGE_MISSING else "complete"
    text_status = "missing" if missing_type == TEXT_MISSING else "complete"
    image_mD = state[f"{LEARNER}.visual_memory_{image_status}"]
    text_mD = state[f"{LEARNER}.text_memory_{text_status}"]
    common_mE = state[f"{LEARNER}.common_memory_{AVAILABLE[missing_type]}"]
    alpha = state[f"{LEARNER}.residual_alpha"]

    image_memory, text_memory = [], []
    for k in range(depth):
        pair_mV = torch.cat([image_mD, text_mD], dim=-1)  # both updates read the pair of the layer before
        normed_for_image_mV = layer_norm(state, f"{LEARNER}.layernorm_image.{k}", pair_mV)
        normed_for_text_mV = layer_norm(state, f"{LEARNER}.layernorm_text.{k}", pair_mV)
        new_image_mD = rdn(state, f"{LEARNER}.compound_memory_projections_image.{k}", normed_for_image_mV, dropout)
        new_text_mD = rdn(state, f"{LEARNER}.compound_memory_projections_text.{k}", normed_for_text_mV, dropout)
        if k > 0:  # the residual bypass
            new_image_mD = alpha * new_image_mD + (1 - alpha) * image_mD
            new_text_mD = alpha * new_text_mD + (1 - alpha) * text_mD
        image_mD, text_mD = new_image_mD, new_text_mD
        image_memory.append(image_mD)
        text_memory.append(text_mD)

    shared_image_mD = rdn(state, f"{LEARNER}.common_memory_projection_image", common_mE, dropout)
    shared_text_mD = rdn(state, f"{LEARNER}.common_memory_projection_text", common_mE, dropout)
    image_memory[0] = torch.cat([image_memory[0], shared_image_mD])
    text_memory[0] = torch.cat([text_memory[0], shared_text_mD])
    return image_memory, text_memory


# --- towers with memory (section 3) ----------------------------------------------------------------------------------


def run_blocks(
    state: State, tower: str, x_LD: Tensor, missing_type: int, memory: list[Tensor], causal: bool, activation: str
) -> Tensor:
    """All blocks of `tower` over its input tokens `x_LD`: (3m+L, D), slots first: private, shared, dynamic."""
    m = memory[0].shape[0] // 2
    blocks = f"{tower}.transformer.resblocks"
    queries_mD = state[f"{blocks}.0.memories_dynamic_{AVAILABLE[missing_type]}"][:, 0]  # stored m×1×D
    dynamic_mD = attention(state, f"{blocks}.0.attn_memory", queries_mD, x_LD, heads=1)
    x_LD = torch.cat([memory[0], dynamic_mD, x_LD])

    length = x_LD.shape[0]
    allowed_LL = torch.ones(length, length, dtype=torch.bool, device=x_LD.device).tril() if causal else None
    n = 0
    while f"{blocks}.{n}.ln_1.weight" in state:
        if 1 <= n < len(memory):
            x_LD = torch.cat([memory[n], x_LD[m:]])
        x_LD = residual_block(state, f"{blocks}.{n}", x_LD, allowed_LL, activation)
        n += 1
    return x_LD


def encode_image(
    state: State, image_3RR: Tensor, missing_type: int, memory: list[Tensor], *, activation: str = "quick_gelu"
) -> Tensor:
    """(E,) feature of one normalised image (3, R, R), `memory` being the image half of `learn_memory`."""
    kernel = state[f"{IMAGE}.conv1.weight"]  # (D, 3, patch, patch)
    grid = F.conv2d(image_3RR[None], kernel, stride=kernel.shape[-1])[0]  # (D, rows, columns)
    patches_PD = grid.flatten(1).T  # row by row
    x_LD = torch.cat([state[f"{IMAGE}.class_embedding"][None], patches_PD])
    x_LD = layer_norm(state, f"{IMAGE}.ln_pre", x_LD + state[f"{IMAGE}.positional_embedding"])

    x_LD = run_blocks(state, IMAGE, x_LD, missing_type, memory, causal=False, activation=activation)
    slots = 3 * (memory[0].shape[0] // 2)
    class_token_D = x_LD[slots]
    return layer_norm(state, f"{IMAGE}.ln_post", class_token_D) @ state[f"{IMAGE}.proj"]


def encode_text(
    state: State, tokens_L: Tensor, missing_type: int, memory: list[Tensor], *, activation: str = "quick_gelu"
) -> Tensor:
    """(E,) feature of one text: token ids (77,), padding included; `memory` is the text half of `learn_memory`."""
    tokens_L = tokens_L.long()
    x_LD = state[f"{TEXT}.token_embedding.weight"][tokens_L] + state[f"{TEXT}.positional_embedding"]

    x_LD = run_blocks(state, TEXT, x_LD, missing_type, memory, causal=True, activation=activation)
    slots = 3 * (memory[0].shape[0] // 2)
    x_LD = layer_norm(state, f"{TEXT}.ln_final", x_LD[slots:])
    end = int((tokens_L == tokens_L.max()).nonzero()[0])  # the highest id is <end>; the first one counts
    return x_LD[end] @ state[f"{TEXT}.text_projection"]


# --- head, loss, what is trained (sections 4 and 5) ------------------------------------------------------------------


def features(
    state: State,
    image_3RR: Tensor,
    tokens_L: Tensor,
    missing_type: int,
    depth: int,
    *,
    activation: str = "quick_gelu",
    dropout: Dropout | None = None,
) -> Features:
    """Both (2E,) features of one sample: image (3, R, R), tokens (77,). Arguments as in `learn_memory`."""
    image_memory, text_memory = learn_memory(state, missing_type, depth, dropout)
    image_E = encode_image(state, image_3RR, missing_type, image_memory, activation=activation)
    text_E = encode_text(state, tokens_L, missing_type, text_memory, activation=activation)
    kept_image_E = torch.zeros_like(image_E) if missing_type == IMAGE_MISSING else image_E
    kept_text_E = torch.zeros_like(text_E) if missing_type == TEXT_MISSING else text_E
    return Features(torch.cat([image_E, text_E]), torch.cat([kept_image_E, kept_text_E]))


def logits(
    state: State,
    image_3RR: Tensor,
    tokens_L: Tensor,
    missing_type: int,
    depth: int,
    task: str,
    *,
    activation: str = "quick_gelu",
    dropout: Dropout | None = None,
) -> Tensor:
    """(C,) scores of one sample by the head named `{task}_classifier`. Arguments as in `features`."""
    both = features(state, image_3RR, tokens_L, missing_type, depth, activation=activation, dropout=dropout)
    return linear(state, f"{task}_classifier", both.masked)


def batch_logits(
    state: State,
    images_B3RR: Tensor,
    tokens_BL: Tensor,
    missing_types: Sequence[int],
    depth: int,
    task: str,
    *,
    activation: str = "quick_gelu",
    dropouts: Sequence[Dropout] | None = None,
) -> Tensor:
    """(B, C): `logits` of every sample in turn, each with its own dropout where `dropouts` (B of them) is given."""
    rows = []
    for i, missing_type in enumerate(missing_types):
        dropout = None if dropouts is None else dropouts[i]
        sample = (images_B3RR[i], tokens_BL[i], int(missing_type))
        rows.append(logits(state, *sample, depth, task, activation=activation, dropout=dropout))
    return torch.stack(rows)


def loss(logits_BC: Tensor, label: Tensor, task: str) -> Tensor:
    """Scalar. `label` is (B, C) of 0/1 floats for mmimdb, (B,) class indices for food101 and hatememes."""
    if task == "mmimdb":
        return F.binary_cross_entropy_with_logits(logits_BC, label)
    if task in ("food101", "hatememes"):
        return F.cross_entropy(logits_BC, label)
    raise ValueError(f"task must be 'mmimdb', 'food101' or 'hatememes', got {task!r}")


def trained_names(state: State, task: str) -> set[str]:
    """The entries of `state` that `task` trains (table of section 5)."""
    prefixes = [f"{LEARNER}.", f"{task}_classifier."]
    if task == "hatememes":
        for tower in (IMAGE, TEXT):
            prefixes.append(f"{tower}.transformer.resblocks.0.attn_memory.")
        prefixes += [f"{IMAGE}.ln_post.", f"{TEXT}.ln_final.", f"{IMAGE}.proj"]
    return {name for name in state if name.startswith(tuple(prefixes))}
