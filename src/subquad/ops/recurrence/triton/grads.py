"""The gradients of a chunk's inputs, from the state before it and the gradient after it.

All chunks and blocks of key channels at once, in one kernel, or in two, dA and Y first, where
making them in every block costs more than the memory between. With D and F of the passes over time
(:mod:`scan`), S the state before the chunk and dS the gradient after it:

    dA = lower(do D^T)           dq  = scale exp(G) (do S^T) + dA k
    Y  = strict_lower(F D^T)     Z   = exp(G) (F S^T) + Y k
    dk = exp(G_end - G) (D dS^T) + dA^T q - (beta Y)^T k - beta Z
    dbeta = F . v - k . Z        dv  = beta F (the delta rule; else scan_back wrote it)
          = F . D / beta

where products inside the chunk carry exp(G_i - G_j) (per channel: as in :mod:`prepare`). Where G_i
enters with a plus sign (q, Z) or a minus sign (the rest of dk), the gradient of the log decay gains
or loses the operand times its gradient; summed from the back of the chunk it is that of g.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    LOG2E,
    NONE,
    block,
    bulk,
    fade,
    gate_place,
    gate_row,
    halves,
    kernel,
    numbers,
    put,
    put_block,
    reference,
    segment,
    summed,
    summed_back,
    tile,
    whole_gate,
)

SMALL = tl.constexpr(1e-3)  # a beta under which what is written says too little of it


@triton.jit
def _exact(
    q, k, kb, G, a, y, dq, dk, z,
    DELTA: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the parts of dq, dk (its minus part) and Z that pass through the scores, for any decay;
    kb is -beta k."""
    kind = k.dtype
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    same = tl.sum(tl.where(i == j, a.to(tl.float32), 0.0), axis=1)[:, None]
    dq += same * k
    dk += same * q
    S = 1
    while S < C:
        f = tl.exp2(-tl.abs(G - reference(G, S, C, BK)))
        kf = (k * f).to(kind)
        keep = halves(S, C)
        s = tl.where(keep, a, 0.0)
        dq += f * tl.dot(s, kf, input_precision=PRECISION)
        m = tl.dot(tl.trans(s), (q * f).to(kind), input_precision=PRECISION)
        if DELTA:
            z += f * tl.dot(tl.where(keep, y, 0.0), kf, input_precision=PRECISION)
            kf = (kb * f).to(kind)
            m = tl.dot(tl.trans(tl.where(keep, y, 0.0)), kf, m, input_precision=PRECISION)
        dk += f * m
        S *= 2
    return dq, dk, z


