"""Attention of queries that each chose some chunks of the keys, by the chunk instead of the query:
no key is copied for every query that reads it.

Legend: n queries, H query heads, G key heads, p choices of each query and head, C chunks of l keys,
K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.attention import attention

TILE = 64  # queries of one head and chunk computed together
COPIED = 1 << 22  # elements of keys and values copied at once
TILES = 1 << 15  # tiles computed at once; a GPU takes no more than twice as many


def dispatch(
    q: Tensor, choice: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query over all keys of the chunks it chose.

    Args:
        q: ``[p,n,H,K]``, for each choice a query of its own (rotated to its place, say).
        choice: int ``[p,n,H]``, in 0..C-1, no chunk twice.
        k: ``[C,l,G,K]``; v: ``[C,l,G,V]``.

    Returns:
        ``o [n,H,V]`` and ``lse [n,H]``, ready to be merged with other parts.
    """
    (p, n, H, K), (C, length, G, V) = q.shape, v.shape
    # Pairs are counted as rotated queries lie in memory: by choice, head, and query.
    pairs = q.transpose(1, 2).reshape(-1, K)
    group = (choice.transpose(1, 2) + C * torch.arange(H, device=q.device)[:, None]).flatten()
    order = group.argsort()
    counts = torch.bincount(group, minlength=H * C)
    tile = 1
    while tile < TILE and 2 * tile <= n * p // C:
        tile *= 2
    tiles = -(-counts // tile)
    # Each pair's place among those of its head and chunk, and so its tile and its slot there.
    shift = (tiles.cumsum(0) - tiles) * tile - (counts.cumsum(0) - counts)
    slot = torch.empty_like(group)
    slot[order] = torch.arange(len(group), device=q.device) + shift[group[order]]
    total = int(tiles.sum())
    rows = q.new_zeros(total * tile, K).index_copy_(0, slot, pairs).view(total, tile, 1, K)
    # Of each tile the chunk, in the order of key heads.
    of = torch.arange(H * C, device=q.device).repeat_interleave(tiles)
    of = of // C * G // H * C + of % C
    k, v = (x.movedim(2, 0).flatten(0, 1).unsqueeze(2) for x in (k, v))
    step = max(1, min(TILES, COPIED * (1 + 15 * q.is_cuda) // (length * (K + V))))
    parts = [
        attention(r, k.index_select(0, c), v.index_select(0, c), scale=scale, return_lse=True)
        for r, c in zip(rows.split(step), of.split(step), strict=True)
    ]
    o, lse = (torch.cat(x).flatten(0, 2).index_select(0, slot) for x in zip(*parts, strict=True))
    o, lse = o.view(p, H, n, V), lse.view(p, H, n)
    whole = lse.logsumexp(0)
    o = (o * (lse - whole)[..., None].exp()).sum(0)
    return o.to(v.dtype).transpose(0, 1), whole.T
