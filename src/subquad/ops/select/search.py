"""Finding good blocks without scoring all of them: segments are halved, the better halves stay.

Source: HiP attention (arXiv 2406.09827), the search with one key block standing for a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import interpreted
from subquad.ops.layout import repeat_heads

CHUNK = 1 << 24  # elements of keys gathered at once


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
) -> Tensor:
    """For every row of queries about the ``keep`` best of the key blocks before its window.

    The blocks are cut in ``keep`` segments. In each round every segment is halved, each half is
    scored by one of its blocks (the largest product of a sampled query with a key of it), and the
    ``keep`` best halves go on, until segments are single blocks: 2 keep log2(n / keep) scores.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``.
        keep: blocks to find.
        rows: queries that search together.
        size: keys in a block.
        window: the last keys before the row's end, not searched (they are kept anyway).
        sample: (first, step) of the queries of a row that score.
        center: a segment is judged by its middle block, not by its first.
        offset: the key position of the first query; S - T where None.

    Returns:
        int32 ``[B,H,R,keep]``, rising, -1 at the end where the row has fewer blocks.
    """
    for name, value in (("keep", keep), ("rows", rows), ("size", size)):
        checks.positive(name, value)
    checks.positive("window", window, zero=True)
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B S G K")})
    (B, T, H, K), S = q.shape, k.shape[1]
    checks.divides("heads of k", k.shape[2], "heads of q", H)
    offset = S - T if offset is None else offset
    R = -(-T // rows)
    with torch.no_grad():
        keys = repeat_heads(k, H).transpose(1, 2)  # [B,H,S,K]
        short = -T % rows
        own = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, short)).unflatten(1, (R, rows))
        first, step = sample if rows > 1 else (0, 1)
        own = own[:, :, first::step].permute(0, 3, 1, 2, 4)  # [B,H,R,i,K]
        ends = ((torch.arange(R, device=q.device) + 1) * rows).clamp_max(T) + offset - window
        # The rows that stand beyond T are zeros: they must not score.
        place = torch.arange(first, rows, step, device=q.device)
        there = torch.arange(R, device=q.device)[:, None] * rows + place < T
        chunk = max(1, CHUNK // max(1, B * H * 2 * keep * size * K))
        parts = [
            _search(own[:, :, r : r + chunk], there[r : r + chunk], keys, ends[r : r + chunk],
                    keep, size, center)
            for r in range(0, R, chunk)
        ]  # fmt: skip
    return torch.cat(parts, 2) if parts else k.new_zeros(B, H, 0, keep, dtype=torch.int32)


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
    if starts.is_cuda or interpreted():
        from subquad.ops.select import triton

        return triton.halves(starts, sizes, left, right)
    score = torch.stack([left.masked_fill(half < 1, -torch.inf), right], -1).flatten(-2)
    best = score.topk(n, -1, sorted=False).indices.sort(-1).values
    both = torch.stack([starts, starts + half], -1), torch.stack([half, sizes - half], -1)
    a, g = (x.flatten(-2).gather(-1, best) for x in both)
    return a, g, score.gather(-1, best)


def _search(q, there, keys, ends, keep: int, size: int, center: bool) -> Tensor:
    (B, H, S), R = keys.shape[:3], q.shape[2]
    blocks = -(-ends.clamp_min(0) // size).double()[:, None]  # [R,1]
    i = torch.arange(keep, device=q.device)
    start = (blocks / keep * i).long()
    length = (blocks / keep * (i + 1)).long() - start
    start, length = (x.expand(B, H, R, keep) for x in (start, length))
    width = (blocks / keep).squeeze(1)
    while bool((width > 1).any()):
        half = length // 2
        starts = torch.cat([start, start + half], -1)
        lengths = torch.cat([half, length - half], -1)
        score = _judge(q, there, keys, starts + lengths // 2 if center else starts, size)
        score = score.masked_fill(lengths < 1, -torch.inf)
        best = score.topk(keep, -1)[1]
        going = (width > 1)[:, None]
        start = torch.where(going, starts.gather(-1, best), start)
        length = torch.where(going, lengths.gather(-1, best), length)
        width = width / 2
    few = blocks <= keep
    start = torch.where(few, i, start)
    valid = torch.where(few, i < blocks, length >= 1)
    start = start.masked_fill(~valid, S).sort(-1)[0]
    return start.masked_fill(start == S, -1).int()


def _judge(q, there, keys, block, size: int) -> Tensor:
    """The largest product of a row's queries with the keys of each block: ``[B,H,R,n]``."""
    (S, K), (R, n) = keys.shape[2:], block.shape[2:]
    at = (block[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
    beyond = at >= S
    found = keys.gather(2, at.clamp_max(S - 1)[..., None].expand(-1, -1, -1, K))
    found = found.unflatten(2, (R, n * size))
    s = torch.einsum("bhrik,bhrnk->bhrin", q.to(found.dtype), found)
    s = s.masked_fill(~there[:, :, None], -torch.inf)
    s = s.masked_fill(beyond.unflatten(2, (R, n * size))[:, :, :, None], -torch.inf)
    return s.unflatten(-1, (n, size)).amax((3, 5))
