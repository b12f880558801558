"""The definition of the recurrence, token by token, beside which every faster form is laid.

Works in the dtype it is given (float64 for the tests); the state is kept in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.layout import expand_heads, segments


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str = "recurrent",
) -> tuple[Tensor, Tensor]:
    q, k, v, decay, beta = expand_heads(q, k, v, decay, beta)
    if cu_seqlens is None:
        o, last = recurrent(q, k, v, decay, beta, scale, state)
        return o.to(v.dtype), last
    outs, lasts = [], []
    for n, rows in enumerate(segments(cu_seqlens)):
        cut = [None if t is None else t[:, rows] for t in (q, k, v, decay, beta)]
        o, last = recurrent(*cut, scale, None if state is None else state[n : n + 1])
        outs.append(o)
        lasts.append(last)
    return torch.cat(outs, 1).to(v.dtype), torch.cat(lasts, 0)


def recurrent(q, k, v, decay, beta, scale, state) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t k_t (v_t - S'^T k_t)^T;  o_t = scale S_t^T q_t."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(dtype)
    outs = []
    for t in range(T):
        if decay is not None:
            g = decay[:, t].to(dtype).exp()
            S = S * (g[..., None] if g.dim() == 3 else g[..., None, None])
        write = v[:, t]
        if beta is not None:
            old = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
            write = beta[:, t, :, None].to(dtype) * (write - old)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    o = torch.stack(outs, 1) if outs else v.new_zeros(v.shape)
    return o, S
