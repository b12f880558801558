"""The definitions, dense, beside which every faster form is laid.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
P planes of visible keys (see :mod:`subquad.ops.probe.spans`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.layout import repeat_heads
from subquad.ops.probe.spans import kept


def probe(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, *, lo: Tensor, hi: Tensor, scale: float
) -> Tensor:
    """``o_i = sum_j p_ij (1 + sum_l p_il t_il - t_ij) v_j`` with ``t_ij = r_i . k_j``."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    k, v_wide = (repeat_heads(x.to(dtype), q.shape[2]) for x in (k, v))
    weights, total = _weights(q.to(dtype), k, lo, hi, scale)
    p = weights / torch.where(total > 0, total, 1.0)
    t = torch.einsum("bihk,bjhk->bhij", r.to(dtype), k)
    mean = (p * t).sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhv->bihv", p * (1 + mean - t), v_wide).to(v.dtype)


def local_linear(
    q: Tensor, k: Tensor, v: Tensor, *, ridge: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> Tensor:
    """The intercept of a weighted ridge regression of values on ``z_ij = k_j - q_i``, solved.

    ``w_ij = exp(scale q_i . k_j - m_i)``, ``mu_i = sum_j w_ij z_ij``,
    ``rho_i = (sum_j w_ij z_ij z_ij^T + ridge I)^-1 mu_i``,
    ``o_i = sum_j w_ij (1 - z_ij . rho_i) v_j / (sum_j w_ij - mu_i . rho_i)``.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, (k, v_wide) = q.to(dtype), (repeat_heads(x.to(dtype), q.shape[2]) for x in (k, v))
    w, total = _weights(q, k, lo, hi, scale)
    z = k.transpose(1, 2)[:, :, None] - q.transpose(1, 2)[:, :, :, None]  # [B,H,T,S,K]
    mu = torch.einsum("bhij,bhijk->bhik", w, z)
    sigma = torch.einsum("bhij,bhijk,bhijl->bhikl", w, z, z)
    eye = torch.eye(q.shape[3], dtype=dtype, device=q.device)
    sigma = sigma + ridge.to(dtype)[:, None, None, None] * eye
    rho = torch.linalg.solve(sigma, mu)
    below = total.squeeze(-1) - (mu * rho).sum(-1)
    s = w * (1 - torch.einsum("bhijk,bhik->bhij", z, rho))
    s = s / torch.where(total > 0, below[..., None], 1.0)
    return torch.einsum("bhij,bjhv->bihv", s, v_wide).to(v.dtype)


def _weights(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``exp(scale q k^T - max)`` over the visible keys ``[B,H,T,S]`` and its row sums."""
    scores = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    scores = scores.masked_fill(~kept(lo, hi, 0, k.shape[1])[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    return weights, weights.sum(-1, keepdim=True)
