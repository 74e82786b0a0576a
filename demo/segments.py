"""Synthetic segments of text, audio and vision: a corpus to pretrain on and a smaller one with other widths.

Half of each modality's signal is shared with the others, so a missing one can be guessed in part; half is its own.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

STEPS, LEAST_STEPS = 16, 6
WORDS, POLAR, TEXT_WIDTH = 300, 100, 300
PRETRAINING = {"train": 1600, "valid": 300, "test": 300}
TARGET = {"train": 600, "valid": 150, "test": 400}
WIDTHS = {"mosei": (74, 35), "mosi": (5, 20)}


def vocabulary(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Word vectors (words, width), shared by both corpora, and polarities (words,), 0 for neutral words."""
    polarity = np.concatenate([np.zeros(WORDS - POLAR), np.linspace(-1, 1, POLAR)])
    direction = draw.normal(size=TEXT_WIDTH)
    direction /= np.linalg.norm(direction)
    return draw.normal(0, 0.35, (WORDS, TEXT_WIDTH)) + 1.5 * polarity[:, None] * direction, polarity


def corpus(name: str, sizes: dict[str, int], seed: int = 0) -> dict[str, dict[str, Any]]:
    """A corpus in MulT's layout, keyed by split: padding in front, labels in [-3, 3] in steps of a fifth."""
    vectors, polarity = vocabulary(np.random.default_rng(seed))
    draw = np.random.default_rng([seed, *name.encode()])
    audio_width, vision_width = WIDTHS[name]
    mixes = draw.normal(size=(4, audio_width)) / 2, draw.normal(size=(4, vision_width)) / 2
    splits = {}
    for split, rows in sizes.items():
        shared, own = draw.normal(size=rows), draw.normal(size=(3, rows))
        shown = 0.6 * shared + 0.8 * own
        labels = np.clip(np.round(1.9 * (np.array([0.55, 0.35, 0.35]) @ shown) * 5) / 5, -3, 3)
        arrays: dict[str, Any] = {
            "text": np.zeros((rows, STEPS, TEXT_WIDTH), np.float32),
            "audio": np.zeros((rows, STEPS, audio_width)),
            "vision": np.zeros((rows, STEPS, vision_width)),
        }
        for row in range(rows):
            length = int(draw.integers(LEAST_STEPS, STEPS + 1))
            words, is_polar = _words(draw, shown[0, row], length, polarity)
            arrays["text"][row, -length:] = vectors[words]
            arrays["audio"][row, -length:] = _audio(draw, shown[1, row], is_polar) @ mixes[0]
            arrays["vision"][row, -length:] = _vision(draw, shown[2, row], length) @ mixes[1]
        splits[split] = {
            **arrays,
            "labels": labels.astype(np.float32).reshape(-1, 1, 1),
            "id": np.array([[f"{name}_{split}_{row}".encode()] for row in range(rows)]),
        }
    return splits


def _words(
    draw: np.random.Generator, sentiment: float, length: int, polarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    words = draw.integers(WORDS - POLAR, size=length)
    polar = draw.choice(length, max(2, length // 4), replace=False)
    wanted = np.clip(sentiment / 1.6 + 0.35 * draw.normal(size=len(polar)), -1, 1)
    words[polar] = WORDS - POLAR + np.abs(polarity[-POLAR:, None] - wanted).argmin(0)
    return words, np.isin(np.arange(length), polar)


def _audio(draw: np.random.Generator, sentiment: float, is_polar: np.ndarray) -> np.ndarray:
    t, loudness = np.linspace(0, 1, len(is_polar)), np.where(is_polar, 1.0, 0.5)
    trend = sentiment * (t - 0.5) + 0.3 * np.sin(6 * t + draw.uniform(0, 2 * np.pi)) + 0.5 * draw.normal()
    tracks = np.stack([trend, loudness, draw.normal(size=len(t)), 0.7 * sentiment * loudness], 1)
    noisy: np.ndarray = tracks + 0.5 * draw.normal(size=tracks.shape)
    return noisy


def _vision(draw: np.random.Generator, sentiment: float, length: int) -> np.ndarray:
    steps = np.arange(length)
    bump = np.exp(-0.5 * ((steps - draw.integers(length)) / max(2, length / 5)) ** 2)
    face = 0.3 * draw.normal(size=length) + 0.5 * draw.normal()
    tracks = np.stack([1.5 * sentiment * bump, bump, face, np.linspace(0, 1, length)], 1)
    noisy: np.ndarray = tracks + 0.4 * draw.normal(size=tracks.shape)
    return noisy


def write(folder: Path) -> dict[str, Path]:
    """Writes both corpora as pickles; returns their paths, keyed by the dataset they stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, sizes in (("mosei", PRETRAINING), ("mosi", TARGET)):
        paths[name] = folder / f"{name}.pkl"
        paths[name].write_bytes(pickle.dumps(corpus(name, sizes), protocol=4))
    return paths
