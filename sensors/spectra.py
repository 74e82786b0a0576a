"""From signals to what the backbones take, and resampling (as MOD's recordings are)."""

import math

import numpy as np
import torch
from torch import Tensor

ZERO_CROSSINGS, ROLL_OFF = 6, 0.99
HALF_RATE_TAPS = 28


def spectrum(signal_BcIS: Tensor) -> Tensor:
    """(B, 2c, I, S): real and imaginary part of each channel in turn, by the FFT over the values of an interval."""
    transformed = torch.view_as_real(torch.fft.fft(signal_BcIS))  # (B, c, I, S, 2)
    return transformed.movedim(-1, 2).flatten(1, 2)


def half_rate_kernel() -> np.ndarray:
    """(28,) float64: windowed sinc that halves a rate, with a Hann window."""
    t = np.clip(ROLL_OFF * (np.arange(HALF_RATE_TAPS) - 13) / 2, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = np.cos(math.pi * t / (2 * ZERO_CROSSINGS)) ** 2
    kernel: np.ndarray = ROLL_OFF / 2 * np.sinc(t) * window
    return kernel


def at_half_rate(signal_N: np.ndarray) -> np.ndarray:
    """(ceil(N / 2),) float64 of a recording (N,): at half its rate, with zeros outside."""
    padded = np.concatenate([np.zeros(13), np.asarray(signal_N, dtype=np.float64), np.zeros(HALF_RATE_TAPS)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, HALF_RATE_TAPS)[: len(signal_N) : 2]
    resampled: np.ndarray = windows @ half_rate_kernel()
    return resampled
