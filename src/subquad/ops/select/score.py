"""Attention mass by blocks, with the softmax's statistics found on the way, never a T x S tensor.

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim, R rows of queries,
n blocks or windows of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.select.pool import by_kernels as _kernels

CHUNK = 1 << 22  # scores held at once


def block_mass(
    q: Tensor,
    k: Tensor,
    size: int,
    *,
    rows: int | None = None,
    reduce: str = "sum",
    causal: bool = True,
    scale: float | None = None,
    offset: int | None = None,
) -> Tensor:
    """The softmax's probabilities, reduced over blocks of queries and keys.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``.
        size: keys in a block; rows: queries in a row of blocks, ``size`` where None.
        reduce: "sum" (a full row of queries sums to ``rows``) or "max".
        scale: K**-0.5 where None; offset: S - T where None.

    Returns:
        float32 ``[B,H,R,n]`` (float64 for float64). Not differentiable.
    """
    checks.one_of("reduce", reduce, ("sum", "max"))
    checks.positive("size", size)
    rows = size if rows is None else rows
    checks.positive("rows", rows)
    (T, H, K), S = q.shape[1:], k.shape[1]
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B S G K")})
    checks.divides("heads of k", k.shape[2], "heads of q", H)
    scale = K**-0.5 if scale is None else scale
    offset = S - T if offset is None else offset
    run = _mass
    if _kernels(q) and size in (16, 32, 64, 128) and rows in (16, 32, 64, 128):
        from subquad.ops.select.triton import block_mass as run
    with torch.no_grad():
        return run(q, k, size, rows, reduce, causal, scale, offset)


def products(queries: Tensor, means: Tensor, first: int) -> Tensor:
    """The products of rows of queries with the blocks of keys up to each row's own; what stands
    behind that is not defined.

    Args:
        queries: ``[B,R,H,K]``; means: ``[B,n,G,K]``.
        first: the block of row 0.

    Returns:
        float32 ``[B,H,R,n]`` (float64 for float64). Not differentiable.
    """
    with torch.no_grad():
        if _kernels(queries):
            from subquad.ops.select import triton_best

            return triton_best.products(queries, means, first)
        wide = torch.promote_types(queries.dtype, torch.float32)
        grouped = queries.to(wide).unflatten(2, (means.shape[2], -1))
        return torch.einsum("brgsk,bngk->bgsrn", grouped, means.to(wide)).flatten(1, 2)


def peaks(q: Tensor, k: Tensor, blocks: Tensor, size: int) -> Tensor:
    """How well listed blocks of keys fit some queries: the largest product of any of these with any
    key of the block.

    Args:
        q: ``[B,N,R,m,K]``, the queries of R rows and N heads; k: ``[B,S,G,K]``, G divides N.
        blocks: int ``[B,N,R,n]``, of ``size`` keys each (a last one cut short repeats its end).

    Returns:
        ``[B,N,R,n]``. Not differentiable.
    """
    (B, S, G, _), N = k.shape, q.shape[1]
    checks.positive("size", size)
    checks.divides("heads of k", G, "heads of q", N)
    with torch.no_grad():
        tokens = (blocks[..., None] * size + torch.arange(size, device=k.device)).clamp_max(S - 1)
        row = torch.arange(B, device=k.device)[:, None, None, None, None]
        head = (torch.arange(N, device=k.device) * G // N)[:, None, None, None]
        keys = k[row, tokens, head].flatten(3, 4)  # [B,N,R,n*size,K]
        products = torch.einsum("bnrmk,bnrlk->bnrml", q, keys)
        return products.amax(3).unflatten(-1, (-1, size)).amax(-1)


def _mass(q, k, size, rows, reduce, causal, scale, offset) -> Tensor:
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    R, n = -(-T // rows), -(-S // size)
    out = q.new_zeros(B, H, R, n, dtype=dtype)
    step = max(1, CHUNK // max(1, B * H * S * rows)) * rows
    keys = k.to(dtype).permute(0, 2, 3, 1)  # [B,G,K,S]
    for t in range(0, T, step):
        own = q[:, t : t + step].to(dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
        s = scale * (own @ keys[:, :, None])  # [B,G,r,t,S]
        if causal:
            p = torch.arange(t, t + own.shape[3], device=q.device)[:, None] + offset
            s = s.masked_fill(torch.arange(S, device=q.device) > p, -torch.inf)
        w = s.softmax(-1).nan_to_num(0.0).flatten(1, 2)
        short = -w.shape[2] % rows, -S % size
        w = torch.nn.functional.pad(w, (0, short[1], 0, short[0]))
        w = w.unflatten(3, (n, size)).unflatten(2, (-1, rows))
        part = w.sum((3, 5)) if reduce == "sum" else w.amax((3, 5))
        out[:, :, t // rows : t // rows + part.shape[2]] = part
    return out


def window_mass(
    q: Tensor,
    windows: Tensor,
    size: int,
    stride: int,
    *,
    by: tuple[Tensor, int, int] | None = None,
    scale: float | None = None,
    offset: int = 0,
) -> Tensor:
    """How much of each token's attention over pooled windows falls on each, summed over the heads
    that share the windows: ``sum_h exp(scale q_h . w_j - lse_h)``.

    A window is seen by the tokens from its last key on. Tokens without a window get zeros.

    Args:
        q: ``[B,T,H,K]``; windows: ``[B,n,G,K]``, window j of the ``size`` keys from ``stride * j``.
        by: other windows ``(w', size', stride')`` whose log-sum-exp is taken instead of the own
            one (coarser ones cost less); a token that sees none of them gets zeros.
        offset: the key position of the first query.

    Returns:
        float32 ``[B,G,T,n]`` (float64 for float64). Not differentiable.

    Source: InfLLM-V2 (arXiv 2509.24663), eq. 5 to 7.
    """
    checks.shapes({"q": (q, "B T H K"), "windows": (windows, "B n G K")})
    checks.divides("heads of windows", windows.shape[2], "heads of q", q.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    other = (windows, size, stride) if by is None else by
    run = _window_mass
    if _kernels(q) and windows.shape[1] and other[0].shape[1]:
        from subquad.ops.select.triton import window_mass as run
    with torch.no_grad():
        return run(q, windows, size, stride, other, scale, offset)


def _window_mass(q, windows, size, stride, other, scale, offset) -> Tensor:
    (B, T, H, _), (n, G) = q.shape, windows.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(B, G, T, n, dtype=dtype)
    step = max(1, CHUNK // max(1, B * H * max(n, other[0].shape[1])))
    for t in range(0, T, step):
        own = q[:, t : t + step].to(dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
        p = torch.arange(t, t + own.shape[3], device=q.device)[:, None] + offset

        def scores(w, length, apart, own=own, p=p):
            s = scale * (own @ w.to(dtype).permute(0, 2, 3, 1)[:, :, None])
            end = torch.arange(w.shape[1], device=q.device) * apart + length - 1
            return s.masked_fill(end > p, -torch.inf)

        lse = scores(*other).logsumexp(-1, keepdim=True)
        mass = (scores(windows, size, stride) - lse).exp()
        mass = mass.masked_fill(lse == -torch.inf, 0)
        out[:, :, t : t + step] = mass.sum(2)
    return out
