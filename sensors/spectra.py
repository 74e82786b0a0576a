"""Turns signals into the spectra that the backbones take."""

import torch
from torch import Tensor


def spectrum(signal_BcIS: Tensor) -> Tensor:
    """FFT over the values of each interval (B, 2c, I, S): the real and imaginary part of each channel in turn."""
    transformed = torch.view_as_real(torch.fft.fft(signal_BcIS))  # (B, c, I, S, 2)
    return transformed.movedim(-1, 2).flatten(1, 2)
