"""What a chunk needs before the state reaches it; all chunks at once.

Writes, per head: for the delta rule ``P = (I + N)^-1`` with ``N = strict_lower(beta_i k_i . k_j
exp(G_i - G_j))`` and ``W = -P (beta exp(G) k)``; for a decay per channel the scores ``A`` (scaled,
lower), ``QG = scale exp(G) q``, ``KG = exp(G_end - G) k`` and ``GC = G_end``.

A product over channels with ``exp(G_i - G_j)`` is taken from a row in the middle of the chunk,
``exp(G_i - ref) exp(ref - G_j)``, where both factors are representable (LIMIT); else exactly for
any decay: pairs are sorted by the smallest aligned block of 2 S rows that holds both, and the
reference is the end of its first half, so that no exponent is positive.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    SIZES,
    fade,
    halves,
    inverse,
    numbers,
    put,
    reference,
    segment,
    tile,
)


@triton.jit
def _scores(
    q, k, G, qk, kk,
    LIMIT: tl.constexpr, DELTA: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add these channels' ``sum_d q_i k_j exp(G_i - G_j)`` to qk, and k's with itself to kk.

    Right for i > j, and for i = j in qk; the rest is garbage.
    """
    d = G - reference(G, C // 2, C, BK)
    if tl.max(tl.max(tl.abs(d), axis=1), axis=0) < LIMIT:
        up = tl.exp(d)
        down = tl.trans((k * tl.exp(-d)).to(k.dtype))
        qk += tl.dot((q * up).to(k.dtype), down, input_precision=PRECISION)
        if DELTA:
            kk += tl.dot((k * up).to(k.dtype), down, input_precision=PRECISION)
    else:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        same = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
        qk += tl.where(i == j, same[:, None], 0.0)
        S = 1
        while S < C:
            f = tl.exp(-tl.abs(G - reference(G, S, C, BK)))
            kf = (k * f).to(k.dtype)
            keep = halves(S, C, 0)
            s = tl.dot((q * f).to(k.dtype), tl.trans(kf), input_precision=PRECISION)
            qk += tl.where(keep, s, 0.0)
            if DELTA:
                s = tl.dot(kf, tl.trans(kf), input_precision=PRECISION)
                kk += tl.where(keep, s, 0.0)
            S *= 2
    return qk, kk


@triton.jit(do_not_specialize=SIZES)
def prepare(
    Q, K_, G_, BETA, TABLE, SCRATCH, A, P, W, QG, KG, GC,
    scale, T, H, HQ, HK, HD, HB,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    h = tl.program_id(1)
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    left = end - first
    if left > 0:
        hk = h * HK // H
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        kk = tl.zeros([C, C], tl.float32)
        qk = tl.zeros([C, C], tl.float32)
        for column in range(0, K, BK):
            k = tile(K_, first, left, HK, hk, column, K, C, BK)
            if DECAY == CHANNEL:
                q = tile(Q, first, left, HQ, h * HQ // H, column, K, C, BK)
                g = tile(G_, first, left, HD, h * HD // H, column, K, C, BK)
                G = tl.cumsum(g, axis=0)
                total = tl.sum(g, axis=0)
                qk, kk = _scores(q, k, G, qk, kk, LIMIT, DELTA, C, BK, PRECISION)
                put(QG, q * tl.exp(G) * scale, first, left, H, h, column, K, C, BK)
                put(KG, k * tl.exp(total[None, :] - G), first, left, H, h, column, K, C, BK)
                c = column + tl.arange(0, BK)
                tl.store(GC + (chunk.to(tl.int64) * H + h) * K + c, total, mask=c < K)
            else:
                kk += tl.dot(k, tl.trans(k), input_precision=PRECISION)
        if DECAY == CHANNEL:
            put(A, tl.where(i >= j, qk * scale, 0.0), first, left, H, h, 0, C, C, C)
        if DELTA:
            beta = numbers(BETA, first, left, HB, h * HB // H, C)
            weight = beta
            if DECAY == HEAD:
                G1 = tl.cumsum(numbers(G_, first, left, HD, h * HD // H, C), axis=0)
                kk *= fade(G1[:, None], G1[None, :], i > j)
                weight = beta * tl.exp(G1)
            lower = tl.where(i > j, kk * beta[:, None], 0.0)
            scratch = SCRATCH + (index.to(tl.int64) * H + h) * (C * 16)
            inv = inverse(lower, scratch, C, INVERSE)
            p = inv.to(P.dtype.element_ty)
            put(P, p, first, left, H, h, 0, C, C, C)
            for column in range(0, K, BK):
                k = tile(K_, first, left, HK, hk, column, K, C, BK)
                kw = k * -weight[:, None]
                if DECAY == CHANNEL:
                    g = tile(G_, first, left, HD, h * HD // H, column, K, C, BK)
                    kw *= tl.exp(tl.cumsum(g, axis=0))
                w = tl.dot(p, kw.to(p.dtype), input_precision=PRECISION)
                put(W, w, first, left, H, h, column, K, C, BK)
