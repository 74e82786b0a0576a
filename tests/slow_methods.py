"""All methods on CLIP, slowly: one sample at a time, every position of every block computed, following docs/method.md.

This is the reference for the fast model, so the two share no code: pure functions over `state`, a flat dict of tensors
keyed by checkpoint name (`model.image_encoder.proj`, ...). Sizes are read from the tensors; gradients reach every entry
that requires them.

Shape suffixes: L sequence length, W tower width, E joint embedding, m slots of a group. Missing types: 0 complete,
1 text missing, 2 image missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Dropout = Callable[[str, Tensor], Tensor]
"""(checkpoint prefix of the RDN, its hidden activations (m, 256)) -> the activations with a dropout mask applied."""

PROMPTS = "model.prompt_learner"
MEMORY = "model.memory_learner"
IMAGE = "model.image_encoder"
TEXT = "model.text_encoder"
TOWERS = {"image": IMAGE, "text": TEXT}
HEAD_WIDTH = 64
TEXT_MISSING, IMAGE_MISSING = 1, 2
AVAILABLE = ("complete", "image", "text")
"""Indexed by missing type: common memory and dynamic queries are named after the modality that is *available*."""
RELEASED = {"far": True, "fmb": True, "dynamic_init": False}
"""REP's default options."""


class Features(NamedTuple):
    unmasked: Tensor  # (2E,) image half, then text half
    masked: Tensor  # (2E,) zeros in the missing modality's half


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
    state: State,
    name: str,
    target_LW: Tensor,
    source_SW: Tensor,
    heads: int,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Multi-head attention of `target_LW` over `source_SW`, (L, W); every position also sees `keys` and `values`."""
    weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    sources = (target_LW, source_SW, source_SW)
    query, key, value = (F.linear(x, weight, bias) for x, weight, bias in zip(sources, weights, biases, strict=True))
    ahead = 0
    if keys is not None and values is not None:
        ahead, key, value = len(keys), torch.cat([keys, key]), torch.cat([values, value])
    allowed = torch.ones(len(query), len(key), dtype=torch.bool)
    if causal:
        allowed[:, ahead:] = allowed[:, ahead:].tril()
    attended, width = [], target_LW.shape[-1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        score = query[:, part] @ key[:, part].T / math.sqrt(width)
        attended.append(score.masked_fill(~allowed, -math.inf).softmax(-1) @ value[:, part])
    return linear(state, f"{name}.out_proj", torch.cat(attended, dim=-1))


def rdn(state: State, name: str, x: Tensor, dropout: Dropout | None) -> Tensor:
    """RDN(i -> o), (m, i) -> (m, o). `skip` is the identity if the state has no such layer, as when i = o."""
    hidden = F.gelu(layer_norm(state, f"{name}.layernorm", linear(state, f"{name}.fc1", x)))
    if dropout is not None:
        hidden = dropout(name, hidden)
    skipped = linear(state, f"{name}.skip", x) if f"{name}.skip.weight" in state else x
    return linear(state, f"{name}.fc2", hidden) + skipped


@dataclass
class Slots:
    """Slots of one tower for one sample; lists have an item per block."""

    replaced: list[Tensor] = field(default_factory=list)
    inserted: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: Tensor | None = None
    dynamic: str = ""
    replay: str = ""


def method_slots(
    state: State,
    prompt_type: str,
    missing_type: int,
    inputs: dict[str, Tensor],
    rep: dict[str, bool] = RELEASED,
    dropout: Dropout | None = None,
) -> dict[str, Slots]:
    """One sample's slots for the image and the text tower.

    Args:
        inputs: input tokens (L, W) of each tower, read by SyP and by `dynamic_init`.
        rep: REP's options far, fmb and dynamic_init.
    """
    slots = {"image": Slots(), "text": Slots()}
    if prompt_type == "none":
        return slots
    if prompt_type == "syp":
        return _synergistic(state, missing_type, inputs)
    if prompt_type in ("rep", "dcp"):
        return _chained(state, prompt_type, missing_type, inputs, rep, dropout)
    for tower, tower_slots in slots.items():
        prompts = state.get(f"{PROMPTS}.{tower}_prompts")
        if prompt_type == "coop":
            assert prompts is not None
            tower_slots.inserted = [prompts]
        elif prompt_type == "maple":
            text = state[f"{PROMPTS}.text_prompts"]
            for k in range(len(text)):
                name = f"{PROMPTS}.image_projections.{k}"
                tower_slots.replaced.append(text[k] if tower == "text" else linear(state, name, text[k]))
        elif prompt_type == "msp":
            assert prompts is not None
            for for_image, for_text in prompts:
                by_type = (for_image + for_text, for_image, for_text)
                tower_slots.replaced.append(by_type[missing_type])
        elif prompt_type not in ("map_input", "map_attention"):
            raise NotImplementedError(f"{prompt_type}: expected its slow version here, in method_slots of {__file__}")
        else:
            assert prompts is not None
            for block_prompts in prompts:
                chosen = block_prompts[missing_type]
                if prompt_type == "map_input":
                    tower_slots.inserted.append(chosen)
                else:
                    half = len(chosen) // 2
                    tower_slots.keys.append(chosen[:half])
                    tower_slots.values.append(chosen[half:])
    return slots


def _synergistic(state: State, missing_type: int, inputs: dict[str, Tensor]) -> dict[str, Slots]:
    """SyP: sample-scaled plus static prompts in the first block, each later block's computed from the block before."""
    slots = {"image": Slots(), "text": Slots()}
    missing = {"image": IMAGE_MISSING, "text": TEXT_MISSING}
    means = [inputs[tower].mean(0) * (missing_type != missing[tower]) for tower in slots]
    scale = linear(state, f"{PROMPTS}.scale.2", linear(state, f"{PROMPTS}.scale.0", torch.cat(means)[None]).relu())
    scales = dict(zip(slots, scale[0].sigmoid().split([len(mean) for mean in means]), strict=True))
    for tower, tower_slots in slots.items():
        base = state[f"{PROMPTS}.{tower}_prompts"][missing_type]
        static = linear(state, f"{PROMPTS}.static.{tower}", state[f"{PROMPTS}.static_prompts"])
        tower_slots.replaced.append(base * scales[tower] + static)
    k = 0
    while f"{PROMPTS}.deeper.image.{k}.0.weight" in state:
        pair = torch.cat([slots["image"].replaced[-1], slots["text"].replaced[-1]], dim=-1)
        for tower, tower_slots in slots.items():
            name = f"{PROMPTS}.deeper.{tower}.{k}"
            hidden = F.gelu(linear(state, f"{name}.0", pair))
            tower_slots.replaced.append(layer_norm(state, f"{name}.3", linear(state, f"{name}.2", hidden)))
        k += 1
    return slots


