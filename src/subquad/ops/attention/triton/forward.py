"""The forward kernel: online softmax over the listed blocks of keys."""

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
    plane_of,
    queries,
    rows_of,
    start_of,
    steps,
)
from subquad.ops.kernel import Kernel

# Compiled once for all of their values.
SIZES = ["T", "S", "offset", "first", "shift", "rows", "H", "G", "NB", "NH", "low", "high", "sop"]
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    acc, top, total, q, m_local, p, begin, end, K_, V_, KT, VT, row, col_k, col_v,
    stride_k, stride_v, ENTRY, PATTERN, TABLE, a, c, turn, skip, S, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    SIZE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The run ``a..c`` added to the running softmax; ``scale`` is in base 2 and positive."""
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
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
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
        new = tl.maximum(top, tl.max(s, 1) * scale)
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
        safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        w = tl.exp2(s * scale - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(w, 1)
        v = block_of(
            V_ + first * stride_v, VT, row + start, col_v, at, there, stride_v, V, BV, MASKED, BULK
        )
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new
        start = after
    return acc, top, total


@partial(Kernel, sizes=SIZES)
def attention_forward(
    Q, K_, V_, KT, VT, O, LSE,
    LO, MID, HI, ENTRY, PATTERN, TABLE, CLO, CHI, CENTRY, PLANE,
    scale, T, S, offset, first, shift, rows, H, G, NB, NH, low, high,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sop,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, HG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PER_ROW: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BQ queries of HG heads that share a list, one part of PARTS of it.

    ``scale`` is not negative. O ``[PARTS,B,T,H,V]`` and LSE ``[PARTS,B,T,H]`` are contiguous, a
    part ``sop`` = B * T * H rows.
    """
    part = tl.program_id(0) % PARTS
    row = tl.num_programs(0) // PARTS - 1 - tl.program_id(0) // PARTS  # the longest lists first
    b = tl.program_id(1) // (H // HG)
    h = tl.program_id(1) % (H // HG) * HG
    m = tl.arange(0, BM)
    token, exists = queries(row, m, first, shift, T, BQ, HG)
    head = h + m % HG
    p = token + offset
    m_local = (first + row) * BQ % PER_ROW + m // HG
    q_at = token.to(tl.int64) * sqt + (head - h) * sqh
    q = rows_of(Q + b.to(tl.int64) * sqb + h * sqh, q_at, exists, 1, K, BK, True)
    g = h // (H // G)
    K_ += b.to(tl.int64) * skb + g * skh
    V_ += b.to(tl.int64) * svb + g * svh
    if KIND == BAND:
        own = 0
        x = (first + row) * BQ + offset
        a, b_, c, d, turn, skip = band_runs(x, x + BQ - 1, low, high, S, part, PARTS, BN)
    else:
        own = plane_of(PLANE, b, h, H, NB, NH) * rows + (first + row) * BQ // PER_ROW
        a, b_, c, d, turn, skip = listed_runs(LO, MID, HI, own, part, PARTS)
    begin, end = band_of(p, low, high, S)

    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    scale = tl.maximum(scale, 1e-30) * LOG2E  # 0 times -inf would be NaN
    if SIZE % BN == 0 or KIND == BAND:
        acc, top, total = _attend(
            acc, top, total, q, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
            skt, svt, ENTRY, PATTERN, TABLE, a, b_, b_ - a, 0, S, scale,
            K, V, BK, BV, BN, SIZE, UNIT, SIZE, KIND, False, BULK, PRECISION,
        )  # fmt: skip
    else:
        c = a
    acc, top, total = _attend(
        acc, top, total, q, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
        skt, svt, ENTRY, PATTERN, TABLE, c, d, turn, skip, S, scale,
        K, V, BK, BV, BN, SIZE, UNIT, SIZE, KIND, True, BULK, PRECISION,
    )  # fmt: skip
    if COLUMNS:
        a, _, _, d, turn, skip = listed_runs(CLO, CLO, CHI, own, part, PARTS)
        acc, top, total = _attend(
            acc, top, total, q, m_local, p, begin, end, K_, V_, KT, VT, b * S, g * K, g * V,
            skt, svt, CENTRY, PATTERN, TABLE, a, d, turn, skip, S, scale,
            K, V, BK, BV, BN, 1, 1, SIZE, KIND, True, False, PRECISION,
        )  # fmt: skip

    seen = total > 0
    some = tl.where(seen, total, 1.0)
    at = part.to(tl.int64) * sop + (b.to(tl.int64) * T + token) * H + head
    v = tl.arange(0, BV)
    o = acc * (1.0 / some)[:, None]
    tl.store(
        O + at[:, None] * V + v[None, :], o.to(O.dtype.element_ty),
        mask=exists[:, None] & (v < V)[None, :],
    )  # fmt: skip
    lse = tl.where(seen, (top + tl.log2(some)) * LN2, float("-inf"))
    tl.store(LSE + at, lse, mask=exists)
