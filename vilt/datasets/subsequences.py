"""Groups consecutive samples of a recording, for training that compares them."""

import numpy as np
import pyarrow as pa

RECORDING, NUMBER = "recording", "number"
"""Columns of arrow files: the recording that a sample is cut from, and its number within the recording."""


def subsequences(table: pa.Table, length: int) -> np.ndarray:
    """Rows of each subsequence, int64 (A, length).

    A subsequence has consecutive numbers from one recording. A gap ends it; it is then filled up by repeating its last
    row.
    """
    names = table[RECORDING].to_pylist()
    numbers = table[NUMBER].to_numpy()
    order = sorted(range(len(names)), key=lambda row: (names[row], numbers[row]))
    found: list[list[int]] = []
    for row in order:
        last = found[-1] if found else []
        follows = last and names[last[-1]] == names[row] and numbers[last[-1]] + 1 == numbers[row]
        if follows and len(last) < length:
            last.append(row)
        else:
            found.append([row])
    return np.array([[*rows, *rows[-1:] * (length - len(rows))] for rows in found], dtype=np.int64).reshape(-1, length)
