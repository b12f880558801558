"""The definition of attention over a mask, dense, beside which every faster form is laid."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.mask import Mask
from subquad.ops.layout import repeat_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    """softmax over the kept keys of scale q k^T, times v; quadratic, in at least float32."""
    if k.shape[1] == 0:
        empty = torch.full(q.shape[:3], -torch.inf, dtype=_accumulator(v), device=q.device)
        return v.new_zeros(*q.shape[:3], v.shape[3]), empty
    p, lse = weights(q, k, mask, scale, offset)
    o = torch.einsum("bhij,bjhv->bihv", p, repeat_heads(v.to(p.dtype), q.shape[2]))
    return o.to(v.dtype), lse.transpose(1, 2)


def weights(
    q: Tensor, k: Tensor, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    """P ``[B,H,T,S]``, 0 at the pairs that the mask drops, and lse ``[B,H,T]``; S >= 1."""
    dtype = _accumulator(q)
    T, H, S = q.shape[1], q.shape[2], k.shape[1]
    scores = scale * torch.einsum("bihk,bjhk->bhij", q.to(dtype), repeat_heads(k.to(dtype), H))
    if mask is not None:
        keep = mask.dense(T, S, offset, q.device)
        if keep.dim() == 4:
            keep = keep.repeat_interleave(H // keep.shape[1], 1)
        scores = scores.masked_fill(~keep, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    shares = (scores - top).exp()
    total = shares.sum(-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + total.log(), -torch.inf).squeeze(-1)
    return shares / total, lse


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
