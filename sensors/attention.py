"""Attention of a grid's tokens and of slots to each other: a slot is in every window, and sees the complete grid.

Shape suffixes: b samples, n windows of t tokens, L = nt, P slots, S those of them that ask, h heads, N = bh, d width of
a head, C = hd.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class SlotAttention(torch.autograd.Function):
    """With its gradients written out: autograd's own way transposes, copies and adds up more."""

    @staticmethod
    def forward(
        context: Any, tokens_bLX: Tensor, asking_bSC: Tensor, slots_bPX: Tensor, bias_hntt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(b, L, C): what tokens see of slots and of their window; (b, S, C): what slots see of slots and tokens.

        Args:
            tokens_bLX: queries, keys and values of the tokens, window by window, side by side.
            asking_bSC: queries of slots.
            slots_bPX: keys and values of slots.
            bias_hntt: is added to the products of the tokens of a window.
        """
        h, n, t, _ = bias_hntt.shape
        with torch.autocast(tokens_bLX.device.type, enabled=False):
            q, k, v = _by_head(tokens_bLX, h, 3)
            [q_slots], [k_slots, v_slots] = _by_head(asking_bSC, h, 1), _by_head(slots_bPX, h, 2)
            scale, P = q.shape[-1] ** -0.5, k_slots.shape[1]
            q, q_slots = q * scale, q_slots * scale
            in_window = products(_windows(q, t), _windows(k, t)).view(-1, h, n, t, t) + bias_hntt
            weights = _softmax(products(q, k_slots), in_window.view(len(q), -1, t)).to(v.dtype)
            weights_slots = _softmax(products(q_slots, k_slots), products(q_slots, k)).to(v.dtype)
            to_slots, to_window = _split(weights, P)
            seen = torch.baddbmm(_windows(to_slots @ v_slots, t), _windows(to_window, t), _windows(v, t)).view(q.shape)
            to_slots, to_grid = _split(weights_slots, P)
            seen_slots = to_slots @ v_slots + to_grid @ v
        tensors = q, k, v, q_slots, k_slots, v_slots, weights, weights_slots, seen, seen_slots
        context.save_for_backward(*tensors)
        context.sizes = h, n, t
        return _side_by_side([seen], h), _side_by_side([seen_slots], h)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of a softmax's weights w with the outputs o = wv: w(g·v - g·o) is the gradient before it."""
        q, k, v, q_slots, k_slots, v_slots, weights, weights_slots, seen, seen_slots = context.saved_tensors
        (h, n, t), P, scale = context.sizes, k_slots.shape[1], q.shape[-1] ** -0.5
        [g], [g_slots] = (_by_head(gradient, h, 1) for gradient in gradients)
        total, total_slots = ((x * y).sum(dim=-1, keepdim=True) for x, y in ((g, seen), (g_slots, seen_slots)))
        weights_to_slots, weights_to_window = _split(weights, P)
        of_slots_to_slots, of_slots_to_grid = _split(weights_slots, P)

        to_slots = products(g, v_slots).sub_(total).mul_(weights_to_slots)
        slots_to_slots = products(g_slots, v_slots).sub_(total_slots).mul_(of_slots_to_slots)
        slots_to_grid = products(g_slots, v).sub_(total_slots).mul_(of_slots_to_grid)
        asking = _side_by_side([(slots_to_slots @ k_slots + slots_to_grid @ k) * scale], h)
        keys = to_slots.mT @ q + slots_to_slots.mT @ q_slots
        values = weights_to_slots.mT @ g + of_slots_to_slots.mT @ g_slots
        slots = _side_by_side([keys, values], h)

        tokens = bias = None
        if context.needs_input_grad[0] or context.needs_input_grad[3]:
            g_window, from_window = _windows(g, t), _windows(weights_to_window, t).mT
            in_window = products(g_window, _windows(v, t)).sub_(_windows(total, t)).mul_(from_window.mT)
            of_q = torch.baddbmm(_windows(to_slots @ k_slots, t), in_window, _windows(k, t)) * scale
            of_k = torch.baddbmm(_windows(slots_to_grid.mT @ q_slots, t), in_window.mT, _windows(q, t))
            of_v = torch.baddbmm(_windows(of_slots_to_grid.mT @ g_slots, t), from_window, g_window)
            tokens = _side_by_side([x.view(q.shape) for x in (of_q, of_k, of_v)], h)
            bias = in_window.view(-1, h, n, t, t).sum(dim=0) if context.needs_input_grad[3] else None
        return tokens, asking, slots, bias


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """(N, q, k) of (N, q, d) and (N, k, d)."""
    return torch.bmm(queries, keys.mT)


def _softmax(to_slots: Tensor, to_tokens: Tensor) -> Tensor:
    """One of both."""
    together = torch.cat([to_slots, to_tokens], dim=-1)
    return together.softmax(dim=-1, dtype=torch.promote_types(together.dtype, torch.float32))


def _split(weights: Tensor, slots: int) -> Sequence[Tensor]:
    """Those of slots, and of tokens."""
    return weights.split([slots, weights.shape[-1] - slots], dim=-1)


def _windows(x_NLd: Tensor, t: int) -> Tensor:
    """(Nn, t, d)."""
    return x_NLd.reshape(-1, t, x_NLd.shape[-1])


def _by_head(x_bLX: Tensor, h: int, parts: int) -> Iterable[Tensor]:
    """(N, L, d) each, of parts side by side."""
    return x_bLX.unflatten(2, (parts, h, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()


def _side_by_side(parts_NLd: Sequence[Tensor], h: int) -> Tensor:
    """(b, L, parts · C), the way back of `_by_head`."""
    return torch.stack([x.unflatten(0, (-1, h)).transpose(1, 2) for x in parts_NLd], dim=2).flatten(2)
