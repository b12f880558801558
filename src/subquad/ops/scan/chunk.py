"""The scan in chunks: about 2 sqrt(T) vectorised steps, linear in time and memory, exact.

Only gates <= 1 are multiplied, never their inverses, so no decay is too strong. The gradient is the
scan backwards: with G_t = dh_t + conj(a_{t+1}) G_{t+1}, dx_t = G_t and da_t = G_t conj(h_{t-1}).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.operation import operation


def scan(
    x: Tensor, decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    first = x.new_zeros(N, x.shape[2], dtype=wide) if state is None else state.to(wide)
    if x.shape[1] == 0:
        return x, first
    xs, gates = x.to(wide), decay.to(wide).exp()
    if cu_seqlens is None:
        h = _scan(xs, gates, first)
        return h.to(x.dtype), h[:, -1].clone()
    # At the start of a sequence the state before it enters as an input, and the gate is shut.
    steps = torch.arange(x.shape[1], device=x.device)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
    starts = (steps == cu_seqlens[which])[:, None]
    if state is not None:
        xs = xs + torch.where(starts, gates * first[which], 0)
    h = _scan(xs, gates.masked_fill(starts, 0), torch.zeros_like(first[:1]))
    ends = (cu_seqlens[1:] - 1).clamp_min(0)
    last = torch.where((cu_seqlens.diff() > 0)[:, None], h[0, ends], first)
    return h.to(x.dtype), last


@operation("scan")
def _scan(x: Tensor, a: Tensor, first: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` for x, a ``[B,T,D]`` and h_0 = ``first [B,D]``."""
    return _chunked(x, a, first)


@_scan.fake
def _(x: Tensor, a: Tensor, first: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, a, first = inputs
    ctx.save_for_backward(a, output, first)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, h, first = ctx.saved_tensors
    after = F.pad(a[:, 1:], (0, 0, 0, 1)).conj().flip(1).resolve_conj()
    G = _scan(dh.flip(1), after, torch.zeros_like(first)).flip(1)
    before = torch.cat([first[:, None], h[:, :-1]], 1)
    return G, G * before.conj(), G[:, 0] * a[:, 0].conj()


_scan.differentiable(_backward, _save)


def _chunked(x: Tensor, a: Tensor, first: Tensor) -> Tensor:
    """All chunks at once from zero states, then the state through them, chunk after chunk."""
    B, T, D = x.shape
    size = math.isqrt(T - 1) + 1
    rows = size * -(-T // size)
    h, reach = x.new_zeros(B, rows, D), a.new_zeros(B, rows, D)
    h[:, :T], reach[:, :T] = x, a
    h, reach = h.view(B, -1, size, D), reach.view(B, -1, size, D)
    for i in range(1, size):
        h[:, :, i].addcmul_(reach[:, :, i], h[:, :, i - 1])
        reach[:, :, i].mul_(reach[:, :, i - 1])
    for n in range(h.shape[1]):
        h[:, n].addcmul_(reach[:, n], first[:, None])
        first = h[:, n, -1]
    h = h.view(B, rows, D)[:, :T]
    return h if rows == T else h.contiguous()
