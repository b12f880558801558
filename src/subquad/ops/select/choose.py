"""From scores of blocks to indices of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import uses_kernels

MOST = 1 << 14  # scores of a row that a kernel holds


def top(
    scores: Tensor,
    k: int,
    *,
    size: int,
    rows: int | None = None,
    causal: bool = True,
    sinks: int = 0,
    local: int = 0,
    offset: int = 0,
) -> Tensor:
    """The ``k`` best blocks of every row, forced ones among them; of equals the earlier.

    Args:
        scores: ``[...,R,n]`` of n key blocks for R rows of queries; -inf is never taken.
        k: blocks a row may keep; must hold the forced ones.
        size: keys in a block; rows: queries in a row, ``size`` where None.
        causal: drop blocks that begin after the row's last query.
        sinks: the first blocks, always kept.
        local: the blocks up to the one of the row's last query (the diagonal), always kept:
            1 is the diagonal alone.
        offset: the key position of the first query.

    Returns:
        int32 ``[...,R,min(k,n)]``, rising, -1 at the end where fewer are left.
    """
    checks.positive("k", k)
    if k < min(sinks + local, scores.shape[-1]):
        raise ValueError(f"k must hold the {sinks} sinks and {local} local blocks, got {k}")
    for name, value in (("sinks", sinks), ("local", local), ("offset", offset)):
        checks.positive(name, value, zero=True)
    if _kernels(scores):
        from subquad.ops.select import triton_best

        return triton_best.top(scores, k, size, rows or size, causal, sinks, local, offset)
    rank = _forced(scores, size, rows or size, causal, sinks, local, offset)
    best, index = _best(rank, min(k, rank.shape[-1]))
    return _rising(index, best > -torch.inf, rank.shape[-1])


def cover(
    scores: Tensor,
    mass: float,
    *,
    size: int,
    rows: int | None = None,
    causal: bool = True,
    sinks: int = 0,
    local: int = 0,
    offset: int = 0,
    least: int = 1,
    most: int | None = None,
) -> Tensor:
    """The fewest best blocks whose scores sum to the share ``mass`` of their row's.

    Forced blocks come first and count. See :func:`top` for the other arguments.

    Args:
        scores: ``[...,R,n]``, >= 0.
        mass: 0 to 1.
        least, most: bounds on the blocks a row keeps.

    Returns:
        int32 ``[...,R,m]``, rising, -1 at the end; m is ``most``, or n where None (the widest that
        any row could be, so that nothing waits for the device).
    """
    if not 0 <= mass <= 1:
        raise ValueError(f"mass must lie in 0..1, got {mass}")
    checks.positive("least", least)
    n = scores.shape[-1]
    most = n if most is None else min(most, n)
    checks.positive("most", most)
    rank = _forced(scores, size, rows or size, causal, sinks, local, offset)
    best, index = rank.sort(-1, descending=True)
    own = scores.gather(-1, index).masked_fill(best == -torch.inf, 0)
    share = own.cumsum(-1) / own.sum(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
    # A block is needed while those before it do not reach the mass yet.
    needed = torch.cat([torch.zeros_like(share[..., :1]), share[..., :-1]], -1) < mass
    place = torch.arange(n, device=scores.device)
    keep = (needed | (best == torch.inf) | (place < least)) & (place < most)
    return _rising(index, keep & (best > -torch.inf), n)[..., :most]


def _forced(
    scores: Tensor, size: int, rows: int, causal: bool, sinks: int, local: int, offset: int
) -> Tensor:
    """The scores with +inf where forced and -inf where after the queries."""
    for name, value in (("sinks", sinks), ("local", local), ("offset", offset)):
        checks.positive(name, value, zero=True)
    R, n = scores.shape[-2:]
    block = torch.arange(n, device=scores.device)
    last = torch.arange(1, R + 1, device=scores.device)[:, None] * rows - 1 + offset
    diagonal = last // size
    after = block > diagonal
    forced = (block < sinks) | (~after & (block > diagonal - local))
    rank = scores.masked_fill(forced, torch.inf)
    return rank.masked_fill(after, -torch.inf) if causal else rank


def _kernels(scores: Tensor) -> bool:
    fits = scores.dtype != torch.float64 and scores.numel() > 0 and scores.shape[-1] <= MOST
    return fits and uses_kernels(scores) and not torch.compiler.is_compiling()


def _best(rank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` by one rule for ties, so that a token chooses alike in a prompt and in decoding:
    neighboring blocks often tie, by a window that reaches into both."""
    n = rank.shape[-1]
    if rank.dtype != torch.float32:
        best, index = rank.sort(dim=-1, descending=True, stable=True)
        return best[..., :k], index[..., :k]
    bits = rank.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    key = (ordered.long() << 32) | torch.arange(n - 1, -1, -1, device=rank.device)
    index = n - 1 - (key.topk(k, -1)[0] & 0xFFFFFFFF)
    return rank.gather(-1, index), index


def _rising(index: Tensor, keep: Tensor, n: int) -> Tensor:
    index = index.masked_fill(~keep, n).sort(-1)[0]
    return index.masked_fill(index == n, -1).int()
