"""Attention of blocks of queries over key blocks of their choice, before and after them.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
M blocks of R queries, N blocks of keys, n of them a list, L = n * size keys of theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import mask as masks
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.backend import uses_kernels

COPIED = 1 << 24  # elements of keys copied at once


def chosen_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    size: int,
    *,
    rows: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax over the keys in the blocks of a query's list; time follows the lists, not S.

    Kernels read the lists where they are; elsewhere the keys are copied together, some blocks of
    queries at a time.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``; the last blocks may be short.
        index: int ``[B,H,M,n]``, the key blocks that each block of queries reads, rising, -1 at
            the end.
        size: keys in a block.
        rows: queries in a block, ``size`` where None; M = ceil(T / rows).
        scale: multiplies the scores; K**-0.5 where None.

    Returns:
        ``o [B,T,H,V]``, 0 where a list is empty. Differentiable in q, k and v.

    Raises:
        ValueError: for shapes and head counts that do not fit.
    """
    sizes = checks.shapes(
        {"q": (q, "B T H K"), "k": (k, "B S G K"), "v": (v, "B S G V"), "index": (index, "B H M n")}
    )
    checks.positive("size", size)
    rows = size if rows is None else rows
    checks.positive("rows", rows)
    checks.divides("heads of k", sizes["G"], "heads of q", sizes["H"])
    M = -(-sizes["T"] // rows)
    if sizes["M"] != M:
        raise ValueError(f"index must list {M} blocks of {rows} queries, got {sizes['M']}")
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if uses_kernels(q) and q.dtype != torch.float64:
        mask = masks.blocks(index, size, rows)
        return attention(q, k, v, mask, scale=scale, offset=0)
    one = sizes["B"] * sizes["H"] * sizes["n"] * size * (sizes["K"] + sizes["V"])
    step = max(1, COPIED // max(1, one))
    parts = []
    for m in range(0, M, step):
        part = q[:, m * rows : (m + step) * rows], k, v, index[:, :, m : m + step]
        again = torch.is_grad_enabled() and step < M  # copies are made again, not kept
        run = checkpoint if again else _now
        parts.append(run(_gathered, *part, size, rows, scale, use_reentrant=False))
    return torch.cat(parts, 1)


def _now(run, *arguments, use_reentrant: bool) -> Tensor:
    return run(*arguments)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int, rows: int, scale: float
) -> Tensor:
    (B, T, H, _), (S, G), (M, n) = q.shape, k.shape[1:3], index.shape[2:]
    place = torch.arange(size, device=q.device)
    at = index[..., None].long() * size + place  # [B,H,M,n,size]
    keep = ((at >= 0) & (at < S)).flatten(3)
    first = torch.arange(B * G, device=q.device).repeat_interleave(H // G) * S
    flat = (first.view(B, H, 1, 1, 1) + at.clamp(0, S - 1)).flatten()
    k, v = (
        t.transpose(1, 2).flatten(0, 2).index_select(0, flat).view(B * H, M, n * size, -1)
        for t in (k, v)
    )
    own = F.pad(q, (0, 0, 0, 0, 0, M * rows - T)).transpose(1, 2).reshape(B * H, M, rows, -1)
    keep = keep.view(B * H, M, 1, -1)
    bias = None
    if S % size or bool((index < 0).any()):
        bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~keep & keep.any(-1, keepdim=True), -torch.inf)
    o = F.scaled_dot_product_attention(own, k, v, bias, scale=scale)
    if bias is not None:
        o = o * keep.any(-1, keepdim=True)
    return o.view(B, H, M * rows, -1)[:, :, :T].transpose(1, 2)