@kernel
def score_grads(
    V_, BETA, DO, D_, F_, GS, TABLE, DA, Y, DV, DB,
    scale, T, H, HV, HB,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA and Y of every chunk (for a decay per head with their decay), and the first part of
    dbeta, ``F . v``; for the delta rule also dv."""
    index = tl.program_id(0)
    h = tl.program_id(1)
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    left = end - first
    if left > 0:
        hv = h * HV // H
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        a = tl.zeros([C, C], tl.float32)
        y = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)
        if DELTA:
            beta = numbers(BETA, first, left, HB, h * HB // H, C)
        for value in range(0, V, BV):
            do = tile(DO, first, left, H, h, value, V, C, BV)
            if DELTA:
                d = tile(D_, first, left, H, h, value, V, C, BV)
                f = tile(F_, first, left, H, h, value, V, C, BV)
                v = tile(V_, first, left, HV, hv, value, V, C, BV)
                y = tl.dot(f, tl.trans(d), y, input_precision=PRECISION)
                db += tl.sum(f.to(tl.float32) * v.to(tl.float32), axis=1)
                put(DV, f * beta[:, None], first, left, H, h, value, V, C, BV)
            else:
                d = tile(V_, first, left, HV, hv, value, V, C, BV)
            a = tl.dot(do, tl.trans(d), a, input_precision=PRECISION)
        if DECAY == HEAD:
            G = gate_row(GS, 0, chunk, H, h, C)
            lower = fade(tl.trans(G), G, i >= j)
            a *= lower
            y *= lower
        put_block(DA, tl.where(i >= j, a * scale, 0.0), chunk, H, h, 0, C, C, C)
        if DELTA:
            put_block(Y, tl.where(i > j, y, 0.0), chunk, H, h, 0, C, C, C)
            n = tl.arange(0, C)
            tl.store(DB + first * H + h + n * H, db, mask=n < left)


@partial(kernel, length=3)
def grads(
    Q, K_, V_, G_, BETA, DO, D_, F_, FD, HS, DHS, DA, Y, GS, FLAG, TABLE, DQ, DK, DV, DG, DB,
    scale, T, SIZE, H, HQ, HK, HV, HD, HB,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, STRONG: tl.constexpr,
    EXACT: tl.constexpr, ALONE: tl.constexpr, BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK key channels of a chunk. DB, and DG of a decay per head, get a part each from every block
    of channels, SIZE elements apart. STRONG does the chunks that prepare flagged, the other call
    the rest. Unless ALONE, DA, Y, DV and the first part of DB hold what :func:`score_grads` wrote.
    """
    # Blocks of one chunk run together, and heads of one token: they share what they read.
    parts: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    side = pid % parts
    h = pid // parts % H
    index = pid // parts // H
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    left = end - first
    place = chunk.to(tl.int64) * H + h
    wanted = left > 0
    if DECAY == CHANNEL:
        wanted = wanted & ((tl.load(FLAG + place) != 0) == STRONG)
    if wanted:
        hq, hk, hv, hd = h * HQ // H, h * HK // H, h * HV // H, h * HD // H
        kind = K_.dtype.element_ty
        n = tl.arange(0, C)
        column = side * BK
        columns = column + tl.arange(0, BK)
        once = tl.where(side == 0, left, 0)  # what is no channel's is done by the first block
        if DELTA:
            beta = numbers(BETA, first, left, HB, h * HB // H, C)
            if not ALONE:
                db = numbers(DB, first, once, H, h, C)
        if DECAY == HEAD:  # asked for beside the tiles
            G = gate_row(GS, 0, chunk, H, h, C)
            rise = gate_row(GS, 1, chunk, H, h, C)
            fall = gate_row(GS, 2, chunk, H, h, C)
            whole = whole_gate(GS, left, chunk, H, h, C)
        dq = tl.zeros([C, BK], tl.float32)
        dk = tl.zeros([C, BK], tl.float32)
        z = tl.zeros([C, BK], tl.float32)
        forget = tl.zeros([BK], tl.float32)
        if ALONE:
            a = tl.zeros([C, C], tl.float32)
            y = tl.zeros([C, C], tl.float32)
        for value in range(0, V, BV):
            if BULK:
                row = (chunk * H + h) * V + value
                S = HS.load([row, column])
                dS = DHS.load([row, column])
            else:
                r = value + tl.arange(0, BV)[:, None]
                ok = (r < V) & (columns[None, :] < K)
                at = place * (V * K) + r * K + columns[None, :]
                S = tl.load(HS + at, mask=ok, other=0.0)
                dS = tl.load(DHS + at, mask=ok, other=0.0)
            do = bulk(DO, first, left, H, h, value, V, C, BV, BULK)
            dq = tl.dot(do, S, dq, input_precision=PRECISION)
            if DELTA:
                d = bulk(D_, first, left, H, h, value, V, C, BV, BULK)
                f = bulk(FD, first, left, H, h, value, V, C, BV, BULK)
                z = tl.dot(f, S, z, input_precision=PRECISION)
                if ALONE:
                    y = tl.dot(f, tl.trans(d), y, input_precision=PRECISION)
                    put(DV, f * beta[:, None], first, once, H, h, value, V, C, BV)
            else:
                d = bulk(V_, first, left, HV, hv, value, V, C, BV, BULK)
            if ALONE:
                a = tl.dot(do, tl.trans(d), a, input_precision=PRECISION)
            dk = tl.dot(d, dS, dk, input_precision=PRECISION)
            if DECAY != NONE:
                forget += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)

        if ALONE:
            keep = n[:, None] >= n[None, :]
            if DECAY == HEAD:
                lower = fade(tl.trans(G), G, keep)
                a *= lower
                y *= lower
            a = tl.where(keep, a * scale, 0.0).to(kind)
            if DELTA:  # what a token writes is linear in its beta: dbeta = F . D / beta
                own = tl.sum(tl.where(n[:, None] == n[None, :], y, 0.0), axis=1)
                db = tl.where(side == 0, own, 0.0) / beta
            y = tl.where(n[:, None] > n[None, :], y, 0.0)
        else:
            a = block(DA, chunk, H, h, 0, C, C, C)
            if DELTA:
                y = block(Y, chunk, H, h, 0, C, C, C)
        if DELTA:
            if DECAY != CHANNEL:
                yb = (y * -beta[:, None]).to(kind)
            y = y.to(kind)
        q = tile(Q, first, left, HQ, hq, column, K, C, BK)
        k = tile(K_, first, left, HK, hk, column, K, C, BK)
        if DECAY == CHANNEL:
            g = tile(G_, first, left, HD, hd, column, K, C, BK) * LOG2E
            Gc = summed(g, C, EXACT)
            factors = gate_place(GS, chunk, H, h, K) + columns
            ends = forget * tl.load(factors, mask=columns < K, other=0.0)
            if STRONG:
                last = tl.sum(g, axis=0)
                dq *= tl.exp2(Gc) * scale
                z *= tl.exp2(Gc)
                dk *= tl.exp2(last[None, :] - Gc)
                ends += tl.sum(dk * k, axis=0)
                minus = k * -beta[:, None] if DELTA else k
                dq, dk, z = _exact(q, k, minus, Gc, a, y if DELTA else a, dq, dk, z,
                                   DELTA, C, BK, PRECISION)  # fmt: skip
            else:
                middle = tl.sum(tl.where(n[:, None] < C // 2, g, 0.0), axis=0)
                rises = tl.load(factors + K, mask=columns < K, other=0.0)[None, :]
                falls = tl.load(factors + 2 * K, mask=columns < K, other=0.0)[None, :]
                up = tl.exp2(Gc - middle[None, :])
                down = tl.exp2(middle[None, :] - Gc)
                kd = k * down
                dk *= falls
                ends += tl.sum(dk * kd, axis=0)
                kd = kd.to(kind)
                dk = tl.dot(tl.trans(a), (q * up).to(kind), dk, input_precision=PRECISION)
                dq = up * tl.dot(a, kd, dq * (rises * scale), input_precision=PRECISION)
                if DELTA:
                    kb = (k * (up * -beta[:, None])).to(kind)
                    dk = tl.dot(tl.trans(y), kb, dk, input_precision=PRECISION)
                    z = up * tl.dot(y, kd, z * rises, input_precision=PRECISION)
                dk *= down
        else:
            dq *= scale
            if DECAY == HEAD:
                rise = tl.trans(rise)
                dq *= rise
                z *= rise
                dk *= tl.trans(fall)
                tail = tl.sum(tl.sum(dk * k, axis=1), axis=0)
                tail += tl.sum(forget, axis=0) * whole
            dq = tl.dot(a, k, dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(a), q, dk, input_precision=PRECISION)
            if DELTA:
                z = tl.dot(y, k, z, input_precision=PRECISION)
                dk = tl.dot(tl.trans(yb), k, dk, input_precision=PRECISION)

        put(DQ, dq, first, left, H, h, column, K, C, BK)
        if DECAY == CHANNEL:
            gain = q * dq - k * dk
            if DELTA:
                gain -= k * z * beta[:, None]
        elif DECAY == HEAD:
            gains = tl.sum(q * dq - k * dk, axis=1)
        if DELTA:
            kz = tl.sum(k * z, axis=1)
            if ALONE:
                small = tl.abs(beta) < SMALL
                if tl.max(tl.where(small & (n < left), 1, 0), axis=0) > 0:
                    own = -kz
                    for value in range(0, V, BV):
                        f = tile(F_, first, once, H, h, value, V, C, BV)
                        v = tile(V_, first, once, HV, hv, value, V, C, BV)
                        own += tl.sum(f.to(tl.float32) * v.to(tl.float32), axis=1)
                    db = tl.where(small, own, db)
            else:
                db -= kz
            dk -= z * beta[:, None]
            tl.store(DB + side * SIZE + first * H + h + n * H, db, mask=n < left)
        put(DK, dk, first, left, H, h, column, K, C, BK)
        if DECAY == CHANNEL:  # last, when little else is held
            dg = summed_back(gain, kind, C, EXACT) + ends[None, :]
            put(DG, dg, first, left, H, h, column, K, C, BK)
        if DECAY == HEAD:
            if DELTA:
                gains -= kz * beta
            dg1 = tl.cumsum(gains, axis=0, reverse=True) + tail
            tl.store(DG + side * SIZE + first * H + h + n * H, dg1, mask=n < left)
