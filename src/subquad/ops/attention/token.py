"""Attention of one token to keys in a cache: all of them, or spans that it chose.

In a launch that is recorded once and repeated (a CUDA graph), the number of keys must not be the
host's: ``clock`` counts tokens on the device.

Legend: B batch, H query heads, S keys, G key heads, K head dim, N lists of spans, n spans in each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from subquad.ops.attention import attention
from subquad.ops.backend import interpreted


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

    Returns:
        ``o [B,1,H,V]``, 0 where no key is seen.
    """
    if clock is None and starts is None:
        first = 0 if window is None else max(k.shape[1] - window, 0)
        return attention(q, k[:, first:], v[:, first:], scale=scale)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fits = q.dtype != torch.float64 and max(k.shape[3], v.shape[3]) <= 256
    if (q.is_cuda or interpreted()) and fits and not grad:
        from subquad.ops.attention.triton.token import token as run
    else:
        run = _token
    return run(q, k, v, starts, size, scale, window, clock, shift)


def _token(q, k, v, starts, size, scale, window, clock, shift) -> Tensor:
    """By a copy of the keys where there are spans, and a dense kernel."""
    (B, _, H, _), (S, G) = q.shape, k.shape[1:3]
    device = q.device
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
