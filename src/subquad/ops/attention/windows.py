"""Neighborhood attention with a relative bias, by gathered windows: as NAT and DiNAT were trained.

Sources: Hassani et al., arXiv 2204.07143; Hassani and Shi, arXiv 2209.15001.

Legend: B batch, L1..Ln grid of T tokens, H heads, K key dim, V value dim, W keys in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import mask as masks
from subquad.mask.grid import Axis
from subquad.mask.kept import kept
from subquad.ops import checks

COPIED = 1 << 22  # elements of keys copied at once


def biased_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    scale: float | None = None,
) -> Tensor:
    """Attention over neighborhoods whose scores get ``bias`` by the distance on each axis.

    Args:
        q, k: ``[B,L1..Ln,H,K]``; v: ``[B,L1..Ln,H,V]``.
        bias: ``[H,2 w1 - 1,..,2 wn - 1]``, added to the score at ``j - i + w - 1``, counted inside
            the dilation group.
        window: w of each axis, odd.
        scale: multiplies the scores before the bias; K**-0.5 where None.

    Returns:
        ``o [B,L1..Ln,H,V]``. Differentiable in q, k, v and bias.

    Raises:
        ValueError: for an even window, and shapes that do not fit.
    """
    grid, H = tuple(q.shape[1:-2]), q.shape[-2]
    axes = masks.neighborhood(grid, window, 1, dilation).axes
    if any(axis.window % 2 == 0 for axis in axes):
        raise ValueError(f"window must be odd beside a relative bias, got {window}")
    checks.shape("bias", bias, (H, *(2 * axis.window - 1 for axis in axes)))
    for name, t in (("k", k), ("v", v)):
        if t.shape[:-1] != q.shape[:-1]:
            raise ValueError(f"{name} must lie on the grid and heads of q, got {list(t.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    keys, shift = (index.to(q.device) for index in _window_index(axes))
    step = max(1, COPIED // (q.shape[0] * keys.shape[1] * H * (k.shape[3] + v.shape[3])))
    parts = []
    for first in range(0, len(keys), step):
        here = slice(first, first + step)
        given = q[:, here] * scale, k, v, bias.flatten(1), keys[here], shift[here]
        again = torch.is_grad_enabled() and step < len(keys)  # copies are made again, not kept
        parts.append(checkpoint(_attend, *given, use_reentrant=False) if again else _attend(*given))
    return torch.cat(parts, 1).unflatten(1, grid)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keys: Tensor, shift: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthk,btwhk->bthw", q.to(wide), k[:, keys].to(wide))
    weights = (scores + bias[:, shift].transpose(0, 1).to(wide)).softmax(-1)
    return torch.einsum("bthw,btwhv->bthv", weights, v[:, keys].to(wide)).to(v.dtype)


@kept(64)
def _window_index(axes: tuple[Axis, ...]) -> tuple[Tensor, Tensor]:
    """Of every token, row-major: its keys and their places in a flat bias, int64 ``[T,W]``."""
    keys = shift = torch.zeros(1, 1, dtype=torch.int64)
    for axis in axes:
        c = torch.arange(axis.length)
        group, i = c % axis.dilation, c // axis.dilation
        start, _ = axis.keys(i, axis.members(group))
        j = start[:, None] + torch.arange(axis.window)
        place = j * axis.dilation + group[:, None]
        distance = j - i[:, None] + axis.window - 1
        keys = _crossed(keys, axis.length, place)
        shift = _crossed(shift, 2 * axis.window - 1, distance)
    assert keys.shape == (prod(a.length for a in axes), prod(a.window for a in axes))
    return keys, shift


def _crossed(outer: Tensor, size: int, inner: Tensor) -> Tensor:
    """Indices over some axes ``[T,W]`` and those of one more axis, of ``size``, as one index."""
    return (outer[:, None, :, None] * size + inner[None, :, None, :]).flatten(2).flatten(0, 1)
