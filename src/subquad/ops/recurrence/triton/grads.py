"""The gradients of a chunk's inputs, from the state before it and the gradient after it.

All chunks at once. With D and F of the passes over time (:mod:`scan`), S the state before the chunk
and dS the gradient after it:

    dA = lower(do D^T)           dq  = scale exp(G) (do S^T) + dA k
    Y  = strict_lower(F D^T)     Z   = exp(G) (F S^T) + Y k,    both from W and N
    dk = exp(G_end - G) (D dS^T) + dA^T q - (beta Y)^T k - beta Z
    dbeta = F . v - k . Z        dv  = beta F (the delta rule; else scan_back wrote it)

where products inside the chunk carry exp(G_i - G_j) (per channel: as in :mod:`prepare`). Where G_i
enters with a plus sign (q, Z) or a minus sign (the rest of dk), the gradient of the log decay gains
or loses the operand times its gradient; summed from the back of the chunk it is that of g.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    NONE,
    SIZES,
    fade,
    gates,
    halves,
    numbers,
    put,
    reference,
    segment,
    summed,
    tile,
)


@triton.jit
def _exact(
    q, k, G, a, at, y, yt, dq, dk, z,
    DELTA: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the parts of dq, dk (its minus part) and Z that pass through the scores."""
    kind = k.dtype
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    same = tl.sum(tl.where(i == j, a.to(tl.float32), 0.0), axis=1)[:, None]
    dq += same * k
    dk += same * q
    S = 1
    while S < C:
        f = tl.exp(-tl.abs(G - reference(G, S, C, BK)))
        kf = (k * f).to(kind)
        keep = halves(S, C, 0)
        keep_t = halves(S, C, 1)
        dq += f * tl.dot(tl.where(keep, a, 0.0), kf, input_precision=PRECISION)
        m = tl.dot(tl.where(keep_t, at, 0.0), (q * f).to(kind), input_precision=PRECISION)
        if DELTA:
            z += f * tl.dot(tl.where(keep, y, 0.0), kf, input_precision=PRECISION)
            m = tl.dot(tl.where(keep_t, yt, 0.0), kf, m, input_precision=PRECISION)
        dk += f * m
        S *= 2
    return dq, dk, z


