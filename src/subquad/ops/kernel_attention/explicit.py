"""The definitions of the bidirectional forms: all weights written out, quadratic in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.kernel_attention.bidirectional import Normalizer, prepare
from subquad.ops.kernel_attention.landmarks import RIDGE, gaussian


def bidirectional_weights(
    q: Tensor,
    k: Tensor,
    normalizer: str | Normalizer,
    *,
    scale: float | None = None,
    turned: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``w_ij = a(z_i) s_ij + b(z_i) / S``, ``[B,H,T,S]``; arguments as of ``bidirectional``."""
    normalize, scale = prepare(q, k, k, normalizer, scale, turned, valid)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    there = torch.ones(k.shape[:2], dtype=torch.bool) if valid is None else valid
    there = there[:, None, None, :].to(q.dtype)
    S = there.sum(-1, keepdim=True)
    z = (scale / S * torch.einsum("bihk,bjhk->bhij", q, keys) * there).sum(-1)
    a, b = normalize(z, eps)
    if turned is not None:
        q, keys = turned[0], turned[1].repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = scale / S * torch.einsum("bihk,bjhk->bhij", q, keys)
    return (a[..., None] * s + b[..., None] / S) * there


def landmark_weights(q: Tensor, landmarks: Tensor, *, normalize: bool = True) -> Tensor:
    """``P M P^T``, ``[B,H,N,N]``, with the inverse by elimination."""
    queries, marks = q.transpose(1, 2), landmarks.transpose(1, 2)
    P, A = gaussian(queries, marks), gaussian(marks, marks)
    if normalize:
        root = A.sum(-1, keepdim=True).rsqrt()
        M = root * torch.linalg.inv(A) * root.mT
    else:
        M = torch.linalg.inv(A + RIDGE * torch.eye(A.shape[-1], dtype=A.dtype))
    return P @ M @ P.mT
