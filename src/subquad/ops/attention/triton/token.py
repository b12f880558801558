"""Attention of one token: its keys are dealt out over the GPU, and the parts are merged.

Legend: B batch, H query heads, S keys, G key heads, K head dim, V value dim, N lists (of spans, or
one for each key head), n spans in a list; a program's BM rows are the heads that share a list.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from subquad.ops.kernel import Kernel, on_device

LOG2E = tl.constexpr(1.4426950408889634)
# All keys, or spans: at most how many programs, and their tiles of BN keys.
PROGRAMS = {"all": 128, "spans": 528}
TILES = {
    "all": {"BN": 64, "num_warps": 4, "num_stages": 3},
    "spans": {"BN": 32, "num_warps": 4, "num_stages": 3},
    "rotated": {"BN": 64, "num_warps": 4, "num_stages": 2},
    "rotated float32": {"BN": 16, "num_warps": 4, "num_stages": 2},
    "float32": {"BN": 32, "num_warps": 4, "num_stages": 3},
    "wide": {"BN": 32, "num_warps": 8, "num_stages": 2},
}


@partial(Kernel, sizes=("S", "shift", "window", "n", "splits", "sinks", "ring"))
def part_kernel(
    Q, K_, V_, STARTS, CLOCK, COS, SIN, PARTNER, O, LSE,
    scale, S, shift, window, n, splits, sinks, ring, H, G, N,
    sqb, sqh, skb, skt, skh, svb, svt, svh,
    GROUP: tl.constexpr, BM: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One list, one part of its keys, BN of them at a time."""
    b, c = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    m, d, e = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BV)
    h = c * GROUP + m
    there = (m < GROUP)[:, None]
    Q += b * sqb + h[:, None] * sqh
    q = tl.load(Q + d[None, :], mask=there & (d < K)[None, :], other=0.0)
    g = c // (N // G)
    K_ += b * skb + g * skh
    V_ += b * svb + g * svh
    length = S
    if CLOCK is not None:
        length = tl.minimum(tl.load(CLOCK).to(tl.int32) + shift + 1, S)
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    last, own, partners = shift, 0, q
    if COS is not None:
        # (R k) . q is taken as k . (R^T q), so that k is read as it lies: features times their
        # cosines for q, and times their sines for q's partners.
        if CLOCK is not None:
            last += tl.load(CLOCK).to(tl.int32)
        own = tl.minimum(last, sinks + ring - 1)
        other = tl.load(PARTNER + d, mask=d < K, other=0)
        mine, theirs = own * K + d, own * K + other
        partners = tl.load(Q + other[None, :], mask=there & (d < K)[None, :], other=0.0)
        near = q * tl.load(COS + mine, mask=d < K, other=0.0)[None, :].to(tl.float32)
        near += partners * tl.load(SIN + theirs, mask=d < K, other=0.0)[None, :].to(tl.float32)
        far = partners * tl.load(COS + theirs, mask=d < K, other=0.0)[None, :].to(tl.float32)
        far += q * tl.load(SIN + mine, mask=d < K, other=0.0)[None, :].to(tl.float32)
        q, partners = near.to(q.dtype), far.to(q.dtype)
    if STARTS is None:
        keys = length - first
    else:
        keys = n * SIZE
        STARTS += (b * N + c) * n
    each = tl.cdiv(tl.cdiv(keys, splits), BN) * BN
    begin = tl.program_id(0) * each
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for i in range(begin, tl.minimum(begin + each, keys), BN):
        at = i + tl.arange(0, BN)
        if STARTS is None:
            key = first + at
            seen = key < length
        else:
            start = tl.load(STARTS + at // SIZE, mask=at < keys, other=-1)
            key = start + at % SIZE
            seen = (start >= 0) & (key < length) & (key >= first)
        row = tl.where(seen, key, 0).to(tl.int64)[:, None]
        k = tl.load(K_ + row * skt + d[None, :], mask=seen[:, None] & (d < K)[None, :], other=0.0)
        if COS is None:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            place = tl.where(key < sinks, key, own - (last - key) % ring)
            place = tl.where(seen, place, 0)[:, None] * K + d[None, :]
            cos = tl.load(COS + place, mask=seen[:, None] & (d < K)[None, :], other=0.0)
            sin = tl.load(SIN + place, mask=seen[:, None] & (d < K)[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k * cos), input_precision=PRECISION)
            s = tl.dot(partners, tl.trans(k * sin), s, input_precision=PRECISION)
        s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        v = tl.load(V_ + row * svt + e[None, :], mask=seen[:, None] & (e < V)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(w.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(w, 1)
        top = new
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = ((b * H + h) * splits + tl.program_id(0))[:, None]
    tl.store(O + row * V + e[None, :], out.to(O.dtype.element_ty), mask=there & (e < V)[None, :])
    if LSE is not None:
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(LSE + row, lse[:, None], mask=there)


@partial(Kernel, sizes=("splits",))
def merge_kernel(
    PARTS, LSE, O, splits, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Some features of one head: its parts by their weights."""
    head = tl.program_id(0).to(tl.int64)
    i, e = tl.arange(0, BS), tl.program_id(1) * BV + tl.arange(0, BV)
    lse = tl.load(LSE + head * splits + i, mask=i < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    w = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(w, 0)
    w /= tl.where(total > 0, total, 1.0)
    at = (head * splits + i)[:, None] * V + e[None, :]
    parts = tl.load(PARTS + at, mask=(i < splits)[:, None] & (e < V)[None, :], other=0.0)
    out = tl.sum(parts * w[:, None], 0)
    tl.store(O + head * V + e, out.to(O.dtype.element_ty), mask=e < V)


def token(q, k, v, starts, size, scale, window, clock, shift, rope, ring):
    """As :func:`subquad.ops.attention.token.token`."""
    (B, _, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    N, n = (G, 0) if starts is None else starts.shape[1:]
    starts = starts if starts is None else starts.contiguous()
    kind, wide = "spans" if n else "all", " float32" if q.dtype == torch.float32 else ""
    form = "rotated" if rope else "wide" if max(K, V) > 256 else ""
    cos, sin, partner = rope or (None, None, None)
    tile = TILES[(form + wide).strip() or kind]
    splits = max(1, min(triton.cdiv(n * size or S, tile["BN"]), PROGRAMS[kind] // (B * N)))
    o = torch.empty(B, 1, H, V, dtype=v.dtype, device=q.device)
    lse, parts = None, o
    if splits > 1:
        parts = torch.empty(B, H, splits, V, dtype=torch.float32, device=q.device)
        lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    with on_device(q):
        part_kernel.launch(
            (splits, B * N), (q, k, v, starts, clock, cos, sin, partner, parts, lse),
            scale, S, shift, window or 0, n, splits, *ring, H, G, N,
            q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
            GROUP=H // N, BM=max(16, triton.next_power_of_2(H // N)), K=K, V=V,
            BK=max(16, triton.next_power_of_2(K)), BV=max(16, triton.next_power_of_2(V)),
            SIZE=size, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", **tile,
        )  # fmt: skip
        if splits > 1:
            BV = 32
            merge_kernel.launch(
                (B * H, triton.cdiv(V, BV)), (parts, lse, o), splits,
                V=V, BV=BV, BS=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
    return o
