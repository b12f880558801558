"""Without the delta rule: the gradients of a chunk's inputs from the state before it and the
gradient after it (:mod:`states`), all chunks at once.

    dq = scale (exp(G) (do S^T) + B k)   B_ij = do_i . v_j exp(G_i - G_j), i >= j
    dk = exp(G_end - G) (v dS^T) + scale B^T q
    dv = exp(G_end - G) (k dS) + scale A^T do   A_ij = q_i . k_j exp(G_i - G_j), i >= j

The gradient of the log decay gains q . dq and loses k . dk, summed from the back of a chunk, whose
end has <S, dS> of what comes after it.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import bulk, kernel, put, segment, tile


@triton.jit
def _state(
    HS, place, value, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """``[BV,BK]`` of a chunk's state, or of its gradient."""
    if BULK:
        return HS.load([place.to(tl.int32) * V + value, column])
    else:
        r = value + tl.arange(0, BV)[:, None]
        c = column + tl.arange(0, BK)[None, :]
        return tl.load(HS + place * (V * K) + r * K + c, mask=(r < V) & (c < K), other=0.0)


@triton.jit
def _keys(
    Q, K_, V_, DO, HS, DHS, DQ, DK, DG, G, whole, place, first, left, h, side,
    scale, SIZE, H, HQ, HK, HV,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK channels of dq and dk, and their part of the log decay's gradient."""
    column = side * BK
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    b = tl.zeros([C, C], tl.float32)
    forget = tl.zeros([BK], tl.float32)
    for value in range(0, V, BV):
        S = _state(HS, place, value, column, K, V, BK, BV, BULK)
        dS = _state(DHS, place, value, column, K, V, BK, BV, BULK)
        do = bulk(DO, first, left, H, h, value, V, C, BV, BULK)
        v = bulk(V_, first, left, HV, h * HV // H, value, V, C, BV, BULK)
        dq = tl.dot(do, S, dq, input_precision=PRECISION)
        dk = tl.dot(v, dS, dk, input_precision=PRECISION)
        b = tl.dot(do, tl.trans(v), b, input_precision=PRECISION)
        if DECAY:
            forget += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)
    q = tile(Q, first, left, HQ, h * HQ // H, column, K, C, BK)
    k = tile(K_, first, left, HK, h * HK // H, column, K, C, BK)
    n = tl.arange(0, C)
    keep = n[:, None] >= n[None, :]
    dq *= scale
    if DECAY:
        b *= tl.exp2(tl.where(keep, G[:, None] - G[None, :], float("-inf")))
        dq *= tl.exp2(G)[:, None]
        dk *= tl.exp2(whole - G)[:, None]
        tail = tl.sum(tl.sum(dk * k, axis=1), axis=0)
        tail += tl.sum(forget, axis=0) * tl.exp2(whole)
    else:
        b = tl.where(keep, b, 0.0)
    b = (b * scale).to(k.dtype)
    dq = tl.dot(b, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(b), q, dk, input_precision=PRECISION)
    put(DQ, dq, first, left, H, h, column, K, C, BK)
    put(DK, dk, first, left, H, h, column, K, C, BK)
    if DECAY:
        dg = tl.cumsum(tl.sum(q * dq - k * dk, axis=1), axis=0, reverse=True) + tail
        tl.store(DG + side * SIZE + first * H + h + n * H, dg, mask=n < left)


@triton.jit
def _values(
    Q, K_, DO, DHS, DV, G, whole, place, first, left, h, value, scale, H, HQ, HK,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV channels of dv; its scores are made turned, as the product takes them."""
    dv = tl.zeros([C, BV], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        dS = _state(DHS, place, value, column, K, V, BK, BV, BULK)
        q = bulk(Q, first, left, HQ, h * HQ // H, column, K, C, BK, BULK)
        k = bulk(K_, first, left, HK, h * HK // H, column, K, C, BK, BULK)
        dv = tl.dot(k, tl.trans(dS), dv, input_precision=PRECISION)
        a = tl.dot(k, tl.trans(q), a, input_precision=PRECISION)
    do = tile(DO, first, left, H, h, value, V, C, BV)
    n = tl.arange(0, C)
    keep = n[:, None] <= n[None, :]
    if DECAY:
        a *= tl.exp2(tl.where(keep, G[None, :] - G[:, None], float("-inf")))
        dv *= tl.exp2(whole - G)[:, None]
    else:
        a = tl.where(keep, a, 0.0)
    dv = tl.dot((a * scale).to(do.dtype), do, dv, input_precision=PRECISION)
    put(DV, dv, first, left, H, h, value, V, C, BV)


@kernel
def gradients(
    Q, K_, V_, DO, HS, DHS, GS, TABLE, QD, KD, VD, DD, DQ, DK, DV, DG,
    scale, T, SIZE, H, HQ, HK, HV, HD,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk BK key channels of dq and dk, or BV value channels of dv. DG gets a part from
    every block of key channels, SIZE elements apart. Loops read VD, DD, QD and KD: v, do, q and k,
    or for the copy engine (BULK) their descriptors."""
    sides: tl.constexpr = (K + BK - 1) // BK
    parts: tl.constexpr = sides + (V + BV - 1) // BV
    pid = tl.program_id(0)
    side = pid % parts
    h = pid // parts % H
    index = pid // parts // H
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    left = end - first
    if left > 0:
        place = chunk.to(tl.int64) * H + h
        G = tl.zeros([C], tl.float32)
        whole = 0.0
        if DECAY:
            at = (chunk.to(tl.int64) * HD + h * HD // H) * C
            G = tl.load(GS + at + tl.arange(0, C))
            whole = tl.load(GS + at + C - 1)
        if side < sides:
            _keys(
                Q, K_, VD, DD, HS, DHS, DQ, DK, DG, G, whole, place, first, left, h, side,
                scale, SIZE, H, HQ, HK, HV, K, V, C, BK, BV, DECAY, BULK, PRECISION,
            )  # fmt: skip
        else:
            _values(
                QD, KD, DO, DHS, DV, G, whole, place, first, left, h, (side - sides) * BV,
                scale, H, HQ, HK, K, V, C, BK, BV, DECAY, BULK, PRECISION,
            )  # fmt: skip
