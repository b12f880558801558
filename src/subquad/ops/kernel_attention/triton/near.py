"""Kernels of the exact part: exponentials of near keys under their maximum, times the values.

    N_i = sum_j p_ij v_j,   d_i = sum_j p_ij,   p_ij = exp(s_ij - m_i),   m_i = max_j s_ij

One walk over a query block's near keys gives N, d, m and where it lies, a; both backward walks make
p again from m. With dP = dN v^T + dd, dS = P * dP, less at a_i what a row of it adds up to:
dN_i . N_i + dd_i d_i.

Legend: t row of a query, i = t + offset its column, j column of a key, BM rows and BN columns of a
tile, C, BEFORE, WINDOW as in :class:`~subquad.ops.kernel_attention.exact.Band`.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel

SIZES = ["T", "S", "H", "G", "offset", "C", "BEFORE", "WINDOW"]  # none costs a compilation
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(X, rows, n, stride, D: tl.constexpr, BD: tl.constexpr):
    """``[rows,BD]`` of X ``[n,D]``, zeros outside."""
    d = tl.arange(0, BD)
    at = X + rows.to(tl.int64)[:, None] * stride + d[None, :]
    there = ((rows >= 0) & (rows < n))[:, None] & (d < D)[None, :]
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def _near(t, j, T, offset, C, BEFORE, WINDOW):
    """bool, t and j one a row and the other a column, whether key j is near query t."""
    i = t + offset
    return (j <= i) & (i - j < WINDOW) & (j >= offset + (t // C - BEFORE) * C) & (t < T)


@triton.jit
def _first(t, offset, C, BEFORE, WINDOW):
    """The first key column that query row t may see."""
    return tl.maximum(0, offset + tl.maximum((t // C - BEFORE) * C, t - WINDOW + 1))


@partial(Kernel, sizes=SIZES)
def near_forward(
    Q, K_, V_, QI, KI, N, DEN, TOP, ARG, scale, T, S, H, G, offset, C, BEFORE, WINDOW,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sqi, ski,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    Q += r * sqb + h * sqh
    K_ += r * skb + h // (H // G) * skh
    V_ += r * svb + h // (H // G) * svh
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _tile(Q, t, T, sqt, K, BK)
    q_id = tl.load(QI + r * sqi + t, mask=t < T, other=-2)
    top = tl.full([BM], float("-inf"), tl.float32)
    arg = tl.full([BM], -1, tl.int32)
    den = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BV], tl.float32)
    start = _first(tl.program_id(0) * BM, offset, C, BEFORE, WINDOW) // BN * BN
    stop = tl.minimum(S, tl.program_id(0) * BM + BM + offset)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        k = _tile(K_, j, S, skt, K, BK)
        k_id = tl.load(KI + r * ski + j, mask=j < S, other=-1)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        see = _near(t[:, None], j[None, :], T, offset, C, BEFORE, WINDOW)
        see = see & (q_id[:, None] == k_id[None, :])
        s = tl.where(see, s, float("-inf"))
        most = tl.max(s, 1)
        where = tl.min(tl.where(s == most[:, None], j[None, :], S), 1)
        arg = tl.where(most > top, where, arg)
        new = tl.maximum(top, most)
        safe = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2((top - safe) * LOG2E)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        den = den * fade + tl.sum(p, 1)
        v = _tile(V_, j, S, svt, V, BV)
        high = p.to(v.dtype)
        out = out * fade[:, None] + tl.dot(high, v, input_precision=PRECISION)
        if v.dtype != tl.float32:
            # What rounding p leaves out: gradients that sum over the tokens would gather it.
            low = (p - high.to(tl.float32)).to(v.dtype)
            out += tl.dot(low, v, input_precision=PRECISION)
        top = new
    row = (r * T + t) * H + h
    d = tl.arange(0, BV)
    tl.store(N + row[:, None] * V + d[None, :], out, mask=(t < T)[:, None] & (d < V)[None, :])
    tl.store(DEN + row, den, mask=t < T)
    tl.store(TOP + row, tl.where(top == float("-inf"), 0.0, top), mask=t < T)
    tl.store(ARG + row, arg, mask=t < T)


@partial(Kernel, sizes=SIZES)
def near_queries(
    Q, K_, V_, QI, KI, DN, DD, TOP, ARG, SUM, DQ, scale, T, S, H, G, offset, C, BEFORE, WINDOW,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sqi, ski,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q; DN, DQ ``[R,T,H,.]``, DD, TOP, ARG, SUM ``[R,T,H]``."""
    r, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    Q += r * sqb + h * sqh
    K_ += r * skb + h // (H // G) * skh
    V_ += r * svb + h // (H // G) * svh
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    row = r * T * H + h
    q = _tile(Q, t, T, sqt, K, BK).to(tl.float32)
    q_id = tl.load(QI + r * sqi + t, mask=t < T, other=-2)
    dn = _tile(DN + row * V, t, T, H * V, V, BV)
    at = row + t.to(tl.int64) * H
    dd = tl.load(DD + at, mask=t < T, other=0.0)
    top = tl.load(TOP + at, mask=t < T, other=0.0)
    arg = tl.load(ARG + at, mask=t < T, other=-1)
    total = tl.load(SUM + at, mask=t < T, other=0.0)
    dq = tl.zeros([BM, BK], tl.float32)
    start = _first(tl.program_id(0) * BM, offset, C, BEFORE, WINDOW) // BN * BN
    stop = tl.minimum(S, tl.program_id(0) * BM + BM + offset)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        k = _tile(K_, j, S, skt, K, BK).to(tl.float32)
        v = _tile(V_, j, S, svt, V, BV).to(tl.float32)
        k_id = tl.load(KI + r * ski + j, mask=j < S, other=-1)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        see = _near(t[:, None], j[None, :], T, offset, C, BEFORE, WINDOW)
        see = see & (q_id[:, None] == k_id[None, :])
        p = tl.where(see, tl.exp2((s - top[:, None]) * LOG2E), 0.0)
        dp = tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None]
        ds = p * dp - tl.where(arg[:, None] == j[None, :], total[:, None], 0.0)
        dq += tl.dot(ds, k, input_precision=PRECISION)
    d = tl.arange(0, BK)
    tl.store(
        DQ + at[:, None] * K + d[None, :], dq * scale, mask=(t < T)[:, None] & (d < K)[None, :]
    )


