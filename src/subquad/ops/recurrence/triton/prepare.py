"""What a chunk needs before the state reaches it; all chunks at once.

Writes, per chunk and head (rows without a token are 0):

    A = scale lower(q_i . k_j exp(G_i - G_j))                       the scores
    AL, what A's rounding left, or A in float16 (SCALED)            for FINE outputs
    P = (I + N)^-1 - I,  N = strict_lower(beta_i k_i . k_j exp(G_i - G_j))
    BS, beta without gaps                                           for the delta rule
    QG = scale exp(G) q,  KG = exp(G_end - G) k,  KW = exp(G) k     for a decay per channel
    GS: G, exp(G), exp(G_end - G) for a decay per head; exp(G_end), exp(ref), exp(G_end - ref) for
        one per channel, and what SCALED scores are to be multiplied by

The delta rule with a decay per channel has :func:`invert` make P of N, which holds few registers.

A product over channels with ``exp(G_i - G_j)`` is taken from the middle of the chunk, ``exp(G_i -
ref) exp(ref - G_j)``. Where a factor would not be representable (LIMIT), FLAG is set, and the same
kernel with STRONG does the chunk again, exactly for any decay: pairs are sorted by the smallest
aligned block of 2 S rows that holds both, and the reference is the end of its first half, so that
no exponent is positive. FINE takes these factors in tf32, whose three further bits show in
bfloat16 outputs.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    LOG2E,
    block,
    bulk,
    fade,
    gate_place,
    halves,
    inverse,
    kernel,
    lost,
    narrowed,
    numbers,
    power,
    put_block,
    reference,
    segment,
    summed,
)


@triton.jit
def _exact_scores(
    q, k, G, qk, kk, DELTA: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add these channels' ``sum_d q_i k_j exp(G_i - G_j)`` to qk, and k's with itself to kk."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    same = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
    qk += tl.where(i == j, same[:, None], 0.0)
    S = 1
    while S < C:
        f = tl.exp2(-tl.abs(G - reference(G, S, C, BK)))
        kf = narrowed(k * f, k.dtype, FINE)
        keep = halves(S, C)
        s = tl.dot(narrowed(q * f, k.dtype, FINE), tl.trans(kf), input_precision=PRECISION)
        qk += tl.where(keep, s, 0.0)
        if DELTA:
            s = tl.dot(kf, tl.trans(kf), input_precision=PRECISION)
            kk += tl.where(keep, s, 0.0)
        S *= 2
    return qk, kk


@triton.jit
def _chunk(
    Q, K_, G_, BETA, FLAG, A, AL, P, BS, QG, KG, KW, GS, first, left, chunk, h,
    scale, H, HQ, HK, HD, HB,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, STRONG: tl.constexpr,
    LIMIT: tl.constexpr, EXACT: tl.constexpr, FINE: tl.constexpr, BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at = chunk.to(tl.int64) * H + h
    hq, hk, hd = h * HQ // H, h * HK // H, h * HD // H
    kind = A.dtype.element_ty
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    # Asked for first, so that they come beside q and k.
    if DECAY == HEAD:
        g1 = numbers(G_, first, left, HD, hd, C)
    if DELTA:
        beta = numbers(BETA, first, left, HB, h * HB // H, C)
    qk = tl.zeros([C, C], tl.float32)
    kk = tl.zeros([C, C], tl.float32)
    span = 0.0
    for column in range(0, K, BK):
        q = bulk(Q, first, left, HQ, hq, column, K, C, BK, BULK)
        k = bulk(K_, first, left, HK, hk, column, K, C, BK, BULK)
        if DECAY == CHANNEL:
            g = bulk(G_, first, left, HD, hd, column, K, C, BK, BULK) * LOG2E
            G = summed(g, C, EXACT)
            middle = tl.sum(tl.where(i < C // 2, g, 0.0), axis=0)
            total = middle + tl.sum(tl.where(i < C // 2, 0.0, g), axis=0)
            if STRONG:
                qk, kk = _exact_scores(q, k, G, qk, kk, DELTA, C, BK, FINE, PRECISION)
                qg = q * (tl.exp2(G) * scale)
                kg = k * tl.exp2(total[None, :] - G)
                kw = k * tl.exp2(G)
            else:
                d = G - middle[None, :]
                span = tl.maximum(span, tl.max(tl.max(tl.abs(d), axis=1), axis=0))
                qg = q * tl.exp2(d)
                kg = k * tl.exp2(-d)
                down = tl.trans(narrowed(kg, kind, FINE))
                qk = tl.dot(narrowed(qg, kind, FINE), down, qk, input_precision=PRECISION)
                rise = tl.exp2(middle)[None, :]
                if DELTA:
                    kw = k * tl.exp2(d)
                    kk = tl.dot(narrowed(kw, kind, FINE), down, kk, input_precision=PRECISION)
                    kw *= rise
                qg *= rise * scale
                kg *= tl.exp2(total - middle)[None, :]
            put_block(QG, qg, chunk, H, h, column, K, C, BK)
            put_block(KG, kg, chunk, H, h, column, K, C, BK)
            if DELTA:
                put_block(KW, kw, chunk, H, h, column, K, C, BK)
            c = column + tl.arange(0, BK)
            to = gate_place(GS, chunk, H, h, K) + c
            tl.store(to, tl.exp2(total), mask=c < K)
            tl.store(to + K, tl.exp2(middle), mask=c < K)
            tl.store(to + 2 * K, tl.exp2(total - middle), mask=c < K)
        else:
            qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
            if DELTA:
                kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
    if DECAY == CHANNEL and not STRONG:
        tl.store(FLAG + at, (span > LIMIT * LOG2E).to(tl.int32))
    if DECAY == HEAD:
        G1 = tl.cumsum(g1, axis=0)
        place = GS + at * (3 * C) + tl.arange(0, C)
        tl.store(place, G1)
        tl.store(place + C, tl.exp(G1))
        tl.store(place + 2 * C, tl.exp(tl.sum(g1, axis=0) - G1))
        lower = fade(G1[:, None], G1[None, :], i >= j)
        qk *= lower
        kk *= lower
    a = tl.where(i >= j, qk * scale, 0.0)
    put_block(A, a, chunk, H, h, 0, C, C, C)
    if FINE:
        if DELTA and DECAY == CHANNEL:
            size, inverse_size = power(tl.max(tl.max(tl.abs(a), axis=1), axis=0))
            tl.store(gate_place(GS, chunk, H, h, K) + 3 * K, size)
            put_block(AL, a * inverse_size, chunk, H, h, 0, C, C, C)
        else:
            put_block(AL, lost(a), chunk, H, h, 0, C, C, C)
    if DELTA:
        N = tl.where(i > j, kk * beta[:, None], 0.0)
        tl.store(BS + at * C + tl.arange(0, C), beta)
        if DECAY == CHANNEL:
            if not EXACT:
                N = N.to(tl.float16).to(kind, bitcast=True)
            put_block(P, N, chunk, H, h, 0, C, C, C)
        else:
            put_block(P, inverse(N, C, EXACT), chunk, H, h, 0, C, C, C)


@kernel
def invert(N_, P, H, C: tl.constexpr, EXACT: tl.constexpr):
    """P of N (float16 bits unless EXACT), which it may replace, for every chunk and head."""
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    N = block(N_, chunk, H, h, 0, C, C, C)
    if not EXACT:
        N = N.to(tl.float16, bitcast=True)
    put_block(P, inverse(N, C, EXACT), chunk, H, h, 0, C, C, C)


@partial(kernel, length=3)
def prepare(
    Q, K_, G_, BETA, TABLE, FLAG, A, AL, P, BS, QG, KG, KW, GS,
    scale, T, H, HQ, HK, HD, HB,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, STRONG: tl.constexpr,
    LIMIT: tl.constexpr, EXACT: tl.constexpr, FINE: tl.constexpr, BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % H
    index = tl.program_id(0) // H
    if BULK:
        _chunk(
            Q, K_, G_, BETA, FLAG, A, AL, P, BS, QG, KG, KW, GS,
            index.to(tl.int64) * C, C, index, h, scale, H, HQ, HK, HD, HB,
            K, C, BK, DECAY, DELTA, STRONG, LIMIT, EXACT, FINE, BULK, PRECISION,
        )  # fmt: skip
    else:
        first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
        wanted = first < end
        if STRONG:
            wanted = wanted & (tl.load(FLAG + chunk.to(tl.int64) * H + h) != 0)
        if wanted:
            _chunk(
                Q, K_, G_, BETA, FLAG, A, AL, P, BS, QG, KG, KW, GS,
                first, end - first, chunk, h, scale, H, HQ, HK, HD, HB,
                K, C, BK, DECAY, DELTA, STRONG, LIMIT, EXACT, FINE, BULK, PRECISION,
            )  # fmt: skip