def _chained(
    state: State,
    prompt_type: str,
    missing_type: int,
    inputs: dict[str, Tensor],
    rep: dict[str, bool],
    dropout: Dropout | None,
) -> dict[str, Slots]:
    """REP and DCP: private slots, each layer's computed from the layer before; shared slots; dynamic slots."""
    learner, word = (MEMORY, "memory") if prompt_type == "rep" else (PROMPTS, "prompt")
    image_state = "missing" if missing_type == IMAGE_MISSING and rep["fmb"] else "complete"
    text_state = "missing" if missing_type == TEXT_MISSING and rep["fmb"] else "complete"
    visual = state[f"{learner}.visual_{word}_{image_state}"]
    text = state[f"{learner}.text_{word}_{text_state}"]
    slots = {"image": Slots(), "text": Slots()}

    def project(name: str, x: Tensor) -> Tensor:
        if prompt_type == "rep":
            return rdn(state, f"{learner}.{name}", x, dropout)
        return linear(state, f"{learner}.{name}.2", F.gelu(linear(state, f"{learner}.{name}.0", x)))

    k = 0
    while f"{learner}.layernorm_image.{k}.weight" in state:
        pair = torch.cat([visual, text], dim=-1)
        normed_for_image = layer_norm(state, f"{learner}.layernorm_image.{k}", pair)
        normed_for_text = layer_norm(state, f"{learner}.layernorm_text.{k}", pair)
        new_visual = project(f"compound_{word}_projections_image.{k}", normed_for_image)
        new_text = project(f"compound_{word}_projections_text.{k}", normed_for_text)
        if prompt_type == "rep" and k > 0 and rep["far"]:
            alpha = state[f"{learner}.residual_alpha"]
            new_visual = alpha * new_visual + (1 - alpha) * visual
            new_text = alpha * new_text + (1 - alpha) * text
        visual, text = new_visual, new_text
        slots["image"].replaced.append(visual)
        slots["text"].replaced.append(text)
        k += 1
    common = state[f"{learner}.common_{word}_{AVAILABLE[missing_type]}"]
    if rep["dynamic_init"]:
        means = [inputs["image"].mean(0), inputs["text"].mean(0)]
        if missing_type == IMAGE_MISSING:
            means[0] = torch.zeros_like(means[0])
        if missing_type == TEXT_MISSING:
            means[1] = torch.zeros_like(means[1])
        net = f"{learner}.dynamic_common_token_net"
        common = common + rdn(state, net, torch.cat(means)[None], None)
    queries = "memories_dynamic" if prompt_type == "rep" else "prompts_dynamic"
    for tower, tower_slots in slots.items():
        if rep["fmb"]:
            tower_slots.inserted = [project(f"common_{word}_projection_{tower}", common)]
        block = f"{TOWERS[tower]}.transformer.resblocks.0"
        tower_slots.queries = state[f"{block}.{queries}_{AVAILABLE[missing_type]}"][:, 0]
        tower_slots.dynamic = f"{block}.attn_{word}"
        tower_slots.replay = f"{learner}.replay_{tower}"
    return slots


