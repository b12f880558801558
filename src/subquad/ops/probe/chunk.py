"""The probe in blocks of queries, on any device: no T x S tensor, forward or backward.

Backward by hand from lse and the mean of t (``u = t - mean t``), block by block again:

    e_ij = do_i . v_j,   e_i = sum_j p_ij e_ij,   g_ij = e_i - e_ij
    a_ij = p_ij (1 - u_ij),   dt_ij = p_ij g_ij,   ds_ij = p_ij (e_ij - do_i . o_i + u_ij g_ij)
    dv = a^T do,   dr = dt k,   dq = scale ds k,   dk = scale ds^T q + dt^T r

(Parallax, arXiv 2605.29157; the rows' sums of p dp are folded into do . o.)

Legend: B batch, T queries, S keys, H = G R query heads in G groups, n queries of a block,
C keys that a block's queries may see, P planes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.probe.spans import kept

SCORES = 1 << 20  # scores held at once, where one query's fit
QUERIES = 128  # of a block at most: a causal block computes half a square of these in vain

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor, scale: float,
    saves: bool, peak: bool,
) -> Saved:  # fmt: skip
    """``o [B,T,H,V]``, the softmax's mean of v likewise (where it ``saves``), lse and the mean of
    t ``[B,T,H]``, and the key of the largest score (where ``peak``)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.shape[:3]
    o = v.new_empty(*rows, v.shape[3])
    mean = v.new_empty(o.shape if saves else 0)
    lse, drift = (q.new_empty(rows, dtype=dtype) for _ in "12")
    top = lo.new_empty(rows if peak else 0)
    k, v = _by_head(k, dtype), _by_head(v, dtype)
    for at, a, b in _blocks(q, k, lo, hi):
        own = _queries(q, at, k, dtype), _queries(r, at, k, dtype)
        s, t = _scores(*own, k[:, :, None, a:b], lo, hi, at, a, b, scale)
        most, where = s.max(-1)
        w = (s - most.nan_to_num(neginf=0.0)[..., None]).exp_()
        total = w.sum(-1)
        seen = total > 0
        safe = torch.where(seen, total, 1.0)
        p = w.div_(safe[..., None])
        m = torch.linalg.vecdot(p, t)
        if saves:
            mean[:, at] = _tokens(_times(p, v[:, :, a:b]))
        o[:, at] = _tokens(_times(t.neg_().add_(1 + m[..., None]).mul_(p), v[:, :, a:b]))
        lse[:, at] = _tokens(torch.where(seen, most + safe.log(), -torch.inf)[..., None])[..., 0]
        drift[:, at] = _tokens(m[..., None])[..., 0]
        if peak:
            top[:, at] = _tokens((where + a)[..., None])[..., 0].int()
    return o, mean, lse, drift, top


def backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor,
    o: Tensor, mean: Tensor, lse: Tensor, drift: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = lse.dtype
    unseen = lse == -torch.inf
    # A row without keys: exp(s - inf) = 0, and nothing that comes back may touch that.
    lse = lse.masked_fill(unseen, torch.inf)
    delta = torch.linalg.vecdot(do.to(dtype), o.to(dtype)) - dlse.to(dtype).masked_fill(unseen, 0)
    pull = torch.linalg.vecdot(do.to(dtype), mean.to(dtype))
    types = q.dtype, k.dtype, v.dtype
    dq, dr = torch.empty_like(q), torch.empty_like(r)
    k, v = _by_head(k, dtype), _by_head(v, dtype)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for at, a, b in _blocks(q, k, lo, hi):
        own_q, own_r, own_do = (_queries(x, at, k, dtype) for x in (q, r, do))
        by_row = (_queries(x[..., None], at, k, dtype) for x in (lse, drift, delta, pull))
        own_lse, own_drift, own_delta, own_pull = by_row
        keys, values = k[:, :, a:b], v[:, :, a:b]
        s, t = _scores(own_q, own_r, keys[:, :, None], lo, hi, at, a, b, scale)
        p = s.sub_(own_lse).exp_()
        u = t.sub_(own_drift)
        e = own_do @ values[:, :, None].mT
        g = own_pull - e
        dv[:, :, a:b] += _summed(p * (1 - u), own_do)
        dt = p * g
        ds = e.sub_(own_delta).add_(u.mul_(g)).mul_(p)
        dq[:, at] = _tokens(_times(ds, keys) * scale)
        dr[:, at] = _tokens(_times(dt, keys))
        dk[:, :, a:b] += _summed(ds, own_q * scale) + _summed(dt, own_r)
    return dq, dk.transpose(1, 2).to(types[1]), dv.transpose(1, 2).to(types[2]), dr


def _blocks(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Queries of a block, and the keys ``a..b`` outside which they see nothing."""
    (B, T, H), S = q.shape[:3], k.shape[2]
    n = max(1, min(QUERIES, SCORES // max(1, B * H * S)))
    starts = range(0, T, n)
    if not starts:
        return
    # lo and hi never fall, so a block's first and last query bound it.
    firsts = lo[:, ::n].amin(0)
    ends = torch.tensor([min(i + n, T) - 1 for i in starts], device=hi.device)
    lasts = hi.index_select(1, ends).amax(0)
    for i, (a, b) in zip(starts, torch.stack([firsts, lasts], 1).tolist(), strict=True):
        yield slice(i, min(i + n, T)), a, b if b > a else min(a + 1, S)


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B,S,G,D]`` to ``[B,G,S,D]``."""
    return x.to(dtype).transpose(1, 2).contiguous()


def _queries(x: Tensor, at: slice, k: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B,T,H,D]`` at some queries, as ``[B,G,R,n,D]``."""
    return x[:, at].to(dtype).unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)


def _tokens(x: Tensor) -> Tensor:
    """``[B,G,R,n,D]`` to ``[B,n,H,D]``."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(
    q: Tensor, r: Tensor, k: Tensor, lo: Tensor, hi: Tensor, at: slice, a: int, b: int, scale: float
) -> tuple[Tensor, Tensor]:
    """s, -inf where not visible, and t ``[B,G,R,n,C]``."""
    keep = kept(lo[:, at], hi[:, at], a, b)[:, None, None]
    s = (q @ k.mT).mul_(scale).masked_fill_(~keep, -torch.inf)
    return s, r @ k.mT


def _times(weights: Tensor, x: Tensor) -> Tensor:
    """``[B,G,R,n,C]`` times ``[B,G,C,D]``: ``[B,G,R,n,D]``, one product a group."""
    return (weights.flatten(2, 3) @ x).unflatten(2, weights.shape[2:4])


def _summed(weights: Tensor, x: Tensor) -> Tensor:
    """``[B,G,R,n,C]`` turned, times ``[B,G,R,n,D]``: ``[B,G,C,D]``, summed over the group."""
    return weights.flatten(2, 3).mT @ x.flatten(2, 3)
