"""DeepSense for one modality: convolutions over the bins of each interval, then a GRU over the intervals.

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
    """Batch norm for (b, w, I, S), without torch's count of batches, which a fixed momentum does not need."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Convolution(nn.Module):
    """Convolution along the bins, norm and GELU. With stride 1, padding keeps the size; an odd zero goes to the end."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, (1, kernel), (1, stride))
        self.batch_norm = BatchNorm(width)
        self.padding = ((kernel - 1) // 2, kernel // 2) if stride == 1 else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, width_in, I, S) to (b, width, I, S / stride)."""
        activated = F.gelu(self.batch_norm(self.conv(F.pad(x, self.padding))))
        return F.dropout2d(activated, DROPOUT, self.training)


class Extractor(nn.Module):
    """Convolutions over each interval."""

    def __init__(self, sizes: SensorSizes, modality: str) -> None:
        super().__init__()
        own, half = sizes.of(modality), sizes.width // 2
        left = own.samples
        if own.stride > 1:
            left = (own.samples - own.kernel) // own.stride + 1
        if left < 1:
            raise ValueError(f"{modality}: kernel and stride leave none of {own.samples} values")
        self.conv_layer_in = Convolution(2 * own.channels, half, own.kernel, own.stride)
        self.conv_layers_inter = nn.ModuleList(
            Convolution(half, half, own.inner_kernel) for _ in range(sizes.inner_layers)
        )
        self.conv_layer_out = nn.Conv1d(half * left, sizes.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps spectra (b, 2c, I, S) to (b, w, I)."""
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
        """The mean (b, 2r) of the GRU's outputs."""
        outputs: Tensor = self.gru(x_bwI.transpose(1, 2))[0]
        return outputs.mean(dim=1)


class DeepSenseTower(Tower):
    """The encoder of one modality, which slots cannot enter. Its parts are submodules of the backbone."""

    def __init__(self, sizes: SensorSizes, modality: str) -> None:
        super().__init__()
        self.extractor = Extractor(sizes, modality)
        self.recurrence = Recurrence(sizes)
        self.place = Place(sizes.width, 0, projection=sizes.projection_width)
        self.scale = sizes.input_scale.get(modality, 1.0)
        self.dtype, self.checkpointing = torch.float32, False

    def embed(self, input_b: Tensor) -> Tensor:
        """The convolutions' output (b, I, w) for signals (b, c, I, S)."""
        extracted: Tensor = self.extractor(spectrum(input_b / self.scale))
        return extracted.transpose(1, 2)

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, 2r)."""
        feature: Tensor = self.recurrence(tokens_bLD.transpose(1, 2))
        return feature
