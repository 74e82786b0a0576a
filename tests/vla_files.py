"""Made-up segments of text, audio and vision in the layouts of the published pickles."""

from typing import Any

import numpy as np

SIZES = {"train": 6, "valid": 4, "test": 3}
SHAPES = {"text": (5, 7), "audio": (6, 3), "vision": (4, 4)}


def vla_splits(
    sizes: dict[str, int] = SIZES, shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Float32 features (N, T, D) of each split keyed by modality, left-padded; lengths, labels, ids and texts."""
    draw = np.random.default_rng(seed)
    splits = {}
    for split, rows in sizes.items():
        arrays: dict[str, Any] = {"lengths": {}}
        labels = draw.integers(-15, 16, size=rows) / 5
        for name, (steps, width) in shapes.items():
            x = draw.normal(size=(rows, steps, width)).astype(np.float32) + labels[:, None, None].astype(np.float32)
            lengths = draw.integers(3, steps + 1, size=rows)
            for row, length in enumerate(lengths):
                x[row, : steps - length] = 0
            arrays |= {name: x}
            arrays["lengths"][name] = lengths
        arrays["labels"] = labels.astype(np.float32)
        arrays["ids"] = [f"{split}_{row}" for row in range(rows)]
        arrays["texts"] = [f"words of {row}" for row in range(rows)]
        splits[split] = arrays
    return splits


def mult_pickle(splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The splits in MulT's layout."""
    return {
        split: {
            "text": arrays["text"],
            "audio": arrays["audio"].astype(np.float64),
            "vision": arrays["vision"].astype(np.float64),
            "labels": arrays["labels"].reshape(-1, 1, 1),
            "id": np.array([[name.encode()] for name in arrays["ids"]]),
        }
        for split, arrays in splits.items()
    }


def mmsa_pickle(splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The splits in MMSA's layout, right-padded; the padding of audio and vision is 9 and must be ignored."""
    return {
        split: {
            "id": np.array(arrays["ids"]),
            "raw_text": np.array(arrays["texts"]),
            "text": _behind(arrays["text"], arrays["lengths"]["text"], 0),
            "audio": _behind(arrays["audio"], arrays["lengths"]["audio"], 9),
            "vision": _behind(arrays["vision"], arrays["lengths"]["vision"], 9),
            "audio_lengths": arrays["lengths"]["audio"].tolist(),
            "vision_lengths": arrays["lengths"]["vision"].tolist(),
            "regression_labels": arrays["labels"].copy(),
        }
        for split, arrays in splits.items()
    }


def _behind(x: np.ndarray, lengths: np.ndarray, value: float) -> np.ndarray:
    moved = np.full_like(x, value)
    for row, length in enumerate(lengths):
        moved[row, :length] = x[row, x.shape[1] - length :]
    return moved
