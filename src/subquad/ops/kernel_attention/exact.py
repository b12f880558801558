"""The exact part: exponentials of the near keys under their own maximum, times the values.

    N_i = sum_j exp(s_ij - m_i) v_j,   s_ij = scale q_i . k_j,   m_i = max_j s_ij

What mixed attention divides is N and the linear part together, so m does not cancel: it has a
gradient. With dP = dN v^T and P = exp(s - m), dS = P * dP - (sum_j P dP) [s = m], the maximum's
share split among ties. Both passes make the scores of a few blocks of queries at a time and keep
none.

Legend: R rows, T queries, S keys, H query heads, G key heads, r = H / G, K key dim, V value dim,
c queries in a block, n blocks of a piece, D columns that a block may see, M extra keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES = 1 << 21  # scores held at once


@dataclass(frozen=True)
class Band:
    """Who may be near: the query in column a of a block and the keys of its own block and of the
    ``before`` blocks before it, at a distance below ``window``.

    Attributes:
        block: c.
        before: blocks before the own one that are looked at.
        window: keys a query sees, its own included.
        per: extra keys that each block of queries adds; extra keys there were before the first:
            ``extras``. So bounded is what a block can see, and how much of it is computed.
    """

    block: int
    before: int
    window: int
    per: int = 0
    extras: int = 0


def near_sums(
    q: Tensor, k: Tensor, v: Tensor, band: Band, *, scale: float, q_ids: Tensor, k_ids: Tensor,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """N ``[R,T,H,V]``, 0 where a query sees no key. Differentiable in q, k, v and the extra keys.

    Args:
        q: ``[R,T,H,K]``, the last T of the S tokens; k: ``[R,S,G,K]``; v: ``[R,S,G,V]``; float32
            or float64.
        q_ids, k_ids: int64 ``[R or 1,T]`` and ``[R or 1,S]``: a query sees keys of its own number.
        extra: keys ``[R,M,G,K]``, values ``[R,M,G,V]`` and int64 ``[R,M,G]``, the first block of
            queries that sees each.
    """
    T, S, c = q.shape[1], k.shape[1], band.block
    short = -T % c
    skip = S - T - band.before * c
    q, q_ids = _fit(q, 0, short), F.pad(q_ids, (0, short), value=-2)
    k, v = (_fit(x, -skip, short) for x in (k, v))
    k_ids = F.pad(k_ids[:, max(skip, 0) :], (max(-skip, 0), short), value=-1)
    more = extra or (None, None, None)
    return _NearSums.apply(q, k, v, q_ids, k_ids, *more, band, scale)[:, :T]


def _fit(x: Tensor, left: int, right: int) -> Tensor:
    """``x [R,S,...]`` with zeros at both ends; a negative ``left`` cuts."""
    x = x[:, -left:] if left < 0 else x
    return F.pad(x, (0, 0, 0, 0, max(left, 0), right))


class _Piece:
    """Some blocks of queries and all they see: ``scores [R,n,G,r c,D]``, -inf where unseen."""

    def __init__(self, q, k, v, q_ids, k_ids, ek, ev, births, band: Band, scale, first, last):
        c, width = band.block, (band.before + 1) * band.block
        R, G, self.r = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
        self.rows, self.scale, self.c, self.G = slice(first * c, last * c), scale, c, G
        self.columns = slice(first * c, (last - 1) * c + width)
        self.q = self.fold(q[:, self.rows])
        self.k = k[:, self.columns].unfold(1, width, c).mT  # [R,n,G,D,K]
        self.v = v[:, self.columns].unfold(1, width, c).mT
        ids = k_ids[:, self.columns].unfold(1, width, c)[:, :, None]
        own = q_ids[:, self.rows].unflatten(1, (-1, c))[..., None]
        a = torch.arange(c, device=q.device)[:, None] + band.before * c
        distance = a - torch.arange(width, device=q.device)
        keep = (own == ids) & (distance >= 0) & (distance < band.window)
        keep = keep[:, :, None].expand(R, -1, G, -1, -1)
        self.near, self.extras = width, 0
        if ek is not None:
            self.extras = M = min(ek.shape[1], band.extras + band.per * last)
            n = torch.arange(first, last, device=q.device)[:, None, None]
            seen = (births[:, None, :M] <= n).transpose(2, 3)[:, :, :, None]  # [R,n,G,1,M]
            keep = torch.cat([keep, seen.expand(-1, -1, -1, c, -1)], -1)
            self.k = self._with(self.k, ek[:, :M])
            self.v = self._with(self.v, ev[:, :M])
        keep = keep.repeat(1, 1, 1, self.r, 1)
        self.scores = (scale * self.q @ self.k.mT).masked_fill(~keep, -torch.inf)
        self.top = self.scores.amax(-1, keepdim=True)
        safe = self.top.masked_fill(self.top == -torch.inf, 0)
        self.p = (self.scores - safe).exp()

    @staticmethod
    def _with(near: Tensor, extra: Tensor) -> Tensor:
        extra = extra.transpose(1, 2)[:, None].expand(-1, near.shape[1], -1, -1, -1)
        return torch.cat([near, extra], 3)

    def fold(self, x: Tensor) -> Tensor:
        """``[R,n c,H,...]`` to ``[R,n,G,r c,...]``."""
        x = x.unflatten(1, (-1, self.c)).unflatten(3, (self.G, self.r))
        return x.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def unfold(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (self.r, self.c)).permute(0, 1, 4, 2, 3, 5)
        return x.flatten(3, 4).flatten(1, 2)

    def gradients(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of q ``[R,n c,H,K]`` and of this piece's k and v, ``[R,n,G,D,.]``."""
        dout = self.fold(dout)
        ds = (dout @ self.v.mT).mul_(self.p)
        ties = (self.scores == self.top) & (self.top > -torch.inf)
        share = ds.sum(-1, keepdim=True) / ties.sum(-1, keepdim=True).clamp_min(1)
        ds = (ds - ties * share).mul_(self.scale)
        return self.unfold(ds @ self.k), ds.mT @ self.q, self.p.mT @ dout


