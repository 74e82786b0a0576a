"""The SW-Transformer for one modality: windows on a grid of intervals × frequencies, in stages, with slots alongside.

Shape suffixes: b samples with the modality, H × W grid of tokens, L = HW, n windows, t tokens of a window, P slots,
C width of a stage, h heads, d width of a head, E width of features.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.modules.interfaces import NO_SLOTS, Place, Tower, TowerSlots
from common.dropout import dropout
from sensors.sizes import SensorSizes
from sensors.spectra import spectrum

DROPOUT = 0.2
STOCHASTIC_DEPTH = 0.1
"""Drop rate of the last block; it grows linearly from 0 in the first."""
MLP_RATIO = 4
BIAS_STD = 0.02
NOT_SEEN = -100.0


class PatchEmbedding(nn.Module):
    """Embeds the patches of a padded spectrum as tokens, row by row."""

    def __init__(self, channels: int, width: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * channels, width, tuple(patch), tuple(patch))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)

    def forward(self, padded: Tensor) -> Tensor:
        """Tokens (b, L, C)."""
        tokens: Tensor = self.norm(self.proj(padded).flatten(2).transpose(1, 2))
        return tokens


class WindowAttention(nn.Module):
    """Attention within windows. Slots, if there are any, belong to every window and see the complete grid.

    Args:
        grid: H, W.
        shifted: whether windows are shifted by half their size, if the grid is larger than a window in both directions.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        rows, columns = (min(size, grid_size) for size, grid_size in zip(window, grid, strict=True))
        shift = (rows // 2, columns // 2) if shifted and rows < grid[0] and columns < grid[1] else (0, 0)
        self.shift = shift if 0 not in shift else (0, 0)
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * rows - 1) * (2 * columns - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=BIAS_STD)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

        row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        index_tt = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1
        places = torch.arange(grid[0] * grid[1]).view(grid).roll([-shift for shift in self.shift], (0, 1))
        order_nt = _windows(places, rows, columns)
        regions = _region(grid[0], rows, self.shift[0])[:, None] * 3 + _region(grid[1], columns, self.shift[1])
        region_nt = _windows(regions, rows, columns)
        apart_ntt = region_nt[:, :, None] != region_nt[:, None]
        # These buffers are derived from the sizes and left out of our checkpoints.
        self.index_tt: Tensor
        self.order_L: Tensor
        self.inverse_L: Tensor
        self.mask_ntt: Tensor
        self.register_buffer("index_tt", index_tt, persistent=False)
        self.register_buffer("order_L", order_nt.flatten(), persistent=False)
        self.register_buffer("inverse_L", order_nt.flatten().argsort(), persistent=False)
        self.register_buffer("mask_ntt", NOT_SEEN * apart_ntt, persistent=False)
        self.windows, self.tokens = order_nt.shape

    def forward(self, x_bLC: Tensor, slots_bPC: Tensor | None, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """The residuals for the tokens and for the slots from `first` on, if there are any."""
        b, L, C = x_bLC.shape
        n, t, h = self.windows, self.tokens, self.heads
        rate = DROPOUT if self.training else 0.0
        tokens = self.qkv(x_bLC.index_select(1, self.order_L)).view(b, n, t, 3, h, C // h)
        q, k, v = tokens.permute(3, 0, 4, 1, 2, 5).contiguous().unbind()  # (b, h, n, t, d)
        bias_hntt = self.relative_position_bias_table[self.index_tt].permute(2, 0, 1)[:, None] + self.mask_ntt
        new_slots = None
        if slots_bPC is None:
            seen = F.scaled_dot_product_attention(
                q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias_hntt.flatten(0, 1)[None], rate
            ).view(q.shape)
        else:
            assert not rate, "slots enter frozen towers, which are in evaluation mode"
            # Two products and a joint softmax: repeating the slots' keys in every window would cost 5 % of a step.
            slots = self.qkv(slots_bPC).view(b, -1, 3, h, C // h).permute(2, 0, 3, 1, 4)
            q_slots, k_slots, v_slots = slots.unbind()  # (b, h, P, d)
            scale, k_grid, v_grid = (C // h) ** -0.5, k.flatten(2, 3), v.flatten(2, 3)
            q, q_slots = q * scale, q_slots[:, :, first:] * scale
            to_slots = (q.flatten(2, 3) @ k_slots.mT).view(b, h, n, t, -1)
            on_slots, on_window = joint_softmax(to_slots, q @ k.mT + bias_hntt)
            seen = (on_slots.flatten(2, 3) @ v_slots).view(q.shape) + on_window @ v
            on_slots, on_grid = joint_softmax(q_slots @ k_slots.mT, q_slots @ k_grid.mT)
            seen_slots = on_slots @ v_slots + on_grid @ v_grid
            new_slots = self._project(seen_slots.transpose(1, 2).flatten(2))
        seen_bLC = self._project(seen.permute(0, 2, 3, 1, 4).reshape(b, L, C))
        return seen_bLC.index_select(1, self.inverse_L), new_slots

    def _project(self, x: Tensor) -> Tensor:
        return dropout(self.proj(x), DROPOUT, self.training)


def joint_softmax(to_slots: Tensor, to_tokens: Tensor) -> Sequence[Tensor]:
    """Attention weights of slots and of tokens, from one softmax over both."""
    weights = torch.cat([to_slots, to_tokens], dim=-1).softmax(dim=-1)
    return weights.split([to_slots.shape[-1], to_tokens.shape[-1]], dim=-1)


def _windows(grid_HW: Tensor, rows: int, columns: int) -> Tensor:
    """Splits a grid into windows (n, t)."""
    H, W = grid_HW.shape
    return grid_HW.view(H // rows, rows, W // columns, columns).transpose(1, 2).reshape(-1, rows * columns)


def _region(size: int, window: int, shift: int) -> Tensor:
    """Region of each position on an axis of the shifted grid: 0, but 1 and 2 in the last window, where the shift joins
    both ends of the axis."""
    place = torch.arange(size)
    return (place >= size - window).long() + (place >= size - shift).long()


class Mlp(nn.Module):
    """Two layers with GELU in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, C) to (…, C)."""
        hidden = dropout(F.gelu(self.fc1(x)), DROPOUT, self.training)
        return dropout(self.fc2(hidden), DROPOUT, self.training)


class Block(nn.Module):
    """A pre-norm block of window attention and MLP."""

    def __init__(
        self, width: int, heads: int, grid: tuple[int, int], window: Sequence[int], shifted: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, grid, window, shifted)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path = drop_path

    def forward(self, x_bLC: Tensor, slots_bPC: Tensor | None = None, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """The tokens, and the slots from `first` on, if there are any."""
        slots = None if slots_bPC is None else self.norm1(slots_bPC)
        new_x, new_slots = self.attn(self.norm1(x_bLC), slots, first)
        if dropped := self.training and self.drop_path > 0:  # stochastic depth
            keep = x_bLC.new_empty(2, len(x_bLC), 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)

        def added(x: Tensor, new: Tensor, half: int) -> Tensor:
            return torch.addcmul(x, keep[half], new) if dropped else x + new

        x_bLC = added(x_bLC, new_x, 0)
        x_bLC = added(x_bLC, self.mlp(self.norm2(x_bLC)), 1)
        if new_slots is None or slots_bPC is None:
            return x_bLC, None
        slots_bPC = added(slots_bPC[:, first:], new_slots, 0)
        return x_bLC, added(slots_bPC, self.mlp(self.norm2(slots_bPC)), 1)


class Merging(nn.Module):
    """Merges patches of 2 × 2 tokens, which halves rows and columns and doubles the width."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.grid = grid

    def forward(self, x_bLC: Tensor) -> Tensor:
        """Maps tokens (b, L, C) to (b, L/4, 2C); the order within a patch is (0, 0), (1, 0), (0, 1), (1, 1)."""
        H, W = self.grid
        patches = x_bLC.unflatten(1, (H // 2, 2, W // 2, 2)).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.reduction(self.norm(patches.flatten(3).flatten(1, 2)))
        return merged

    def of_slots(self, slots: Tensor) -> Tensor:
        """Maps slots (…, C) to (…, 2C), each treated as a patch of four equal tokens."""
        C = slots.shape[-1]
        alike = (self.reduction.weight * self.norm.weight).unflatten(1, (4, C)).sum(dim=1)
        return F.linear(F.layer_norm(slots, (C,), eps=self.norm.eps), alike, self.reduction.weight @ self.norm.bias)


class Stage(nn.Module):
    """The blocks on one grid, and the merging that leads to the next."""

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int],
        window: Sequence[int],
        drop_paths: Sequence[float],
        last: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, grid, window, number % 2 == 1, drop_path) for number, drop_path in enumerate(drop_paths)
        )
        self.downsample = None if last else Merging(width, grid)


class SwtTower(Tower):
    """The encoder of one modality. Its parts are submodules of the backbone, under the names in checkpoints."""

    def __init__(self, sizes: SensorSizes, modality: str) -> None:
        super().__init__()
        own = sizes.of(modality)
        if sizes.width % sizes.heads or sizes.feature_width % sizes.heads:
            found = f"{sizes.width} and {sizes.feature_width}"
            raise ValueError(f"width and feature_width: expected multiples of heads={sizes.heads}, found {found}")
        self.padded = [
            math.ceil(size / multiple) * multiple
            for size, window, patch in zip((sizes.intervals, own.samples), own.window, own.patch, strict=True)
            for multiple in [window * patch * 2 ** (len(sizes.blocks) - 1)]
        ]
        H, W = (size // patch for size, patch in zip(self.padded, own.patch, strict=True))
        depth, first = sum(sizes.blocks), 0
        self.patch_embed = PatchEmbedding(own.channels, sizes.width, own.patch)
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, H * W, sizes.width))
        """Part of published checkpoints, but never used."""
        nn.init.trunc_normal_(self.absolute_pos_embed, std=BIAS_STD)
        self.stages = nn.ModuleList()
        for s, blocks in enumerate(sizes.blocks):
            rates = [STOCHASTIC_DEPTH * block / max(1, depth - 1) for block in range(first, first + blocks)]
            grid, last = (H // 2**s, W // 2**s), s == len(sizes.blocks) - 1
            self.stages.append(Stage(2**s * sizes.width, sizes.heads, grid, own.window, rates, last))
            first += blocks
        last_stage = len(sizes.blocks) - 1
        flat = H * W // 4**last_stage * 2**last_stage * sizes.width
        self.in_layer = nn.Linear(flat, sizes.feature_width)
        widths = tuple(2**s * sizes.width for s, blocks in enumerate(sizes.blocks) for _ in range(blocks))
        self.place = Place(sizes.width, depth, widths, sizes.projection_width)
        self.scale = sizes.input_scale.get(modality, 1.0)
        self.dtype, self.checkpointing = torch.float32, False

    def embed(self, input_b: Tensor) -> Tensor:
        """Tokens (b, L, C) of signals (b, c, I, S)."""
        taken = spectrum(input_b / self.scale)
        padding = [target - size for target, size in zip(self.padded, taken.shape[2:], strict=True)]
        tokens: Tensor = self.patch_embed(F.pad(taken, (0, padding[1], 0, padding[0])))
        return tokens

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots = NO_SLOTS) -> Tensor:
        """Features (b, E) from tokens with slots `[replaced | inserted | dynamic]`; the last block drops the slots.

        Raises:
            ValueError: slots of a kind that this backbone does not support.
        """
        if slots.prefix_BP2D or len(slots.inserted_BmD) > 1:
            raise ValueError("the SW-Transformer takes replaced and dynamic slots, and inserted ones before block 0")
        replaced, replay, depth = list(slots.replaced_BmD), slots.replay, len(slots.replaced_BmD)
        front = [*replaced[:1], *slots.inserted_BmD]
        P = sum(each.shape[1] for each in front)
        given = [*front, *([] if slots.dynamic_BmD is None else [slots.dynamic_BmD])]
        x_bLC, slots_bPC = tokens_bLD, torch.cat(given, dim=1) if given else None
        outputs_BPC: list[Tensor] = []  # at the replaced and inserted slots, for the replay
        k = left_out = 0
        with torch.autocast(tokens_bLD.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            for stage in self.stages:
                assert isinstance(stage, Stage)
                for block in stage.blocks:
                    if slots_bPC is not None:
                        if 0 < k < depth:
                            slots_bPC = torch.cat([replaced[k], slots_bPC[:, replaced[k].shape[1] - left_out :]], dim=1)
                        elif depth <= k < depth + len(replay):
                            replayed_bPC = slots_bPC[:, :P] + replay[k - depth](outputs_BPC)
                            slots_bPC = torch.cat([replayed_bPC, slots_bPC[:, P:]], dim=1)
                        # Slots that the next block replaces are not computed, and in the last block none are.
                        left_out = replaced[k + 1].shape[1] if k + 1 < depth and not replay else 0
                        if k + 1 == self.place.depth:
                            left_out = slots_bPC.shape[1]
                    if self.checkpointing and torch.is_grad_enabled():
                        x_bLC, slots_bPC = checkpoint(block, x_bLC, slots_bPC, left_out, use_reentrant=False)
                    else:
                        x_bLC, slots_bPC = block(x_bLC, slots_bPC, left_out)
                    if slots_bPC is not None and replay and k < depth:
                        outputs_BPC.append(slots_bPC[:, :P])
                    k += 1
                if isinstance(stage.downsample, Merging):
                    x_bLC, merged = stage.downsample(x_bLC), stage.downsample.of_slots
                    slots_bPC = None if slots_bPC is None else merged(slots_bPC)
                    replaced[k:], outputs_BPC = map(merged, replaced[k:]), list(map(merged, outputs_BPC))
            feature: Tensor = self.in_layer(x_bLC.flatten(1))
        return feature.float() if self.dtype is not torch.float32 else feature
