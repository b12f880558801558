"""Attention of one token to keys in a cache: all of them, or spans that it chose.

In a launch that is recorded once and repeated (a CUDA graph), the number of keys must not be the
host's: ``clock`` counts tokens on the device.

Legend: B batch, H query heads, S keys, G key heads, K head dim, N lists of spans, n spans in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from subquad.ops.attention import attention
from subquad.ops.backend import uses_kernels


class Rope(NamedTuple):
    """A model's rotation to the places 0..n-1: ``x cos`` and, from feature i, ``x[i] sin[i]`` to
    feature ``partner[i]``, whose own partner is i.

    Attributes:
        cos, sin: ``[n,K]``; partner: int32 ``[K]``.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        """``x [B,S,G,K]`` at the places, int ``[S]``."""
        cos, sin = (table[place, None] for table in self[:2])
        return x * cos + (x * sin)[..., self.partner]


def token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clock: Tensor | None = None,
    shift: int = 0,
    *,
    scale: float,
    starts: Tensor | None = None,
    size: int = 1,
    window: int | None = None,
    rope: Rope | None = None,
    ring: tuple[int, int] = (0, 1),
) -> Tensor:
    """Exact attention of one token; its own key is the last of those that are there.

    Args:
        q: ``[B,1,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``.
        clock: int64 ``[1]``, on the device: min(S, clock + shift + 1) keys are there; all S where
            None.
        starts: int ``[B,N,n]``, the first keys of each list's spans, -1 for none; H / N heads read
            one list. None reads everything.
        size: keys in a span, of which those that are not there are left out.
        window: so many last keys are seen at most.
        rope: what is given is not rotated yet; of all keys (``starts`` and ``window`` are None).
        ring: with ``rope``, ``(s, w)``: token t lies in slot t if t < s, else in slot
            ``s + (t - s) mod w``; the last is token ``clock + shift`` (``shift`` without a clock).
            It and the keys are rotated to their places among the s first and w last tokens.

    Returns:
        ``o [B,1,H,V]``, 0 where no key is seen.
    """
    whole, (K, V) = clock is None and starts is None and rope is None, (k.shape[3], v.shape[3])
    if whole and (max(K, V) <= 256 or torch.compiler.is_compiling()):
        first = 0 if window is None else max(k.shape[1] - window, 0)
        return attention(q, k[:, first:], v[:, first:], scale=scale)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fits = q.dtype != torch.float64 and max(K, V) <= 256
    fits |= q.dtype.itemsize == 2 and K <= 1024 and V <= 512 and rope is None
    if uses_kernels(q) and fits and not grad:
        from subquad.ops.attention.triton.token import token as run
    else:
        run = _token
    return run(q, k, v, starts, size, scale, window, clock, shift, rope, ring)


def _token(q, k, v, starts, size, scale, window, clock, shift, rope, ring) -> Tensor:
    """By a copy of the keys where there are spans, and a dense kernel."""
    (B, _, H, _), (S, G) = q.shape, k.shape[1:3]
    device = q.device
    if rope is not None:
        (s, w), slot = ring, torch.arange(S, device=device)
        last = slot.new_tensor([shift]) if clock is None else clock + shift
        own = last.clamp_max(s + w - 1)
        place = torch.where(slot < s, slot, own - (last - slot) % w)
        q, k = rope(q, own), rope(k, place.clamp_min(0))
    length = S if clock is None else (clock + shift + 1).clamp_max(S)
    if starts is None:
        at, N = torch.arange(S, device=device), G
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B,N,S,*]
    else:
        spans, N = starts[..., None], starts.shape[1]
        at = torch.where(spans < 0, -1, spans + torch.arange(size, device=device)).flatten(2)
        row = torch.arange(B, device=device)[:, None, None]
        head = (torch.arange(N, device=device) * G // N)[:, None]
        here = at.clamp(0, S - 1)
        k, v = k[row, here, head], v[row, here, head]
    seen = (at >= 0) & (at < length)
    if window is not None:
        seen &= at >= length - window
    seen = seen.expand(B, N, -1)[:, :, None]
    if clock is not None:  # memory that was never written may hold anything
        k, v = (x.masked_fill(~seen.mT, 0) for x in (k, v))
    o = scaled_dot_product_attention(q.view(B, N, H // N, -1), k, v, seen, scale=scale)
    return o.nan_to_num(0.0).reshape(B, 1, H, -1)