class _NearSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_ids, k_ids, ek, ev, births, band, scale):
        ctx.save_for_backward(q, k, v, q_ids, k_ids, ek, ev, births)
        ctx.rest = band, scale
        out = [
            piece.unfold(piece.p @ piece.v)
            for piece in _pieces(q, k, v, q_ids, k_ids, ek, ev, births, band, scale)
        ]
        return torch.cat(out, 1) if out else v.new_zeros(*q.shape[:3], v.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, q_ids, k_ids, ek, ev, births = ctx.saved_tensors
        band, scale = ctx.rest
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dek = dev = None
        if ek is not None:
            dek, dev = torch.zeros_like(ek), torch.zeros_like(ev)
        for piece in _pieces(q, k, v, q_ids, k_ids, ek, ev, births, band, scale):
            dq[:, piece.rows], gk, gv = piece.gradients(dout[:, piece.rows])
            for into, extra, got in ((dk, dek, gk), (dv, dev, gv)):
                near = got[..., : piece.near, :].transpose(2, 3)  # [R,n,D,G,.]
                _add(into[:, piece.columns], near, band)
                if extra is not None:
                    extra[:, : piece.extras] += got[..., piece.near :, :].sum(1).transpose(1, 2)
        return dq, dk, dv, None, None, dek, dev, None, None, None


def _pieces(q, k, v, q_ids, k_ids, ek, ev, births, band: Band, scale) -> Iterator[_Piece]:
    blocks, c = q.shape[1] // band.block, band.block
    seen = (band.before + 1) * c + (0 if ek is None else ek.shape[1])
    step = max(1, SCORES // max(1, q.shape[0] * q.shape[2] * c * seen))
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        yield _Piece(q, k, v, q_ids, k_ids, ek, ev, births, band, scale, first, last)


def _add(into: Tensor, x: Tensor, band: Band) -> None:
    """Add the overlapping blocks ``x [R,n,D,G,.]`` to the columns they came from."""
    c, n = band.block, x.shape[1]
    for slab in range(band.before + 1):
        part = x[:, :, slab * c : (slab + 1) * c].flatten(1, 2)
        into[:, slab * c : (slab + n) * c] += part
