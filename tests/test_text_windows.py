"""Whole texts: windows of 75 tokens, encoded separately, whose features are pooled; grouped texts of a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip.tokenizer import ClipTokenizer, is_surely_cut, load_tokenizer
from common.errors import ConfigError
from config import DEFAULTS
from demo.backbone import train_tokenizer
from engine.training import model_input
from runs.check_options import check_together, resolve
from tests.data_files import Tokenizer, films, genres, write
from tests.models import model_input as batch_of
from tests.models import tiny_batch, tiny_classifier
from vilt.batches import collate
from vilt.datasets.arrow_dataset import ArrowDataset, Sample
from vilt.datasets.kinds import InputFormat, TextKind, kinds_of
from vilt.datasets.specs import DATASETS

FILMS = DATASETS["mmimdb"]
METHODS = ("rep", "none", "dcp", "map_input", "map_attention", "maple", "coop", "msp", "mora", "lora")
TYPES = (0, 2, 0, 1, 0)
"""Missing types of five samples: complete, image missing, complete, text missing, complete."""
WINDOWS = (2, 3, 1, 0, 2)
"""Number of windows of each sample's text."""


def samples_in_windows() -> tuple[list[Sample], Tensor, Tensor]:
    """Five samples, their images, and the token ids of all windows (n, 77); the third and fifth share an image."""
    images, _ = tiny_batch(len(TYPES))
    _, ids = tiny_batch(sum(WINDOWS), seed=1)
    images = images.double()
    windows_of_samples = iter(ids.split([*WINDOWS]))
    samples = []
    for number, missing_type in enumerate(TYPES):
        windows = next(windows_of_samples)
        inputs = {} if missing_type == 2 else {"image": images[number]}
        inputs |= {} if missing_type == 1 else {"text": windows}
        label = torch.tensor(genres(number), dtype=torch.uint8)
        samples.append(Sample(inputs, label, number))
    samples[4].inputs["image"] = samples[2].inputs["image"]
    return samples, images, ids


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("prompt_type", METHODS)
def test_logits_and_gradients_equal_a_loop_over_windows(prompt_type: str, once: bool) -> None:
    options: dict[str, Any] = {"prompt_type": prompt_type, "memory_depth": 2}
    fast = tiny_classifier("mmimdb", seed=0, text_windows=8, **options).double().eval()
    plain = tiny_classifier("mmimdb", seed=0, **options).double().eval()
    shared = {name: value for name, value in fast.state_dict().items() if not name.startswith(fast.head_name)}
    plain.load_state_dict(shared, strict=False)
    samples, _, _ = samples_in_windows()
    weight = fast.get_parameter(f"{fast.head_name}.weight")
    assert weight.shape[1] == 3 * plain.model.embed_dim
    rows = []
    for sample, missing_type in zip(samples, TYPES, strict=True):
        image, found = sample.inputs.get("image", torch.zeros(3, 32, 32, dtype=torch.float64)), []
        for window in sample.inputs.get("text", torch.zeros(1, 77, dtype=torch.long)):
            features, _ = plain.features(batch_of(image[None], window[None], [missing_type]))
            found.append(features)
        texts = [features["text"][0] for features in found]
        mean = torch.stack(texts).sum(dim=0) / len(texts)
        highest = torch.stack(texts).max(dim=0).values
        rows.append(torch.cat([found[0]["image"][0], mean, highest]))
    slow = torch.stack(rows) @ weight.T + fast.get_parameter(f"{fast.head_name}.bias")
    logits = fast(model_input(collate(kinds_of(FILMS), samples, once=once)))
    assert logits.shape == (len(TYPES), 23) and torch.allclose(logits, slow, rtol=0, atol=1e-10)
    factor = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    slow_parameters = {name: each for name, each in plain.named_parameters() if each.requires_grad and name in shared}
    (slow * factor).sum().backward(inputs=[weight, *slow_parameters.values()])
    expected = [0 if each.grad is None else each.grad.clone() for each in (weight, *slow_parameters.values())]
    weight.grad = None
    fast_parameters = [weight, *(fast.get_parameter(name) for name in slow_parameters)]
    (logits * factor).sum().backward(inputs=fast_parameters)
    for name, each, slow_grad in zip(["head", *slow_parameters], fast_parameters, expected, strict=True):
        grad = torch.zeros(()) if each.grad is None else each.grad
        assert float((grad - slow_grad).norm()) <= 1e-9 * (1 + float(grad.norm())), name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a few words of a plot"]).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("tokens", [0, 1, 74, 75, 76, 150, 151, 599, 600, 601, 2000])
