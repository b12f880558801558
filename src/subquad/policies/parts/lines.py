"""Columns and diagonals of an attention map: estimated from its last rows, turned into blocks.

Legend: B batch, L last queries, S keys, H query heads, G key heads, K head dim; M tokens in a
block; R rows, each a block of queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.backend import uses_kernels

HELD = 1 << 24  # elements of an estimate held at once
COUNTED = 1 << 21  # sums of which a kernel counts the best
STEPS = 16  # blocks between two looks at whether any row still has one to add


def last_rows(q: Tensor, k: Tensor, scale: float, window: int | None = None) -> Tensor:
    """How much the last queries attend to each key, and to each distance.

    Args:
        q: ``[B,L,H,K]``, the queries of the last L of the keys ``k [B,S,G,K]``.

    Returns:
        float32 ``[2,B,H,S]``: the probabilities summed over the queries by key, and by distance
        (query position - key position). Far distances are seen by fewer queries.
    """
    if by_kernels(q):
        from subquad.ops.select import triton_lines

        return triton_lines.last_rows(q, k, scale, window)
    (B, L, H, _), (S, G) = q.shape, k.shape[1:3]
    query, key = torch.arange(S - L, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    hidden = key > query
    if window is not None:
        hidden = hidden | (key <= query - window)
    sums = q.new_empty(2, B, H, S, dtype=torch.float32)
    step = max(1, HELD * (1 + 15 * q.is_cuda) // (L * S))
    for b in range(B):
        for h in range(0, H, step):
            heads = torch.arange(h, min(h + step, H), device=q.device)
            keys = k[b, :, heads * G // H].transpose(0, 1)
            scores = q[b, :, heads].transpose(0, 1).float() @ keys.float().transpose(1, 2)
            p = (scale * scores).masked_fill_(hidden, -torch.inf).softmax(-1)
            sums[0, b, heads], sums[1, b, heads] = p.sum(1), _diagonals(p)
    return sums


def by_kernels(q: Tensor) -> bool:
    """Whether kernels choose for the queries ``q [B,T,H,K]``: they know no float64."""
    fits = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[3] <= 256
    return fits and q.numel() > 0 and uses_kernels(q)


def _diagonals(p: Tensor) -> Tensor:
    """Sums of ``p [h,L,S]`` by distance, ``[h,S]``."""
    h, L, S = p.shape
    # Row i, written backwards and moved i to the right: equal distances stand in one column.
    moved = F.pad(p.flip(-1), (0, L)).flatten(1)[:, : L * (S + L - 1)].view(h, L, S + L - 1)
    return moved.sum(1)[:, L - 1 :]


def best(sums: Tensor, keys: tuple[int, int], distances: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The best keys and distances by ``sums [2,B,H,S]``, which are overwritten.

    Args:
        keys, distances: how many, and how many first ones before all others, as in :func:`top`.

    Returns:
        int ``[B,H,v]`` and ``[B,H,s]``, rising.
    """
    kernels = uses_kernels(sums) and sums.dtype == torch.float32
    if kernels and sums.shape[-1] < COUNTED:
        from subquad.ops.select import triton_lines

        return triton_lines.best(sums, keys, distances)
    return top(sums[0], *keys), top(sums[1], *distances)


def top(score: Tensor, n: int, forced: int) -> Tensor:
    """The places of the n largest of ``score [B,H,S]``, rising; the first ``forced`` before all,
    and of more than n of these the first n (distance 0 among them: no query is left without).
    Their scores are overwritten."""
    score[..., : min(forced, n)].fill_(torch.inf)
    return score.topk(min(n, score.shape[-1]), -1, sorted=False).indices.sort(-1).values


def blocks(columns: Tensor, distances: Tensor, T: int, S: int, M: int) -> tuple[Tensor, Tensor]:
    """The diagonals of each row of queries as blocks of M keys, and the columns outside these.

    Row m ends before ``end = M (m + 1)``. From far to near, a diagonal at distance d needs the keys
    ``[e - M, e)``, e = end - d (at least M): covered already, or the block grows by M, or a new one
    starts. (csrc/vertical_slash_index.cu of MInference, over all rows at once.)

    Args:
        columns, distances: int ``[B,H,v]`` and ``[B,H,s]``, rising; -1 for none.
        T: queries, the last of S tokens.

    Returns:
        The first keys of the blocks ``[B,H,R,n]``, rising by M or more, and the single columns
        ``[B,H,R,c]``, rising; -1 at the end of shorter rows. R rows from the one of query 0 on.
    """
    if uses_kernels(columns):
        from subquad.ops.select import triton_lines

        return triton_lines.blocks(columns, distances, T, S, M)
    first, last = (S - T) // M, -(-S // M)
    end = M * torch.arange(first + 1, last + 1).expand(*columns.shape[:2], -1)
    nearer = _nearer(distances, M * last)
    d = nearer.gather(-1, end)
    reach = torch.where(d < 0, 0, (end - d).clamp_min(M))
    found = [torch.where(d < 0, -1, reach - M)]
    while len(found) < last:
        d = nearer.gather(-1, (end - reach).clamp_min(0))
        e = end - d
        start = torch.where(e <= reach + M, reach, e - M)
        found.append(torch.where((d < 0) | (start >= S), -1, start))
        reach = torch.where(d < 0, reach, start + M)
        if len(found) % STEPS == 0 and not bool((found[-1] >= 0).any()):
            break
    starts = trimmed(torch.stack(found, -1))
    return starts, _outside(columns, starts, reach, M)


def _nearer(distances: Tensor, most: int) -> Tensor:
    """The largest distance below x, for x in 0..most; -1 where there is none."""
    is_one = torch.full((*distances.shape[:2], most + 1), -1, device=distances.device)
    is_one.scatter_(-1, distances + 1, distances)
    return is_one.cummax(-1).values


def _outside(columns: Tensor, starts: Tensor, reach: Tensor, M: int) -> Tensor:
    """The columns before the end of each row's last block and in none of its blocks."""
    (B, H, R, n), v = starts.shape, columns.shape[-1]
    far = reach.max().clamp_min(1) + M
    ordered = torch.where(starts < 0, far, starts)
    step = max(1, HELD // (4 * B * H * max(v, n)))
    parts = []
    for r in range(0, R, step):
        rows = ordered[:, :, r : r + step].contiguous()
        own = columns[:, :, None].expand(-1, -1, rows.shape[2], -1).contiguous()
        before = torch.searchsorted(rows, own, right=True) - 1
        covered = (before >= 0) & (own - rows.gather(-1, before.clamp_min(0)) < M)
        single = ~covered & (own >= 0) & (own < reach[:, :, r : r + step, None])
        parts.append(trimmed(listed(single, own)))
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(p, (0, width - p.shape[-1]), value=-1) for p in parts], 2)


def listed(keep: Tensor, values: Tensor) -> Tensor:
    """``values`` (int, >= 0) where ``keep``, rising, then -1."""
    most = torch.iinfo(values.dtype).max
    kept = torch.where(keep, values, most).sort(-1).values
    return torch.where(kept == most, -1, kept)


def trimmed(lists: Tensor) -> Tensor:
    """Lists ``[...,n]`` up to the last column that is not -1 in all of them (one is left)."""
    used = (lists >= 0).flatten(0, -2).any(0).nonzero()
    return lists[..., : int(used[-1]) + 1 if len(used) else 1]