@triton.jit(do_not_specialize=SIZES)
def grads(
    Q, K_, V_, G_, BETA, DO, D_, F_, HS, DHS, GS, FLAG, TABLE, DQ, DK, DV, DG, DB,
    scale, T, H, HQ, HK, HV, HD, HB,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, STRONG: tl.constexpr,
    FUSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """STRONG does the chunks that prepare flagged, the other call the rest."""
    ONE: tl.constexpr = BV >= V  # the values fit one block, which is then read once
    index = tl.program_id(0)
    h = tl.program_id(1)
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    left = end - first
    wanted = left > 0
    if DECAY == CHANNEL:
        wanted = wanted & ((tl.load(FLAG + chunk.to(tl.int64) * H + h) != 0) == STRONG)
    if wanted:
        hq, hk, hv, hd = h * HQ // H, h * HK // H, h * HV // H, h * HD // H
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        kind = K_.dtype.element_ty

        # The gradients of the scores, each also transposed: a dot's fresh result is not
        # transposed for another dot, which some compilers get wrong on Hopper.
        a = tl.zeros([C, C], tl.float32)
        at = tl.zeros([C, C], tl.float32)
        y = tl.zeros([C, C], tl.float32)
        yt = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)
        if DELTA:
            beta = numbers(BETA, first, left, HB, h * HB // H, C)
        for value in range(0, V, BV):
            do = tile(DO, first, left, H, h, value, V, C, BV)
            if DELTA:
                d = tile(D_, first, left, H, h, value, V, C, BV)
                f = tile(F_, first, left, H, h, value, V, C, BV)
                v = tile(V_, first, left, HV, hv, value, V, C, BV)
                db += tl.sum(f.to(tl.float32) * v.to(tl.float32), axis=1)
                put(DV, f * beta[:, None], first, left, H, h, value, V, C, BV)
                y = tl.dot(f, tl.trans(d), y, input_precision=PRECISION)
                yt = tl.dot(d, tl.trans(f), yt, input_precision=PRECISION)
            else:
                d = tile(V_, first, left, HV, hv, value, V, C, BV)
            a = tl.dot(do, tl.trans(d), a, input_precision=PRECISION)
            at = tl.dot(d, tl.trans(do), at, input_precision=PRECISION)
        a *= scale
        at *= scale
        if DELTA:
            yt *= -beta[None, :]
        if DECAY == HEAD:
            G, g_end = gates(G_, GS, first, left, HD, hd, chunk, H, h, C, FUSE)
            lower = fade(G[:, None], G[None, :], i >= j)
            upper = fade(G[None, :], G[:, None], i <= j)
            a *= lower
            at *= upper
            y = tl.where(i > j, y * lower, 0.0)
            yt = tl.where(i < j, yt * upper, 0.0)
            gains = tl.zeros([C], tl.float32)
            tail = 0.0
        else:
            a = tl.where(i >= j, a, 0.0)
            at = tl.where(i <= j, at, 0.0)
            y = tl.where(i > j, y, 0.0)
            yt = tl.where(i < j, yt, 0.0)
        a, at, y, yt = a.to(kind), at.to(kind), y.to(kind), yt.to(kind)

        if ONE:
            do = tile(DO, first, left, H, h, 0, V, C, BV)
            if DELTA:
                d = tile(D_, first, left, H, h, 0, V, C, BV)
                f = tile(F_, first, left, H, h, 0, V, C, BV)
            else:
                d = tile(V_, first, left, HV, hv, 0, V, C, BV)
        state = (chunk.to(tl.int64) * H + h) * (V * K)
        for column in range(0, K, BK):
            columns = column + tl.arange(0, BK)
            dq = tl.zeros([C, BK], tl.float32)
            dk = tl.zeros([C, BK], tl.float32)
            z = tl.zeros([C, BK], tl.float32)
            forget = tl.zeros([BK], tl.float32)
            for value in range(0, V, BV):
                r = value + tl.arange(0, BV)[:, None]
                ok = (r < V) & (columns[None, :] < K)
                S = tl.load(HS + state + r * K + columns[None, :], mask=ok, other=0.0)
                dS = tl.load(DHS + state + r * K + columns[None, :], mask=ok, other=0.0)
                if not ONE:
                    do = tile(DO, first, left, H, h, value, V, C, BV)
                    if DELTA:
                        d = tile(D_, first, left, H, h, value, V, C, BV)
                        f = tile(F_, first, left, H, h, value, V, C, BV)
                    else:
                        d = tile(V_, first, left, HV, hv, value, V, C, BV)
                dq = tl.dot(do, S, dq, input_precision=PRECISION)
                dk = tl.dot(d, dS, dk, input_precision=PRECISION)
                if DELTA:
                    z = tl.dot(f, S, z, input_precision=PRECISION)
                if DECAY != NONE:
                    forget += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)

            q = tile(Q, first, left, HQ, hq, column, K, C, BK)
            k = tile(K_, first, left, HK, hk, column, K, C, BK)
            if DECAY == CHANNEL:
                g = tile(G_, first, left, HD, hd, column, K, C, BK)
                Gc = summed(g, C)
                middle = tl.sum(tl.where(i < C // 2, g, 0.0), axis=0)
                last = middle + tl.sum(tl.where(i < C // 2, 0.0, g), axis=0)
                if STRONG:
                    dq *= tl.exp(Gc) * scale
                    z *= tl.exp(Gc)
                    dk *= tl.exp(last[None, :] - Gc)
                    ends = tl.sum(dk * k, axis=0)
                    dq, dk, z = _exact(q, k, Gc, a, at, y, yt, dq, dk, z, DELTA, C, BK, PRECISION)
                else:
                    up = tl.exp(Gc - middle[None, :])
                    down = tl.exp(middle[None, :] - Gc)
                    kd = (k * down).to(kind)
                    dq *= (tl.exp(middle) * scale)[None, :]
                    dq = up * tl.dot(a, kd, dq, input_precision=PRECISION)
                    dk *= tl.exp(last - middle)[None, :]
                    ends = tl.sum(dk * (k * down), axis=0)
                    dk = tl.dot(at, (q * up).to(kind), dk, input_precision=PRECISION)
                    if DELTA:
                        z *= tl.exp(middle)[None, :]
                        z = up * tl.dot(y, kd, z, input_precision=PRECISION)
                        dk = tl.dot(yt, (k * up).to(kind), dk, input_precision=PRECISION)
                    dk *= down
                ends += forget * tl.exp(last)
            else:
                dq *= scale
                if DECAY == HEAD:
                    dq *= tl.exp(G)[:, None]
                    z *= tl.exp(G)[:, None]
                    dk *= tl.exp(g_end - G)[:, None]
                    tail += tl.sum(tl.sum(dk * k, axis=1), axis=0)
                    tail += tl.sum(forget, axis=0) * tl.exp(g_end)
                dq = tl.dot(a, k, dq, input_precision=PRECISION)
                dk = tl.dot(at, q, dk, input_precision=PRECISION)
                if DELTA:
                    z = tl.dot(y, k, z, input_precision=PRECISION)
                    dk = tl.dot(yt, k, dk, input_precision=PRECISION)

            put(DQ, dq, first, left, H, h, column, K, C, BK)
            if DECAY != NONE:
                gain = q * dq - k * dk
            if DELTA:
                db -= tl.sum(k * z, axis=1)
                z *= -beta[:, None]
                dk += z
                if DECAY != NONE:
                    gain += k * z
            put(DK, dk, first, left, H, h, column, K, C, BK)
            if DECAY == CHANNEL:
                later = tl.where(i <= j, 1.0, 0.0)
                dg = tl.dot(later, gain, input_precision=PRECISION) + ends[None, :]
                put(DG, dg, first, left, H, h, column, K, C, BK)
            elif DECAY == HEAD:
                gains += tl.sum(gain, axis=1)

        n = tl.arange(0, C)
        if DECAY == HEAD:
            dg1 = tl.cumsum(gains, axis=0, reverse=True) + tail
            tl.store(DG + first * H + h + n * H, dg1, mask=n < left)
        if DELTA:
            tl.store(DB + first * H + h + n * H, db, mask=n < left)
