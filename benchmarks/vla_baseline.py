"""The baseline of the part `vla`: plain versions of the published models for text, audio and vision.

MPLMM's code projects or generates modalities and computes prompts separately for every sample; REP's computes the
memory sample by sample. The encoders are MulT's: steps first; each encoder embeds its source as key and as value; every
layer normalises and projects both and builds its mask; attention weights are matrices whose mean over the heads is
returned; all steps of a tower are computed to the end; and missing modalities are encoded like the others. The
parameters are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import ModelInput
from vilt.missing_types import is_missing
from vla.backbone import LETTERS, VlaBackbone
from vla.encoder import DROPOUT, EMBEDDING_DROPOUT, Attention, Encoder, Layer, positions
from vla.memory_learner import MODE_OF_TYPE, VlaMemoryLearner
from vla.mplmm import Mplmm

NAMES = tuple(LETTERS)


def logits(classifier: MissingModalityClassifier, features: dict[str, Tensor], batch: ModelInput) -> Tensor:
    """The classifier's output (B, 1).

    Args:
        features: (B, T, D) for each modality; those of missing ones are given but not read.
        batch: the same samples.
    """
    model, method, types = classifier.model, classifier.method, batch.missing_type_B.tolist()
    assert isinstance(model, VlaBackbone)
    features = {**features, "text": F.dropout(features["text"], EMBEDDING_DROPOUT, model.training)}
    if isinstance(method, Mplmm):
        samples = [_complete(model, method, features, row, code) for row, code in enumerate(types)]
        entered = [torch.cat(rows).permute(2, 0, 1) for rows in zip(*samples, strict=True)]
    else:
        entered = []
        for number, (name, x_BTD) in enumerate(features.items()):
            present_BTD = x_BTD * batch.present_BM[:, number, None, None]
            weight = model.get_parameter(f"proj_{LETTERS[name]}.weight")
            entered.append(F.conv1d(present_BTD.transpose(1, 2), weight).permute(2, 0, 1))
    towers = []
    for target, letter in enumerate(LETTERS.values()):
        streams = [
            _encode(model.get_submodule(f"trans_{letter}_with_{other}"), entered[target], entered[source])
            for source, other in enumerate(LETTERS.values())
            if source != target
        ]
        towers.append(torch.cat(streams, dim=2))
    if isinstance(method, Mplmm):
        appended = torch.stack([_type_prompts(method, code) for code in types], dim=2)
        towers = [torch.cat(pair) for pair in zip(towers, appended, strict=True)]
    memories = [_memory(method, code) for code in types] if isinstance(method, VlaMemoryLearner) else None
    last = []
    for number, (letter, x_TBw) in enumerate(zip(LETTERS.values(), towers, strict=True)):
        encoder = model.get_submodule(f"trans_{letter}_mem")
        if memories is None:
            last.append(_encode(encoder, x_TBw)[-1])
            continue
        assert isinstance(method, VlaMemoryLearner)
        layers = [torch.stack(slots, dim=1) for slots in zip(*(one[number] for one in memories), strict=True)]
        queries = method.get_parameter(f"dynamic_queries_{letter}")[[MODE_OF_TYPE[code] for code in types]]
        embedded = _embed(x_TBw, model.training)
        dynamic = _attend(method.get_submodule(f"attn_memory_{letter}"), queries.transpose(0, 1), embedded, embedded)
        last.append(_encode(encoder, embedded, memory=[torch.cat([layers[0], dynamic]), *layers[1:]])[-1])
    z = torch.cat(last, dim=1)
    fused = model.proj2(F.dropout(F.relu(model.proj1(z)), DROPOUT, model.training)) + z
    return classifier.head(fused, batch.missing_type_B)


def _complete(model: VlaBackbone, method: Mplmm, features: dict[str, Tensor], row: int, code: int) -> list[Tensor]:
    """The modalities (1, d, T) of one sample: projected, or generated from the present ones."""
    x = {name: features[name][row : row + 1].transpose(1, 2) for name in NAMES}
    there = tuple(name for name in NAMES if not is_missing(NAMES, name, code))
    found = []
    for number, (name, letter) in enumerate(LETTERS.items()):
        if name in there:
            u = F.conv1d(x[name], model.get_parameter(f"proj_{letter}.weight"))
            u = u + method.get_parameter(f"prompt{letter}_nm")
        else:
            given = [method.generative_prompt[number][None]]
            for other in there:
                conv = method.get_submodule(f"{LETTERS[other]}2{letter}.conv")
                given.append(F.gelu(conv(x[other])))
            letters = "".join(LETTERS[other] for other in there)
            over_time = method.get_submodule(f"{letter}_{'al' if letters == 'la' else letters}p.conv")
            u = F.gelu(over_time(torch.cat(given, dim=2).transpose(1, 2))).transpose(1, 2)
            u = u + method.get_parameter(f"prompt{letter}_m")
        found.append(u)
    return found


def _type_prompts(method: Mplmm, code: int) -> Tensor:
    """Missing-type prompts (3, P, w) of one sample."""
    coupled: Tensor = sum(  # type: ignore[assignment]
        method.get_parameter(f"prompt{letter}_{'m' if is_missing(NAMES, name, code) else 'nm'}")
        @ method.get_parameter(f"m_{letter}")
        for name, letter in LETTERS.items()
    )
    return method.missing_type_prompt @ coupled


def _memory(method: VlaMemoryLearner, code: int) -> list[list[Tensor]]:
    """Slots (m, w) of one sample for each modality and layer; private and shared slots (2m, w) for the first layer."""
    slots = [
        method.get_parameter(f"memory_start_{letter}")[int(is_missing(NAMES, name, code))]
        for name, letter in LETTERS.items()
    ]
    layers: list[list[Tensor]] = [[] for _ in NAMES]
    for k in range(method.options.memory_depth):
        joined, before = torch.cat(slots, dim=-1), slots
        slots = []
        for letter, old in zip(LETTERS.values(), before, strict=True):
            normed = method.get_submodule(f"layernorm_{letter}.{k}")(joined)
            new = method.get_submodule(f"compound_memory_projections_{letter}.{k}")(normed)
            alpha = method.residual_alpha
            slots.append(alpha * new + (1 - alpha) * old if k else new)
        for of_modality, private in zip(layers, slots, strict=True):
            of_modality.append(private)
    for letter, of_modality in zip(LETTERS.values(), layers, strict=True):
        common = method.common_memory[MODE_OF_TYPE[code]]
        shared = method.get_submodule(f"common_memory_projection_{letter}")(common)
        of_modality[0] = torch.cat([of_modality[0], shared])
    return layers


def _embed(x_TBD: Tensor, training: bool) -> Tensor:
    T, _, D = x_TBD.shape
    table = F.pad(positions(T, D, x_TBD.device), (0, 0, 1, 0))
    steps_TB = torch.arange(1, T + 1)[:, None] * (x_TBD[:, :, 0] != 0)
    position_TBD = table.index_select(0, steps_TB.flatten()).view(x_TBD.shape)
    return F.dropout(D**0.5 * x_TBD + position_TBD, EMBEDDING_DROPOUT, training)


def _encode(
    encoder: nn.Module, x_TBD: Tensor, source_SBD: Tensor | None = None, memory: list[Tensor] | None = None
) -> Tensor:
    """Output (T, B, D). With `memory`, (m, B, D) per layer (all slots for the first), x is already embedded."""
    assert isinstance(encoder, Encoder)
    training = encoder.training
    x = torch.cat([memory[0], x_TBD]) if memory else _embed(x_TBD, training)
    read = None if source_SBD is None else (_embed(source_SBD, training), _embed(source_SBD, training))
    for k, layer in enumerate(encoder.layers):
        assert isinstance(layer, Layer)
        if memory and 0 < k < len(memory):
            x = torch.cat([memory[k], x[len(memory[k]) :]])
        norm, residual = layer.layer_norms[0], x
        x = norm(x)
        key, value = (x, x) if read is None else (norm(read[0]), norm(read[1]))
        mask = torch.full((len(x), len(key)), -torch.inf).triu(1 + abs(len(key) - len(x)))
        x = residual + F.dropout(_attend(layer.self_attn, x, key, value, mask), DROPOUT, training)
        hidden = F.dropout(F.relu(layer.fc1(layer.layer_norms[1](x))), DROPOUT, training)
        x = x + F.dropout(layer.fc2(hidden), DROPOUT, training)
    return encoder.layer_norm(x)


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    assert isinstance(attention, Attention)
    (T, B, D), H = query.shape, attention.heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    if key is query:
        q, k, v = F.linear(query, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    else:
        given = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, weight, bias) for x, weight, bias in given)
    q = q * (D // H) ** -0.5
    q, k, v = (x.contiguous().view(len(x), B * H, D // H).transpose(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    shares = (scores if mask is None else scores + mask[None]).softmax(dim=-1)
    shares = F.dropout(shares, attention.dropout, attention.training)
    read = torch.bmm(shares, v).transpose(0, 1).contiguous().view(T, B, D)
    shares.view(B, H, T, -1).sum(dim=1).div(H)  # returned by the published code, but not used
    return attention.out_proj(read)
