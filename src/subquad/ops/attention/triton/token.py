"""Attention of one token over keys of its choice: few launches, as a token's time is theirs."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel

LOG2E = tl.constexpr(1.4426950408889634)


@partial(Kernel, sizes=("S", "first", "n"))
def token_kernel(
    Q, K_, V_, STARTS, O, scale, S, first, n, H, G, N,
    sqb, sqh, skb, skt, skh, svb, svt, svh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SIZE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One head, BN keys of its spans at a time."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    q = tl.load(Q + b.to(tl.int64) * sqb + h * sqh + d, mask=d < K, other=0.0).to(tl.float32)
    q *= scale * LOG2E
    g = h // (H // G)
    K_ += b.to(tl.int64) * skb + g * skh
    V_ += b.to(tl.int64) * svb + g * svh
    STARTS += (b.to(tl.int64) * N + h // (H // N)) * n
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BV], tl.float32)
    for i in range(0, n * SIZE, BN):
        at = i + tl.arange(0, BN)
        start = tl.load(STARTS + at // SIZE, mask=at < n * SIZE, other=-1)
        key = start + at % SIZE
        there = (start >= 0) & (key < S) & (key >= first)
        row = tl.where(there, key, 0).to(tl.int64)
        k = tl.load(K_ + row[:, None] * skt + d[None, :], mask=(d < K)[None, :], other=0.0)
        s = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(s - safe)
        shrink = tl.exp2(top - safe)
        v = tl.load(V_ + row[:, None] * svt + e[None, :], mask=(e < V)[None, :], other=0.0)
        acc = acc * shrink + tl.sum(v.to(tl.float32) * w[:, None], 0)
        total = total * shrink + tl.sum(w, 0)
        top = new
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(O + tl.program_id(0).to(tl.int64) * V + e, out.to(O.dtype.element_ty), mask=e < V)


def token(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, size: int, *, scale: float, first: int = 0
) -> Tensor:
    """``o [B,1,H,V]`` of ``q [B,1,H,K]`` over ``size`` keys from each of ``starts [B,N,n]`` on, -1
    for none, that are not before ``first`` nor behind the end."""
    (B, _, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o = torch.empty(B, 1, H, V, dtype=v.dtype, device=q.device)
    token_kernel.launch(
        (B * H,), (q, k, v, starts.contiguous(), o),
        scale, S, first, starts.shape[2], H, G, starts.shape[1],
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        K=K, V=V, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V), SIZE=size,
        BN=64, num_warps=4,
    )  # fmt: skip
    return o