def run_tower(state: State, tower: str, tokens_LW: Tensor, slots: Slots, activation: str) -> tuple[Tensor, int]:
    """Outputs of the last block at all positions, slots first, and the number of positions before the input tokens."""
    x = tokens_LW
    if slots.queries is not None:
        x = torch.cat([attention(state, slots.dynamic, slots.queries, tokens_LW, heads=1), x])
    outputs: list[Tensor] = []
    n_replaced = n_inserted = n = 0
    replay_depth = len(state[f"{slots.replay}.gates"]) if f"{slots.replay}.gates" in state else 0
    while f"{TOWERS[tower]}.transformer.resblocks.{n}.ln_1.weight" in state:
        if n < len(slots.replaced):
            x = x[n_replaced:]
        if n < len(slots.inserted):
            x = torch.cat([slots.inserted[n], x])
            n_inserted += len(slots.inserted[n])
        if n < len(slots.replaced):
            x = torch.cat([slots.replaced[n], x])
            n_replaced = len(slots.replaced[n])
        deeper = n - len(slots.replaced)
        if 0 <= deeper < replay_depth:
            weights = state[f"{slots.replay}.layer_scores"].softmax(0)
            total = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
            assert isinstance(total, Tensor)
            again = state[f"{slots.replay}.gates"][deeper] * layer_norm(state, f"{slots.replay}.norm", total)
            x = torch.cat([x[: len(again)] + again, x[len(again) :]])
        keys, values = (ahead[n] if n < len(ahead) else x[:0] for ahead in (slots.keys, slots.values))
        x = _block(state, f"{TOWERS[tower]}.transformer.resblocks.{n}", x, keys, values, tower == "text", activation)
        if n < len(slots.replaced):
            outputs.append(x[: n_replaced + n_inserted])
        n += 1
    return x, len(x) - len(tokens_LW)


def _block(
    state: State, name: str, x_LW: Tensor, keys: Tensor, values: Tensor, causal: bool, activation: str
) -> Tensor:
    """One block of CLIP, with extra keys and values in front that every position sees."""
    normed, heads = layer_norm(state, f"{name}.ln_1", x_LW), x_LW.shape[-1] // HEAD_WIDTH
    x_LW = x_LW + attention(state, f"{name}.attn", normed, normed, heads, keys, values, causal)
    hidden = activate(linear(state, f"{name}.mlp.c_fc", layer_norm(state, f"{name}.ln_2", x_LW)), activation)
    return x_LW + linear(state, f"{name}.mlp.c_proj", hidden)


def features(
    state: State,
    prompt_type: str,
    image: Tensor,
    tokens: Tensor,
    missing_type: int,
    rep: dict[str, bool] = RELEASED,
    activation: str = "quick_gelu",
    dropout: Dropout | None = None,
) -> Features:
    """Features of one sample: a normalised image (3, R, R) and token ids (77,), padding included."""
    kernel = state[f"{IMAGE}.conv1.weight"]
    patches = F.conv2d(image[None], kernel, stride=kernel.shape[-1])[0].flatten(1).T
    image_tokens = torch.cat([state[f"{IMAGE}.class_embedding"][None], patches])
    image_tokens = layer_norm(state, f"{IMAGE}.ln_pre", image_tokens + state[f"{IMAGE}.positional_embedding"])
    text_tokens = state[f"{TEXT}.token_embedding.weight"][tokens] + state[f"{TEXT}.positional_embedding"]
    inputs = {"image": image_tokens, "text": text_tokens}
    slots = method_slots(state, prompt_type, missing_type, inputs, rep, dropout)

    x, before = run_tower(state, "image", image_tokens, slots["image"], activation)
    image_E = layer_norm(state, f"{IMAGE}.ln_post", x[before]) @ state[f"{IMAGE}.proj"]
    x, before = run_tower(state, "text", text_tokens, slots["text"], activation)
    end = int((tokens == tokens.max()).nonzero()[0])  # the highest id is <end>; the first one counts
    text_E = layer_norm(state, f"{TEXT}.ln_final", x[before + end]) @ state[f"{TEXT}.text_projection"]
    masked = image_E * (missing_type != IMAGE_MISSING), text_E * (missing_type != TEXT_MISSING)
    return Features(torch.cat([image_E, text_E]), torch.cat(masked))


def msp_penalty(state: State) -> Tensor:
    """0.15 times the mean absolute cosine between the two prompt sets, over towers and blocks."""
    cosines = []
    for tower in TOWERS:
        for for_image, for_text in state[f"{PROMPTS}.{tower}_prompts"]:
            one, other = for_image.flatten(), for_text.flatten()
            cosines.append((one @ other / (one.norm() * other.norm())).abs())
    return 0.15 * torch.stack(cosines).mean()


def decoupling(all_slots: list[dict[str, Slots]]) -> Tensor:
    """Mean squared cosine between every private and every shared slot, over samples, towers and layers."""
    squares = []
    for slots in all_slots:
        for tower_slots in slots.values():
            for private in tower_slots.replaced:
                for one in private:
                    for other in tower_slots.inserted[0]:
                        squares.append((one @ other / (one.norm() * other.norm())) ** 2)
    return torch.stack(squares).mean()
