"""Attention where every head has a number of keys of its own, laid end to end.

Legend: B batch, T queries, H query heads, N key lists a row (N divides H), M entries of all lists
together, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.attention import attention


def ragged(q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Each query attends to the whole list of its row and head.

    Args:
        q: ``[B,T,H,K]``; k: ``[M,K]``; v: ``[M,V]``.
        ptr: int ``[B*N+1]``; list ``b * N + n`` holds the entries ``ptr[i] .. ptr[i + 1]`` and
            serves row b, query heads ``n * H / N`` and on.

    Returns:
        ``o [B,T,H,V]`` and ``lse [B,T,H]``, ready to be merged with other parts.
    """
    B, T, H, _ = q.shape
    N, bounds = (len(ptr) - 1) // B, ptr.tolist()
    o = v.new_empty(B, T, H, v.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(B, T, H, dtype=wide)
    for i in range(B * N):
        heads = slice(i % N * H // N, (i % N + 1) * H // N)
        own, row = slice(bounds[i], bounds[i + 1]), slice(i // N, i // N + 1)
        o[row, :, heads], lse[row, :, heads] = attention(
            q[row, :, heads], k[None, own, None], v[None, own, None], scale=scale, return_lse=True
        )
    return o, lse
