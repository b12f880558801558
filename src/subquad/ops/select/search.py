"""Finding good blocks without scoring all of them: segments are halved, the better halves stay.

Source: HiP attention (arXiv 2406.09827), the search with one key block standing for a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import uses_kernels
from subquad.ops.select.choose import _best
from subquad.ops.select.score import peaks

COPIED = 1 << 24  # elements of keys copied at once


def halving(
    q: Tensor,
    k: Tensor,
    keep: int,
    *,
    rows: int,
    size: int = 1,
    window: int = 0,
    sample: tuple[int, int] = (1, 2),
    center: bool = False,
    offset: int | None = None,
    heads: int | None = None,
) -> Tensor:
    """For every row of queries about the ``keep`` best of the key blocks before its window.

    The blocks are cut in ``keep`` segments. In each round every segment is halved, each half is
    scored by one of its blocks (the largest product of a sampled query with a key of it), and the
    ``keep`` best halves go on, until segments are single blocks: 2 keep log2(n / keep) scores. The
    device is asked nothing on the way.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``.
        keep: blocks to find.
        rows: queries that search together.
        size: keys in a block.
        window: the last keys before the row's end, not searched (they are kept anyway).
        sample: (first, step) of the queries of a row that score.
        center: a segment is judged by its middle block, not by its first.
        offset: the key position of the first query; S - T where None.
        heads: N, a multiple of G that divides H: H/N consecutive heads search together; H where
            None.

    Returns:
        int32 ``[B,N,R,keep]``, rising, -1 at the end where the row has fewer blocks.
    """
    for name, value in (("keep", keep), ("rows", rows), ("size", size)):
        checks.positive(name, value)
    checks.positive("window", window, zero=True)
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B S G K")})
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    checks.divides("heads of k", G, "heads of q", H)
    N = H if heads is None else heads
    checks.divides("heads", N, "heads of q", H)
    checks.divides("heads of k", G, "heads", N)
    offset = S - T if offset is None else offset
    if _kernels(q, keep, rows, N, sample):
        from subquad.ops.select.triton_search import search

        return search(q, k, keep, rows, size, window, sample, center, offset, N)
    R, slot = -(-T // rows), torch.arange(keep, device=q.device)
    # How far rows see is known without asking the device; one cut short sees as far as a whole one.
    ends = offset + rows * torch.arange(1, R + 1) - window
    blocks = -(-ends.clamp(0, S) // size)
    # Short rows have no more blocks than are kept; for them there is nothing to search.
    short = int((blocks <= keep).sum())
    found = torch.where(slot < blocks[:short, None].to(q.device), slot, -1)
    parts = [found.int().expand(B, N, -1, -1)]
    step = max(1, COPIED // max(1, B * N * keep * size * K))
    with torch.no_grad():
        for r in range(short, R, step):
            own = blocks[r : r + step]
            # Not on a GPU: there a quotient by a number is a product with its rounded inverse.
            bound = (own[:, None].double() / keep * torch.arange(keep + 1)).int().to(q.device)
            asking = _sampled(q, range(r, r + len(own)), rows, N, sample)
            segments = bound[:, :-1], bound.diff(), own / keep
            parts.append(_search(asking, k, *segments, size, center))
    return torch.cat(parts, 2)


def _kernels(q: Tensor, keep: int, rows: int, N: int, sample: tuple[int, int]) -> bool:
    """Whether a kernel searches; it holds a row's scores and all queries that are asked at once."""
    (_, T, H, K), wide = q.shape, q.element_size()
    asked = H // N * len(range(sample[0] if rows > 1 else 0, rows, sample[1]))
    fits = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and K * wide <= 512
    fits = fits and 0 < asked <= 256 and asked * K * wide <= 1 << 16 and keep <= 1 << 14
    return fits and T > 0 and uses_kernels(q)


def halves(
    starts: Tensor, sizes: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The n best halves of n segments each.

    Args:
        starts, sizes: int32 ``[...,n]``, segments that rise and do not overlap, sizes of 1 or more;
            the left half of one is ``sizes // 2`` long.
        left, right: float32 ``[...,n]``, how good its halves are. A left half of size 0 is none.

    Returns:
        Starts, sizes and scores of the halves, ``[...,n]`` each, rising.
    """
    n, half = starts.shape[-1], sizes // 2
    score = torch.stack([left.masked_fill(half < 1, -torch.inf), right], -1).flatten(-2)
    best = _best(score, n)[1].sort(-1).values
    both = torch.stack([starts, starts + half], -1), torch.stack([half, sizes - half], -1)
    a, g = (x.flatten(-2).gather(-1, best) for x in both)
    return a, g, score.gather(-1, best)


def _sampled(q: Tensor, here: range, rows: int, N: int, sample: tuple[int, int]) -> Tensor:
    """The queries that speak for the rows ``here``, of all heads that search together,
    ``[B,N,r,m,K]``."""
    T, device = q.shape[1], q.device
    first = rows * torch.arange(here.start, here.stop, device=device)[:, None]
    begin, step = sample if rows > 1 else (0, 1)
    index = first + torch.arange(begin, rows, step, device=device)
    # A row cut short repeats its last one (its first, where there is no other).
    last = torch.where(index < T, index, first).amax(1, keepdim=True)
    q = q[:, torch.where(index < T, index, last)].unflatten(3, (N, -1))  # [B,r,m,N,f,K]
    return q.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)


def _search(
    q: Tensor, k: Tensor, a: Tensor, g: Tensor, span: Tensor, size: int, center: bool
) -> Tensor:
    """Halve and choose: the blocks ``[B,N,r,n]`` that survive, rising.

    Args:
        q: ``[B,N,r,m,K]``; k: ``[B,S,G,K]``.
        a, g: int32 ``[r,n]``, where the segments begin and their sizes, in blocks of keys.
        span: float ``[r]`` on the CPU, their mean size; it is halved until it is 1.
    """
    (B, N, r), n = q.shape[:3], a.shape[1]
    a, g = (x.expand(B, N, r, n).contiguous() for x in (a, g))
    # A left half known by its first block has the score of the whole.
    known = None if center else peaks(q, k, a, size)
    while (live := int((span > 1).sum())) > 0:
        # Spans never fall from row to row, so those still at work are the last.
        own = (slice(None), slice(None), slice(r - live, None))
        left, half = a[own], g[own] // 2
        right = left + half
        if known is None:
            left_score = peaks(q[own], k, left + half // 2, size)
            right_score = peaks(q[own], k, right + (g[own] - half) // 2, size)
        else:
            left_score, right_score = known[own], peaks(q[own], k, right, size)
        best = halves(left, g[own], left_score, right_score)
        if live == r:
            a, g, known = (*best[:2], None if known is None else best[2])
        else:
            a[own], g[own] = best[:2]
            if known is not None:
                known[own] = best[2]
        span = span / 2
    return a