def test_windows_hold_all_tokens_up_to_their_limit(tokenizer: ClipTokenizer, tokens: int) -> None:
    """Each has a start and an end token; no token is repeated or skipped; the first window is the published input."""
    digits = "".join(str(number % 10) for number in range(tokens))  # one token each
    [text], [alone] = tokenizer([digits], 8), tokenizer([digits])
    assert np.array_equal(text[0], alone)
    inner = []
    for window in text:
        end = int(window.argmax())
        assert window[0] == tokenizer.start_id and window[end] == tokenizer.end_id and not window[end + 1 :].any()
        inner += window[1:end].tolist()
    ids = {digit: int(tokenizer([str(digit)])[0, 1]) for digit in range(10)}
    assert inner == [ids[number % 10] for number in range(min(tokens, 600))]
    assert len(text) == min(8, max(1, -(-tokens // 75)))


def test_shorter_texts_are_padded_with_empty_windows(tokenizer: ClipTokenizer) -> None:
    ids = tokenizer(["1" * 200, "", "2" * 80], 8)
    assert ids.shape == (3, 3, 77) and (ids[..., 0] > 0).sum(axis=1).tolist() == [3, 1, 2]
    assert tokenizer([], 8).shape == (0, 1, 77)


def test_texts_counted_as_cut_are_cut(tokenizer: ClipTokenizer) -> None:
    """Without a vocabulary the count is never too high, and exact if each piece is one token."""
    for count in (74, 75, 76, 90):
        for unit in ("7 ", "word ", "it's, ", "&amp;&amp; ", "naïve–", "\u2167 ²"):
            text = unit * count
            assert not is_surely_cut(text) or tokenizer([text], 2).shape[1] == 2
        assert is_surely_cut("7 " * count) == (count > 75)


PLOTS = [["1" * 100, "2"], [], ["3" * 800], ["4", "5" * 160, "6" * 600]]
"""Plots of four films, with 2 and 1 windows; none; 8 of 11; 1, 3 and 8."""


@pytest.mark.parametrize("group", [False, True])
def test_a_sample_has_windows_of_one_text_or_all(tmp_path: Path, tokenizer: ClipTokenizer, group: bool) -> None:
    write(tmp_path / "mmimdb_test.arrow", films(PLOTS))
    data = ArrowDataset(FILMS, tmp_path, "test", 8, group_texts=group)
    data.tokenize(tokenizer, "f", 8)
    expected = [[100], [1], [], [600], [1], [160], [600]] if not group else [[100, 1], [], [600], [1, 160, 300]]
    assert len(data) == len(expected)
    texts = ["\n".join(plots) or None for plots in PLOTS] if group else [*PLOTS[0], None, *PLOTS[2], *PLOTS[3]]
    assert [data.given("text", number) for number in range(len(data))] == texts
    for number, token_counts in enumerate(expected):
        windows = data[0, number].inputs.get("text", torch.zeros(0, 77))
        lengths = [min(75, tokens - start) for tokens in token_counts for start in range(0, tokens, 75)]
        assert [int(window.argmax()) - 1 for window in windows] == lengths and len(windows) <= 8
    again = ArrowDataset(FILMS, tmp_path, "test", 8, group_texts=group)
    again.tokenize(Tokenizer(), "f", 8)
    assert torch.equal(again[0, 0].inputs["text"], data[0, 0].inputs["text"]), "the cached token ids are read"
    cut = ArrowDataset(FILMS, tmp_path, "test", 8)
    cut.tokenize(tokenizer, "f")
    assert cut[0, 0].inputs["text"].shape == (77,), "ids in windows are cached separately"


def test_a_given_text_has_windows(tokenizer: ClipTokenizer) -> None:
    given = InputFormat(8, tokenizer, "f", text_windows=2)
    assert TextKind.read_given("1" * 80, FILMS.modalities["text"], given).shape == (2, 77)
    assert TextKind.read_given("", FILMS.modalities["text"], given).shape == (1, 77)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"prompt_type": "syp"}, "prompt_type=syp"),
        ({"prompt_type": "aoept"}, "prompt_type=aoept"),
        ({"dynamic_init": True}, "prompt_type=rep"),
        ({"prompt_type": "none", "head": "dpl"}, "head: expected linear"),
        ({"prompt_type": "none", "head": "linear_by_type"}, "head: expected linear"),
    ],
)
def test_methods_and_heads_without_windows_refuse_them(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        tiny_classifier("mmimdb", text_windows=8, **options)


def test_grouped_texts_need_several_windows() -> None:
    with pytest.raises(ConfigError, match="group_texts: expected text_windows above 1"):
        check_together(resolve({**DEFAULTS, "task": "mmimdb", "group_texts": True}))
