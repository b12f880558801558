"""The backward kernels: rows' sums, then dq and dr by queries, then dk and dv by keys.

With ``u = t - mean t`` and ``g = do . mean - e`` (see :mod:`subquad.ops.probe.chunk`):

    a = p (1 - u),   dt = p g,   ds = p (e - delta + u g)
"""

from functools import partial

import triton.language as tl

from subquad.ops.kernel import Kernel
from subquad.ops.probe.triton.forward import SIZES, rows_at, span_of

LOG2E = tl.constexpr(1.4426950408889634)


@partial(Kernel, sizes=("rows", "T", "H"))
def probe_rows(
    O, MEAN, DO, LSE, DLSE, LSE2, DELTA, PULL, rows, T, H, sdb, sdt, sdh,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``do . (mean - o) + dlse``, ``do . mean``, lse in base 2 (+inf where a row sees no key)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    exists = row < rows
    token, h = row // H, row % H
    do = rows_at(DO, token // T * sdb + token % T * sdt + h * sdh, exists, V, BV).to(tl.float32)
    o = rows_at(O, row * V, exists, V, BV).to(tl.float32)
    mean = rows_at(MEAN, row * V, exists, V, BV).to(tl.float32)
    lse = tl.load(LSE + row, mask=exists, other=0.0)
    seen = lse > float("-inf")
    dlse = tl.where(seen, tl.load(DLSE + row, mask=exists, other=0.0), 0.0)
    tl.store(DELTA + row, tl.sum(do * (mean - o), 1) + dlse, mask=exists)
    tl.store(PULL + row, tl.sum(do * mean, 1), mask=exists)
    tl.store(LSE2 + row, tl.where(seen, lse * LOG2E, float("inf")), mask=exists)


@partial(Kernel, sizes=SIZES)
def probe_grad_q(
    Q, K_, V_, R, DO, LO, HI, LSE2, DRIFT, DELTA, PULL, DQ, DR,
    scale, T, S, H, G, plane,
    sqb, sqt, sqh, skb, sks, skh, svb, svs, svh, srb, srt, srh, sdb, sdt, sdh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. DQ and DR ``[B,T,H,K]`` are contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    m = block * BM + tl.arange(0, BM)
    exists = m < T
    lo, hi, first, last = span_of(LO, HI, b * plane + m, exists, S)
    wide = m.to(tl.int64)
    q = rows_at(Q + b * sqb + h * sqh, wide * sqt, exists, K, BK)
    r = rows_at(R + b * srb + h * srh, wide * srt, exists, K, BK)
    do = rows_at(DO + b * sdb + h * sdh, wide * sdt, exists, V, BV)
    at = (b * T + m) * H + h
    lse = tl.load(LSE2 + at, mask=exists, other=float("inf"))
    drift = tl.load(DRIFT + at, mask=exists, other=0.0)
    delta = tl.load(DELTA + at, mask=exists, other=0.0)
    pull = tl.load(PULL + at, mask=exists, other=0.0)
    K_ += b * skb + g * skh
    V_ += b * svb + g * svh
    dq = tl.zeros([BM, BK], tl.float32)
    dr = tl.zeros([BM, BK], tl.float32)
    for start in range(first // BN * BN, last, BN):
        n = start + tl.arange(0, BN)
        there = n < S
        k = rows_at(K_, n.to(tl.int64) * sks, there, K, BK)
        v = rows_at(V_, n.to(tl.int64) * svs, there, V, BV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        t = tl.dot(r, tl.trans(k), input_precision=PRECISION)
        e = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        keep = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None])
        p = tl.exp2(tl.where(keep, s - lse[:, None], float("-inf")))
        gap = pull[:, None] - e
        dr = tl.dot((p * gap).to(k.dtype), k, dr, input_precision=PRECISION)
        ds = p * (delta[:, None] - (1.0 - t + drift[:, None]) * gap)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    d = tl.arange(0, BK)
    to = at[:, None] * K + d[None, :]
    keep = exists[:, None] & (d < K)[None, :]
    tl.store(DQ + to, (dq * scale).to(DQ.dtype.element_ty), mask=keep)
    tl.store(DR + to, dr.to(DR.dtype.element_ty), mask=keep)


@partial(Kernel, sizes=(*SIZES, "blocks", "own"))
def probe_grad_kv(
    Q, K_, V_, R, DO, LO, HI, FIRST, LAST, LSE2, DRIFT, DELTA, PULL, DK, DV,
    scale, T, S, H, G, plane, blocks, own,
    sqb, sqt, sqh, skb, sks, skh, svb, svs, svh, srb, srt, srh, sdb, sdt, sdh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one group, and the queries ``FIRST..LAST`` of all its heads.

    FIRST and LAST hold ``blocks`` numbers a plane and step by ``own`` from row to row. All products
    have the keys as rows, so that none is turned. DK and DV are contiguous.
    """
    block = tl.program_id(0)
    b = (tl.program_id(1) // G).to(tl.int64)
    g = tl.program_id(1) % G
    n = block * BN + tl.arange(0, BN)
    there = n < S
    k = rows_at(K_ + b * skb + g * skh, n.to(tl.int64) * sks, there, K, BK)
    v = rows_at(V_ + b * svb + g * svh, n.to(tl.int64) * svs, there, V, BV)
    first = tl.load(FIRST + b * own + block)
    last = tl.load(LAST + b * own + block)
    dk = tl.zeros([BN, BK], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    for head in range(0, H // G):
        h = g * (H // G) + head
        for start in range(first // BM * BM, last, BM):
            m = start + tl.arange(0, BM)
            exists = m < T
            wide = m.to(tl.int64)
            at = (b * T + m) * H + h
            q = rows_at(Q + b * sqb + h * sqh, wide * sqt, exists, K, BK)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            lo = tl.load(LO + b * plane + m, mask=exists, other=0)
            hi = tl.load(HI + b * plane + m, mask=exists, other=0)
            keep = (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
            lse = tl.load(LSE2 + at, mask=exists, other=float("inf"))
            p = tl.exp2(tl.where(keep, s - lse[None, :], float("-inf")))
            r = rows_at(R + b * srb + h * srh, wide * srt, exists, K, BK)
            t = tl.dot(k, tl.trans(r), input_precision=PRECISION)
            drift = tl.load(DRIFT + at, mask=exists, other=0.0)
            a = p * (1.0 - t + drift[None, :])
            do = rows_at(DO + b * sdb + h * sdh, wide * sdt, exists, V, BV)
            dv = tl.dot(a.to(do.dtype), do, dv, input_precision=PRECISION)
            e = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            pull = tl.load(PULL + at, mask=exists, other=0.0)
            gap = pull[None, :] - e
            dk = tl.dot((p * gap).to(r.dtype), r, dk, input_precision=PRECISION)
            delta = tl.load(DELTA + at, mask=exists, other=0.0)
            ds = (p * delta[None, :] - a * gap) * scale
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = (b * S + n) * G + g
    d = tl.arange(0, BK)
    keep = there[:, None] & (d < K)[None, :]
    tl.store(DK + at[:, None] * K + d[None, :], dk.to(DK.dtype.element_ty), mask=keep)
    d = tl.arange(0, BV)
    keep = there[:, None] & (d < V)[None, :]
    tl.store(DV + at[:, None] * V + d[None, :], dv.to(DV.dtype.element_ty), mask=keep)
