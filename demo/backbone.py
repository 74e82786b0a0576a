"""Trains a byte-pair tokenizer and a tiny CLIP on the demo's captioned posters and saves both as a Hugging Face folder.

    python -m demo.backbone --data DIR/pretrain --out DIR/backbone [--steps 400] [--seed 0]

The folder has what transformers' CLIPModel.from_pretrained and CLIPTokenizer.from_pretrained read, with the
conventions of the published CLIP checkpoints (the vocabulary's order, the two highest ids, 77 positions, quick-GELU,
64 values per head). Only posters and captions are used; the pretraining films have no genres.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from clip.tokenizer import CONTEXT_LENGTH, END, PIECES, START, byte_characters
from common.errors import DataError, UserError
from demo.data import whole_folder
from vilt.transforms import decode_image, normalise

_WORD_END = "</w>"

VOCABULARY = 2000
"""Most tokens there may be: 512 bytes, the merges, the two marks. Fewer come out when every word has its own."""

_HELD_OUT = 128
"""Films kept from the training, for the retrieval accuracy at the end."""


@dataclass(frozen=True)
class TinyClip:
    """Sizes and training of the tiny CLIP. Widths are multiples of 64: one head is 64 wide.

    The towers differ in width, as those of the published CLIPs do, so that a mix-up of the two shows.
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
    """A CLIP tokenizer with at most `vocabulary` ids trained on `texts`: the bytes, the bytes at a word's end, the
    merges, and last the start and the end mark."""
    symbols = byte_characters()
    alphabet = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The trainer breaks ties between pairs by id and numbers a symbol as it meets it, in no fixed order. Naming the
    # alphabet as special tokens fixes the ids, and with them the merges.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, special_tokens=alphabet, end_of_word_suffix=_WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(left + right for left, right in merges), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT_LENGTH
    )


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, B x 77: cut to 77 with the end mark last, padded with 0."""
    ids_BL = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    for row, ids in zip(
        ids_BL, tokenizer(list(texts), truncation=True, max_length=CONTEXT_LENGTH)["input_ids"], strict=True
    ):
        row[: len(ids)] = torch.tensor(ids)
    return ids_BL


def read_films(folder: Path, image_size: int) -> tuple[torch.Tensor, list[list[str]]]:
    """Posters (N x 3 x size x size) and captions of the films under `folder`, in the order of their ids.

    DataError where the folder, a label or a poster is missing or unreadable, or too few films are there.
    """
    paths = sorted((folder / "labels").glob("*.json"))
    if len(paths) < 2:
        raise DataError(
            f"{folder}: {len(paths)} files in labels/, at least 2 needed; write them with python -m demo.data"
        )
    images: list[torch.Tensor] = []
    captions: list[list[str]] = []
    for path in paths:
        poster = folder / "images" / f"{path.stem}.jpeg"
        try:
            captions.append(list(json.loads(path.read_text(encoding="utf-8"))["plot"]))
            images.append(normalise(decode_image(poster.read_bytes(), image_size)))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"film {path.stem} of {folder} cannot be read: {type(error).__name__}: {error}") from error
    return torch.stack(images), captions


def build_model(tokenizer: CLIPTokenizer, sizes: TinyClip) -> CLIPModel:
    """An untrained CLIP of these sizes for this tokenizer."""
    end = int(tokenizer.eos_token_id)
    text = {
        "vocab_size": end + 1,
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_width // 64,
        "max_position_embeddings": CONTEXT_LENGTH,
        "hidden_act": "quick_gelu",
        "projection_dim": sizes.embed,
        "bos_token_id": int(tokenizer.bos_token_id),
        "eos_token_id": end,
        "pad_token_id": 0,
    }
    vision = {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.image_width,
        "intermediate_size": 4 * sizes.image_width,
        "num_hidden_layers": sizes.image_layers,
        "num_attention_heads": sizes.image_width // 64,
        "hidden_act": "quick_gelu",
        "projection_dim": sizes.embed,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embed))


def retrieval_accuracy(model: CLIPModel, images: torch.Tensor, ids_BL: torch.Tensor) -> tuple[float, float]:
    """Share of posters whose own caption is the closest of the batch, and of captions whose own poster is."""
    model.eval()
    with torch.no_grad():
        similarity = model(pixel_values=images, input_ids=ids_BL).logits_per_image
    own = torch.arange(len(images))
    to_text, to_image = ((similarity.argmax(dim) == own).float().mean().item() for dim in (1, 0))
    return to_text, to_image


def pretrain(
    model: CLIPModel,
    images: torch.Tensor,
    captions: Sequence[torch.Tensor],
    steps: int,
    sizes: TinyClip,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Trains `model` in place to match posters (N x 3 x size x size) with their captions (per film: k x 77 ids).

    One wording of each film is drawn per step. Symmetric cross-entropy over the batch, AdamW, warm-up and cosine.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98), weight_decay=sizes.weight_decay
    )
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
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
        ids_BL = torch.stack(
            [captions[film][int(w * len(captions[film]))] for film, w in zip(chosen.tolist(), wording, strict=True)]
        )
        # The attention is causal and the text is read at the end mark: columns of padding alone change nothing.
        ids_BL = ids_BL[:, : int((ids_BL > 0).sum(1).max())]
        pixels = images[chosen]
        similarity = model(pixel_values=pixels, input_ids=ids_BL).logits_per_image
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
            say(f"step {step}/{steps}  loss {loss.item():.3f}  {left:.0f} s left")


def make_backbone(
    data: Path, out: Path, steps: int, seed: int, sizes: TinyClip | None = None, say: Callable[[str], None] = print
) -> None:
    """Pretrains on the films under `data` and writes the folder `out`, whole or not at all.

    DataError where `data` cannot be read or `out` is not the demo's to replace.
    """
    sizes = sizes or TinyClip()
    images, captions = read_films(data, sizes.image_size)
    tokenizer = train_tokenizer(text for texts in captions for text in texts)
    ids = [encode(tokenizer, texts) for texts in captions]
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    held = min(_HELD_OUT, len(order) // 2)
    test, train = order[:held], order[held:]
    torch.manual_seed(seed)
    model = build_model(tokenizer, sizes)
    n_values = sum(p.numel() for p in model.parameters())
    say(f"tiny CLIP: {n_values:,} values, {len(tokenizer)} tokens; {len(train)} films, {held} held out")
    pretrain(model, images[train], [ids[film] for film in train], steps, sizes, seed, say)
    to_text, to_image = retrieval_accuracy(model, images[test], torch.stack([ids[film][0] for film in test]))
    say(f"held-out retrieval among {held}: caption of a poster {to_text:.0%}, poster of a caption {to_image:.0%}")
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Transformers 5 writes tokenizer.json alone; other readers of CLIP folders want these two.
        vocabulary = tokenizer.get_vocab()
        (folder / "vocab.json").write_text(
            json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1])), ensure_ascii=False), encoding="utf-8"
        )
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit status: 0, or 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m demo.backbone", description="Pretrain the demo's tiny CLIP.")
    parser.add_argument("--data", type=Path, required=True, help="the pretrain/ folder of demo.data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        if args.steps < 1:
            raise DataError(f"--steps {args.steps}: must be at least 1")
        make_backbone(args.data, args.out, args.steps, args.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
