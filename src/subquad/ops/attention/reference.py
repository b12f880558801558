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
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    T, H, S = q.shape[1], q.shape[2], k.shape[1]
    k, v_full = (repeat_heads(x.to(dtype), H) for x in (k, v))
    scores = scale * torch.einsum("bihk,bjhk->bhij", q.to(dtype), k)
    if mask is not None:
        keep = mask.dense(T, S, offset, q.device)
        if keep.dim() == 4:
            keep = keep.repeat_interleave(H // keep.shape[1], 1)
        scores = scores.masked_fill(~keep, -torch.inf)
    if S == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3]), scores.new_full(q.shape[:3], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + total.log(), -torch.inf).squeeze(-1)
    o = torch.einsum("bhij,bjhv->bihv", weights / total, v_full)
    return o.to(v.dtype), lse.transpose(1, 2)
