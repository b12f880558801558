"""The backward kernels: probabilities are made again from lse, never stored.

    P = exp(s - lse),  dS = P * (do v^T - delta),  delta = sum(do * o) - dlse
    dq = scale dS k,   dk = scale dS^T q,          dv = P^T do

``lse`` arrives in base 2, +inf for rows without keys, so that their P is 0. Scores for dk and dv
are computed transposed from the start: no product is ever turned round.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.attention.triton.walk import (
    BAND,
    band_of,
    band_runs,
    block_of,
    kept,
    keys,
    listed_runs,
    padded,
    plane_of,
    queries,
    rows_of,
    start_of,
    steps,
)
from subquad.ops.kernel import Kernel

# Compiled once for all of their values.
SIZES = [
    "T", "S", "offset", "first", "shift", "rows", "blocks", "H", "G", "NB", "NH", "low", "high",
]  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)


@partial(Kernel, sizes=("T", "H"))
def attention_delta(
    O, DO, LSE, DLSE, DELTA, LSE2, TAKEN, T, H, sot, soh, sob, sdt, sdh, sdb,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta and lse in base 2, float32 ``[B,H,padded(T)]``, from LSE and DLSE ``[B,T,H]``; O and DO
    with any strides but the last; TAKEN int32 ``[8]``, the counters of the kernels that follow,
    becomes 0. One program for BM tokens of a head."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(TAKEN + tl.arange(0, 8), 0)
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = t < T
    v = tl.arange(0, BV)
    there = exists[:, None] & (v < V)[None, :]
    at = t.to(tl.int64)
    o = tl.load(O + b * sob + h * soh + (at * sot)[:, None] + v[None, :], mask=there, other=0.0)
    do = tl.load(DO + b * sdb + h * sdh + (at * sdt)[:, None] + v[None, :], mask=there, other=0.0)
    lse = tl.load(LSE + (b * T + at) * H + h, mask=exists, other=float("-inf"))
    dlse = tl.load(DLSE + (b * T + at) * H + h, mask=exists, other=0.0)
    seen = lse != float("-inf")
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - tl.where(seen, dlse, 0.0)
    to = (b * H + h) * padded(T) + t
    tl.store(DELTA + to, delta)
    tl.store(LSE2 + to, tl.where(seen, lse * LOG2E, float("inf")))


@triton.jit
def _by_query(
    dq, q, do, lse, delta, m_local, p, begin, end, K_, V_, KT, VT, row, col_k, col_v,
    stride_k, stride_v, ENTRY, PATTERN, TABLE, a, c, turn, skip, S, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    SIZE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = start_of(ENTRY, 0, a, c, turn, skip, BN, SIZE, UNIT, KIND)
    for i in range(steps(a, c, BN, SIZE, KIND)):
        after = start_of(ENTRY, i + 1, a, c, turn, skip, BN, SIZE, UNIT, KIND)
        at, there, e, place = keys(ENTRY, i, a, c, BN, SIZE, UNIT, KIND)
        key = start + at
        there = there & (key < S)
        first = tl.cast(start, tl.int64)
        k = block_of(
            K_ + first * stride_k, KT, row + start, col_k, at, there, stride_k, K, BK, MASKED, BULK
        )
        v = block_of(
            V_ + first * stride_v, VT, row + start, col_v, at, there, stride_v, V, BV, MASKED, BULK
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
        if MASKED:
            n_local = place + tl.arange(0, BN)
            keep = kept(
                m_local[:, None], p[:, None], n_local[None, :], key[None, :], S,
                key[None, :], begin[:, None], end[:, None], PATTERN, TABLE, e, place,
                BN, TILE, KIND,
            )  # fmt: skip
            if SIZE % BN != 0 and KIND != BAND:
                keep = keep & there[None, :]
            s = tl.where(keep, s, float("-inf"))
        w = tl.exp2(s)
        dw = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = w * (dw - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        start = after
    return dq


@partial(Kernel, sizes=SIZES)
def attention_grad_q(
    Q, K_, V_, KT, VT, DO, LSE2, DELTA, DQ,
    LO, MID, HI, ENTRY, PATTERN, TABLE, CLO, CHI, CENTRY, PLANE,
    scale, T, S, offset, first, shift, rows, H, G, NB, NH, low, high,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, HG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PER_ROW: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq: one program for BQ queries of HG heads that share a list. DQ is contiguous."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // (H // HG)
    h = tl.program_id(1) % (H // HG) * HG
    m = tl.arange(0, BM)
    token, exists = queries(row, m, first, shift, T, BQ, HG)
    head = h + m % HG
    p = token + offset
    m_local = (first + row) * BQ % PER_ROW + m // HG
    q_at = token.to(tl.int64) * sqt + head * sqh
    d_at = token.to(tl.int64) * sdt + head * sdh
    q = rows_of(Q + b.to(tl.int64) * sqb, q_at, exists, 1, K, BK, True)
    do = rows_of(DO + b.to(tl.int64) * sdb, d_at, exists, 1, V, BV, True)
    at = (b.to(tl.int64) * H + head) * padded(T) + token
    lse = tl.load(LSE2 + at, mask=exists, other=float("inf"))
    delta = tl.load(DELTA + at, mask=exists, other=0.0)
    g = h // (H // G)
    K_ += b.to(tl.int64) * skb + g * skh
    V_ += b.to(tl.int64) * svb + g * svh
    if KIND == BAND:
        own = 0
        x = (first + row) * BQ + offset
        a, b_, c, d, turn, skip = band_runs(x, x + BQ - 1, low, high, S, 0, 1, BN)
    else:
        own = plane_of(PLANE, b, h, H, NB, NH) * rows + (first + row) * BQ // PER_ROW
        a, b_, c, d, turn, skip = listed_runs(LO, MID, HI, own, 0, 1)
    begin, end = band_of(p, low, high, S)

    dq = tl.zeros([BM, BK], tl.float32)
    log2_scale = scale * LOG2E
    if SIZE % BN == 0 or KIND == BAND:
        dq = _by_query(
            dq, q, do, lse, delta, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
            skt, svt, ENTRY, PATTERN, TABLE, a, b_, b_ - a, 0, S, log2_scale,
            K, V, BK, BV, BN, SIZE, UNIT, SIZE, KIND, False, BULK, PRECISION,
        )  # fmt: skip
    else:
        c = a
    dq = _by_query(
        dq, q, do, lse, delta, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
        skt, svt, ENTRY, PATTERN, TABLE, c, d, turn, skip, S, log2_scale,
        K, V, BK, BV, BN, SIZE, UNIT, SIZE, KIND, True, BULK, PRECISION,
    )  # fmt: skip
    if COLUMNS:
        a, _, _, d, turn, skip = listed_runs(CLO, CLO, CHI, own, 0, 1)
        dq = _by_query(
            dq, q, do, lse, delta, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
            skt, svt, CENTRY, PATTERN, TABLE, a, d, turn, skip, S, log2_scale,
            K, V, BK, BV, BN, 1, 1, SIZE, KIND, True, False, PRECISION,
        )  # fmt: skip
    to = (b.to(tl.int64) * T + token) * H + head
    d = tl.arange(0, BK)
    tl.store(
        DQ + to[:, None] * K + d[None, :], (dq * scale).to(DQ.dtype.element_ty),
        mask=exists[:, None] & (d < K)[None, :],
    )  # fmt: skip


@triton.jit
def _pairs(
    q, do, lse, delta, k, v, keep, scale,
    MASKED: tl.constexpr, UPRIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P^T and dS^T ``[BN,BM]`` of queries ``q [BM,BK]`` and keys ``k [BN,BK]``, made as they are
    returned or (UPRIGHT) with the queries as rows and then turned; ``keep`` is as they are made."""
    if UPRIGHT:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
        if MASKED:
            s = tl.where(keep, s, float("-inf"))
        w = tl.exp2(s)
        dw = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = w * (dw - delta[:, None])
        return tl.trans(w.to(do.dtype)), tl.trans(ds.to(q.dtype))
    else:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]
        if MASKED:
            s = tl.where(keep, s, float("-inf"))
        w = tl.exp2(s)
        dw = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        return w.to(do.dtype), (w * (dw - delta[None, :])).to(q.dtype)


