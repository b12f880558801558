"""The definition of mixed attention, dense, beside which every faster form is laid.

    a_ij = w exp(scale q_i . k_j - m_i)   j exact, m_i the largest of these scaled scores
    b_ij = phi_q_i . phi_k_j              j <= i otherwise
    o_i  = (sum_j a_ij v_j + g_i * (sum_j b_ij v_j + S^T phi_q_i))
         / (sum_j a_ij + sum_j b_ij + z . phi_q_i + eps)

In the dtype it is given, in float32 at least; float64 in the tests. Quadratic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.kernel_attention.near import Near, places
from subquad.ops.layout import repeat_heads, segments


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, *, near: Near, scale: float,
    weight: Tensor | None, gate: Tensor | None, chosen: Tensor | None,
    state: tuple[Tensor, Tensor] | None, starts: Tensor | None, cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    rest: dict[str, Any] = {"near": near, "scale": scale, "weight": weight, "eps": eps}
    if cu_seqlens is None:
        return _rows(
            q, k, v, phi_q, phi_k, gate=gate, chosen=chosen, state=state, starts=starts, **rest
        )
    parts = []
    for n, cut in enumerate(segments(cu_seqlens)):
        by_token = [None if t is None else t[:, cut] for t in (gate, chosen)]
        past = None if state is None else (state[0][n : n + 1], state[1][n : n + 1])
        inputs = (t[:, cut] for t in (q, k, v, phi_q, phi_k))
        gates, kept = by_token
        parts.append(_rows(*inputs, gate=gates, chosen=kept, state=past, starts=None, **rest))
    S = torch.cat([state[0] for _, state in parts])
    z = torch.cat([state[1] for _, state in parts])
    return torch.cat([o for o, _ in parts], 1), (S, z)


def _rows(q, k, v, phi_q, phi_k, *, near, scale, weight, gate, chosen, state, starts, eps):
    dtype = torch.promote_types(v.dtype, torch.float32)
    (B, T, H, _), S, (L, F) = q.shape, k.shape[1], (phi_k.shape[1], phi_k.shape[3])
    if S == 0:
        empty = state or (q.new_zeros(B, H, F, v.shape[3], dtype=dtype), q.new_zeros(B, H, F))
        return v.new_zeros(B, 0, H, v.shape[3]), empty
    exact, linear, flushed = pairs(S, T, near, chosen, starts, state is not None, q.device)
    out = v.dtype
    v = repeat_heads(v, H).to(dtype)
    phi_q, phi_k = phi_q.to(dtype), phi_k.to(dtype)
    a, b = weigh(q, k, phi_q, phi_k, exact, linear, scale, weight)
    far = torch.einsum("bhij,bjhv->bihv", b, v)
    total = (a.sum(-1) + b.sum(-1)).transpose(1, 2)
    if state is not None:
        far = far + torch.einsum("bihf,bhfv->bihv", phi_q, state[0].to(dtype))
        total = total + torch.einsum("bihf,bhf->bih", phi_q, state[1].to(dtype))
    far = far if gate is None else far * gate.to(dtype)
    total = total + eps
    o = torch.einsum("bhij,bjhv->bihv", a, v) + far
    o = o / torch.where(total == 0, 1.0, total)[..., None]
    left = phi_k * flushed[:, :L].to(dtype)[..., None]
    after = torch.einsum("bjhf,bjhv->bhfv", left, v[:, :L]), left.sum(1)
    if state is not None:
        after = after[0] + state[0].to(dtype), after[1] + state[1].to(dtype)
    return o.to(out), after


def mixed_weights(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, *, near: Near, scale: float,
    weight: Tensor | None = None, chosen: Tensor | None = None, starts: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """``(a + b) / (sum (a + b) + eps)``, ``[B,H,T,T]``, of whole texts without a past."""
    T = q.shape[1]
    exact, linear, _ = pairs(T, T, near, chosen, starts, False, q.device)
    a, b = weigh(q, k, phi_q, phi_k, exact, linear, scale, weight)
    total = (a + b).sum(-1, keepdim=True) + eps
    return (a + b) / torch.where(total == 0, 1.0, total)


def pairs(
    S: int, T: int, near: Near, chosen: Tensor | None, starts: Tensor | None, past: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the last T queries and all S keys: the exact pairs and the linear ones, bool
    ``[B or 1, H or 1, T, S]``, and the keys that the state takes over, ``[B or 1, S, H or 1]``."""
    place, _ = places(S, starts, None, device)
    covered = near.flushed(_seen(place, S - T)) if past else torch.zeros_like(place[:, 0])
    live = (place >= 0) & (place >= covered[:, None])
    p, j = place[:, None, S - T :, None], place[:, None, None, :]
    causal = (j <= p) & live[:, None, None]
    exact = near.exact(p, j)
    flushed = (live & (place < near.flushed(_seen(place, S))[:, None]))[..., None]
    if chosen is not None:
        exact = exact | chosen.transpose(1, 2)[:, :, None]
        flushed = flushed & ~chosen
    return causal & exact, causal & ~exact, flushed


def _seen(place: Tensor, columns: int) -> Tensor:
    """int64 ``[B or 1]``, the tokens of each sequence before the column ``columns``."""
    return (place[:, 0] + columns).clamp_min(0)


def weigh(q, k, phi_q, phi_k, exact, linear, scale, weight) -> tuple[Tensor, Tensor]:
    """The weights a and b ``[B,H,T,S]`` before the division."""
    dtype, H, S = phi_q.dtype, q.shape[2], k.shape[1]
    scores = scale * torch.einsum("bihk,bjhk->bhij", q.to(dtype), repeat_heads(k, H).to(dtype))
    scores = scores.masked_fill(~exact, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    a = (scores - torch.where(top == -torch.inf, 0.0, top)).exp()
    if weight is not None:
        a = a * weight.to(dtype)[:, None, None]
    short = S - phi_k.shape[1]
    b = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k)
    b = torch.nn.functional.pad(b, (0, short)).masked_fill(~linear, 0.0)
    return a, b