@partial(Kernel, sizes=SIZES)
def near_keys(
    Q, K_, V_, QI, KI, DN, DD, TOP, ARG, SUM, DK, DV, scale, T, S, H, G, offset, C, BEFORE, WINDOW,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sqi, ski,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v of each query head, DK and DV ``[R,S,H,.]``; tiles have keys as
    rows."""
    r, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    Q += r * sqb + h * sqh
    K_ += r * skb + h // (H // G) * skh
    V_ += r * svb + h // (H // G) * svh
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    row = r * T * H + h
    k = _tile(K_, j, S, skt, K, BK).to(tl.float32)
    v = _tile(V_, j, S, svt, V, BV).to(tl.float32)
    k_id = tl.load(KI + r * ski + j, mask=j < S, other=-1)
    dk = tl.zeros([BN, BK], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    last = tl.maximum(tl.program_id(0) * BN + BN - 1 - offset, 0)  # row of the last key's own query
    start = tl.maximum(tl.program_id(0) * BN - offset, 0) // BM * BM
    stop = tl.minimum(T, tl.minimum((last // C + BEFORE + 1) * C, last + WINDOW))
    for first in range(start, stop, BM):
        t = first + tl.arange(0, BM)
        q = _tile(Q, t, T, sqt, K, BK).to(tl.float32)
        dn = _tile(DN + row * V, t, T, H * V, V, BV)
        q_id = tl.load(QI + r * sqi + t, mask=t < T, other=-2)
        at = row + t.to(tl.int64) * H
        dd = tl.load(DD + at, mask=t < T, other=0.0)
        top = tl.load(TOP + at, mask=t < T, other=0.0)
        arg = tl.load(ARG + at, mask=t < T, other=-1)
        total = tl.load(SUM + at, mask=t < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        see = _near(t[None, :], j[:, None], T, offset, C, BEFORE, WINDOW)
        see = see & (q_id[None, :] == k_id[:, None])
        p = tl.where(see, tl.exp2((s - top[None, :]) * LOG2E), 0.0)
        dv += tl.dot(p, dn, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dn), input_precision=PRECISION) + dd[None, :]
        ds = p * dp - tl.where(arg[None, :] == j[:, None], total[None, :], 0.0)
        dk += tl.dot(ds, q, input_precision=PRECISION)
    at = (r * S + j) * H + h
    there = (j < S)[:, None]
    d = tl.arange(0, BK)
    tl.store(DK + at[:, None] * K + d[None, :], dk * scale, mask=there & (d < K)[None, :])
    d = tl.arange(0, BV)
    tl.store(DV + at[:, None] * V + d[None, :], dv, mask=there & (d < V)[None, :])