@triton.jit
def _by_key(
    dk, dv, k, v, key, place, begin, end, Q, DO, QT, DOT, LSE2, DELTA, ROW, PATTERN, TABLE,
    a, c, turn, skip, b, h, shift, T, S, sqt, sqh, sdt, sdh, offset, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, HG: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr, UPRIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of queries of the run ``a..c`` added to dk and dv."""
    EACH: tl.constexpr = PER_ROW * HG
    m = tl.arange(0, BM)
    n_local = place + tl.arange(0, BN)
    start = start_of(ROW, 0, a, c, turn, skip, BM, EACH, EACH, KIND)
    for i in range(steps(a, c, BM, EACH, KIND)):
        after = start_of(ROW, i + 1, a, c, turn, skip, BM, EACH, EACH, KIND)
        if EACH % BM == 0 or KIND == BAND:
            e = a + i // (EACH // BM)
            inside = start + m
            exists = m >= 0
        else:
            e = a + (i * BM + m) // EACH
            exists = e < c
            inside = tl.load(ROW + e, mask=exists, other=0) * EACH + (i * BM + m) % EACH
        m_local = inside // HG % PER_ROW
        token = inside // HG - shift
        exists = exists & (token >= 0) & (token < T)
        head = h + inside % HG
        at = head * padded(T) + token
        lse = tl.load(LSE2 + at, mask=exists, other=float("inf"))
        delta = tl.load(DELTA + at, mask=exists, other=0.0)
        if UPRIGHT:
            if MASKED:
                keep = kept(
                    m_local[:, None], (token + offset)[:, None], n_local[None, :], key[None, :], S,
                    token[:, None], begin[None, :], end[None, :], PATTERN, TABLE, e,
                    place, BN, TILE, KIND,
                )  # fmt: skip
            else:
                keep = exists[:, None]
        else:
            if MASKED:
                keep = kept(
                    m_local[None, :], (token + offset)[None, :], n_local[:, None], key[:, None], S,
                    token[None, :], begin[:, None], end[:, None], PATTERN, TABLE, e,
                    place, BN, TILE, KIND,
                )  # fmt: skip
            else:
                keep = exists[None, :]
        q_at = token.to(tl.int64) * sqt + head * sqh
        d_at = token.to(tl.int64) * sdt + head * sdh
        q = block_of(Q, QT, b * T + start - shift, h * K, q_at, exists, 1, K, BK, True, BULK)
        do = block_of(DO, DOT, b * T + start - shift, h * V, d_at, exists, 1, V, BV, True, BULK)
        w, ds = _pairs(q, do, lse, delta, k, v, keep, scale, MASKED, UPRIGHT, PRECISION)
        dv = tl.dot(w, do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        start = after
    return dk, dv


@partial(Kernel, sizes=SIZES)
def attention_grad_kv(
    Q, K_, V_, DO, QT, DOT, LSE2, DELTA, DK, DV, LO, MID, HI, ROW, PATTERN, TABLE, PLANE,
    scale, T, S, offset, shift, blocks, H, G, NB, NH, low, high,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PER_ROW: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, BULK: tl.constexpr,
    UPRIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: one program for BN keys of one head of keys, over the rows of queries that see
    their block. DK and DV are contiguous."""
    block = tl.program_id(0) // (SIZE // BN)
    b = tl.program_id(1) // G
    g = tl.program_id(1) % G
    place = tl.program_id(0) % (SIZE // BN) * BN
    key = block * SIZE + place + tl.arange(0, BN)
    there = key < S
    k = rows_of(K_ + b.to(tl.int64) * skb + g * skh, key.to(tl.int64), there, skt, K, BK, True)
    v = rows_of(V_ + b.to(tl.int64) * svb + g * svh, key.to(tl.int64), there, svt, V, BV, True)
    Q += b.to(tl.int64) * sqb
    DO += b.to(tl.int64) * sdb
    LSE2 += b.to(tl.int64) * H * padded(T)
    DELTA += b.to(tl.int64) * H * padded(T)
    dk = tl.zeros([BN, BK], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    log2_scale = scale * LOG2E
    begin, end = band_of(key - offset, -high, -low, T)
    for j in range(H // G // HG):
        h = g * (H // G) + j * HG
        if KIND == BAND:
            y = tl.program_id(0) * BN - offset
            a, b_, c, d, turn, skip = band_runs(y, y + BN - 1, -high, -low, T, 0, 1, BM)
        else:
            own = plane_of(PLANE, b, h, H, NB, NH) * blocks + block
            a, b_, c, d, turn, skip = listed_runs(LO, MID, HI, own, 0, 1)
        dk, dv = _by_key(
            dk, dv, k, v, key, place, begin, end, Q, DO, QT, DOT, LSE2, DELTA,
            ROW, PATTERN, TABLE, a, b_, b_ - a, 0, b, h, shift, T, S, sqt, sqh, sdt, sdh, offset,
            log2_scale, K, V, BK, BV, BM, BN, HG, PER_ROW, SIZE, KIND, False, BULK, UPRIGHT,
            PRECISION,
        )  # fmt: skip
        dk, dv = _by_key(
            dk, dv, k, v, key, place, begin, end, Q, DO, QT, DOT, LSE2, DELTA,
            ROW, PATTERN, TABLE, c, d, turn, skip, b, h, shift, T, S, sqt, sqh, sdt, sdh, offset,
            log2_scale, K, V, BK, BV, BM, BN, HG, PER_ROW, SIZE, KIND, True, BULK, UPRIGHT,
            PRECISION,
        )  # fmt: skip
    at = (b.to(tl.int64) * S + key) * G + g
    d, w = tl.arange(0, BK), tl.arange(0, BV)
    tl.store(
        DK + at[:, None] * K + d[None, :], (dk * scale).to(DK.dtype.element_ty),
        mask=there[:, None] & (d < K)[None, :],
    )  # fmt: skip
    tl.store(
        DV + at[:, None] * V + w[None, :], dv.to(DV.dtype.element_ty),
        mask=there[:, None] & (w < V)[None, :],
    )  # fmt: skip


@triton.jit
def _scatter(
    q, do, lse, delta, p, K_, V_, DK, DV, stride_k, stride_v, stride_dk, stride_dv, ENTRY, a, c, S,
    scale, log2_scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    d, d_v = tl.arange(0, BK), tl.arange(0, BV)
    for i in range(steps(a, c, BN, SIZE, KIND)):
        at, there, e, _ = keys(ENTRY, i, a, c, BN, SIZE, UNIT, KIND)
        key = start_of(ENTRY, i, a, c, 0, 0, BN, SIZE, UNIT, KIND) + at
        there = there & (key < S)
        first = key.to(tl.int64)
        k = rows_of(K_, first, there, stride_k, K, BK, True)
        v = rows_of(V_, first, there, stride_v, V, BV, True)
        keep = kept(0, p[None, :], 0, key[:, None], S, 0, 0, 0, ENTRY, ENTRY, e, 0, BN, SIZE, KIND)
        keep = keep & there[:, None]
        w, ds = _pairs(q, do, lse, delta, k, v, keep, log2_scale, True, False, PRECISION)
        dv = tl.dot(w, do, input_precision=PRECISION)
        dk = tl.dot(ds, q, input_precision=PRECISION) * scale
        to = key.to(tl.int64)[:, None]
        tl.atomic_add(
            DK + to * stride_dk + d[None, :], dk, mask=there[:, None] & (d < K)[None, :],
            sem="relaxed",
        )  # fmt: skip
        tl.atomic_add(
            DV + to * stride_dv + d_v[None, :], dv, mask=there[:, None] & (d_v < V)[None, :],
            sem="relaxed",
        )  # fmt: skip


@partial(Kernel, sizes=SIZES)
def attention_scatter_kv(
    Q, K_, V_, DO, LSE2, DELTA, DK, DV, LO, HI, ENTRY, CLO, CHI, CENTRY, PLANE,
    scale, T, S, offset, first, shift, rows, H, G, NB, NH, low, high,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, HG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PER_ROW: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv added up in memory, for blocks that start anywhere: float32 ``[B,S,G,*]``, zero
    before. The order of the additions, so the last bits, may differ from run to run."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // (H // HG)
    h = tl.program_id(1) % (H // HG) * HG
    m = tl.arange(0, BM)
    token, exists = queries(row, m, first, shift, T, BQ, HG)
    head = h + m % HG
    p = token + offset
    q_at = token.to(tl.int64) * sqt + head * sqh
    d_at = token.to(tl.int64) * sdt + head * sdh
    q = rows_of(Q + b.to(tl.int64) * sqb, q_at, exists, 1, K, BK, True)
    do = rows_of(DO + b.to(tl.int64) * sdb, d_at, exists, 1, V, BV, True)
    at = (b.to(tl.int64) * H + head) * padded(T) + token
    lse = tl.load(LSE2 + at, mask=exists, other=float("inf"))
    delta = tl.load(DELTA + at, mask=exists, other=0.0)
    g = h // (H // G)
    K_ += b.to(tl.int64) * skb + g * skh
    V_ += b.to(tl.int64) * svb + g * svh
    DK += (b.to(tl.int64) * S * G + g) * K
    DV += (b.to(tl.int64) * S * G + g) * V
    own = plane_of(PLANE, b, h, H, NB, NH) * rows + (first + row) * BQ // PER_ROW
    log2_scale = scale * LOG2E
    _scatter(
        q, do, lse, delta, p, K_, V_, DK, DV, skt, svt, G * K, G * V, ENTRY,
        tl.load(LO + own), tl.load(HI + own), S, scale, log2_scale,
        K, V, BK, BV, BN, SIZE, UNIT, KIND, PRECISION,
    )  # fmt: skip
    if COLUMNS:
        _scatter(
            q, do, lse, delta, p, K_, V_, DK, DV, skt, svt, G * K, G * V, CENTRY,
            tl.load(CLO + own), tl.load(CHI + own), S, scale, log2_scale,
            K, V, BK, BV, BN, 1, 1, KIND, PRECISION,
        )  # fmt: skip
