"""Attention over any mask in blocks, on any device, without a T x S tensor.

Forward: every batch of alike units is one call of the fused CPU kernel (plain matrix products
elsewhere). Backward: by hand, from lse: P = exp(s - lse) is made again, block by block, and

    dv = P^T do,   dS = P * (do v^T - sum(do * o) + dlse),   dq = scale dS k,   dk = scale dS^T q

so nothing of the size of the mask is stored. Memory follows the mask's area in one row of tiles.

Legend: R queries in a unit, C keys it sees, n units in a batch, r = H / G heads in a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops.attention.node import run
from subquad.ops.attention.plan import Batch, Plan, plan

FEW = 8  # up to this many queries (decode) need no tiles
GATHERED = 1 << 24  # elements of keys copied at once
SCORES = 1 << 20  # scores held at once in the backward pass, if one unit has fewer


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    if q.shape[1] <= FEW or k.shape[1] == 0:
        return few(q, k, v, mask, scale, offset)
    return run(__name__, q, k, v, mask or masks.full(), scale, offset)


def few(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    """A few queries against all keys: one product, linear in the keys that may be seen."""
    (B, T, H, _), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    keep = None
    if mask is not None:
        first, last = mask.key_range(offset, offset + T - 1, S)
        k, v = k[:, first:last], v[:, first:last]
        if mask.planes == (1, 1):
            p = torch.arange(T, device=q.device)[:, None] + offset
            keep = mask.at(p, torch.arange(first, last, device=q.device)).expand(T, last - first)
        else:
            keep = mask.dense(T, S, offset, q.device)[..., first:last]
            keep = keep.repeat_interleave(H // keep.shape[1], 1)
            keep = keep.unflatten(1, (G, H // G)).flatten(2, 3)
    accumulate = _accumulator(q.dtype)
    q = q.to(accumulate).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # [B,G,r,T,K]
    scores = scale * (q.flatten(2, 3) @ k.to(accumulate).permute(0, 2, 3, 1))
    if keep is not None:
        keep = keep.repeat(H // G, 1) if keep.dim() == 2 else keep
        scores = scores.masked_fill(~keep, -torch.inf)
    o, lse = _softmax_times(scores, v.to(accumulate).transpose(1, 2))
    o = o.unflatten(2, (H // G, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H, V)
    return o.to(v.dtype), lse.unflatten(2, (H // G, T)).permute(0, 3, 1, 2).reshape(B, T, H)


def _softmax_times(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if scores.shape[-1] == 0:
        return scores @ v, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + safe.log(), -torch.inf).squeeze(-1)
    return (weights @ v) / safe, lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    walk = plan(mask, q.shape[0], q.shape[1], k.shape[1], offset)
    if len(walk.heads) == 1:
        return _forward(q, k, v, walk, walk.heads[0][1], scale)
    o = v.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_accumulator(q.dtype))
    for heads, keys, batches in walk.head_groups(q.shape[2], k.shape[2]):
        own = _pick(q, heads), _pick(k, keys), _pick(v, keys)
        o[:, :, heads], lse[:, :, heads] = _forward(*own, walk, batches, scale)
    return o, lse


def backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: Mask, scale: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    walk = plan(mask, q.shape[0], q.shape[1], k.shape[1], offset)
    dtype = lse.dtype
    unseen = lse == -torch.inf
    # A row without keys: exp(s - inf) = 0, and nothing that comes back may touch that.
    dlse = dlse.to(dtype).masked_fill(unseen, 0)
    lse = lse.masked_fill(unseen, torch.inf)
    delta = torch.linalg.vecdot(do.to(dtype), o.to(dtype)) - dlse
    if len(walk.heads) == 1:
        dq, dk, dv = _backward([q, do, lse, delta], [k, v], walk, walk.heads[0][1], scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for heads, keys, batches in walk.head_groups(q.shape[2], k.shape[2]):
        by_query = [_pick(x, heads) for x in (q, do, lse, delta)]
        by_key = [_pick(x, keys) for x in (k, v)]
        got = _backward(by_query, by_key, walk, batches, scale)
        dq[:, :, heads] = got[0]
        dk.index_add_(2, keys, got[1]) if isinstance(keys, Tensor) else dk.add_(got[1])
        dv.index_add_(2, keys, got[2]) if isinstance(keys, Tensor) else dv.add_(got[2])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, walk: Plan, batches: list[Batch], scale: float
) -> tuple[Tensor, Tensor]:
    (B, T, H, K), G, V, block = q.shape, k.shape[2], v.shape[3], walk.tiles.block
    q, k, v = (_tiled(x, block) for x in (q, k, v))
    o = v.new_zeros(*q.shape[:3], V)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_accumulator(q.dtype))
    for batch in batches:
        bias = walk.bias(batch.pattern, q.dtype, H // G, q.device)
        size = len(batch.pattern) * block * G * (K + V)
        for piece in batch.pieces(max(1, GATHERED // size)):
            got = _attend(_rows(q, piece, G), _keys(k, piece), _keys(v, piece), bias, scale)
            o[piece.rows], lse[piece.rows] = (_unfold(x, block) for x in got)
    return _untiled(o, B, T), _untiled(lse, B, T)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[n,G,M,K]``, k ``[n,G,C,K]``, v ``[n,G,C,V]``, bias ``[M,C]``: o and lse."""
    if q.device.type != "cpu":
        accumulate = _accumulator(q.dtype)
        scores = scale * (q.to(accumulate) @ k.to(accumulate).transpose(-1, -2))
        scores = scores if bias is None else scores + bias
        return _softmax_times(scores, v.to(accumulate))
    K, V = q.shape[3], v.shape[3]
    q, k, v = (F.pad(x, (0, max(K, V) - x.shape[3])) if K != V else x for x in (q, k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=None if bias is None else bias[None, None], scale=scale
    )
    if bias is not None:
        unseen = (bias == -torch.inf).all(-1)
        lse = lse.masked_fill(unseen, -torch.inf)
    return o[..., :V], lse


def _backward(
    by_query: list[Tensor], by_key: list[Tensor], walk: Plan, batches: list[Batch], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from ``[q, do, lse, delta]`` and ``[k, v]``."""
    (B, T, H, _), (S, G) = by_query[0].shape, by_key[0].shape[1:3]
    block, dtype = walk.tiles.block, by_query[2].dtype
    q, do, lse, delta, k, v = (_tiled(x, block) for x in by_query + by_key)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for batch in batches:
        bias = walk.bias(batch.pattern, dtype, H // G, q.device)
        unit = len(batch.pattern) * block * H * block
        for piece in batch.pieces(max(1, SCORES // unit)):
            qs, dos = (_rows(x, piece, G).flatten(0, 1).to(dtype) for x in (q, do))
            ks, vs = (_keys(x, piece).flatten(0, 1).to(dtype) for x in (k, v))
            ls, ds = (_rows(x[..., None], piece, G).flatten(0, 1) for x in (lse, delta))
            qs = qs * scale
            p = torch.bmm(qs, ks.transpose(1, 2))
            if bias is not None:
                p += bias
            p = p.sub_(ls).exp_()
            _add(dv, piece, torch.bmm(p.transpose(1, 2), dos))
            dp = torch.bmm(dos, vs.transpose(1, 2)).sub_(ds).mul_(p)
            _add(dk, piece, torch.bmm(dp.transpose(1, 2), qs))
            got = torch.bmm(dp, ks).unflatten(0, (-1, G)).mul_(scale)
            dq[piece.rows] = _unfold(got, block)
    return _untiled(dq, B, T), _untiled(dk, B, S), _untiled(dv, B, S)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pick(x: Tensor, heads: Tensor | slice) -> Tensor:
    return x[:, :, heads]


def _tiled(x: Tensor, block: int) -> Tensor:
    """``[B,T,H,...]`` to tiles of all batch rows ``[B * tiles, block, H, ...]``, filled with 0."""
    short = -x.shape[1] % block
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], 1)
    return x.contiguous().view(-1, block, *x.shape[2:])


def _untiled(x: Tensor, B: int, T: int) -> Tensor:
    return x.view(B, -1, *x.shape[2:])[:, :T]


def _rows(x: Tensor, piece: Batch, G: int) -> Tensor:
    """The queries of the units, the heads of a group folded into rows: ``[n,G,r*R,K]``."""
    return x[piece.rows].unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x: Tensor, block: int) -> Tensor:
    """``[n,G,r*R,...]`` back to ``[n,R,H,...]``."""
    return x.unflatten(2, (-1, block)).movedim(3, 1).flatten(2, 3)


def _keys(x: Tensor, piece: Batch) -> Tensor:
    """The keys of the units ``[n,G,C,K]``: a view where their tiles are a run, else a copy."""
    if piece.run is None:
        return x[torch.tensor(piece.columns, device=x.device)].flatten(1, 2).transpose(1, 2)
    first, step = piece.run
    tile, token, head, _ = x.stride()
    shape = (len(piece.units), x.shape[2], len(piece.pattern) * x.shape[1], x.shape[3])
    return x.as_strided(shape, (step * tile, head, token, 1), x.storage_offset() + first * tile)


def _add(into: Tensor, piece: Batch, x: Tensor) -> None:
    """Add ``x [n*G,C,K]`` to the tiles of the units' keys."""
    n, (_, block, G, K) = len(piece.units), into.shape
    x = x.unflatten(0, (n, G)).transpose(1, 2)
    if n == 1 and piece.run is not None:
        first = piece.columns[0][0]
        into[first : first + len(piece.pattern)].view(-1, G, K).add_(x[0])
        return
    tiles = torch.tensor(piece.columns, device=into.device).flatten()
    into.index_add_(0, tiles, x.reshape(-1, block, G, K))
