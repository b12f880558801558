"""Decoding over keys that stay split: each rank reads its shard, the parts are merged.

Source: the merge of Liu, Zaharia, Abbeel, arXiv 2310.01889, over all ranks at once.

Legend: B batch, T new queries, S keys of this rank, H query heads, G key/value heads, K key dim,
V value dim, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.attention import attention, merge
from subquad.parallel.collectives import gather
from subquad.parallel.mesh import place


def attend_shards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    mesh: Any = None,
) -> Tensor:
    """What a few queries read of all ranks' keys; every rank sends ``B T H (V + 1)`` numbers.

    Args:
        q: ``[B,T,H,K]``, the same on every rank; they see every key.
        k: ``[B,S,G,K]``; v: ``[B,S,G,V]``, this rank's keys, S >= 0, of any number.
        scale, backend: as in :func:`subquad.ops.attention.attention`.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``o [B,T,H,V]``, on every rank.

    Raises:
        ValueError: for shapes that do not fit, or queries that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    here.agree("attend_shards", q=q, heads=[k.shape[2], v.shape[3]])
    o, lse = attention(q, k, v, scale=scale, backend=backend, return_lse=True)
    everyone = gather(torch.cat([o.to(lse.dtype), lse[..., None]], -1), here, "attend_shards")
    return merge([(part[..., :-1], part[..., -1]) for part in everyone])[0].to(v.dtype)
