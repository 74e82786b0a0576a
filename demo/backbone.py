"""A byte-pair tokenizer and a tiny CLIP, trained on the demo's captioned posters and saved as a Hugging Face folder.

It follows the published CLIP checkpoints: the order of the vocabulary, the two highest ids, 77 positions, quick-GELU,
heads of width 64. Only posters and captions are used; the pretraining films have no genres.
"""

import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clip.modules.vision_transformer_memory import normalise
from clip.tokenizer import CONTEXT_LENGTH, END, SPLIT, START, byte_characters
from common.errors import DataError
from demo.data import whole_folder
from vilt.datasets.kinds import decode_image

_WORD_END = "</w>"
VOCABULARY = 2000
"""Maximum vocabulary size: 512 bytes, the merges, two marks. It is smaller if every word gets its own token."""
_HELD_OUT = 128
"""Number of films held out from training."""


@dataclass(frozen=True)
class TinyClip:
    """Sizes and training settings of the tiny CLIP. Widths are multiples of 64, the width of a head.

    The towers differ in width, like those of the published CLIPs, so that mixing them up has visible effects.
    """

    image_size: int = 64
    patch_size: int = 16
    image_width: int = 128
    image_layers: int = 4
    text_width: int = 64
    text_layers: int = 4
    embed: int = 128
    batch: int = 96
    learning_rate: float = 1e-3
    weight_decay: float = 0.05


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> CLIPTokenizer:
    """Trains a CLIP tokenizer with at most `vocabulary` ids on `texts`.

    The ids are, in order: bytes, bytes at the end of a word, merges, start mark and end mark.
    """
    symbols = byte_characters()
    alphabet = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([SPLIT, by_byte])
    # The trainer breaks ties between pairs by id and assigns ids to symbols in no fixed order. Declaring the alphabet
    # as special tokens fixes the ids, and with them the merges.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, special_tokens=alphabet, end_of_word_suffix=_WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(left + right for left, right in merges), START, END]
    ids = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT_LENGTH)


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids (B, 77), cut to 77 with the end mark last, padded with 0."""
    ids_BL = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    encoded = tokenizer(list(texts), truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]
    for row, ids in zip(ids_BL, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return ids_BL


def read_films(folder: Path, image_size: int) -> tuple[torch.Tensor, list[list[str]]]:
    """Posters (N, 3, size, size) and captions of the films in `folder`, sorted by id.

    Raises DataError if there are no films or one cannot be read.
    """
    paths = sorted((folder / "labels").glob("*.json"))
    if not paths:
        raise DataError(f"{folder}: expected films in labels/, found none")
    images: list[torch.Tensor] = []
    captions: list[list[str]] = []
    for path in paths:
        poster = folder / "images" / f"{path.stem}.jpeg"
        try:
            captions.append(list(json.loads(path.read_text(encoding="utf-8"))["plot"]))
            images.append(normalise(decode_image(poster.read_bytes(), image_size)))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read film {path.stem} of {folder}: {type(error).__name__}: {error}") from error
    return torch.stack(images), captions


def build_model(tokenizer: CLIPTokenizer, sizes: TinyClip) -> CLIPModel:
    """Builds an untrained CLIP of these sizes for this tokenizer."""
    end = int(tokenizer.eos_token_id)

    def tower(width: int, layers: int, **more: int) -> dict[str, Any]:
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        return {**shape, "num_hidden_layers": layers, "hidden_act": "quick_gelu", "projection_dim": sizes.embed, **more}

    marks = {"bos_token_id": int(tokenizer.bos_token_id), "eos_token_id": end, "pad_token_id": 0}
    positions = {"vocab_size": end + 1, "max_position_embeddings": CONTEXT_LENGTH}
    text = tower(sizes.text_width, sizes.text_layers, **marks, **positions)
    grid = {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
    vision = tower(sizes.image_width, sizes.image_layers, **grid)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embed))


def pretrain(
    model: CLIPModel, images: torch.Tensor, captions: Sequence[torch.Tensor], steps: int, sizes: TinyClip, seed: int
) -> Iterator[str]:
    """Trains `model` in place to match posters (N, 3, size, size) with their captions (per film: ids (k, 77)).

    Each step draws one caption per film. Symmetric cross-entropy over the batch, AdamW, warm-up and cosine decay.

    Yields:
        Progress lines.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.learning_rate, (0.9, 0.98), weight_decay=sizes.weight_decay)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    batch = min(sizes.batch, len(images))
    model.train()
    began = time.monotonic()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=draw)
        chosen, order = order[:batch], order[batch:]
        wording = torch.rand(batch, generator=draw)
        pairs = zip(chosen.tolist(), wording, strict=True)
        ids_BL = torch.stack([captions[film][int(w * len(captions[film]))] for film, w in pairs])
        # Attention is causal and the text is read at the end mark, so all-padding columns can be dropped.
        ids_BL = ids_BL[:, : int((ids_BL > 0).sum(1).max())]
        similarity = model(pixel_values=images[chosen], input_ids=ids_BL).logits_per_image
        own = torch.arange(batch)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % max(1, steps // 10) == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            yield f"step {step}/{steps}  loss {loss.item():.3f}  {left:.0f} s left"


def make_backbone(data: Path, out: Path, steps: int, seed: int, sizes: TinyClip | None = None) -> None:
    """Pretrains on the films in `data` and writes the folder `out`, completely or not at all.

    Raises DataError if `data` cannot be read, or if `out` exists and was not written by the demo.
    """
    sizes = sizes or TinyClip()
    images, captions = read_films(data, sizes.image_size)
    tokenizer = train_tokenizer(text for texts in captions for text in texts)
    ids = [encode(tokenizer, texts) for texts in captions]
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    train = order[min(_HELD_OUT, len(order) // 2) :]
    torch.manual_seed(seed)
    model = build_model(tokenizer, sizes)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"tiny CLIP: {parameters:,} parameters, {len(tokenizer)} tokens; {len(train)} films")
    for line in pretrain(model, images[train], [ids[film] for film in train], steps, sizes, seed):
        print(line, flush=True)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
