"""The definition of mixed attention, dense, beside which every faster form is laid.

    a_ij = w exp(scale q_i . k_j - m_i)   j exact, m_i the largest of these scaled scores
    b_ij = phi_q_i . phi_k_j              j <= i otherwise
    o_i  = (sum_j a_ij v_j + g_i * (sum_j b_ij v_j + S^T phi_q_i))
         / (sum_j a_ij + sum_j b_ij + z . phi_q_i + eps)

In the dtype it is given, in float32 at least; float64 in the tests. Quadratic.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.kernel_attention.near import How, places
from subquad.ops.layout import repeat_heads, segments

Pair = tuple[Tensor, Tensor]


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, how: How
) -> tuple[Tensor, Pair]:
    if how.cu_seqlens is None:
        return _rows(q, k, v, phi_q, phi_k, how)
    parts = []
    for n, cut in enumerate(segments(how.cu_seqlens)):
        gate = None if how.gate is None else how.gate[:, cut]
        past = None if how.state is None else (how.state[0][n : n + 1], how.state[1][n : n + 1])
        own = replace(how, gate=gate, state=past, cu_seqlens=None)
        cuts = q[:, cut], k[:, cut], v[:, cut], phi_q[:, cut], phi_k[:, cut]
        parts.append(_rows(*cuts, own))
    S = torch.cat([state[0] for _, state in parts])
    z = torch.cat([state[1] for _, state in parts])
    return torch.cat([o for o, _ in parts], 1), (S, z)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, how: How
) -> tuple[Tensor, Pair]:
    dtype, out = torch.promote_types(v.dtype, torch.float32), v.dtype
    (B, T, H, _), S, (L, width) = q.shape, k.shape[1], (phi_k.shape[1], phi_k.shape[3])
    S0, z0 = how.state or (
        q.new_zeros(B, H, width, v.shape[3], dtype=dtype),
        q.new_zeros(B, H, width, dtype=dtype),
    )
    S0, z0 = S0.to(dtype), z0.to(dtype)
    if S == 0:
        return v.new_zeros(B, 0, H, v.shape[3]), (S0, z0)
    v = repeat_heads(v, H).to(dtype)
    phi_q, phi_k = phi_q.to(dtype), phi_k.to(dtype)
    a, b = weigh(q, k, phi_q, phi_k, how)
    values = v if how.kept is None else torch.cat([v, how.kept[1].to(dtype)], 1)
    far = torch.einsum("bhij,bjhv->bihv", b, v) + torch.einsum("bihf,bhfv->bihv", phi_q, S0)
    far = far if how.gate is None else far * how.gate.to(dtype)
    total = (a.sum(-1) + b.sum(-1)).transpose(1, 2) + torch.einsum("bihf,bhf->bih", phi_q, z0)
    total = total + how.eps
    o = torch.einsum("bhij,bjhv->bihv", a, values) + far
    o = o / torch.where(total == 0, 1.0, total)[..., None]

    flushed = places(T, S, how, q.device).flushed[..., None]
    flushed = flushed if how.chosen is None else flushed & ~how.chosen
    left = phi_k * flushed[:, :L].to(dtype)[..., None]
    return o.to(out), (S0 + torch.einsum("bjhf,bjhv->bhfv", left, v[:, :L]), z0 + left.sum(1))


def weigh(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, how: How) -> Pair:
    """a ``[B,H,T,S(+M)]`` and b ``[B,H,T,S]`` before the division, a over the kept keys too."""
    (T, H), S, dtype = q.shape[1:3], k.shape[1], torch.promote_types(phi_q.dtype, torch.float32)
    at = places(T, S, how, q.device)
    p, j = at.place[:, None, S - T :, None], at.place[:, None, None]
    causal = (j <= p) & at.live[:, None, None]
    exact = how.near.exact(p, j)
    if how.chosen is not None:
        exact = exact | how.chosen.transpose(1, 2)[:, :, None]
    exact, linear = causal & exact, causal & ~exact
    k = repeat_heads(k, H)
    if how.kept is not None:
        k = torch.cat([k, how.kept[0]], 1)
        seen = how.kept[2][:, None, None].expand(-1, H, T, -1)
        exact = torch.cat([exact.expand(len(seen), H, -1, -1), seen], -1)
    scores = how.scale * torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype))
    scores = scores.masked_fill(~exact, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    a = (scores - torch.where(top == -torch.inf, 0.0, top)).exp()
    if how.weight is not None:
        a = a * how.weight.to(dtype)[:, None, None]
    b = torch.einsum("bihf,bjhf->bhij", phi_q.to(dtype), phi_k.to(dtype))
    return a, F.pad(b, (0, S - phi_k.shape[1])).masked_fill(~linear, 0.0)


def mixed_weights(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, how: How) -> Tensor:
    """``(a + b) / (sum (a + b) + eps)``, ``[B,H,T,T]``, of whole texts without a past."""
    a, b = weigh(q, k, phi_q, phi_k, how)
    total = (a + b).sum(-1, keepdim=True) + how.eps
    return (a + b) / torch.where(total == 0, 1.0, total)
