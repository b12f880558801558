"""Attention of every query over key blocks of its own choice.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
n blocks a query, L = n * size keys of theirs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import mask as masks
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.backend import uses_kernels

COPIED = 1 << 22  # elements of keys copied at once


def chosen(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int, *, scale: float | None = None
) -> Tensor:
    """Softmax over the keys up to the query itself in the blocks of its list.

    The queries are the last T of the S tokens. Kernels read the lists where they are; elsewhere the
    keys are copied together, some queries at a time, so that time follows L and not S.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``.
        index: int ``[B,G,T,n]``, blocks of ``size`` keys, rising, -1 at the end; the heads of a
            group share their lists.
        scale: multiplies the scores; K**-0.5 where None.

    Returns:
        ``o [B,T,H,V]``, 0 where a list holds no key. Differentiable in q, k and v.
    """
    sizes = checks.shapes(
        {"q": (q, "B T H K"), "k": (k, "B S G K"), "v": (v, "B S G V"), "index": (index, "B G T n")}
    )
    checks.positive("size", size)
    checks.divides("heads of k", sizes["G"], "heads of q", sizes["H"])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    T, S = q.shape[1], k.shape[1]
    if uses_kernels(q) and q.dtype != torch.float64:
        rows = S if T == 1 else 1  # one list serves wherever its token stands
        lists = index if T == 1 else F.pad(index, (0, 0, S - T, 0), value=-1)
        return attention(q, k, v, masks.causal() & masks.blocks(lists, size, rows), scale=scale)
    run = partial(_gathered, size=size, scale=scale)
    step = max(1, COPIED // max(1, index[:, :, 0].numel() * size * (k.shape[3] + v.shape[3])))
    parts = []
    for t in range(0, T, step):
        part = q[:, t : t + step], k, v, index[:, :, t : t + step], S - T + t
        again = torch.is_grad_enabled() and step < T  # copies are made again, not kept
        parts.append(checkpoint(run, *part, use_reentrant=False) if again else run(*part))
    return torch.cat(parts, 1)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, offset: int, size: int, scale: float
) -> Tensor:
    (B, T, _, _), (S, G) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    at = (index[..., None].long() * size + torch.arange(size, device=q.device)).flatten(3)
    keep = (at >= 0) & (at <= torch.arange(T, device=q.device)[:, None] + offset)  # [B,G,T,L]
    row = torch.arange(B * G, device=q.device).view(B, G, 1, 1) * S
    flat = (row + at.clamp(0, S - 1)).flatten()
    k, v = (
        t.transpose(1, 2).flatten(0, 2).index_select(0, flat).view(*at.shape, -1).to(wide)
        for t in (k, v)
    )
    own = q.unflatten(2, (G, -1)).permute(0, 2, 1, 3, 4).to(wide)  # [B,G,T,r,K]
    scores = (scale * own @ k.transpose(-1, -2)).masked_fill(~keep[..., None, :], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~keep.any(-1)[..., None, None], 0)
    return (weights @ v).permute(0, 2, 1, 3, 4).flatten(2, 3).to(q.dtype)
