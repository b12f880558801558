"""Attention of queries that each chose some chunks of the keys, by the chunk instead of the query:
no key is copied for every query that reads it.

Legend: n queries, H query heads, G key heads, p choices of each query and head, C chunks of l keys,
K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64  # queries of one head and chunk computed together
AT_ONCE = 1 << 22  # scores held at once


def dispatch(
    q: Tensor, choice: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query over all keys of the chunks it chose.

    Args:
        q: ``[n,H,p,K]``, for each choice a query of its own (rotated to its place, say).
        choice: int ``[n,H,p]``, in 0..C-1, no chunk twice.
        k: ``[C,l,G,K]``; v: ``[C,l,G,V]``.

    Returns:
        ``o [n,H,V]`` and ``lse [n,H]``, ready to be merged with other parts.
    """
    (n, H, p, K), (C, length, G, V) = q.shape, v.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = (torch.arange(H, device=q.device)[:, None] * C + choice).flatten()
    order = group.argsort()
    counts = torch.bincount(group, minlength=H * C)
    tile = 1
    while tile < TILE and 2 * tile <= n * p // C:
        tile *= 2
    tiles = -(-counts // tile)
    # Each pair's place among those of its head and chunk, and so its tile and its slot there.
    place = torch.arange(len(group), device=q.device) - (counts.cumsum(0) - counts)[group[order]]
    slot = (tiles.cumsum(0) - tiles)[group[order]] * tile + place
    total = int(tiles.sum())
    rows = q.new_zeros(total * tile, K, dtype=wide)
    rows.index_copy_(0, slot, q.reshape(-1, K).index_select(0, order).to(wide))
    rows = rows.view(total, tile, K)
    # Of each tile the chunk, in the order of key heads.
    of = torch.arange(H * C, device=q.device).repeat_interleave(tiles)
    of = of // C * G // H * C + of % C
    k, v = (x.movedim(2, 0).flatten(0, 1).to(wide) for x in (k, v))
    o, lse = rows.new_empty(total, tile, V), rows.new_empty(total, tile, 1)
    most = AT_ONCE * 16 if q.is_cuda else AT_ONCE
    step = max(1, most // (tile * length + 2 * length * K))
    for i in range(0, total, step):
        here = slice(i, i + step)
        keys, values = (x.index_select(0, of[here]) for x in (k, v))
        scores = scale * (rows[here] @ keys.mT)
        lse[here] = scores.logsumexp(-1, keepdim=True)
        o[here] = (scores - lse[here]).exp_() @ values
    back = torch.empty_like(slot)
    back[order] = slot
    o = o.view(-1, V).index_select(0, back).view(n, H, p, V)
    lse = lse.view(-1)[back].view(n, H, p)
    whole = lse.logsumexp(-1)
    weights = (lse - whole[..., None]).exp()
    return torch.einsum("nhp,nhpv->nhv", weights, o).to(v.dtype), whole
