"""DeepSense of one modality: convolutions over the bins of each interval, then a GRU over the intervals.

Shape suffixes: b samples with the modality, I intervals, S bins, w width of the convolutions, r width of the GRU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import NO_SLOTS, Place, Tower, TowerSlots
from sensors.sizes import SensorSizes
from sensors.spectra import spectrum

DROPOUT = 0.2
RECURRENT_LAYERS = 2


class BatchNorm(nn.Module):
    """Of images (b, w, I, S); without torch's count of batches, which this momentum does not need."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Convolution(nn.Module):
    """Along the bins, with norm and GELU. Padded to the same size where the stride is 1, the odd zero at the end."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, (1, kernel), (1, stride))
        self.batch_norm = BatchNorm(width)
        self.padding = ((kernel - 1) // 2, kernel // 2) if stride == 1 else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, I, S / stride)."""
        activated = F.gelu(self.batch_norm(self.conv(F.pad(x, self.padding))))
        return F.dropout2d(activated, DROPOUT, self.training)


class Extractor(nn.Module):
    """Convolutions of each interval."""

    def __init__(self, sizes: SensorSizes, modality: str) -> None:
        super().__init__()
        of_modality, half = sizes.of(modality), sizes.width // 2
        left = of_modality.samples
        if of_modality.stride > 1:
            left = (of_modality.samples - of_modality.kernel) // of_modality.stride + 1
        if left < 1:
            raise ValueError(f"{modality}: no value is left of {of_modality.samples} by kernel and stride")
        self.conv_layer_in = Convolution(2 * of_modality.channels, half, of_modality.kernel, of_modality.stride)
        self.conv_layers_inter = nn.ModuleList(
            Convolution(half, half, of_modality.inner_kernel) for _ in range(sizes.inner_layers)
        )
        self.conv_layer_out = nn.Conv1d(half * left, sizes.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, w, I) of spectra (b, 2c, I, S)."""
        x = self.conv_layer_in(x)
        for layer in self.conv_layers_inter:
            x = x + layer(x)
        out: Tensor = self.conv_layer_out(x.transpose(2, 3).flatten(1, 2))
        return out


class Recurrence(nn.Module):
    """A bidirectional GRU over the intervals."""

    def __init__(self, sizes: SensorSizes) -> None:
        super().__init__()
        self.gru = nn.GRU(
            sizes.width, sizes.recurrent_width, RECURRENT_LAYERS, dropout=DROPOUT, bidirectional=True, batch_first=True
        )

    def forward(self, x_bwI: Tensor) -> Tensor:
        """(b, 2r): mean of its outputs."""
        outputs: Tensor = self.gru(x_bwI.transpose(1, 2))[0]
        return outputs.mean(dim=1)


class DeepSenseTower(Tower):
    """The encoder of one modality, which no slots can enter. Its parts are the backbone's."""

    def __init__(self, sizes: SensorSizes, modality: str) -> None:
        super().__init__()
        self.extractor = Extractor(sizes, modality)
        self.recurrence = Recurrence(sizes)
        self.place = Place(sizes.width, 0, projection=sizes.projection_width)
        self.scale = sizes.input_scale.get(modality, 1.0)
        self.dtype, self.checkpointing = torch.float32, False

    def embed(self, input_b: Tensor) -> Tensor:
        """(b, I, w): what the convolutions make of signals (b, c, I, S)."""
        extracted: Tensor = self.extractor(spectrum(input_b / self.scale))
        return extracted.transpose(1, 2)

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, 2r)."""
        feature: Tensor = self.recurrence(tokens_bLD.transpose(1, 2))
        return feature
