"""The definition of the recurrence, beside which every faster form is laid: token by token, and as
a matrix of all pairs of tokens.

Works in the dtype it is given (float64 for the tests), in float32 at least. Plain autograd, so
both forms can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """ "parallel" forms the pairs; every other form goes token by token."""
    run: Callable[..., tuple[Tensor, Tensor]] = parallel if form == "parallel" else recurrent
    dtype = torch.promote_types(v.dtype, torch.float32)
    out = v.dtype
    inputs = [None if t is None else t.to(dtype) for t in expand_heads(q, k, v, decay, beta)]
    if state is None:
        H = max(t.shape[2] for t in inputs if t is not None)
        N = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        state = q.new_zeros(N, H, q.shape[3], v.shape[3])
    state = state.to(dtype)
    if cu_seqlens is None:
        o, last = run(*inputs, scale, state)
        return o.to(out), last
    outs, lasts = [], []
    for n, rows in enumerate(segments(cu_seqlens)):
        cut = [None if t is None else t[:, rows] for t in inputs]
        o, last = run(*cut, scale, state[n : n + 1])
        outs.append(o)
        lasts.append(last)
    return torch.cat(outs, 1).to(out), torch.cat(lasts, 0)


def recurrent(q, k, v, decay, beta, scale, S) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t k_t (v_t - S'^T k_t)^T;  o_t = scale S_t^T q_t."""
    outs = []
    for t in range(q.shape[1]):
        if decay is not None:
            g = decay[:, t].exp()
            S = S * (g[..., None] if g.dim() == 3 else g[..., None, None])
        write = v[:, t]
        if beta is not None:
            old = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
            write = beta[:, t, :, None] * (write - old)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v), S


def parallel(q, k, v, decay, beta, scale, S) -> tuple[Tensor, Tensor]:
    """With b_t the sum of the log gates up to t, and a pair's gate exp(b_i - b_j), j <= i:

    D = (I + strict_lower(beta K K^T))^-1 beta (V - (exp(b) K) S)  with the delta rule, else V;
    O = scale ((exp(b) Q) S + lower(Q K^T) D);   S_T = exp(b_T) S + (exp(b_T - b) K)^T D.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    T = q.shape[2]
    if T == 0:
        return v.transpose(1, 2), S
    if decay is None:
        b = q.new_zeros(*q.shape[:3], 1)
    else:
        b = (decay if decay.dim() == 4 else decay[..., None]).transpose(1, 2).cumsum(2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)[..., None]
    gates = (b[:, :, :, None] - b[:, :, None]).masked_fill(future, -torch.inf).exp()
    gates = gates.expand(-1, -1, -1, -1, q.shape[3])
    D = v
    if beta is not None:
        beta = beta.transpose(1, 2)[..., None]
        N = (beta * torch.einsum("bhik,bhjk,bhijk->bhij", k, k, gates)).tril(-1)
        Y = beta * (v - (b.exp() * k) @ S)
        D = torch.linalg.solve_triangular(
            N + torch.eye(T, dtype=q.dtype, device=q.device), Y, upper=False, unitriangular=True
        )
    o = (b.exp() * q) @ S + torch.einsum("bhik,bhjk,bhijk->bhij", q, k, gates) @ D
    end = b[:, :, -1:]
    S = end.exp().mT * S + ((end - b).exp() * k).mT @ D
    return scale * o.transpose(1, 2), S
