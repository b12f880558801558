"""The masses of :mod:`subquad.ops.select.score` as kernels.

The softmax's statistics are found in a first walk over the keys, the masses in a second.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ("T", "offset", "H", "G", "n")  # none costs a compilation


@triton.jit
def _scores(
    q, X, first, n, stride, p, scale, SIZE, STRIDE,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores ``[BM,BN]`` in base 2 against the windows from ``first`` on, -inf where unseen."""
    j = first + tl.arange(0, BN)
    d = tl.arange(0, BK)
    at = X + j.to(tl.int64)[None, :] * stride + d[:, None]
    x = tl.load(at, mask=(j < n)[None, :] & (d < K)[:, None], other=0.0)
    s = tl.dot(q, x, input_precision=PRECISION) * scale
    seen = (j < n)[None, :]
    if CAUSAL:
        seen = seen & ((j * STRIDE + SIZE - 1)[None, :] <= p[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _queries(Q, m, T, stride, K: tl.constexpr, BK: tl.constexpr):
    d = tl.arange(0, BK)
    there = (m < T)[:, None] & (d < K)[None, :]
    return tl.load(Q + m.to(tl.int64)[:, None] * stride + d[None, :], mask=there, other=0.0)


@triton.jit
def _lse(
    q, X, n, stride, p, scale, SIZE, STRIDE, last,
    K: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2**score over all windows, ``[BM]``; +inf where none is seen."""
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for first in range(0, last, BN):
        s = _scores(q, X, first, n, stride, p, scale, SIZE, STRIDE, K, BK, BN, CAUSAL, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = new
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


@partial(Kernel, sizes=(*SIZES, "S", "R"))
def block_kernel(
    Q, KEYS, OUT, scale, T, S, offset, H, G, R, n, sqb, sqt, sqh, skb, skt, skh,
    K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    m = r * ROWS + tl.arange(0, ROWS)
    q = _queries(Q + b.to(tl.int64) * sqb + h * sqh, m, T, sqt, K, BK)
    KEYS += b.to(tl.int64) * skb + h // (H // G) * skh
    p = m + offset
    scale *= LOG2E
    last = S
    if CAUSAL:
        last = tl.minimum(S, r * ROWS + ROWS + offset)
    lse = _lse(q, KEYS, S, skt, p, scale, 1, 1, last, K, BK, ROWS, SIZE, CAUSAL, PRECISION)
    lse = tl.where(m < T, lse, float("inf"))
    OUT += (tl.program_id(1).to(tl.int64) * R + r) * n
    for c in range(0, tl.cdiv(last, SIZE)):
        s = _scores(q, KEYS, c * SIZE, S, skt, p, scale, 1, 1, K, BK, SIZE, CAUSAL, PRECISION)
        w = tl.exp2(s - lse[:, None])
        if LARGEST:
            tl.store(OUT + c, tl.max(tl.max(w, 1), 0))
        else:
            tl.store(OUT + c, tl.sum(tl.sum(w, 1), 0))


@partial(Kernel, sizes=SIZES)
def lse_kernel(
    Q, Y, LSE, scale, T, offset, H, G, n, size, stride, sqb, sqt, sqh, syb, syt, syh,
    K: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LSE ``[B,H,T]`` in base 2 of BM tokens of one head over the windows that they see."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _queries(Q + b.to(tl.int64) * sqb + h * sqh, m, T, sqt, K, BK)
    Y += b.to(tl.int64) * syb + h // (H // G) * syh
    end = tl.program_id(0) * BM + BM + offset
    last = tl.minimum(n, tl.maximum(end - size + stride, 0) // stride)
    lse = _lse(
        q, Y, n, syt, m + offset, scale * LOG2E, size, stride, last, K, BK, BM, BN, True, PRECISION
    )
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + m, lse, mask=m < T)


@partial(Kernel, sizes=SIZES)
def window_kernel(
    Q, X, LSE, OUT, scale, T, offset, H, G, n, size, stride, sqb, sqt, sqh, sxb, sxt, sxh,
    K: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The masses of BM tokens on BN windows, summed over the heads of one key head."""
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    # OUT is zero where the last token of the tile sees no window yet.
    if first * stride + size <= tl.program_id(0) * BM + BM + offset:
        X += b.to(tl.int64) * sxb + g * sxh
        mass = tl.zeros([BM, BN], tl.float32)
        for i in range(GROUP):
            h = g * GROUP + i
            q = _queries(Q + b.to(tl.int64) * sqb + h * sqh, m, T, sqt, K, BK)
            own = LSE + (b * H + h).to(tl.int64) * T + m
            lse = tl.load(own, mask=m < T, other=float("inf"))
            s = _scores(
                q, X, first, n, sxt, m + offset, scale * LOG2E, size, stride, K, BK, BN, True,
                PRECISION,
            )  # fmt: skip
            mass += tl.exp2(s - lse[:, None])
        j = first + tl.arange(0, BN)[None, :]
        at = OUT + (tl.program_id(2).to(tl.int64) * T + m)[:, None] * n + j
        tl.store(at, mass, mask=(m < T)[:, None] & (j < n))


def block_mass(q, k, size, rows, reduce, causal, scale, offset):
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    R, n = cdiv(T, rows), cdiv(S, size)
    out = torch.zeros(B, H, R, n, dtype=torch.float32, device=q.device)
    with on_device(q):
        block_kernel.launch(
            (R, B * H), (q, k, out),
            scale, T, S, offset, H, G, R, n, *q.stride()[:3], *k.stride()[:3],
            K=K, BK=max(16, next_power_of_2(K)), ROWS=rows, SIZE=size, CAUSAL=causal,
            LARGEST=reduce == "max", PRECISION=_precision(q), num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def window_mass(q, windows, size, stride, other, scale, offset):
    (B, T, H, K), (n, G) = q.shape, windows.shape[1:3]
    coarse, size_y, stride_y = other
    q, windows, coarse = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, windows, coarse.to(q.dtype))
    )
    windows = windows.to(q.dtype)
    out = torch.zeros(B, G, T, n, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    shape = {
        "K": K, "BK": max(16, next_power_of_2(K)), "BM": 64, "BN": 64,
        "PRECISION": _precision(q), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    rows = cdiv(T, 64)
    with on_device(q):
        lse_kernel.launch(
            (rows, B * H), (q, coarse, lse),
            scale, T, offset, H, G, coarse.shape[1], size_y, stride_y,
            *q.stride()[:3], *coarse.stride()[:3], **shape,
        )  # fmt: skip
        window_kernel.launch(
            (rows, cdiv(n, 64), B * G), (q, windows, lse, out),
            scale, T, offset, H, G, n, size, stride,
            *q.stride()[:3], *windows.stride()[:3], GROUP=H // G, **shape,
        )  # fmt: skip
    return out


def _precision(q):
    return "tf32x3" if q.dtype == torch.float32 else "tf32"
