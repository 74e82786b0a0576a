"""From signals to what the backbones take."""

import torch
from torch import Tensor


def spectrum(signal_BcIS: Tensor) -> Tensor:
    """(B, 2c, I, S): real and imaginary part of each channel in turn, by the FFT over the values of an interval."""
    transformed = torch.view_as_real(torch.fft.fft(signal_BcIS))  # (B, c, I, S, 2)
    return transformed.movedim(-1, 2).flatten(1, 2)
